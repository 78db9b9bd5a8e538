"""A second teacher, or other words, for the steps that show normals."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import BallTeacher

from sds3d.cameras import orbit
from sds3d.config import load as configs
from sds3d.config.schema import PaintConfig
from sds3d.data import toybox
from sds3d.diffusion.noise import Schedule
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.core import ScoreObjective
from sds3d.distill.score.sds import SDS
from sds3d.evaluate.true_teacher import TrueTeacher
from sds3d.runs import launch
from sds3d.runs.memory_estimate import Machine, estimate
from sds3d.students.base import Draw
from sds3d.teachers.base import HFConfig, NormalsConfig, TeacherConfig, answerer, domains_of
from sds3d.teachers.by_domain import ByDomain, Worded
from sds3d.teachers.load import load_by_domain, load_teacher

SCENE = {"render.resolution": 16, "render.views": 2, "domains.normals": 0.5, "device": "cpu"}


def judged(teacher, domain, images):
    """The result of one step of SDS on images of a domain, and the gradient on them."""
    objective = ScoreObjective(teacher, SDS(5.0), TimestepSampler(0.5, 0.6), negative="blurry ball")
    images = images.clone().requires_grad_()
    group = torch.zeros(len(images), dtype=torch.long)
    rng = torch.Generator().manual_seed(1)
    result = objective(Draw(images, ["a red ball"] * len(images), orbit(len(images)), group, domain=domain), 0, rng)
    result.loss.backward()
    return result, images.grad


def test_normals_are_encoded_noised_and_judged_by_the_second_teacher_alone():
    first, second = BallTeacher(), BallTeacher(colour=(0.5, 0.5, 1.0), image_size=8, shape=(3, 8, 8))
    second.schedule = Schedule.linear()
    both, images = ByDomain(first, second), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for domain, alone, other in (("colours", first, second), ("normals", second, first)):
        result, gradient = judged(both, domain, images)
        assert result.query.x.shape[1:] == alone.shape and not other.asked
        expected = judged(alone, "colours", images)
        assert torch.equal(gradient, expected[1])  # the same images, by it alone
        assert both.teacher is first and both.normals is second
        first.asked.clear()
        second.asked.clear()


def test_words_stand_before_every_prompt_about_normals_and_stay_in_the_null_prompt():
    teacher = BallTeacher()
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for words, told in (("normal map of", "normal map of "), ("", "")):
        both = ByDomain(teacher, words=words)
        result, _ = judged(both, "normals", images)
        q = result.query
        q.predict(q.x_t, q.t, "uncond", "negative", "spoilt", "front view")
        assert teacher.asked[-1] == [
            told.strip(), f"{told}blurry ball", f"{told}a red ball, blurry ball", f"{told}a red ball, front view",
        ]  # fmt: skip
        judged(both, "colours", images)
        assert teacher.asked[-1] == ["a red ball", "blurry ball"]
        assert domains_of(both) == ("colours", "normals")
    knows = TrueTeacher(16)
    assert answerer(ByDomain(teacher, knows), "normals") is knows  # its own word, as it is
    assert isinstance(answerer(ByDomain(teacher, knows, "normal map of"), "normals"), Worded)
    assert answerer(teacher, "normals") is teacher


def test_a_prompt_that_the_second_teacher_cannot_read_is_refused():
    with pytest.raises(ValueError, match="the teacher of normals: .*mugg"):
        ByDomain(tiny("a red mugg"), TrueTeacher(16)).check("a red mugg")


def tiny(prompt):
    """A teacher that reads this prompt only."""
    teacher = BallTeacher()
    teacher.check = lambda text: None if text == prompt else pytest.fail(text)
    return teacher


class TrueColours(TrueTeacher):
    """The true images, of colours only."""

    domains = ("colours",)


@pytest.mark.slow
def test_the_truth_that_answers_for_normals_only_mends_the_surface(tmp_path):
    """True colours alone leave a cube's surface pitted; the mean cosine of its rendered normals is the measure."""
    cosines, cameras, toy = {}, orbit(6, elevation=25.0), toybox.parse("a red cube")
    for part in (0.0, 0.4):
        teacher = ByDomain(TrueColours(32), TrueTeacher(64))
        settings = ("steps=100", "render.views=4", "render.resolution=32", f"domains.normals={part}")
        asset, steps = started("a red cube", tmp_path / str(part), *settings, teacher=teacher)
        for _ in steps:
            pass
        views = asset.scene.render_view(cameras, 32, normals=True)
        _, normals, hit = toy.surface(cameras, 32)
        cosines[part] = torch.cosine_similarity(views.normal, normals)[hit[:, 0]].mean().item()
    assert cosines[0.4] > 0.95 and cosines[0.4] > cosines[0.0] + 0.05, cosines


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two tiny pipelines: one in the space of a VAE, one in pixels."""
    folder = tmp_path_factory.mktemp("pipelines")
    return {name: tiny_pipelines.build(name, folder / name) for name in ("sd", "if")}


def started(prompt, folder, *overrides, teacher=None):
    layer = configs.parse_overrides([f"out={folder}", *(f"{key}={value}" for key, value in SCENE.items()), *overrides])
    return launch.start(configs.load(prompt, layer), teacher)


def test_two_pipelines_of_other_spaces_teach_one_scene(folders, tmp_path):
    asset, steps = started(
        "a red mug", tmp_path, f"teacher.name={folders['sd']}", f"teacher.normals.name={folders['if']}",
        "teacher.normals.words=normal map of", f"teacher.hf.cache={tmp_path / 'cache'}", "steps=4",
    )  # fmt: skip
    assert len(list(steps)) == 4
    stored = configs.of_run(asset.run.config)
    assert stored.teacher.normals == NormalsConfig(str(folders["if"].resolve()), "normal map of")
    assert stored.domains.normals(0) == 0.5  # the pair knows normals, so no step falls away
    loaded = load_by_domain(stored.teacher, "cpu")
    assert isinstance(loaded, ByDomain)
    assert len(loaded.shape) == len(answerer(loaded, "normals").shape) == 3
    assert loaded.shape != answerer(loaded, "normals").shape


def test_a_packaged_teacher_beside_a_pipeline_has_no_settings_of_pipelines(folders, tmp_path):
    hf = HFConfig(cache=str(tmp_path / "cache"), slicing=True)
    loaded = load_by_domain(TeacherConfig("small", hf=hf, normals=NormalsConfig(str(folders["sd"]))), "cpu")
    assert loaded.image_size == 64 and answerer(loaded, "normals").shape != loaded.shape
    alone = TeacherConfig("small", hf=hf, normals=NormalsConfig("digits"))
    with pytest.raises(ValueError, match="teacher.hf and float16 are for diffusers pipelines"):
        load_by_domain(alone, "cpu")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["teacher.normals.name=nowhere.safetensors"], "teacher.normals.name: teacher 'nowhere.saf.* is neither"),
        (["teacher.normals.name=digits"], "the teacher digits knows neither cameras nor view words"),
        (["teacher.normals.words=normal map of"], "the teacher of normals: .*map"),
        (["teacher.normals.name=small", "domains.normals=0"], "no step shows them: give domains.normals=0.3"),
        (["teacher.normals.name=small", "method=vsd"], "trains a critic in the space and words of one teacher"),
    ],
)
def test_mistakes_about_the_teacher_of_normals_are_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        started("a red mug", tmp_path, *overrides)
    assert not list(tmp_path.iterdir())


def test_a_second_teacher_without_views_is_refused_by_its_name(tmp_path):
    second = BallTeacher(views="words")
    second.vocabulary = ("a", "red", "ball")
    layer = configs.parse_overrides([f"out={tmp_path}", "domains.normals=0.5"])
    with pytest.raises(ValueError, match="the teacher BallTeacher knows neither cameras nor view words"):
        launch.start(configs.load("a red ball", layer), ByDomain(BallTeacher(), second))


def test_the_teacher_of_normals_is_for_scenes(tmp_path):
    layer = configs.parse_overrides([f"out={tmp_path}", "teacher.normals.name=small"])
    for start in (
        lambda: launch.start(configs.load("a red mug", layer, kind=PaintConfig)),
        lambda: load_teacher(replace(TeacherConfig(), normals=NormalsConfig("small"))),
        lambda: estimate(configs.load("a red mug", layer), Machine("cpu", 2**34, False)),
    ):
        with pytest.raises(ValueError, match="leave teacher.normals"):
            start()
