"""Runs of every kind, put together and carried out with teachers that know the answer."""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import TINY, BallTeacher
from diffusers import UNet2DConditionModel
from torch.nn.modules.module import register_module_forward_pre_hook

import sds3d
from sds3d import cameras as cam
from sds3d.cli import main
from sds3d.config import load as configs
from sds3d.config.load import Config, DistillConfig, PaintConfig
from sds3d.data import toybox
from sds3d.distill.score import METHODS
from sds3d.evaluate import comparison as comparing
from sds3d.evaluate.truth import silhouette_iou, unseen_views
from sds3d.pages import comparison as page
from sds3d.runs import build, kinds, launch
from sds3d.runs.scene import Asset
from sds3d.runtime.ramp import Ramp
from sds3d.students.base import Particles
from sds3d.students.image import ImageConfig, ImageStudent
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.mixture import MixtureTeacher, PointNet
from sds3d.train import OptimConfig, Plan, train

SIZE = 12


def tiny() -> dict:
    pairs = (text.split("=") for text in TINY)
    return {key: int(value) if value.isdigit() else value for key, value in pairs}


def pictures() -> torch.Tensor:
    """Two discs and two squares on white, (4, 3, SIZE, SIZE)."""
    axis = torch.arange(SIZE) - SIZE / 2 + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    disc, square = (x**2 + y**2) < 16, (x.abs() < 4) & (y.abs() < 3)
    colours = torch.tensor([[1.0, 0, 0], [0.8, 0.3, 0], [0, 0, 1.0], [0, 0.4, 0.8]])
    shapes = torch.stack([disc, disc, square, square])[:, None].float()
    return 1 - shapes + shapes * colours[:, :, None, None]


PROMPTS = {"a disc": [1.0, 1, 0, 0], "a square": [0, 0, 1.0, 1], "ugly": [1.0, 1, 1, 1], "a disc, ugly": [1.0, 1, 1, 1]}


@pytest.fixture
def oracle(in_folder) -> MixtureTeacher:
    """An exact teacher of four pictures; and an empty folder to work in."""
    return MixtureTeacher.of_images(pictures(), 0.02, PROMPTS)


def own_settings(name: str) -> dict:
    """What a method needs of this teacher, and a range of t down to where a picture is sharp."""
    settings = {
        "image.size": SIZE,
        "steps": 200,
        "time.t_min": [0, 0.8, 0.05, 200],
        "time.t_max": [0, 0.98, 0.2, 200],
        "negative": "ugly" if "negative" in METHODS[name].NEEDS else "",
        "log.picture_every": 75,
    }
    critic = {"critic.kind": "copy", "critic.steps": 4, "critic.lr": 2e-3}
    return settings | (critic if "critic" in METHODS[name].NEEDS else {})


def nearest(image: torch.Tensor) -> tuple[int, float]:
    """Which of the pictures it is, and the root-mean-square distance."""
    distance = (image - pictures()).square().flatten(1).mean(1).sqrt()
    return int(distance.argmin()), float(distance.min())


FOR_GENERATORS = ("dmd", "dmd2")  # they need pairs, or real images
# The root-mean-square distance to the nearest picture, of the worst of four images: what seed 0 reached and three
# standard deviations between seeds 0, 1 and 2, in which it was 0.0002, 0.029, 0.045, 0.0625, 0.138, 0.027 and 0.036 at
# seed 0. ISM's seeds reach 0.138, 0.208 and 0.206, and its bound is nearer. CSD only says what tells a disc from a
# square, and nothing once that is clear: it has none.
FARTHEST = {"sds": 0.001, "nfsd": 0.033, "vsd": 0.066, "sdi": 0.064, "ism": 0.15, "bridge": 0.052}
FARTHEST |= {"diffinstruct": 0.075}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dds", *FOR_GENERATORS)])
def test_every_method_paints_a_picture_that_the_oracle_knows(oracle, name):
    painting = sds3d.paint("a disc", teacher=oracle, method=name, **own_settings(name))
    found = [nearest(image) for image in painting.images.cpu()]
    assert all(which < 2 for which, _ in found), found  # a disc, not a square
    if name != "csd":
        assert max(distance for _, distance in found) < FARTHEST[name], found
    files = {p.name for p in painting.path.iterdir()}
    assert {"image.png", "images", "progress", "config.yaml", "metrics.jsonl"} <= files
    assert len(list((painting.path / "images").iterdir())) == 4


