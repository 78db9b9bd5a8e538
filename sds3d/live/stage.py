"""The page in the browser: a canvas with an orbit camera, and a panel beside it. The only file that uses viser.

The canvas shows either a scene, rendered here from each viewer's own camera, or a mesh, which the browser draws. viser
calls back from its own threads. Callbacks that touch a scene, a run or the canvas pass an action to `Stage.run_soon`;
the thread that trains runs it in `Stage.update`.
"""

from __future__ import annotations

import asyncio
import html
import io
import ipaddress
import math
import queue
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import numpy as np
import torch

from sds3d.cameras import Cameras, Poses
from sds3d.live.address import Address
from sds3d.live.viewers import Viewers
from sds3d.media.sheet import to_bytes
from sds3d.runtime.files import from_json

if TYPE_CHECKING:
    from viser import CameraHandle, ClientHandle, GuiEvent, IconName

    from sds3d.runs.scene import Asset

BRAND = (38, 103, 148)
PROBLEMS = (ValueError, ArithmeticError, RuntimeError, OSError, LookupError, TypeError, AttributeError, ImportError)
FRONT = (35.0, 15.0, 3.0, 40.0)  # the initial camera: azimuth, elevation, distance, fov, as in cameras.py
MESSAGES, BURST = 100, 100  # of all viewers: per second, and at once; a browser sends 60 per second while dragging
LARGEST = 1 << 20  # most bytes of a message; the longest is a prompt
RADIUS = 0.95  # a mesh is scaled to fit into a ball of this radius, scene units


class Stage:
    """A page that is served until `close`.

    Args:
        address: address and port to serve on.
        title: plain text above the panel.

    Attributes:
        viewers: the viewers of the page.
        gui: viser's panel (a GuiApi); may be used from any thread.
    """

    def __init__(self, address: Address, title: str):
        import viser

        class Server(viser.ViserServer):
            """A server that never opens a tunnel to the internet, even if a client requests it."""

            def request_share_url(self, verbose: bool = True) -> str | None:
                return None

        with redirect_stdout(io.StringIO()), same_origin_only(address):  # stdout holds results only
            self._server = Server(address.host, address.port, label=title, verbose=False)
        self.address = Address(address.host, self._server.get_port())
        self.viewers, self.gui = Viewers(), self._server.gui
        self._mesh, self._actions = None, queue.SimpleQueue[Callable[[], None]]()
        self.gui.configure_theme(
            control_width="large",
            show_logo=False,
            show_share_button=False,
            brand_color=BRAND,
        )
        self.gui.main_panel.dock_right()
        self._server.scene.set_up_direction("+y")
        self._server.scene.configure_default_lights(cast_shadow=False)
        position = Cameras(*(torch.tensor([v]) for v in FRONT)).positions()[0]
        camera = self._server.initial_camera
        camera.position, camera.look_at, camera.fov = position.numpy(), (0.0, 0.0, 0.0), math.radians(FRONT[3])
        self._server.on_client_connect(self._connect)
        self._server.on_client_disconnect(self._disconnect)

    async def _connect(self, client: ClientHandle) -> None:
        """Follow a new viewer's camera. Async callbacks run on viser's event loop, where a pose is read as a whole."""

        async def follow(camera: CameraHandle) -> None:
            self.viewers.update(client.client_id, pose_of(camera))

        client.camera.on_update(follow)
        await follow(client.camera)

    async def _disconnect(self, client: ClientHandle) -> None:
        self.viewers.remove(client.client_id)

    def run_soon(self, action: Callable[[], None]) -> None:
        """Run an action in the next call of `update`, on its thread. To be called from callbacks."""
        self._actions.put(action)
        self.viewers.changed.set()

    def update(self, asset: Asset | None, training: bool) -> None:
        """Run the actions of `run_soon`, and render one picture if one is due.

        Args:
            asset: the asset whose scene the canvas shows, unless it shows a mesh.
            training: whether a training waits meanwhile.
        """
        try:
            while not self._actions.empty():
                self._actions.get()()
            if asset is not None and len(self.viewers) and self._mesh is None:
                self._render(asset, training)
        except PROBLEMS as error:  # an error of the page must not end a training
            for client in self._server.get_clients().values():
                client.add_notification("That did not work", str(error), color="red")

    def _render(self, asset: Asset, training: bool) -> None:
        """Render the next picture that is due, and send it to its viewer."""
        request = self.viewers.next_request(training)
        if request is None:
            return
        begun = time.perf_counter()
        image = to_bytes(asset.views(request.pose, request.height))[0]
        assert isinstance(request.key, int), "the client's id, as in `_connect`"
        client = self._server.get_clients().get(request.key)
        if client is None:
            self.viewers.remove(request.key)
        else:
            client.scene.set_background_image(image, format="png")  # enlarged, the blocks of a JPEG would be visible
            client.flush()
        self.viewers.record(request, time.perf_counter() - begun, training)

    def show_scene(self) -> None:
        """Show the scene that `update` renders."""
        if self._mesh is not None:
            self._mesh.remove()
            self._mesh = None
        self.viewers.invalidate()

    def show_mesh(self, path: Path) -> None:
        """Show a GLB file, centred and scaled to the size of a scene. Raises ValueError if it cannot be read."""
        try:
            data = path.read_bytes()
            low, high = bounds(data)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot show {path}: {error}; was it moved or edited?") from error
        scale = RADIUS / max(float(np.linalg.norm(high - low)) / 2, 1e-6)
        self._mesh = self._server.scene.add_glb("/mesh", data, scale=scale, position=-scale * (low + high) / 2)
        for client in self._server.get_clients().values():
            client.scene.set_background_image(None)

    def send_file(self, event: GuiEvent, path: Path) -> None:
        """Send a file, named after its run, to the browser of the viewer who clicked."""
        assert event.client is not None, "a click comes from a client"
        try:
            data = path.read_bytes()
        except OSError as error:
            event.client.add_notification("It cannot be downloaded", f"{path}: {error.strerror}", color="red")
            return
        name = f"{path.parent.name}{path.stem.removeprefix('mesh')}{path.suffix}"
        event.client.send_file_download(name, data, save_immediately=True)

    def wait(self, seconds: float) -> None:
        """Wait until a camera moves or an action is added, at most this many seconds."""
        self.viewers.changed.wait(seconds)
        self.viewers.changed.clear()

    def close(self) -> None:
        """Send the last messages, and stop serving."""
        self._server.flush()
        with redirect_stdout(io.StringIO()):
            self._server.stop()


