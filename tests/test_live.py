"""The live page and the studio without a browser: who gets a picture when, pause and stop, the queue, the port."""

import http.client
import http.server
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh

from sds3d.cameras import Cameras, Poses
from sds3d.config import load as configs
from sds3d.data import toybox
from sds3d.distill.score import METHODS
from sds3d.live import stage as stages
from sds3d.live.address import Address
from sds3d.live.jobs import Queue
from sds3d.live.prompt_hints import TITLE, TOYS, Hints, without_commands
from sds3d.live.studio import Studio
from sds3d.live.viewers import GROWING, QUICK, SHARP, Viewers
from sds3d.live.watch import Watch
from sds3d.prompts import VIEW_WORDS, words
from sds3d.runs import launch
from sds3d.runs.scene import Asset
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.load import load_teacher
from sds3d.train import Step

FRONT = Cameras(*(torch.tensor([v]) for v in stages.FRONT))
POSE = Poses(FRONT.positions(), FRONT.rotations(), FRONT.fov, aspect=1.0)


class Clock:
    """A clock that is put forward by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Element:
    """Stands for any element of viser's panel: keeps what it is given, and can be clicked."""

    def __init__(self, *given, **props):
        self.given, self.visible, self.removed = given, props.get("visible", True), False
        self.content = given[0] if given else ""
        value = given[1] if len(given) > 1 else ""
        self.value = props.get("initial_value", value[0] if isinstance(value, tuple) else value)
        self._callbacks = []

    def on_click(self, callback):
        self._callbacks.append(callback)

    on_update = on_submit = on_click

    def click(self, value=None, client=None):
        self.value = self.value if value is None else value
        for callback in self._callbacks:
            callback(SimpleNamespace(target=self, client=client))

    submit = click

    def remove(self):
        self.removed = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Gui:
    """Stands for viser's panel; remembers its elements."""

    def __init__(self):
        self.elements: list[Element] = []

    def __getattr__(self, name: str):
        def add(*given, **props) -> Element:
            self.elements.append(Element(*given, **props))
            return self.elements[-1]

        assert name.startswith("add_"), name
        return add

    def named(self, label: str) -> Element:
        """The newest element of that label."""
        return [e for e in self.elements if e.given[:1] == (label,) and not e.removed][-1]

    def html(self) -> str:
        """All that is told now."""
        return "\n".join(str(e.content) for e in self.elements if e.visible and not e.removed)


class Page:
    """Stands for a Stage: nobody's browser, but whoever is put among its viewers gets pictures.

    Attributes:
        waits: what to do each time somebody waits; then it ends with an error.
    """

    def __init__(self):
        self.viewers, self.gui, self.waits = Viewers(), Gui(), []
        self.pictures, self.canvas, self.offered, self._actions = [], "", [], []

    def run_soon(self, action):
        self._actions.append(action)

    def update(self, asset, training):
        while self._actions:
            self._actions.pop(0)()
        if asset is not None and len(self.viewers):
            self.pictures.append((asset.views(POSE, 8), training))

    def wait(self, seconds):
        self.waits.pop(0)()

    def show_scene(self):
        self.canvas = "scene"

    def show_mesh(self, path):
        self.canvas = str(path)

    def send_file(self, event, path):
        self.offered.append(path)


@pytest.fixture
def begin(ball_teacher, in_folder, tiny):
    """Starts a tiny run; gives the asset and its steps."""
    return lambda *more: launch.start(
        configs.load("a red ball", configs.parse_overrides([*tiny, *more]), kind=configs.Config), ball_teacher
    )


def test_nobody_looks_nobody_is_drawn():
    viewers = Viewers()
    assert len(viewers) == 0 and viewers.next_request(training=True) is None
    viewers.update("a", POSE)
    assert len(viewers) == 1 and viewers.next_request(training=True) is not None
    viewers.remove("a")
    assert len(viewers) == 0 and viewers.next_request(training=False) is None


