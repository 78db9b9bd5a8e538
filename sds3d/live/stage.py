"""The page itself, and the only file that knows viser: a canvas that can be orbited, and a panel beside it.

The canvas shows either a scene, rendered here from each viewer's own camera, or a mesh, which the browser draws.
viser calls back from threads of its own. What touches a scene, a run or the canvas is left, by `ask`, to the thread
that calls `attend`: the one that trains.
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
from sds3d.live.eyes import Eyes
from sds3d.media.sheet import to_bytes
from sds3d.runtime.files import from_json

if TYPE_CHECKING:
    from viser import CameraHandle, ClientHandle, GuiEvent, IconName

    from sds3d.runs.scene import Asset

BRAND = (38, 103, 148)
PROBLEMS = (ValueError, ArithmeticError, RuntimeError, OSError, LookupError, TypeError, AttributeError, ImportError)
FRONT = (35.0, 15.0, 3.0, 40.0)  # where everybody begins: azimuth, elevation, distance, fov, as in cameras.py
MESSAGES, BURST = 100, 100  # from all viewers, a second and at once; a browser sends 60 a second while one drags
LARGEST = 1 << 20  # bytes of a message; a prompt is the longest
RADIUS = 0.95  # of the ball that a mesh is scaled to fit into, scene units


class Stage:
    """A page that is served from now on, until `close`.

    Args:
        address: where.
        title: over the panel; plain text.

    Attributes:
        eyes: those who look.
        gui: viser's panel (a GuiApi); safe to use from any thread.
    """

    def __init__(self, address: Address, title: str):
        import viser

        class Server(viser.ViserServer):
            """One that never opens a tunnel to the outside, though a client may ask for it."""

            def request_share_url(self, verbose: bool = True) -> str | None:
                return None

        with redirect_stdout(io.StringIO()), own_pages_only(address):  # stdout holds results only
            self._server = Server(address.host, address.port, label=title, verbose=False)
        self.address = Address(address.host, self._server.get_port())
        self.eyes, self.gui = Eyes(), self._server.gui
        self._mesh, self._asked = None, queue.SimpleQueue[Callable[[], None]]()
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
        self._server.on_client_connect(self._welcome)
        self._server.on_client_disconnect(self._part)

    async def _welcome(self, client: ClientHandle) -> None:
        """Follow a new viewer's camera. Async: runs on viser's one loop, so that poses are noted whole."""

        async def note(camera: CameraHandle) -> None:
            self.eyes.note(client.client_id, pose_of(camera))

        client.camera.on_update(note)
        await note(client.camera)

    async def _part(self, client: ClientHandle) -> None:
        self.eyes.forget(client.client_id)

    def ask(self, action: Callable[[], None]) -> None:
        """Have something done by the thread that calls `attend`, soon. For callbacks."""
        self._asked.put(action)
        self.eyes.moved.set()

    def attend(self, asset: Asset | None, growing: bool) -> None:
        """Do what was asked for, and render one picture, if somebody's is due.

        Args:
            asset: whose scene the canvas shows, unless it shows a mesh.
            growing: whether training waits meanwhile.
        """
        try:
            while not self._asked.empty():
                self._asked.get()()
            if asset is not None and len(self.eyes) and self._mesh is None:
                self._look(asset, growing)
        except PROBLEMS as error:  # whatever a page asks for, it does not end a training
            for client in self._server.get_clients().values():
                client.add_notification("That did not work", str(error), color="red")

    def _look(self, asset: Asset, growing: bool) -> None:
        wanted = self.eyes.wanted(growing)
        if wanted is None:
            return
        begun = time.perf_counter()
        image = to_bytes(asset.views(wanted.pose, wanted.height))[0]
        assert isinstance(wanted.key, int), "a client's number, as `_welcome` notes it"
        client = self._server.get_clients().get(wanted.key)
        if client is None:
            self.eyes.forget(wanted.key)
        else:
            client.scene.set_background_image(image, format="png")  # JPEG's blocks would show, drawn larger
            client.flush()
        self.eyes.drew(wanted, time.perf_counter() - begun, growing)

    def show_scene(self) -> None:
        """Show what `attend` renders."""
        if self._mesh is not None:
            self._mesh.remove()
            self._mesh = None
        self.eyes.blur()

    def show_mesh(self, path: Path) -> None:
        """Show a GLB file, centred, in the size that a scene has. Raises ValueError where it cannot be read."""
        try:
            data = path.read_bytes()
            low, high = bounds(data)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot show {path}: {error}; was it moved or edited?") from error
        scale = RADIUS / max(float(np.linalg.norm(high - low)) / 2, 1e-6)
        self._mesh = self._server.scene.add_glb("/mesh", data, scale=scale, position=-scale * (low + high) / 2)
        for client in self._server.get_clients().values():
            client.scene.set_background_image(None)

    def offer(self, event: GuiEvent, path: Path) -> None:
        """Have the browser of somebody who clicked download a file, under its run's name."""
        assert event.client is not None, "somebody clicked"
        try:
            data = path.read_bytes()
        except OSError as error:
            event.client.add_notification("It cannot be downloaded", f"{path}: {error.strerror}", color="red")
            return
        name = f"{path.parent.name}{path.stem.removeprefix('mesh')}{path.suffix}"
        event.client.send_file_download(name, data, save_immediately=True)

    def wait(self, seconds: float) -> None:
        """Until a camera moves or something is asked for, at most so many seconds."""
        self.eyes.moved.wait(seconds)
        self.eyes.moved.clear()

    def close(self) -> None:
        """Say what is left to say, and end the page."""
        self._server.flush()
        with redirect_stdout(io.StringIO()):
            self._server.stop()


