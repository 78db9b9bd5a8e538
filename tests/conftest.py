"""A teacher that knows exactly one thing, a ball, settings that make a run take a second, and every schedule."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import sds3d
from sds3d.cameras import Cameras, orbit
from sds3d.diffusion.noise import Prediction, Schedule
from sds3d.teachers import small
from sds3d.teachers.base import Teacher, decode_pixels, encode_pixels

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels run on a CPU
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, each of which keeps to one processor,
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and so do the programs it starts

TINY = (
    "steps=6 field.levels=4 field.log2_table=10 field.finest=32 field.hidden=8 render.views=2 render.resolution=16 "
    "render.samples=24 occupancy.resolution=8 export.mesh.resolution=24 export.mesh.texture=128 export.frames=4 "
    "export.size=32 log.save_every=4 log.picture_every=3 backend=torch"
).split()

# What a teacher computes in on a CPU where a test leaves that to teacher.dtype=auto: the same on every machine. Tests
# marked `network` also pass in bfloat16, which is the default where the processor has it (AMX); .ci/run runs them so.
TEST_DTYPE = os.environ.get("SDS3D_TEST_DTYPE", "float32")
if TEST_DTYPE not in ("float32", "bfloat16"):
    raise pytest.UsageError(f"SDS3D_TEST_DTYPE is {TEST_DTYPE!r}; give float32 or bfloat16")

SCHEDULES = {
    "cosine": Schedule.cosine(),
    "linear": Schedule.linear(),
    "ve": Schedule.ve(0.02, 50.0),
    "flow": Schedule.flow(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@dataclass
class BallTeacher:
    """Sees a ball of ``radius`` at the origin in every image, seen by pinhole cameras that look at it: exact x0.

    Attributes:
        asked: the prompts of every predict call.
    """

    radius: float = 0.6
    colour: tuple[float, float, float] = (0.9, 0.1, 0.1)
    image_size: int = 16
    shape: tuple[int, int, int] = (3, 16, 16)
    views: str = "camera"
    schedule: Schedule = field(default_factory=Schedule.cosine)
    dtype: torch.dtype = torch.float32
    asked: list[list[str]] = field(default_factory=list)

    def encode(self, images: Tensor) -> Tensor:
        return encode_pixels(images, self.image_size)

    def decode(self, x: Tensor) -> Tensor:
        return decode_pixels(x)

    def predict(
        self, x_t: Tensor, t: Tensor, prompts: list[str], cameras: Cameras | None = None, camera_mask=None
    ) -> Prediction:
        self.asked.append(prompts)
        cameras = orbit(1)[torch.zeros(len(x_t), dtype=torch.long)] if cameras is None else cameras
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Prediction(2 * self.image(cameras) - 1, x_t, alpha, sigma, "x0")

    def image(self, cameras: Cameras) -> Tensor:
        """(B, 3, H, H): a ray hits the ball if its angle to the axis is below asin(radius / distance)."""
        _, directions = cameras.rays(self.image_size)
        axis = -cameras.positions() / cameras.distance[:, None]
        cosine = (directions * axis[:, None, None]).sum(-1)  # (B, H, W)
        hit = cosine > torch.cos(torch.asin(self.radius / cameras.distance))[:, None, None]
        return torch.where(hit[:, None], torch.tensor(self.colour)[:, None, None], torch.ones(3, 1, 1))

    def check(self, prompt: str) -> None:
        if "ball" not in prompt:
            raise ValueError(f"unknown: {prompt!r} (nearest: ball)")


@pytest.fixture(autouse=True, scope="session")
def auto_dtype():
    """Let every teacher of a CPU that is loaded with dtype "auto" compute in TEST_DTYPE."""
    machine, patch = small.fast_bf16, pytest.MonkeyPatch()
    wanted = TEST_DTYPE == "bfloat16"
    patch.setattr(small, "fast_bf16", lambda device: wanted if device.type == "cpu" else machine(device))
    yield
    patch.undo()


@pytest.fixture
def ball_teacher() -> BallTeacher:
    """The teacher of `call`."""
    return BallTeacher()


@pytest.fixture
def tiny() -> list[str]:
    """``key=value`` settings for a run of a second."""
    return list(TINY)


def settings() -> dict:
    """TINY as keyword arguments."""
    pairs = (text.split("=") for text in TINY)
    return {key: int(value) if value.isdigit() else value for key, value in pairs}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run, made once."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sds3d.generate("a red ball", teacher=BallTeacher(), **settings())
    return folder


@pytest.fixture
def made(call, finished, in_folder):
    """A copy of it, as outputs/00001-a-red-ball."""
    shutil.copytree(finished / "outputs", in_folder / "outputs")
    return "outputs/00001-a-red-ball"


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(call_packaged, ball_teacher):
    """Run the command line in an empty folder, with a BallTeacher where a command takes an object; gives exit code,
    stdout, stderr."""

    def run(*arguments: str, teacher: Teacher = ball_teacher) -> tuple[int, str, str]:
        takes_object = arguments[:1] not in (("teacher",), ("doctor",))
        return call_packaged(*arguments, teacher=teacher if takes_object else None)

    return run


@pytest.fixture
def call_packaged(capsys, in_folder):
    """The same with teachers by their name, or any object."""
    from sds3d.cli import main

    def run(*arguments: str, teacher: Teacher | None = None) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(arguments), teacher)
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


PATIENCE = 240  # seconds; only what hangs takes so long


def until(holds: Callable[[], object], what: str) -> None:
    """Wait until something holds. Fails after PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE} s"
        time.sleep(0.02)


@contextmanager
def started(command: list[str], **named: Any) -> Iterator[subprocess.Popen]:
    """A program, which is killed at the end with all that it started. Ctrl-C reaches it, though it be ignored here, as
    it is in a shell's background jobs."""
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, preexec_fn=heeding, start_new_session=True, **named)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)


# Chromium as root, without a GPU (SwiftShader draws WebGL) and without calling home.
CHROMIUM = (
    "--no-sandbox --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader"
).split()


def chromium_program() -> str:
    """Where the browser is; the test is skipped where none is installed."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    return program


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium (playwright's Browser); the test is skipped where none is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=chromium_program(), args=CHROMIUM)
        yield chromium
        chromium.close()


def watch(page) -> list[str]:
    """What a page (playwright's Page) complains of from now on: console errors, requests that leave the machine."""
    found: list[str] = []
    here = ("file:", "data:", "blob:", "about:", "http://127.0.0.1:", "ws://127.0.0.1:")
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(here) else found.append(request.url))
    return found


@pytest.fixture
def browser_page(browser):
    """An empty page (playwright's Page). What `watch` finds fails the test at its end."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(20_000)
    found = watch(page)
    yield page
    context.close()
    assert not found
