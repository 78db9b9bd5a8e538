"""The live page, the view of a finished run and the studio, as users meet them: in a browser, from another process."""

import io
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import conftest
import numpy as np
import pytest
import trimesh
from conftest import TINY
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]
import conftest, torch
from sds3d.cli import main

class Ball(conftest.BallTeacher):  # red in front, blue behind, so that turning it can be seen
    def image(self, cameras):
        image, front = super().image(cameras), torch.cos(torch.deg2rad(cameras.azimuth)) > 0
        return torch.where(front[:, None, None, None], image, image.flip(1))

main(teacher=Ball())
"""
PATIENCE = 120_000  # milliseconds; WebGL in software takes its time on a busy machine
CANVAS = {"x": 350, "y": 200, "width": 500, "height": 550}  # away from the panel and viser's notices


@pytest.fixture
def serve(tmp_path):
    """Starts a command that serves a page, with a teacher that knows a ball; gives its process and its address."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ExitStack() as stack:

        def start(*arguments: str) -> tuple[subprocess.Popen, str]:
            command = [sys.executable, "-c", SCRIPT, str(ROOT), str(ROOT / "tests"), *arguments, "--port", "0"]
            process = stack.enter_context(conftest.started(command, cwd=tmp_path, **pipes))
            said = process.stderr.readline()
            url = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert url, said + process.stderr.read()
            return process, url[0]

        yield start