@pytest.mark.parametrize("name", FOR_GENERATORS)
def test_methods_for_generators_make_no_pictures(oracle, name):
    with pytest.raises(ValueError, match=f"{name.upper()} needs (pairs|real): it trains generators, with sds3d"):
        sds3d.paint("a disc", teacher=oracle, method=name)


@pytest.mark.slow
def test_dds_turns_a_picture_of_one_kind_into_the_other_and_keeps_a_right_one(oracle, tmp_path):
    from sds3d.runs.folder import save_png

    save_png(tmp_path / "square.png", pictures()[2])
    edit = own_settings("dds") | {"image.start": str(tmp_path / "square.png"), "image.noise": 0.0, "image.count": 2}
    turned = sds3d.paint("a disc", teacher=oracle, method="dds", **edit, **{"source.prompt": "a square"})
    found = [nearest(image) for image in turned.images.cpu()]
    assert all(which < 2 and distance < 0.001 for which, distance in found), found  # in three seeds 0.0001 at most
    kept = sds3d.paint("a square", teacher=oracle, method="dds", **edit, **{"source.prompt": "a square"})
    assert (kept.images.cpu() - pictures()[2]).abs().max() < 1e-4  # in three seeds 0
    with pytest.raises(ValueError, match="DDS needs a source: give source.prompt"):
        sds3d.paint("a disc", teacher=oracle, method="dds")
    with pytest.raises(ValueError, match="DDS edits, and needs a source: give image.start"):
        sds3d.paint("a disc", teacher=oracle, method="dds", **{"source.prompt": "a square"})
    with pytest.raises(ValueError, match="no picture that can be read"):
        sds3d.paint("a disc", teacher=oracle, image={"start": "nowhere.png"})


def test_a_run_says_that_its_teacher_was_an_object_and_goes_on_with_one_alone(oracle, call):
    settings = own_settings("sds") | {"steps": 2}
    painting = sds3d.paint("a disc", teacher=oracle, **settings)
    name = "python:sds3d.teachers.mixture.MixtureTeacher"
    stored = configs.of_run(painting.path / "config.yaml")
    assert stored.teacher == TeacherConfig(name, "words") and stored == painting.config
    assert name in (painting.path / "index.html").read_text()
    again = sds3d.resume(painting.path, teacher=oracle, steps=3)
    assert again.run.rows()[-1]["step"] == 3
    for said, carry_out in (
        (f"{name[7:]}., .* give an object of this class", lambda: sds3d.resume(painting.path, steps=4)),
        (
            f"teacher is {name} with views=words, and python:conftest.B",
            lambda: sds3d.resume(painting.path, teacher=BallTeacher()),
        ),
        ("teacher.dtype is for a teach", lambda: sds3d.paint("a disc", teacher=oracle, **{"teacher.dtype": "float32"})),
        ("generator's run is opened .* by its name", lambda: sds3d.train_generator(teacher=oracle, method="dmd")),
        (
            "teacher.name is 'digits', and the teacher is an object",
            lambda: launch.start(configs.load("a disc", {"teacher.name": "digits"}, kind=PaintConfig), oracle),
        ),
    ):
        with pytest.raises(ValueError, match=said):
            carry_out()
    code, _, err = call("paint", "a ball", "--teacher", "small")
    assert code == 2 and "teacher.name is for a teacher that is loaded by its name, and an object is given" in err