@contextmanager
def own_pages_only(address: Address) -> Iterator[None]:
    """A server that viser starts inside refuses pages of other sites, which a browser would let drive it, and takes no
    more than MESSAGES a second from all viewers together, so that nobody who floods it slows a training.

    A page's origin must be the host it asks for, and that must be this machine: see `is_here`.
    """
    import websockets.asyncio.server as sockets

    serve, pace = sockets.serve, Pace(MESSAGES, BURST)

    class Paced(sockets.ServerConnection):
        """A connection whose messages wait for their turn; who sends more is not listened to, which TCP tells him."""

        async def recv(self, *given: Any, **named: Any) -> Any:
            message = await super().recv(*given, **named)
            await pace.turn()
            return message

    def strict(*given: Any, process_request: Callable[..., Any], **named: Any) -> Any:
        def check(connection: Any, request: Any) -> Any:
            host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
            if not is_here(host, address) or origin not in (None, f"http://{host}", f"https://{host}"):
                return connection.respond(403, "this page belongs to another site\n")
            return process_request(connection, request)

        return serve(*given, process_request=check, create_connection=Paced, **(named | {"max_size": LARGEST}))

    sockets.serve = strict
    try:
        yield
    finally:
        sockets.serve = serve


def is_here(host: str, address: Address) -> bool:
    """Whether a Host header names this machine: localhost, a number, what --host says, and, where others are let in,
    this machine's own names. Any other name may have been made to lead here by the site that it belongs to.

    Where nobody else is let in, of numbers only this machine's own.
    """
    name = ""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name in ("localhost", address.host.lower()):
            return True
        number = ipaddress.ip_address(name)
    except ValueError:  # a name, or nothing that a browser sends
        own = socket.gethostname().lower()
        return bool(address.warning) and name in (own, f"{own.partition('.')[0]}.local", socket.getfqdn().lower())
    return bool(address.warning) or number.is_loopback


class Pace:
    """Turns: at most ``rate`` a second, ``burst`` of them at once after a rest; who waits longest is next."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._seen, self._queue = float(burst), clock(), asyncio.Lock()

    async def turn(self) -> None:
        """Wait for one."""
        async with self._queue:
            while (wait := self._missing()) > 0:
                await asyncio.sleep(wait)
            self._left -= 1

    def _missing(self) -> float:
        """Seconds until there is one."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._seen) * self._rate)
        self._seen = now
        return max(0.0, 1 - self._left) / self._rate


def pose_of(camera: CameraHandle) -> Poses:
    """A viewer's camera: viser's looks along +z, with y down."""
    from viser.transforms import SO3

    axes = torch.tensor(SO3(camera.wxyz).as_matrix() * (1.0, -1.0, -1.0), dtype=torch.float32)
    aspect = camera.image_width / max(camera.image_height, 1)
    fov = torch.tensor([math.degrees(camera.fov)])
    return Poses(torch.tensor(camera.position, dtype=torch.float32)[None], axes[None], fov, min(max(aspect, 0.1), 10.0))


def bounds(glb: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest corner (3,) of a GLB's vertices, from its header (glTF 2.0, 5.1.6: accessors of positions
    have them). Raises ValueError for anything else."""
    if glb[:4] != b"glTF":
        raise ValueError("it is no GLB")
    tree = from_json(glb[20 : 20 + int.from_bytes(glb[12:16], "little")])
    try:
        parts = [part["attributes"]["POSITION"] for mesh in tree["meshes"] for part in mesh["primitives"]]
        boxes = np.array([[tree["accessors"][i][key] for key in ("min", "max")] for i in parts], dtype=float)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"its header says not where its vertices are ({type(error).__name__})") from error
    if boxes.ndim != 3 or boxes.shape[1:] != (2, 3) or not np.isfinite(boxes).all():
        raise ValueError("its header says not where its vertices are")
    return boxes[:, 0].min(0), boxes[:, 1].max(0)


def icon(name: str) -> IconName:
    """A symbol of tabler.io/icons by its name, as "download"."""
    return cast("IconName", name)  # a str, which viser's types set apart


def text(*lines: str, muted: bool = False, strong: bool = False) -> str:
    """Plain lines as HTML for the panel, everything in them escaped."""
    style = "padding:0 .6em .5em;line-height:1.45;overflow-wrap:anywhere;"
    style += "opacity:.65;font-size:.85em;" if muted else ""
    style += "font-weight:600;font-size:1.05em;" if strong else ""
    return f'<div style="{style}">{"<br>".join(html.escape(line) for line in lines)}</div>'