@pytest.mark.parametrize("moves, share", [(True, 0.5), (False, 0.2)])
def test_training_keeps_most_of_the_time(moves, share):
    clock = Clock()
    viewers, drawn, steps = Viewers(clock), 0.0, 0.0
    viewers.update("a", POSE)
    clock.now = 10.0
    while clock.now < 60:
        if moves:
            viewers.update("a", POSE)
        wanted = viewers.next_request(training=True)
        if wanted is not None:
            took = 2e-5 * wanted.height**2  # of a machine as slow as that
            clock.now += took
            drawn += took
            viewers.record(wanted, took, training=True)
        clock.now += 0.01
        steps += 0.01
    assert share * 0.8 < drawn / (drawn + steps) <= share + 0.01


def test_a_resting_camera_gets_one_sharp_picture_as_large_as_time_allows():
    clock = Clock()
    viewers = Viewers(clock)

    def draw(seconds_a_pixel: float = 1e-5):
        wanted = viewers.next_request(training=False)
        if wanted is not None:
            viewers.record(wanted, seconds_a_pixel * wanted.height**2, training=False)
        return wanted

    viewers.update("a", POSE)
    assert not draw().sharp and draw() is None  # it moves
    clock.now = 1.0
    sharp = draw()
    assert sharp.sharp and sharp.height == round(math.sqrt(SHARP / 1e-5))
    assert draw() is None
    viewers.update("a", POSE)
    assert draw().height == round(math.sqrt(QUICK / 1e-5))
    clock.now = 2.0
    assert draw().sharp and draw() is None
    viewers.invalidate()  # the scene has changed
    assert draw().height == round(math.sqrt(GROWING / 1e-5)) and draw().sharp


def test_who_moves_while_being_drawn_and_who_waits_longest_come_next():
    clock = Clock()
    viewers = Viewers(clock)
    viewers.update("a", POSE)
    wanted = viewers.next_request(training=False)
    viewers.update("a", POSE.to("cpu"))  # another pose, meanwhile
    viewers.record(wanted, 0.1, training=False)
    assert viewers.next_request(training=False).key == "a"
    order = []
    for key in "bc":
        viewers.update(key, POSE)
    for _ in range(6):
        clock.now += 10
        wanted = viewers.next_request(training=True)
        viewers.record(wanted, 0.1, training=True)
        order.append(wanted.key)
    assert sorted(order[:3]) == ["a", "b", "c"] and order[3:] == order[:3]