def canvas(page) -> np.ndarray:
    """The middle of what the canvas shows, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(page.screenshot(clip=CANVAS))).convert("RGB")).astype(int)


def coloured(page) -> float:
    """The share of its pixels that are not white."""
    return float((canvas(page).min(-1) < 230).mean())


def tinted(page) -> bool:
    """Whether it is no longer grey."""
    red, green, blue = canvas(page).reshape(-1, 3).mean(0)
    return max(red, blue) - green > 15


def until(page, condition, what: str):
    """Wait until a condition holds; gives what it gave."""
    end = time.monotonic() + PATIENCE / 1000
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {PATIENCE} ms"
        page.wait_for_timeout(250)
    return value


def resting(page) -> np.ndarray:
    """The canvas once it no longer changes."""
    views = [canvas(page)]

    def same() -> bool:
        views.append(canvas(page))
        return (views[-1] == views[-2]).all()

    until(page, same, "the canvas rests")
    return views[-1]


def drag(page) -> None:
    """Turn the scene with the mouse."""
    page.mouse.move(450, 450)
    page.mouse.down()
    page.mouse.move(700, 350, steps=8)
    page.mouse.up()


def open_page(page, url: str) -> None:
    """Go there, and wait until the page talks with the server: what is typed before is lost."""
    page.set_default_timeout(PATIENCE)
    with page.expect_console_message(lambda message: message.text.startswith("Connected!")):
        page.goto(url)
    page.wait_for_selector("canvas")
    page.wait_for_timeout(2000)


def write(page, prompt: str) -> None:
    """Type a prompt as people do: viser sends at most every 50 ms, and drops what came between."""
    box = page.get_by_role("textbox").first

    def typed() -> bool:
        box.clear()
        box.press_sequentially(prompt, delay=60)
        page.wait_for_timeout(1000)
        return box.input_value() == prompt

    until(page, typed, "the prompt is typed")


def step_of(page) -> int:
    """The step the panel tells of, 0 while it tells of none."""
    found = re.search(r"step (\d+)/", page.inner_text("body"))
    return int(found[1]) if found else 0


def watertight(path: Path) -> bool:
    mesh = trimesh.load(path, force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # they part where the texture does
    return mesh.is_watertight and mesh.volume > 0


@pytest.mark.slow
def test_live_page_orbits_pauses_stops_and_exports(serve, browser_page, tmp_path):
    page = browser_page
    process, url = serve("generate", "a red ball", *TINY, "steps=100000", "--live")
    open_page(page, url)
    until(page, lambda: coloured(page) > 0.05, "the growing scene is seen")
    first = until(page, lambda: step_of(page), "the step is told")
    until(page, lambda: step_of(page) > first, "steps go on")
    until(page, lambda: tinted(page), "it takes on colours")
    assert "a red ball" in page.inner_text("body") and "s left" in page.inner_text("body")

    page.get_by_role("button", name="Pause").click()
    page.get_by_text("paused after step").wait_for()
    rows = (tmp_path / "outputs/00001-a-red-ball/metrics.jsonl").read_text().splitlines()
    page.wait_for_timeout(3000)  # until the sharp picture is there
    assert len((tmp_path / "outputs/00001-a-red-ball/metrics.jsonl").read_text().splitlines()) == len(rows)
    before = canvas(page)

    def turned() -> bool:
        drag(page)
        page.wait_for_timeout(2000)
        return (abs(canvas(page) - before) > 8).mean() > 0.02

    until(page, turned, "the paused scene turns")
    size = coloured(page)
    page.mouse.move(600, 450)
    page.mouse.wheel(0, 800)
    until(page, lambda: 0 < coloured(page) < 0.8 * size, "it is smaller from afar")

    page.get_by_role("button", name="Resume").click()
    until(page, lambda: step_of(page) > len(rows), "steps go on")
    page.get_by_role("button", name="Stop and export").click()
    page.get_by_role("button", name="Download GLB").wait_for()
    assert "outputs/00001-a-red-ball/mesh.glb" in page.inner_text("body")
    assert watertight(tmp_path / "outputs/00001-a-red-ball/mesh.glb")
    assert process.poll() is None  # the page stays
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE / 1000)
    assert process.returncode == 0, err
    assert "outputs/00001-a-red-ball/mesh.glb" in out.splitlines()
    assert "sds3d resume outputs/00001-a-red-ball" in err


@pytest.mark.slow
def test_studio_makes_what_is_typed_and_gives_it_away(serve, browser_page, tmp_path):
    page = browser_page
    process, url = serve("studio", *TINY)
    open_page(page, url)
    write(page, "a <img src=x> cube")
    page.get_by_role("button", name="Make it").click()
    page.get_by_text("unknown: 'a <img src=x> cube' (nearest: ball)").wait_for()
    box = page.get_by_role("textbox").first
    until(page, lambda: box.input_value() == "a <img src=x> cube", "the refused prompt is back, to be mended")
    write(page, "a red ball")
    page.keyboard.press("Enter")
    download = page.get_by_role("button", name="Download GLB").last
    page.get_by_text("00001-a-red-ball, sds, seed 0, 6 steps").wait_for()
    until(page, lambda: coloured(page) > 0.05, "its mesh is seen")
    with page.expect_download() as event:
        download.click()
    event.value.save_as(tmp_path / "got.glb")
    assert event.value.suggested_filename == "00001-a-red-ball.glb"
    assert (tmp_path / "got.glb").read_bytes() == (tmp_path / "outputs/00001-a-red-ball/mesh.glb").read_bytes()
    assert watertight(tmp_path / "got.glb")
    page.get_by_role("button", name="Remove").click()
    page.get_by_text("unknown:").wait_for(state="detached")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE / 1000)
    assert process.returncode == 0

    process, url = serve("view", "outputs/00001-a-red-ball")
    open_page(page, url)
    until(page, lambda: coloured(page) > 0.05, "the mesh is seen")
    mesh_view = resting(page)  # before the click: the scene may be there before the next screenshot
    page.get_by_role("button", name="rendered scene").click()
    until(page, lambda: (abs(canvas(page) - mesh_view) > 8).mean() > 0.01, "the scene takes its place")
    assert coloured(page) > 0.05
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE / 1000)
    assert process.returncode == 0


def catches(process: subprocess.Popen, number: int) -> bool:
    """Whether a program has a handler of its own for a signal, as the kernel has it (Linux)."""
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_studio_ends_and_says_nothing(serve, number):
    process, _ = serve("studio", *TINY)
    conftest.until(lambda: catches(process, signal.SIGTERM), "the studio serves")  # it has listed earlier runs
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE / 1000)
    assert process.returncode == 0 and not out and not err.strip(), err
