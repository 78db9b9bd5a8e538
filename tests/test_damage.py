"""Damaged and hostile files never end the page of the others, and show nothing that is not the run's."""

import asyncio
import json
import os
import random
import resource
import selectors
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import started, until
from PIL import Image

from sds3d.config import load as configs
from sds3d.live import stage as stages
from sds3d.live.address import Address
from sds3d.live.studio import Finished, card, earlier
from sds3d.runs import kinds
from sds3d.runs.folder import Run
from sds3d.runtime.files import DEEPEST, from_json
from sds3d.students.generator import GeneratorConfig
from sds3d.teachers import small
from sds3d.teachers.hf import generator as hf
from sds3d.teachers.training import fit, sources
from sds3d.teachers.training.settings import FitConfig

SECRET = b"the secret of another folder" * 9
DEEP = "[" * 100_000


def bomb(path: Path) -> None:
    """A PNG of 50,000 x 50,000 pixels by its header, in a few bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


DAMAGE = {
    "a list in metrics.jsonl": lambda run: (run / "metrics.jsonl").write_text("[1]\n"),
    "no step in metrics.jsonl": lambda run: (run / "metrics.jsonl").write_text('{"a":1}\n'),
    "text for figures in metrics.jsonl": lambda run: (run / "metrics.jsonl").write_text('{"step":1,"seconds":"x"}\n'),
    "endless figures in metrics.jsonl": lambda run: (run / "metrics.jsonl").write_text(
        '{"step":1,"seconds":1e999,"memory":NaN}\n{"step":1,"seconds":1' + "0" * 400 + "}\n"
    ),
    "a deep metrics.jsonl": lambda run: (run / "metrics.jsonl").write_text(DEEP),
    "bytes in metrics.jsonl": lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\0"),
    "a bomb for a preview": lambda run: bomb(run / "preview.png"),
    "an empty preview": lambda run: (run / "preview.png").write_bytes(b""),
    "a deep mesh.json": lambda run: (run / "mesh.json").write_text('{"a":' * 100_000),
    "a rather deep mesh.json": lambda run: (run / "mesh.json").write_text('{"a":' * 600 + "1" + "}" * 600),
    "a list for mesh.json": lambda run: (run / "mesh.json").write_text("[1]"),
    "endless figures in mesh.json": lambda run: (run / "mesh.json").write_text(
        '{"iou":1e999,"faces":1' + "0" * 400 + "}"
    ),
    "a deep config.yaml": lambda run: (run / "config.yaml").write_text("a: " + "[" * 5000),
    "a list for config.yaml": lambda run: (run / "config.yaml").write_text("[1]"),
    "a mesh.glb of text": lambda run: (run / "mesh.glb").write_bytes(b"glTF" + b"x" * 30),
    "a mesh.glb with another header": lambda run: glb(run / "mesh.glb", '{"meshes":[{"primitives":[3]}]}'),
    "a mesh.glb without vertices": lambda run: glb(run / "mesh.glb", '{"meshes":[]}'),
    "a deep mesh.glb": lambda run: glb(run / "mesh.glb", DEEP),
}


def glb(path: Path, header: str) -> None:
    data = header.encode()
    path.write_bytes(b"glTF" + bytes(8) + len(data).to_bytes(4, "little") + b"JSON" + data)


@pytest.fixture
def two(made):
    """Two runs in a folder: one to be damaged, and another."""
    import shutil

    shutil.copytree(made, "outputs/00002-a-red-ball")
    return Path(made), Path("outputs/00002-a-red-ball")


@pytest.mark.parametrize("name", DAMAGE)
def test_one_damaged_run_does_not_end_the_gallery(call, two, name):
    DAMAGE[name](two[0])
    code, out, err = call("gallery", "outputs")
    page = Path("outputs/index.html").read_text()
    assert code == 0 and page.count("00001-a-red-ball") and page.count("00002-a-red-ball"), err


@pytest.mark.parametrize("name", DAMAGE)
def test_one_damaged_run_does_not_end_the_studio(two, name, capsys):
    DAMAGE[name](two[0])
    from test_live import Page

    from sds3d.live.studio import Studio

    class Stage(Page):
        """Reads meshes as the real one does."""

        def show_mesh(self, path):
            stages.bounds(path.read_bytes())
            super().show_mesh(path)

    base = configs.load("a red ball", {"out": "outputs"}, kind=configs.Config)
    page = Stage()
    Studio(page, base, {})
    assert "00002-a-red-ball" in page.gui.html()
    listed = "00001-a-red-ball" in page.gui.html()
    assert listed or "left out: outputs/00001-a-red-ball" in capsys.readouterr().err
    assert listed or "config" in name


@pytest.mark.parametrize("header", ["[1]", "{}", '{"meshes":3}', '{"meshes":[],"accessors":[]}', DEEP, "\xff"])
def test_a_damaged_mesh_is_a_sentence(tmp_path, header):
    glb(tmp_path / "mesh.glb", header)
    with pytest.raises(ValueError):
        stages.bounds((tmp_path / "mesh.glb").read_bytes())


def test_json_has_a_depth():
    assert from_json("[" * DEEPEST + "]" * DEEPEST)
    for text in ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), DEEP, '{"a":' * 999 + "1" + "}" * 999):
        with pytest.raises(ValueError, match="nested too deeply"):
            from_json(text)


def test_pages_show_no_file_of_another_folder(call, two, tmp_path):
    """A link in a stranger's run leads to a secret; what leads to another file of the run is fine."""
    import base64

    secret, run = tmp_path / "secret", two[0]
    secret.write_bytes(SECRET)
    for name in ("eval.png", "mesh-2.glb", "turntable-2.mp4", "preview.png", "progress/00099.png"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret)
    (tmp_path / "facts.json").write_text('{"iou": 0.123456, "note": "confidential"}')
    (run / "eval.json").symlink_to(tmp_path / "facts.json")
    (run / "turntable-3.mp4").symlink_to("turntable.mp4")
    kinds.write_page(Run.open(run))
    code, _, err = call("gallery", "outputs")
    assert code == 0, err
    for page in ((run / "index.html").read_text(), Path("outputs/index.html").read_text()):
        assert base64.b64encode(SECRET).decode()[:40] not in page and "confidential" not in page
    assert (run / "index.html").read_text().count("<video") == 2
    (run / "mesh.glb").unlink()
    (run / "mesh.glb").symlink_to(secret)
    assert earlier(Path("outputs")) == [two[1]]  # whose mesh may be downloaded
    assert "<img" not in card(Finished(run / "mesh.glb", "a", "b"))