@contextmanager
def same_origin_only(address: Address) -> Iterator[None]:
    """A context in which servers that viser starts accept only this page's own requests, at a limited rate.

    Without it, a browser would let pages of other sites control the server. The origin of a request must be the host
    that it is sent to, and this host must be this machine; see `is_own_host`. At most MESSAGES messages per second are
    accepted from all viewers together, so that a flood of messages cannot slow a training.
    """
    import websockets.asyncio.server as sockets

    serve, limit = sockets.serve, RateLimit(MESSAGES, BURST)

    class Limited(sockets.ServerConnection):
        """A connection that reads messages at a limited rate; TCP's flow control then slows the sender."""

        async def recv(self, *args: Any, **kwargs: Any) -> Any:
            message = await super().recv(*args, **kwargs)
            await limit.turn()
            return message

    def strict(*args: Any, process_request: Callable[..., Any], **kwargs: Any) -> Any:
        def check(connection: Any, request: Any) -> Any:
            host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
            if not is_own_host(host, address) or origin not in (None, f"http://{host}", f"https://{host}"):
                return connection.respond(403, "this page belongs to another site\n")
            return process_request(connection, request)

        return serve(*args, process_request=check, create_connection=Limited, **(kwargs | {"max_size": LARGEST}))

    sockets.serve = strict
    try:
        yield
    finally:
        sockets.serve = serve


def is_own_host(host: str, address: Address) -> bool:
    """Return whether a Host header names this machine.

    It may be localhost, a loopback address, or the address of --host. If other machines are let in, it may also be any
    IP address, or this machine's own name. Any other name could belong to a site that has pointed it here (DNS
    rebinding).
    """
    name = ""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name in ("localhost", address.host.lower()):
            return True
        number = ipaddress.ip_address(name)
    except ValueError:  # a host name, or a malformed header
        machine = socket.gethostname().lower()
        names = (machine, f"{machine.partition('.')[0]}.local", socket.getfqdn().lower())
        return bool(address.warning) and name in names
    return bool(address.warning) or number.is_loopback


class RateLimit:
    """Limits turns to ``rate`` per second, with up to ``burst`` at once after a pause; turns are given in order."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._seen, self._queue = float(burst), clock(), asyncio.Lock()

    async def turn(self) -> None:
        """Wait for a turn."""
        async with self._queue:
            while (wait := self._missing()) > 0:
                await asyncio.sleep(wait)
            self._left -= 1

    def _missing(self) -> float:
        """Seconds until the next turn."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._seen) * self._rate)
        self._seen = now
        return max(0.0, 1 - self._left) / self._rate


def pose_of(camera: CameraHandle) -> Poses:
    """Convert a viser camera, which looks along +z with y down, to a pose."""
    from viser.transforms import SO3

    axes = torch.tensor(SO3(camera.wxyz).as_matrix() * (1.0, -1.0, -1.0), dtype=torch.float32)
    aspect = camera.image_width / max(camera.image_height, 1)
    fov = torch.tensor([math.degrees(camera.fov)])
    return Poses(torch.tensor(camera.position, dtype=torch.float32)[None], axes[None], fov, min(max(aspect, 0.1), 10.0))


def bounds(glb: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest corner (3,) of a GLB's vertices, from its header.

    Accessors of positions have them (glTF 2.0, section 5.1.6).

    Raises:
        ValueError: the data is no GLB, or its header lacks them.
    """
    if glb[:4] != b"glTF":
        raise ValueError("it is no GLB")
    tree = from_json(glb[20 : 20 + int.from_bytes(glb[12:16], "little")])
    try:
        parts = [part["attributes"]["POSITION"] for mesh in tree["meshes"] for part in mesh["primitives"]]
        boxes = np.array([[tree["accessors"][i][key] for key in ("min", "max")] for i in parts], dtype=float)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"its header does not say where its vertices are ({type(error).__name__})") from error
    if boxes.ndim != 3 or boxes.shape[1:] != (2, 3) or not np.isfinite(boxes).all():
        raise ValueError("its header does not say where its vertices are")
    return boxes[:, 0].min(0), boxes[:, 1].max(0)


def icon(name: str) -> IconName:
    """Return an icon of tabler.io/icons by its name, as "download"."""
    return cast("IconName", name)  # IconName is a str with its own type in viser


def text(*lines: str, muted: bool = False, strong: bool = False) -> str:
    """Format plain lines as HTML for the panel, escaped."""
    style = "padding:0 .6em .5em;line-height:1.45;overflow-wrap:anywhere;"
    style += "opacity:.65;font-size:.85em;" if muted else ""
    style += "font-weight:600;font-size:1.05em;" if strong else ""
    return f'<div style="{style}">{"<br>".join(html.escape(line) for line in lines)}</div>'