class Incomplete(BallTeacher):
    decode = property()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (BallTeacher, r"the class BallTeacher; give an object, as BallTeacher\(\)"),
        (3, "the teacher is a int without schedule, image_size, .*, check; give a name, or an object"),
        (["small"], "the teacher is a list without"),
        (Incomplete(), "the teacher is a Incomplete without decode"),
        (Path("no-such-folder"), "teacher 'no-such-folder' is neither packaged"),
    ],
)
def test_what_is_no_teacher_is_refused_in_words(given, said, in_folder):
    with pytest.raises(ValueError, match=said):
        sds3d.paint("a ball", teacher=given, steps=2)
    with pytest.raises(SystemExit, match="2"):
        main(["paint", "a ball", "steps=2"], teacher=given)
    assert not (in_folder / "outputs").exists()


def test_a_command_that_would_load_another_teacher_refuses_the_object(in_folder, capsys):
    for command in (["doctor"], ["teacher", "words"]):
        with pytest.raises(SystemExit, match="2"):
            main(command, teacher=BallTeacher())
        assert f"error: sds3d {command[0]} loads a teacher by its name" in capsys.readouterr().err


def test_a_teacher_that_needs_words_for_views_is_asked_for_them_before_the_run(in_folder):
    class Plain(BallTeacher):
        def check(self, prompt):
            if "view" in prompt:
                raise ValueError(f"this teacher does not know {prompt!r}")

    with pytest.raises(ValueError, match="front view: this teacher does not know 'a ball, front view'"):
        sds3d.generate("a ball", teacher=Plain(views="words"), steps=2)
    assert not (in_folder / "outputs").exists()


def test_a_painting_resumes_bit_for_bit_critic_and_all(oracle):
    settings = own_settings("vsd") | {"steps": 8, "log.save_every": 100}
    whole = sds3d.paint("a disc", teacher=oracle, method="vsd", **settings)
    half, steps = launch.start(configs.load("a disc", {"method": "vsd", **settings}, kind=PaintConfig), oracle)
    for step in steps:
        if step.step == 3:
            steps.close()
    again, steps = launch.resume(half.path, teacher=oracle)
    assert [step.step for step in steps] == [4, 5, 6, 7, 8]
    assert torch.equal(again.images, whole.images)


def test_particles_share_a_critic_and_keep_to_themselves():
    class Noted:
        steps, draws = 1, []

        def fit(self, draw, generator):
            self.draws.append(draw.particle)
            return torch.zeros(())

    config = ImageConfig(count=1, size=4)
    students = [ImageStudent(config, "", torch.Generator().manual_seed(i)) for i in range(3)]
    student, critic, moved = Particles(students), Noted(), []
    before = [s.images() for s in students]

    def objective(draw, step, generator):
        moved.append(draw.particle)
        return type("Judged", (), {"loss": draw.images.square().sum(), "metrics": {}})

    plan = Plan(12, optim=OptimConfig({"pixels": Ramp.constant(0.01)}))
    for _ in train(student, {"o": objective}, plan, companions={"critic": critic}):
        now = [s.images() for s in students]
        changed = [i for i in range(3) if not torch.equal(before[i], now[i])]
        assert changed == [moved[-1]]
        before = [image.clone() for image in now]
    assert set(moved) == set(critic.draws) == {0, 1, 2}
    other = Particles([ImageStudent(config, "", torch.Generator().manual_seed(9)) for _ in range(3)])
    other.load_state_dict(student.state_dict())
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(student.students, other.students))


@dataclass
class TrainableBall(BallTeacher):
    """One that a critic can start from; what the critic learns is a difference in v."""

    network: PointNet = field(default_factory=lambda: PointNet(3 * 16 * 16))
    extra_width: int = 0

    def answer(self, network, x_t, t, prompts, cameras=None, camera_mask=None, extra=None):
        exact = self.predict(x_t, t, prompts, cameras, camera_mask)
        return replace(exact, output=exact.v + network(x_t, t), kind="v")