def test_a_config_that_is_a_link_is_not_quoted(call, two, tmp_path):
    (tmp_path / "secret.yaml").write_text("confidential: 1")
    (two[0] / "config.yaml").unlink()
    (two[0] / "config.yaml").symlink_to(tmp_path / "secret.yaml")
    code, _, err = call("gallery", "outputs")
    assert code == 0 and "confidential" not in Path("outputs/index.html").read_text() + err
    code, _, err = call("resume", str(two[0]))
    assert code == 2 and "config.yaml is a link out of the run" in err, err


def test_durations_come_from_a_clock_that_does_not_jump():
    """time.time and datetime.now follow the machine's clock, which may be set; only file times are shown by it."""
    import ast

    import sds3d

    for path in Path(sds3d.__file__).parent.rglob("*.py"):
        called = [
            ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ]
        assert not {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now"} & set(called), path


def test_a_name_that_is_not_utf8_is_refused_and_shown(call, two):
    code, _, err = call("resume", os.fsdecode(b"outputs/\xff"))
    assert code == 2 and "is not UTF-8: rename the file" in err and "codec" not in err, err
    code, _, err = call("generate", "a red ball", "--out", os.fsdecode(b"\xff"))
    assert code == 2 and "is not UTF-8: rename the file" in err and not list(Path().glob("*\udcff*"))
    two[0].rename(os.fsdecode(b"outputs/00001-\xff"))
    code, _, err = call("gallery", "outputs")
    assert code == 0 and "00001-%FF/index.html" in Path("outputs/index.html").read_text(), err


# Teachers


DIGITS = {"data": "digits", "size": 8, "batch": 8, "coarse": 0}


@pytest.mark.slow
def test_a_teacher_that_diverges_ends_with_1_and_keeps_its_last_state(call_packaged, in_folder):
    """The issue's command line, whose learning rate makes NaN after a hundred steps."""
    flags = "digits -o t steps=400 batch=8 lr=1 decay=0.01 save_every=50".split()
    code, out, err = call_packaged("teacher", "train", *flags)
    assert code == 1 and "is not finite" in err and "lower lr. t/state.pt is from before, and good" in err, err
    state = torch.load("t/state.pt", weights_only=True)
    assert len(state["losses"]) % 50 == 0 and len(state["losses"]) >= 50
    for part in ("nets", "ema"):
        assert all(bool(w.isfinite().all()) for w in state[part].values() if w.is_floating_point())
    assert json.loads(Path("t/fit.json").read_text())["step"] == len(state["losses"])
    small.load("t/teacher.safetensors")


@pytest.mark.slow
def test_a_teacher_whose_weights_are_not_finite_is_not_saved(tmp_path):
    config = FitConfig(**DIGITS, steps=4, save_every=1)
    steps = fit.train(tmp_path, config, sources.build_source("digits", 8)[0])
    next(steps)
    before = (tmp_path / "state.pt").read_bytes()
    made = fit.Fit(config, sources.build_source("digits", 8)[0])
    with torch.no_grad():
        next(made.nets.parameters()).fill_(float("nan"))
    with pytest.raises(fit.Diverged, match="is not finite after step 0: lower lr"):
        made.save(tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == before
    steps.close()


def test_a_teachers_place_is_tried_before_the_training(call_packaged, in_folder):
    (in_folder / "file").write_text("")
    for place in ("file", "file/t", "/proc/t", "/dev/null"):
        code, _, err = call_packaged("teacher", "train", "digits", "-o", place, "steps=100000", "save_every=100000")
        assert code == 2 and err.startswith("error: cannot write") and err.count("\n") == 1, err  # no step was shown


def limited(folder: Path, most: int, program: str) -> subprocess.CompletedProcess:
    """A program whose files cannot have more than so many bytes, as on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, preexec_fn=limit, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("most", [100, 100_000, 1_000_000])
def test_a_full_disk_is_a_sentence_and_keeps_what_was_there(tmp_path, most):
    flags = "'teacher', 'train', 'digits', '-o', 't', 'steps=3', 'batch=8', 'save_every=3', '--quiet'"
    found = limited(tmp_path, most, f"from sds3d.cli import main; main([{flags}])")
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("error: cannot write t/") and len(found.stderr.splitlines()) == 1, found.stderr
    assert "make room" in found.stderr and not (tmp_path / "t" / "state.pt").exists()
    assert [path.name for path in (tmp_path / "t").iterdir() if path.name.startswith(".")] == [".lock"]


def test_every_bit_of_a_teachers_weights_counts(tmp_path):
    config = FitConfig(**DIGITS, steps=1)
    fit.Fit(config, sources.build_source("digits", 8)[0]).save(tmp_path)
    file = tmp_path / small.FILE
    whole, draws = file.read_bytes(), random.Random(0)
    good = small.load(file).fingerprint
    for _ in range(30):
        place = draws.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draws.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged or no teacher of this project"):
            small.load(file)
    file.write_bytes(whole)
    assert small.load(file).fingerprint == good
    assert "sha256" not in small.load().header  # the packaged ones are from before, and load


@pytest.mark.slow
def test_every_page_of_a_teachers_state_counts(tmp_path):
    """As of a run's checkpoint; torch.load reads what a disk made of it, and says nothing."""
    config = FitConfig(**DIGITS, steps=4, save_every=1)
    steps = fit.train(tmp_path, config, sources.build_source("digits", 8)[0])
    next(steps)
    steps.close()
    file, draws = tmp_path / "state.pt", random.Random(0)
    whole, made = file.read_bytes(), fit.Fit(config, sources.build_source("digits", 8)[0])
    good = torch.load(file, weights_only=True)
    numbers = good["nets"]["unet.first.weight"].numpy().tobytes()
    pages = [whole.index(numbers) + 64, *(draws.randrange(len(whole) // 4096) * 4096 for _ in range(20))]
    places = [(page, bytes(len(whole[page : page + 512]))) for page in pages]
    bits = (pages[0], *draws.sample(range(len(whole)), 20))
    places += [(at, bytes([whole[at] ^ 1 << draws.randrange(8)])) for at in bits]
    refused = 0
    for at, bad in places:
        file.write_bytes(whole[:at] + bad + whole[at + len(bad) :])
        try:
            made.load(tmp_path)
        except ValueError as error:
            refused += 1
            assert "state.pt is damaged or of another version (" in str(error) and "start a new folder" in str(error)
            continue
        same = torch.load(file, weights_only=True)  # such as a date in the archive
        assert set(same) == set(good) and all(same["nets"][k].equal(v) for k, v in good["nets"].items())
    assert refused > len(places) / 2
    del good["sha256"]
    torch.save(good, file)  # as before there were digests
    made.load(tmp_path)
    assert made.step == 1


CARD = {"generator": "{}", "teacher": "t", "method": "m", "steps": "1", "prompts": "[]", "call": "", "hf": {}}


@pytest.mark.parametrize(
    "card", ["", "[1]", "3", DEEP, *(json.dumps({**CARD, key: 3}) for key in CARD), json.dumps({"hf": {}})]
)
def test_a_damaged_generator_card_is_a_sentence(call_packaged, in_folder, card):
    (in_folder / "g" / "pipeline").mkdir(parents=True)
    (in_folder / "g" / "pipeline" / hf.CARD).write_text(card)
    code, _, err = call_packaged("sample", "g")
    assert code == 2 and "generator.json is damaged" in err, err


@pytest.mark.parametrize(
    "times", [DEEP, "3", "{}", "[1e999]", "[NaN]", "[7.0]", "[0.0]", "[0.5, 0.4]", "[" + "1" * 400 + "]", '["a"]']
)
def test_a_generator_whose_times_are_none_is_a_sentence(call_packaged, in_folder, times):
    teacher, kind = small.load(small.packaged("digits")), GeneratorConfig()
    header = {"generator": json.dumps(asdict(kind)), "teacher": "digits", "method": "m", "steps": "1", "times": times}
    file = in_folder / "generator.safetensors"
    small.save(file, teacher.network, teacher.text, teacher.vocabulary, teacher.prompts, header)
    code, _, err = call_packaged("sample", str(file), "a handwritten seven", "-n", "1")
    assert code == 2 and "the generator's header is damaged" in err and len(err.splitlines()) == 1, err


def test_a_deep_header_of_weights_is_a_sentence(call_packaged, in_folder):
    header = (DEEP * 2).encode()
    (in_folder / "deep.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    code, _, err = call_packaged("generate", "a red mug", "--teacher", "deep.safetensors", "--dry-run")
    assert code == 2 and "deep.safetensors is damaged" in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("index", ["", "[1]", "3", DEEP, "{}", '{"_class_name": []}', '{"_class_name": {"a": 1}}'])
def test_a_damaged_pipeline_index_is_a_sentence(call_packaged, in_folder, index):
    (in_folder / "p").mkdir()
    (in_folder / "p" / "model_index.json").write_text(index)
    code, _, err = call_packaged("paint", "a red mug", "--teacher", "p", "steps=1")
    assert code == 2 and "model_index.json is damaged" in err, err


def test_a_picture_with_too_many_pixels_and_deep_captions_are_sentences(call_packaged, in_folder):
    bomb(in_folder / "bomb.png")
    code, _, err = call_packaged("paint", "a red mug", "image.start=bomb.png", "steps=1")
    assert code == 2 and "bomb.png" in err and len(err.splitlines()) == 1, err
    (in_folder / "data").mkdir()
    Image.new("RGB", (40, 40)).save(in_folder / "data" / "a.png")
    (in_folder / "data" / "captions.jsonl").write_text(DEEP)
    code, _, err = call_packaged("teacher", "train", "data", "-o", "t", "size=32")
    assert code == 2 and "captions.jsonl, line 1: it is nested too deeply" in err, err


# Live


@pytest.mark.parametrize(
    ("serves", "host", "known"),
    [
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", "evil.example:8080", False),
        ("0.0.0.0", "localhost.evil.example", False),
        ("0.0.0.0", "", False),
        ("0.0.0.0", "[::1", False),
        ("0.0.0.0", "192.168.1.5:8080", True),
        ("0.0.0.0", "[2001:db8::1]:8080", True),
        ("0.0.0.0", "localhost:99", True),
        ("mybox.lan", "MyBox.lan:8080", True),
        ("127.0.0.1", "127.0.0.1:80", True),
        ("127.0.0.1", "[::1]:80", True),
        ("127.0.0.1", "192.168.1.5", False),
        ("127.0.0.1", "evil.example", False),
    ],
)
def test_a_host_is_this_machine_or_refused(serves, host, known):
    assert stages.is_own_host(host, Address(serves, 8080)) == known


def test_where_others_are_let_in_this_machines_name_is_known(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "MyBox")
    monkeypatch.setattr("socket.getfqdn", lambda: "mybox.example.org")
    for host in ("mybox", "mybox.local:8080", "MYBOX.example.org"):
        assert stages.is_own_host(host, Address("0.0.0.0", 8080))
        assert not stages.is_own_host(host, Address("127.0.0.1", 8080))


class Hourglass(asyncio.SelectorEventLoop):
    """An event loop whose time goes on only while it waits, by as long as it would: the same on every machine."""

    def __init__(self):
        self.now = 0.0
        super().__init__(Turned(self))

    def time(self) -> float:
        return self.now


class Turned(selectors.SelectSelector):
    """Waits no time at all, and says that it did."""

    def __init__(self, loop: Hourglass):
        super().__init__()
        self.loop = loop

    def select(self, timeout=None):
        self.loop.now += max(timeout or 0.0, 1e-6)
        return super().select(0)


def test_a_pace_gives_so_many_turns_a_second_and_a_few_at_once():
    async def count(seconds: float, takers: int) -> list[int]:
        pace, found = stages.RateLimit(100, 20, asyncio.get_running_loop().time), [0] * takers

        async def take(i: int) -> None:
            while True:
                await pace.turn()
                found[i] += 1

        tasks = [asyncio.create_task(take(i)) for i in range(takers)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        return found

    with asyncio.Runner(loop_factory=Hourglass) as runner:
        found = runner.run(count(1.0, 4))
    assert 118 <= sum(found) <= 121, found  # 20 at once and 100 in a second
    assert max(found) - min(found) <= 25, found  # the burst may be one's alone; then each is next in turn


@pytest.mark.slow
def test_a_flood_of_cameras_is_not_listened_to(monkeypatch):
    """One viewer sends as fast as it can; another one's camera is noted all the same, soon."""
    import msgspec
    import viser
    from websockets.sync.client import connect

    begun, noted = time.monotonic(), []
    stage = stages.Stage(Address.find(port=0), "title")
    note = stage.viewers.update
    monkeypatch.setattr(stage.viewers, "update", lambda key, pose: noted.append(key) or note(key, pose))
    camera = {"type": "ViewerCameraMessage", "wxyz": [1.0, 0, 0, 0], "position": [0.0, 0, 3], "fov": 0.7}
    camera |= {"near": 0.01, "far": 100.0, "image_height": 64, "image_width": 64, "look_at": [0.0, 0, 0]}
    data = msgspec.msgpack.encode(camera | {"up_direction": [0.0, 1, 0]})
    url, kind = f"ws://127.0.0.1:{stage.address.port}", f"viser-v{viser.__version__}"
    flood = (
        "import time; from websockets.sync.client import connect\n"
        f"with connect({url!r}, subprotocols=[{kind!r}], compression=None) as socket:\n"
        f"    while True: socket.send({data!r})\n"
    )
    try:
        with started([sys.executable, "-c", flood], stderr=subprocess.DEVNULL):
            until(lambda: len(noted) > stages.BURST + 3 * stages.MESSAGES, "a flood's burst, and three seconds more")
            (flooding,) = set(noted)
            with connect(url, subprotocols=[kind], compression=None) as socket:
                for _ in range(3):
                    socket.send(data)
                until(lambda: set(noted) - {flooding}, "another viewer's camera is noted")
            total, seconds = len(noted), time.monotonic() - begun
        # However slow this machine is; without a pace it is as many as it can take.
        assert total <= stages.BURST + stages.MESSAGES * seconds + 1, (total, seconds)
    finally:
        stage.close()