def test_looking_changes_nothing_of_the_run(begin):
    states = []
    for look in (True, False):
        made, steps = begin()
        page = Page()
        watch = Watch(page)
        watch.begin(made)
        for step in steps:
            if look:
                page.viewers.update("a", POSE)
            watch.update(step, lambda: False)
        assert len(page.pictures) == (step.total if look else 0)
        states.append(made.scene.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_nothing_is_told_while_nobody_looks(begin):
    made, _ = begin()
    page = Page()
    watch = Watch(page)
    watch.begin(made)
    before = page.gui.html()
    watch.update(Step(3, 6, 0.0, {"opacity": 0.25}, 1.0), lambda: False)
    assert page.gui.html() == before
    page.viewers.update("a", POSE)
    watch.update(Step(4, 6, 0.0, {"opacity": 0.25}, 2.0), lambda: False)
    assert "step 4/6" in page.gui.html() and "opacity 0.25" in page.gui.html()


@pytest.mark.parametrize("end", ["resume", "stop", "ctrl-c"])
def test_a_pause_ends_by_resume_by_stop_and_by_ctrl_c(begin, end):
    made, _ = begin()
    page, interrupted = Page(), []
    watch = Watch(page)
    watch.begin(made)
    pause, stop = page.gui.named("Pause"), page.gui.named("Stop and export")
    pause.click()
    told = []
    ends = {"resume": pause.click, "stop": stop.click, "ctrl-c": lambda: interrupted.append(1)}
    page.waits = [lambda: told.append(page.gui.html()), lambda: None, ends[end]]
    watch.update(Step(3, 6, 0.0, {}, 1.0), lambda: bool(interrupted))
    assert page.waits == [] and "paused after step 3/6" in told[0]
    assert watch.stopped == (end == "stop")


def test_text_of_the_user_is_escaped(ball_teacher, in_folder, tiny):
    prompt = "a <img src=x onerror=alert(1)> ball & **bold**"
    made, _ = launch.start(configs.load(prompt, configs.parse_overrides(tiny), kind=configs.Config), ball_teacher)
    page = Page()
    Watch(page).begin(made)
    assert "a &lt;img src=x onerror=alert(1)&gt; ball &amp; **bold**" in page.gui.html()
    assert "<img" not in page.gui.html()


@pytest.mark.slow
def test_stop_and_export_writes_the_files_and_can_be_resumed(call, tiny, monkeypatch):
    update = Watch.update

    def stopping(self, step, interrupted):
        if step.step == 3:
            self._stop_run()
        update(self, step, interrupted)

    monkeypatch.setattr(Watch, "update", stopping)
    code, out, err = call("generate", "a red ball", *tiny, "--live", "--port", "0", "--json")
    assert code == 0 and "open http://127.0.0.1:" in err, err
    made = json.loads(out)
    assert made["steps"] == 3
    assert {"preview.png", "turntable.mp4", "mesh.glb"} <= {Path(file).name for file in made["files"]}
    assert all(Path(file).is_file() for file in made["files"])
    monkeypatch.setattr(Watch, "update", update)
    code, out, err = call("resume", made["run"], "--live", "--port", "0", "--json")
    assert code == 0 and "open http://127.0.0.1:" in err and json.loads(out)["steps"] == 6, err
    rows = (Path(made["run"]) / "metrics.jsonl").read_text().splitlines()
    assert code == 0 and [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_only_scenes_are_watched_while_they_resume(call, in_folder):
    code, out, err = call("paint", "a red ball", "steps=2", "image.count=1", "--json")
    assert code == 0, err
    code, _, err = call("resume", json.loads(out)["run"], "steps=3", "--live", "--port", "0")
    assert code == 2 and "--live shows scenes" in err
    code, _, err = call("resume", json.loads(out)["run"], "--port", "9000")
    assert code == 2 and "add --live" in err


def test_a_taken_port_is_named_and_leaves_no_run(call, tiny, in_folder):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        port = other.server_address[1]
        code, _, err = call("generate", "a red ball", *tiny, "--live", "--port", str(port))
        assert code == 2 and f"cannot use port {port} on 127.0.0.1" in err and "another --port" in err
        assert not (in_folder / "outputs").exists()


def test_without_a_wish_the_next_free_port_is_taken():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        port = other.server_address[1]
        assert Address.find(first=port).port > port


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--port", "9000"), "add --live"),
        (("--host", "0.0.0.0"), "add --live"),
        (("--live", "--port", "70000"), "--port is 70000"),
        (("--live", "--host", "no.such.host.invalid"), "no address"),
        (("--live", "--host", "203.0.113.1"), "cannot serve on 203.0.113.1"),
    ],
)
def test_wrong_addresses(call, tiny, flags, said):
    code, _, err = call("generate", "a red ball", *tiny, *flags)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_other_addresses_are_warned_about(capsys):
    from sds3d.cli.live import staging

    for host, warned in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        with staging(host, 0, "title") as stage:
            out, err = capsys.readouterr()
            assert ("warning" in err and "no password" in err) == warned and not out
            assert stage.address.url in err and stage.address.port > 0
        assert capsys.readouterr() == ("", "")
    assert not Address("::1", 80).warning and Address("some-name", 80).warning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "origin", "answer"),
    [
        ("127.0.0.1:{port}", None, 200),
        ("127.0.0.1:{port}", "http://127.0.0.1:{port}", 200),
        ("localhost:99", "http://localhost:99", 200),  # as ssh -L has it
        ("127.0.0.1:{port}", "http://evil.example", 403),
        ("127.0.0.1:{port}", "null", 403),
        ("evil.example:{port}", None, 403),  # a name that was made to lead here
        ("evil.example:{port}", "http://evil.example:{port}", 403),
    ],
)
def test_pages_of_other_sites_are_refused(host, origin, answer):
    stage = stages.Stage(Address.find(port=0), "title")
    try:
        port = stage.address.port
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        headers = {"Host": host.format(port=port)} | ({"Origin": origin.format(port=port)} if origin else {})
        asked.request("GET", "/", headers=headers)
        assert asked.getresponse().status == answer
    finally:
        stage.close()


