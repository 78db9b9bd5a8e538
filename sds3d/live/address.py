"""The address and port on which a page is served."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass

HERE = "127.0.0.1"
FIRST = 8080  # the first port that is tried if none is given
TRIES = 100  # number of ports that are tried


@dataclass(frozen=True)
class Address:
    """An address of this machine with a port that was free when `find` tried it.

    Args:
        host: the address to bind to.
        port: the port.
    """

    host: str
    port: int

    @classmethod
    def find(cls, host: str = HERE, port: int | None = None, first: int = FIRST) -> Address:
        """Find an address with the given port, or with the first free one from ``first`` on.

        Raises:
            ValueError: the port is taken or not allowed, or the host is not this machine's.
        """
        if port is not None and not 0 <= port <= 65535:
            raise ValueError(f"--port is {port}; give a number from 1 to 65535, or leave it out")
        for candidate in range(first, first + TRIES) if port is None else [port]:
            try:
                return cls(host, _bind(host, candidate))
            except socket.gaierror as error:
                raise ValueError(f"--host is {host!r}, which is no address; leave it out for {HERE}") from error
            except OSError as error:
                problem = error.strerror or str(error)
                if port is None and not _is_taken(error):
                    raise ValueError(f"cannot serve on {host}: {problem}; leave --host out for {HERE}") from error
        if port is None:
            raise ValueError(f"no port from {first} to {first + TRIES - 1} is free on {host}; give one with --port")
        raise ValueError(f"cannot use port {port} on {host}: {problem}; give another --port, or leave it out")

    @property
    def url(self) -> str:
        """The URL to open in a browser."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def warning(self) -> str:
        """A warning if other machines can open the page; "" if only this machine can."""
        try:
            local = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name of this machine
            local = False
        if local:
            return ""
        return (
            f"warning: --host {self.host} lets everybody who reaches this machine watch, stop runs and start new ones; "
            f"there is no password. For yourself, from elsewhere: ssh -L {self.port}:{HERE}:{self.port} this-machine"
        )


def _bind(host: str, port: int) -> int:
    """Bind to a port and release it. Returns the port, which the system chooses for 0. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        probe.bind((host, port))
        probe.listen(1)
        return probe.getsockname()[1]


def _is_taken(error: OSError) -> bool:
    return error.errno in (errno.EADDRINUSE, errno.EACCES)