@pytest.mark.slow
def test_vsd_makes_as_many_assets_as_particles(ball_teacher, in_folder):
    settings = {**tiny(), "method.particles": 2, "method.scale": 2.0, "critic.kind": "copy"}
    with pytest.raises(ValueError, match="VSD trains a critic that starts from .* BallTeacher has none"):
        sds3d.generate("a red ball", teacher=ball_teacher, method="vsd", **settings)
    asset = sds3d.generate("a red ball", teacher=TrainableBall(), method="vsd", **settings)
    names = {p.name for p in asset.path.iterdir()}
    assert {"mesh.glb", "mesh-2.glb", "preview.png", "preview-2.png", "turntable-2.mp4"} <= names
    first, second = Asset.open(asset.path).particles
    assert not torch.equal(first.scene.field.table, second.scene.field.table)
    with pytest.raises(ValueError, match="method.particles is 0; give 1 to 64"):
        sds3d.generate("a red ball", method="vsd", **{"method.particles": 0})
    with pytest.raises(ValueError, match="for images give image.count"):
        sds3d.paint("a red ball", method="vsd", **{"method.particles": 2})


@pytest.mark.slow
def test_dds_edits_a_scene_beside_itself(ball_teacher, in_folder):
    source = sds3d.generate("a red ball", teacher=ball_teacher, **tiny())
    assert not source.path.is_absolute()
    edit = {**tiny(), "source.run": str(source.path), "source.prompt": "a red ball"}
    edited, steps = launch.start(configs.load("a red ball", {"method": "dds", **edit}), ball_teacher)
    assert torch.equal(edited.scene.field.table, source.scene.field.table)
    rows = [step.metrics["g_norm"] for step in steps]
    assert len(rows) == 6 and Asset.open(edited.path).config.source.run == str(source.path.absolute())
    with pytest.raises(ValueError, match="give source.run=outputs"):
        sds3d.generate("a red ball", teacher=ball_teacher, method="dds", **{**edit, "source.run": ""})
    with pytest.raises(ValueError, match="has other sizes"):
        sds3d.generate("a red ball", teacher=ball_teacher, method="dds", **{**edit, "field.levels": 3})
    assert len(list((in_folder / "outputs").iterdir())) == 2  # the refused ones left nothing


def test_a_comparison_is_one_page_and_goes_on_where_it_stopped(oracle, tmp_path):
    layer = own_settings("sds") | {"steps": 20, "image.count": 2}
    wanted = comparing.Comparison(("a disc",), ("sds", "csd"), (0, 1), "image", layer, oracle)
    out = tmp_path / "out"
    rows = comparing.compare(wanted, out)
    first = next(rows)
    rows.close()
    assert first.key == ("a disc", "sds", 0) and not (out / "index.html").exists()
    with pytest.warns(UserWarning, match="1 finished runs, which are kept: was their teacher the MixtureTeacher"):
        entries = list(comparing.compare(wanted, out))
    assert entries[0].run == first.run and torch.equal(entries[0].pictures, first.pictures)
    assert len(list((out / "runs").iterdir())) == 4
    stored = json.loads((out / "results.json").read_text())["runs"]
    assert [(row["method"], row["seed"]) for row in stored] == [("sds", 0), ("sds", 1), ("csd", 0), ("csd", 1)]
    assert stored[0]["figures"]["asked"] == 20 * 2 * 2  # steps, images, branches
    text = (out / "index.html").read_text()
    for said in ("a disc", "teacher evaluations", "colour off", "diversity", "data:image/png;base64"):
        assert said in text
    assert (out / "sheet.png").is_file()
    with pytest.raises(ValueError, match="other settings.*--out"):
        next(comparing.compare(comparing.Comparison(("a disc",), ("sds",), teacher=oracle), out))
    with pytest.raises(ValueError, match="did you mean vsd"):
        comparing.Comparison(("a disc",), ("vds",))
    with pytest.raises(ValueError, match="at least one prompt"):
        comparing.Comparison((), ("sds",))


class Spoilt(MixtureTeacher):
    """Its first answer about a student's images, which are fewer than a comparison's samples, is NaN."""

    judged = 0

    def predict(self, x_t, *arguments, **named):
        answer = super().predict(x_t, *arguments, **named)
        if len(x_t) >= comparing.SAMPLES:
            return answer
        self.judged += 1
        return replace(answer, output=answer.output * float("nan")) if self.judged == 1 else answer