def test_what_a_page_asks_for_does_not_end_a_training():
    stage = stages.Stage(Address.find(port=0), "title")
    try:
        stage.run_soon(lambda: 1 / 0)
        stage.update(None, training=True)
    finally:
        stage.close()


def test_the_page_never_opens_a_tunnel(capsys):
    stage = stages.Stage(Address.find(port=0), "title")
    try:
        assert stage._server.request_share_url() is None
    finally:
        stage.close()


def test_bounds_of_a_glb(tmp_path):
    mesh = trimesh.creation.box((1.0, 2.0, 0.5)).apply_translation((0.25, 0, 1))
    mesh.export(tmp_path / "box.glb")
    low, high = stages.bounds((tmp_path / "box.glb").read_bytes())
    np.testing.assert_allclose([low, high], mesh.bounds, atol=1e-6)
    with pytest.raises(ValueError, match="no GLB"):
        stages.bounds(b"something else")


def test_a_viewers_camera_is_the_one_that_stands_there():
    from viser.transforms import SO3

    opencv = FRONT.rotations()[0].numpy().astype(float) * (1, -1, -1)  # looks along +z, y down
    camera = SimpleNamespace(
        wxyz=SO3.from_matrix(opencv).wxyz,
        position=FRONT.positions()[0].numpy(),
        fov=math.radians(40),
        image_width=160,
        image_height=100,
    )
    ours, theirs = stages.pose_of(camera).rays(10), FRONT.rays(10, 16)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_queue_keeps_order_and_what_runs():
    queue = Queue()
    threads = [threading.Thread(target=lambda: [queue.add("p", {}) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [job.number for job in queue.jobs()] == list(range(1, 201)) and queue.version == 200
    assert queue.first("new").number == 1 and queue.first("waiting") is None
    queue.move(1, "running")
    queue.move(2, "failed", "why")
    for number in (1, 2, 3, 999):
        queue.remove(number)
    assert [job.number for job in queue.jobs()][:2] == [1, 4]
    assert not queue.move(2, "waiting")
    queue.done(1)
    assert queue.jobs()[0].number == 4 and queue.version == 205


@pytest.fixture
def studio(ball_teacher, in_folder, tiny):
    """A studio for tiny runs, and a function that serves until nothing is left to do."""
    layer = configs.parse_overrides(tiny)

    def make(*teachers: str) -> Studio:
        return Studio(Page(), configs.load("a red ball", layer, kind=configs.Config), layer, teachers, ball_teacher)

    def serve(studio: Studio) -> Path | None:
        return studio.serve(lambda: not any(job.state in ("new", "waiting", "running") for job in studio.queue.jobs()))

    return SimpleNamespace(make=make, serve=serve)


def send(studio: Studio, prompt: str) -> None:
    """Type a prompt and click."""
    studio.stage.gui.named("prompt").value = prompt
    studio.stage.gui.named("New asset").submit()


@pytest.mark.slow
def test_studio_makes_what_is_queued_and_shows_what_is_wrong(studio):
    made = studio.make()
    gui = made.stage.gui
    send(made, "a red ball")
    send(made, "a <cube>")
    gui.named("seed").value = 1
    send(made, "a green ball")
    assert studio.serve(made) is None
    told = gui.html()
    assert "unknown: &#x27;a &lt;cube&gt;&#x27; (nearest: ball)" in told and "<cube>" not in told
    assert told.count("data:image/png;base64,") == 2
    runs = sorted(Path("outputs").iterdir())
    assert [run.name for run in runs] == ["00001-a-red-ball", "00002-a-green-ball"]
    assert [Asset.open(run).config.seed for run in runs] == [0, 1]
    assert made.stage.canvas == str(runs[1] / "mesh.glb")
    buttons = [e for e in gui.elements if e.given[1:] == (("Show", "Download GLB"),)]
    buttons[0].click("Download GLB")
    assert made.stage.offered == [runs[0] / "mesh.glb"]
    buttons[0].click("Show")
    made.stage.update(None, False)
    assert made.stage.canvas == str(runs[0] / "mesh.glb")
    send(made, "another ball")  # it does not take the canvas away from what somebody chose
    studio.serve(made)
    assert made.stage.canvas == str(runs[0] / "mesh.glb")
    gui.named("Back to this one").click()
    made.stage.update(None, False)
    assert made.stage.canvas == "outputs/00003-another-ball/mesh.glb"
    again = studio.make()  # lists them all, the newest on the canvas
    assert again.stage.gui.html().count("data:image/png;base64,") == 3
    assert again.stage.canvas == "outputs/00003-another-ball/mesh.glb"


@pytest.mark.slow
def test_studio_removes_what_waits_and_survives_what_fails(studio, monkeypatch):
    made = studio.make()
    send(made, "a red ball")
    send(made, "a blue ball")
    made.queue.remove(1)
    finish, empty = Asset.finish, ValueError("there is no surface")

    def failing(self):
        raise empty
        yield

    monkeypatch.setattr(Asset, "finish", failing)
    studio.serve(made)
    assert "there is no surface" in made.stage.gui.html() and made.queue.jobs()[0].state == "failed"
    monkeypatch.setattr(Asset, "finish", finish)
    send(made, "a green ball")
    studio.serve(made)
    assert [run.name for run in sorted(Path("outputs").iterdir())] == ["00001-a-blue-ball", "00002-a-green-ball"]


def test_studio_that_is_interrupted_names_the_run_to_go_on_with(studio):
    made = studio.make()
    send(made, "a red ball")
    asked = []
    left = made.serve(lambda: asked.append(1) or len(asked) > 3)
    assert left == Path("outputs/00001-a-red-ball") and (left / "checkpoint.safetensors").is_file()


def test_studio_offers_methods_that_make_scenes(studio):
    methods = studio.make().stage.gui.named("method").given[1]
    assert {"sds", "vsd"} <= set(methods) and not {"dds", "dmd", "dmd2"} & set(methods)


def test_what_each_method_of_the_studio_makes_is_a_scene(studio, tiny):
    offered = studio.make().stage.gui.named("method").given[1]
    packaged = load_teacher(TeacherConfig("small"))  # since some methods train a copy of it
    fails = []
    for method in METHODS:
        settings = configs.parse_overrides([*tiny, f"method={method}"])
        try:
            launch.check(configs.load("a red ball", settings, kind=configs.Config), packaged)
        except ValueError:
            fails.append(method)
    assert set(offered) == set(METHODS) - set(fails) and {"dds", "dmd", "dmd2"} == set(fails)


def test_hints_about_the_toybox_are_its_words_and_all_that_name_something():
    hints = Hints.of("toybox")
    told = {word for kind in hints.words.values() for word in words(kind)}
    degraded = {word for group in toybox.QUALITIES.values() for phrase in group for word in words(phrase)}
    assert told - set(toybox.VOCABULARY) <= {"any", "as", "colour", "each", "in", "of", "or"}
    missing = set(toybox.VOCABULARY) - told
    assert missing <= degraded | {"view", "the", "and", "with", "an", *words(" ".join(VIEW_WORDS))}
    for prompt in TOYS:
        assert toybox.parse(prompt).main in words(prompt)


def test_hints_about_other_teachers_are_their_words_or_nothing(tmp_path):
    digits, hints = load_teacher(TeacherConfig("digits")), Hints.of("digits")
    assert hints.words["words"].split(", ") == sorted(digits.vocabulary) and len(hints.examples) == 3
    for prompt in hints.examples:
        digits.check(prompt)
    (tmp_path / "model_index.json").write_text("{}")
    assert Hints.of(str(tmp_path)) == Hints.of("no-such.safetensors") == Hints()


def test_studio_hints_at_what_the_chosen_teacher_knows(studio):
    made = studio.make("digits", "no-such.safetensors")
    gui = made.stage.gui
    gui.named("teacher").click("small")
    assert f"for example: {TOYS[0]}; " in gui.html() and "things: ball, cube" in gui.html()
    gui.named("teacher").click("digits")
    assert "handwritten" in gui.html() and "mug" not in gui.html() and gui.named(TITLE).visible
    gui.named("teacher").click("no-such.safetensors")
    assert "for example" not in gui.html() and "words:" not in gui.html() and not gui.named(TITLE).visible


def test_an_unknown_word_is_told_without_commands():
    with pytest.raises(ValueError) as problem:
        load_teacher(TeacherConfig("small")).check("a red mugg")
    told = without_commands(str(problem.value))
    assert "'mugg' (nearest: mug" in told and TITLE in told and "sds3d" not in told and "--" not in told
    assert without_commands("another problem") == "another problem"


def test_nothing_typed_is_nothing_queued_and_a_refused_prompt_can_be_mended(studio):
    made = studio.make()
    box = made.stage.gui.named("prompt")
    send(made, "  ")
    assert made.queue.jobs() == []
    send(made, "a red bal")
    assert box.value == ""
    made._update()
    assert box.value == "a red bal" and made.queue.jobs()[0].state == "failed"
    send(made, "a red cube")
    box.value = "a ball of"  # somebody types on
    made._update()
    assert box.value == "a ball of"


def test_what_waits_is_told_in_words(studio):
    made = studio.make()
    send(made, "a red ball")
    made._update()
    assert "waiting: sds, teacher BallTeacher, 6 steps, seed 0" in made.stage.gui.html()


@pytest.mark.parametrize("out, why", [("/proc/x", "No such file"), ("taken", "File exists")])
def test_studio_begins_only_where_it_can_write(call, in_folder, out, why):
    (in_folder / "taken").write_text("a file")
    code, printed, err = call("studio", "--port", "0", "--out", out)
    assert code == 2 and f"cannot write {out}: {why}" in err and "open http" not in err and not printed


def test_a_place_that_cannot_be_written_any_more_is_told_once(studio, in_folder):
    made = studio.make()
    (in_folder / "outputs").write_text("a file")
    send(made, "a red ball")
    studio.serve(made)
    assert made.stage.gui.html().count("cannot write outputs") == 1
    assert "nothing yet" in made.stage.gui.html() and made.queue.jobs()[0].state == "failed"


@pytest.mark.parametrize("value", [1e20, -1.0, 0.5, float("nan"), float("inf"), 1e300])
def test_a_seed_that_is_none_fails_its_prompt_only(studio, value):
    made = studio.make()
    seed = made.stage.gui.named("seed")
    assert isinstance(seed.value, float)  # a whole number beyond 64 bits ends every page
    kept, seed.value = seed.value, value
    send(made, "a red ball")
    made._update()
    assert made.queue.jobs()[0].state == "failed" and "seed is" in made.queue.jobs()[0].message
    seed.value = kept
    send(made, "a red ball")
    made._update()
    assert made.queue.jobs()[-1].state == "waiting" and made.queue.jobs()[-1].settings["seed"] == 0


def test_a_full_queue_takes_no_more_and_says_so(studio):
    from sds3d.live.studio import WAITING

    made = studio.make()
    for _ in range(WAITING + 270):
        send(made, "a red ball")
    assert len(made.queue.jobs()) == WAITING
    assert f"the queue takes {WAITING} prompts" in made.stage.gui.html()
    assert made.stage.gui.named("prompt").value == "a red ball"  # what was typed stays