def test_a_run_that_diverges_does_not_end_a_comparison(tmp_path):
    teacher = Spoilt.of_images(pictures(), 0.02, PROMPTS)
    layer = own_settings("sds") | {"steps": 5, "image.count": 2}
    wanted = comparing.Comparison(("a disc",), ("csd", "sds"), (0,), "image", layer, teacher)
    for _ in range(2):
        broken, sound = comparing.compare(wanted, tmp_path / "out")
        assert teacher.judged == 1 + 5  # the second time, all is from what was stored
        assert "CSD: non-finite gradient at step 0" in broken.failure and not broken.figures
        assert not sound.failure and sound.figures["asked"] == 5 * 2 * 2
        found = comparing.summary([broken, sound])
        assert found["csd"]["diverged"] == 1 and found["csd"]["psnr"] is None and found["sds"]["diverged"] is None
    assert "csd; seed 0 diverged: CSD: non-finite" in (tmp_path / "out" / "index.html").read_text()


def test_nothing_is_run_where_a_method_of_a_comparison_lacks_what_it_needs(oracle, tmp_path):
    wanted = comparing.Comparison(("a disc",), ("sds", "dds"), (0,), "image", {"image.size": SIZE}, oracle)
    with pytest.raises(ValueError, match="DDS needs a source"):
        next(comparing.compare(wanted, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_colours_are_those_of_what_is_not_background():
    mean, saturation = comparing.colour_of(pictures()[:1])
    assert torch.allclose(mean, torch.tensor([1.0, 0.0, 0.0])) and float(saturation) == pytest.approx(1.0)
    noisy = 1 - 0.15 * torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    noisy[:, :, 16:48, 16:48] = torch.tensor([0.0, 0.0, 1.0])[:, None, None]  # blue on noise that is nearly white
    mean, saturation = comparing.colour_of(noisy)
    assert torch.allclose(mean, torch.tensor([0.0, 0.0, 1.0]), atol=0.15) and float(saturation) > 0.85
    mean, saturation = comparing.colour_of(torch.ones((2, 3, 4, 4)))
    assert mean.tolist() == [1, 1, 1] and float(saturation) == 0


def test_diversity_is_the_mean_difference_of_pairs_and_coarse_without_what_is_fine():
    flat = torch.stack([torch.full((1, 3, 16, 16), level) for level in (0.0, 0.3, 0.9)])  # three seeds
    found = comparing.diversity_of(flat)
    assert found["diversity"] == pytest.approx((0.3 + 0.6 + 0.9) / 3) and found["coarse"] == pytest.approx(0.6)
    chequered = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    boards = [board.expand(1, 3, 16, 16) for board in (chequered, 1 - chequered)]
    found = comparing.diversity_of(torch.stack(boards).float())
    assert found["diversity"] == pytest.approx(1) and found["coarse"] == pytest.approx(0)
    assert comparing.diversity_of(flat[:1]) == {"diversity": None, "coarse": None}


def test_the_best_of_a_column_is_bold(tmp_path):
    columns = {"a": page.Figure("A", 1, True), "b": page.Figure("B & C", 0, False), "c": page.Figure("unused", 0, True)}
    rows = [
        page.Row("x <1>", {"a": 1.26, "b": 3.0}),
        page.Row("y", {"a": 1.31, "b": None}, torch.rand((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))),
        page.Row("truth", {"a": 9.0}, reference=True),
    ]
    text = page.write(tmp_path / "p.html", "T", "n", columns, [page.Section("s", rows)]).read_text()
    assert "<b>1.3</b>" in text and text.count("<b>1.3</b>") == 2  # equal as shown
    assert "x &lt;1&gt;" in text and "B &amp; C" in text and "unused" not in text and "<b>3" not in text
    assert ">9.0</td>" in text and "<b>9.0" not in text  # a reference is not the best
    assert page.contact_sheet(tmp_path / "s.png", [page.Section("s", rows)]).is_file()


def test_a_scene_and_an_image_are_told_apart_by_their_config():
    scene, image = configs.load("a mug"), configs.load("a mug", kind=PaintConfig)
    assert isinstance(scene, Config) and isinstance(image, PaintConfig)
    assert "pixels" in image.optim.lr and "grid" in scene.optim.lr
    assert image.time == configs.load("a mug", {"steps": image.steps}).time  # the recipe's
    assert build.build_student(image).images().shape == (4, 3, 64, 64)


@pytest.mark.parametrize(("name", "iou"), [("sds", 0.88), pytest.param("sdi", 0.8, marks=pytest.mark.slow)])
def test_a_method_makes_the_scene_whose_views_the_oracle_knows(name, iou, in_folder):
    """The oracle is an exact mixture of 72 true views of a mug with their cameras; nobody tells it the shape.

    The field is a density: in so few steps a signed distance, whose skin must shrink first, reaches 0.873, 0.870 and
    0.863 with SDS. With a density seeds 0, 1 and 2 reached 0.906, 0.893 and 0.889 with SDS, 0.814, 0.801 and 0.812 with
    SDI. The bounds are what seed 0 reached less three and two standard deviations between them.
    """
    toy = toybox.parse("a red mug with a white handle")
    cameras = cam.cat([cam.orbit(24, elevation=elevation) for elevation in (0, 20, 40)])
    views, _ = toy.render(cameras, 24)
    teacher = MixtureTeacher.of_images(views, 0.02, {"a mug": [1.0] * 72}, cameras)
    config = configs.load(
        "a mug",
        {"method": name, "method.scale": 1.0, "steps": 100, "render.resolution": 24, "render.samples": 24},
        {"camera.elevation": [0, 40], "field.kind": "density"},
        {"time.t_min": [0, 0.8, 0.05, 100], "time.t_max": [0, 0.98, 0.3, 100], "weight": "x0"},
    )
    asset, steps = launch.start(config, teacher)
    for _ in steps:
        pass
    seen = asset.scene.render_view(unseen_views(), 24)
    _, truth = toy.render(unseen_views(), 24)
    reached = float(silhouette_iou(seen.opacity, truth).mean())
    assert reached > iou, reached


@pytest.mark.slow
def test_an_edit_may_have_another_background_than_its_source(ball_teacher, in_folder):
    source = sds3d.generate("a red ball", teacher=ball_teacher, **tiny())
    edit = {**tiny(), "source.run": str(source.path), "source.prompt": "a red ball", "render.background": "#ff0000"}
    _, steps = launch.start(configs.load("a red ball", {"method": "dds", **edit}), ball_teacher)
    assert next(steps).step == 1
    steps.close()


def test_overrides_of_a_method_and_of_its_settings_meet():
    for texts in (["method=vsd", "method.particles=2"], ["method.particles=2", "method=vsd"]):
        assert configs.load("a ball", configs.parse_overrides(texts)).method.particles == 2


@dataclass
class Greedy(BallTeacher):
    """Fails in one of its answers, as where memory ends."""

    error: Exception = field(default_factory=lambda: torch.OutOfMemoryError("tried to allocate 9 GiB"))
    after: int = 2  # answers

    def predict(self, *arguments, **named):
        if len(self.asked) == self.after:
            raise self.error
        return super().predict(*arguments, **named)


@pytest.mark.parametrize(
    ("kind", "error", "lower"),
    [
        (Config, torch.OutOfMemoryError("tried to allocate 9 GiB"), "render.chunk .*, render.views, render.resolution"),
        (PaintConfig, RuntimeError("DefaultCPUAllocator: not enough memory"), "image.count"),
    ],
)
def test_out_of_memory_names_the_settings_to_lower(in_folder, kind, error, lower):
    config = configs.load("a ball", {"device": "cpu"}, tiny() if kind is Config else {}, kind=kind)
    _, steps = launch.start(config, Greedy(error=error, after=0))
    with pytest.raises(ValueError, match=f"out of memory on cpu; lower {lower}.*{error}"):
        next(steps)


@pytest.mark.parametrize(
    ("told", "settings"),
    [
        ({}, ["critic.kind=lora", "critic.checkpointing=true", "generator.batch=32"]),
        ({"method": "dmd", "critic.checkpointing": True}, ["critic.kind=lora", "generator.batch=32", "pairs.batch=32"]),
        ({"method": "dmd2"}, ["critic.checkpointing=true", "generator.batch=32"]),
    ],
)
def test_what_a_generator_from_a_pipeline_can_save(told, settings):
    config = configs.load(None, {"teacher.name": "a/b", "generator.batch": 64, **told}, kind=DistillConfig)
    assert [saving.setting for saving in kinds.of(config).savings(config, 0)] == settings


SAVED_OFTEN = {"log.save_every": 1, "log.picture_every": 0, "device": "cpu", "method": "sds", "steps": 4}


def until_full(made, steps) -> str:
    """What a run says whose memory ends in its third step."""
    assert [next(steps).step, next(steps).step] == [1, 2]
    with pytest.raises(ValueError) as error:
        next(steps)
    assert made.run.load_checkpoint()["step"] == 2
    return str(error.value)


def test_out_of_memory_leaves_a_checkpoint_and_the_command_that_goes_on(in_folder):
    """From the checkpoint of the step before, with those of the settings that leave the run what it is."""
    teacher, now = Greedy(), "render.chunk=4096"
    made, steps = launch.start(configs.load("a ball", tiny(), SAVED_OFTEN), teacher)
    said = until_full(made, steps)
    assert f"{made.run.checkpoint} is safe: go on with sds3d resume {made.path} {now}" in said
    teacher.after = -1
    again, rest = launch.resume(made.path, configs.parse_overrides([now]), teacher)
    assert [step.step for step in rest] == [3, 4] and again.config.render.chunk == 4096


def test_out_of_memory_with_a_pipeline_names_what_its_teacher_can_save(tmp_path, in_folder):
    """Three settings, the most effective first, each with what it costs."""
    calls, now = [], "teacher.hf.checkpointing=true"

    def full(module, given):
        if isinstance(module, UNet2DConditionModel):
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    settings = {"teacher.name": str(tiny_pipelines.build("sd", tmp_path / "model"))}
    settings |= {"teacher.hf.checkpointing": False, "teacher.hf.cache": str(tmp_path / "prompts")}
    made, steps = launch.start(configs.load("a red ball", tiny(), SAVED_OFTEN, settings))
    hook = register_module_forward_pre_hook(full)
    try:
        said = until_full(made, steps)
    finally:
        hook.remove()
    assert f"{made.run.checkpoint} is safe: go on with sds3d resume {made.path} {now}" in said
    places = [said.index(f"{key} (") for key in (now, "teacher.hf.slicing=true", "teacher.hf.offload=true")]
    assert places == sorted(places) and said.count(" (") == 3
    again, rest = launch.resume(made.path, configs.parse_overrides([now]))
    assert [step.step for step in rest] == [3, 4] and again.config.teacher.hf.checkpointing


def test_out_of_memory_before_anything_was_saved_says_so(in_folder):
    _, steps = launch.start(configs.load("a ball", tiny(), {"device": "cpu", "method": "sds"}), Greedy(after=0))
    with pytest.raises(ValueError, match="Nothing was saved yet"):
        next(steps)


def test_other_errors_stay_what_they_are(in_folder):
    teacher = Greedy(error=RuntimeError("something else"), after=0)
    _, steps = launch.start(configs.load("a ball", tiny(), kind=Config), teacher)
    with pytest.raises(RuntimeError, match="something else"):
        next(steps)


def test_a_deterministic_run_leaves_no_trace(ball_teacher, in_folder, monkeypatch):
    """On a GPU, while it runs; a CPU is left alone."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with launch.repeatable(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    _, steps = launch.start(configs.load("a ball", tiny(), {"deterministic": True}, kind=Config), ball_teacher)
    assert next(steps).step == 1 and not torch.are_deterministic_algorithms_enabled()
    steps.close()
