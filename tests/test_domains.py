"""Domains: the word of each, what a scene shows in each, whose turn it is, and the truth in the teacher's place."""

from dataclasses import replace

import pytest
import torch
from conftest import BallTeacher

from sds3d import domains, ops
from sds3d.cameras import orbit
from sds3d.config import load as configs
from sds3d.data import toybox
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.core import ScoreObjective
from sds3d.distill.score.bridge import Bridge
from sds3d.distill.score.dds import DDS
from sds3d.distill.score.nfsd import NFSD
from sds3d.distill.score.sds import SDS
from sds3d.evaluate.true_teacher import TrueTeacher
from sds3d.runs import build, launch
from sds3d.runtime.ramp import Ramp
from sds3d.students.base import Draw
from sds3d.students.edited_scene import EditedScene
from sds3d.students.representation import domain_image
from sds3d.students.scene.field import FieldConfig
from sds3d.students.scene.student import RenderConfig, SceneConfig, SceneStudent
from sds3d.students.scene.turns import DomainConfig
from sds3d.teachers import small

HALF = Ramp.constant(0.5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ball_scene(**turns) -> SceneStudent:
    """A new scene: a grey ball, whose density falls from 400 at its centre to 0.69 at 0.5."""
    field = FieldConfig(levels=4, log2_table=10, base=4, finest=32, hidden=16, blob_strength=400.0)
    config = SceneConfig(field, render=RenderConfig(views=2, resolution=32, samples=128), domains=DomainConfig(**turns))
    return SceneStudent(config, seeded(), backend=ops.choose("cpu", "torch"))


def test_each_domain_gets_its_part_of_any_few_steps():
    turns = DomainConfig(normals=Ramp.constant(0.3), depths=Ramp(100, 0.0, 0.4, 200))
    shown = [turns.at(step) for step in range(400)]
    for start in range(0, 100, 20):
        assert abs(shown[start : start + 20].count("normals") - 6) <= 1 and "depths" not in shown[:100]
        late = shown[300 + start : 320 + start]
        assert abs(late.count("normals") - 6) <= 1 and abs(late.count("depths") - 8) <= 1
    assert {DomainConfig("albedo", HALF).at(step) for step in range(9)} == {"albedo", "normals"}


def test_domains_that_a_teacher_does_not_know_have_no_turn(tmp_path):
    turns = DomainConfig("albedo", HALF, Ramp.constant(0.4))
    assert turns.known(domains.WORDS) == turns
    assert turns.known(("colours", "depths")) == DomainConfig("colours", depths=Ramp.constant(0.4))
    layer = {"out": str(tmp_path), "steps": 2, "render": {"resolution": 16}, "domains": {"normals": 0.5}}
    with pytest.warns(UserWarning, match="BallTeacher knows colours only: domains.normals have no effect"):
        asset, steps = launch.start(configs.load("a red ball", layer), teacher=BallTeacher())
    for step in steps:
        assert step.metrics["asked"] == 8
    assert configs.of_run(asset.run.config).domains.normals == Ramp.constant(0.0)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"normals": Ramp.constant(0.6), "depths": HALF}, "add up to 1.1 at step 0"),
        ({"normals": Ramp(0, 0.1, 0.9, 50), "depths": HALF}, "add up to 1.4 at step 50"),
        ({"normals": Ramp.constant(1.5)}, "domains.normals"),
        ({"colours": "lit"}, "give colours or albedo"),
    ],
)
def test_turns_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DomainConfig(**settings)


def test_a_scene_shows_the_surface_of_its_ball():
    """Its depths and normals are those of a sphere."""
    scene, cameras = ball_scene(), orbit(3, elevation=35.0)
    views = scene.render_view(cameras, 32, normals=True)
    solid = (views.opacity > 0.999)[:, 0]
    assert solid.sum() > 200
    heights = domains.values(domain_image(views, cameras, "depths")).permute(0, 2, 3, 1)[solid]
    origins, directions = cameras.rays(32)
    distance = views.depth.permute(0, 2, 3, 1)
    points = (origins + directions * distance)[solid]
    assert points.norm(dim=-1).mean() == pytest.approx(0.46, abs=0.01)  # there tau = 400 (0.5 - r)^2 is ln 2
    seen = domains.values(domain_image(views, cameras, "normals"))
    world = torch.einsum("bij,bjhw->bihw", cameras.rotations(), seen).permute(0, 2, 3, 1)[solid]
    assert torch.cosine_similarity(world, points).min() > 0.98
    assert (seen.permute(0, 2, 3, 1)[solid][:, 2] > 0).all()  # in camera axes: towards the camera
    assert torch.allclose(heights, 0.46 * seen.permute(0, 2, 3, 1)[solid][:, 2:].expand(-1, 3), atol=0.03)
    empty = (views.opacity == 0).expand(-1, 3, -1, -1)
    for domain in domains.SURFACE:
        assert torch.allclose(domain_image(views, cameras, domain)[empty], torch.tensor(0.5))
    assert torch.equal(domain_image(views, cameras, "albedo"), views.rgb)


@pytest.mark.parametrize("domain", domains.SURFACE)
def test_a_draw_of_vectors_moves_the_surface_and_not_the_colours(domain):
    scene = ball_scene(**{domain: Ramp.constant(1.0)}, weight_depths=7.0, weight_normals=7.0)
    before = seeded(3)
    draw = scene.draw(0, before)
    assert draw.domain == domain and draw.weight == 7 and draw.cameras is not None
    draw.images.square().sum().backward()
    for parameter in (scene.field.w2, scene.field.b2):
        assert parameter.grad is not None and not parameter.grad[1:].any()
    assert scene.field.table.grad is not None and scene.field.table.grad.abs().sum() > 0
    again = ball_scene().draw(0, seeded(3))
    assert again.domain == "colours" and torch.equal(again.cameras.azimuth, draw.cameras.azimuth)


def test_images_of_the_surface_may_be_smaller():
    settings = {"normals": HALF, "resolution": 8}
    scene, rng = ball_scene(**settings), seeded()
    drawn = [scene.draw(step, rng) for step in range(4)]
    sides = {draw.domain: draw.images.shape[-1] for draw in drawn}
    assert sides == {"normals": 8, "colours": 32}, sides
    assert ball_scene(normals=HALF, resolution=99).draw(0, rng).images.shape[-1] == 32  # never larger than the others


def test_every_branch_has_the_word_of_the_domain_and_vectors_are_not_guided():
    teacher = BallTeacher()
    objective = ScoreObjective(teacher, SDS(5.0), TimestepSampler(0.5, 0.6), negative="ball blur", surface_scale=1.0)
    images, group = torch.rand(2, 3, 16, 16, generator=seeded()), torch.zeros(2, dtype=torch.long)
    gradients = {}
    for domain, weight in (("albedo", 1.0), ("normals", 1.0), ("normals", 3.0)):
        image = images.clone().requires_grad_()
        result = objective(Draw(image, ["a red ball"] * 2, orbit(2), group, domain=domain, weight=weight), 0, seeded(1))
        result.loss.backward()
        gradients[domain, weight] = image.grad
        q = result.query
        q.predict(q.x_t, q.t, "uncond", "negative", "spoilt", "front view")
    assert teacher.asked[0] == ["a red ball, albedo"] * 2 + ["ball blur, albedo"] * 2
    assert teacher.asked[2] == ["a red ball, normals"] * 2  # one branch: no guidance
    branches = ["normals", "ball blur, normals", "a red ball, ball blur, normals", "a red ball, front view, normals"]
    assert teacher.asked[3][::2] == branches
    assert torch.allclose(gradients["normals", 3.0], 3 * gradients["normals", 1.0], atol=1e-4)


@pytest.mark.network
@pytest.mark.parametrize("domain", ["colours", *domains.SURFACE])
def test_an_edit_without_a_change_has_no_gradient_in_any_domain(domain):
    """So both terms of the difference have the same guidance scale."""
    objective = ScoreObjective(small.load(), DDS(5.0), TimestepSampler(0.5, 0.6), source_prompt="a red mug")
    images = torch.rand(2, 3, 64, 64, generator=seeded())
    draw = Draw(images, ["a red mug"] * 2, orbit(2), torch.zeros(2, dtype=torch.long), source=images, domain=domain)
    noise = torch.randn(2, 3, 64, 64, generator=seeded(1))
    query = objective.query(draw, draw.x(objective.teacher.encode), torch.full((2,), 0.5), noise)
    assert objective.gradient(query).abs().max() < 1e-6


@pytest.mark.network
@pytest.mark.parametrize(
    ("method", "against"),
    [(SDS(5.0), "noise"), (Bridge(5.0, second=9), "noise"), (NFSD(5.0), "negative")],
    ids=["sds", "bridge", "nfsd"],
)
def test_methods_take_the_surface_s_guidance_scale_on_surfaces(method, against):
    """At scale 1 the null prompt has no weight; NFSD asks for it, and its share cancels."""
    time = TimestepSampler(0.5, 0.6)
    objective = ScoreObjective(small.load(), method, time, negative="low quality", surface_scale=1.0)
    x, noise = (torch.randn(2, 3, 64, 64, generator=seeded(seed)) for seed in (0, 1))
    draw = Draw(x, ["a red mug"] * 2, orbit(2), torch.zeros(2, dtype=torch.long), encoded=True, domain="normals")
    query = objective.query(draw, x, torch.full((2,), 0.9), noise)
    expected = query.eps("cond")[0] - (query.noise if against == "noise" else query.eps("negative")[0])
    assert torch.allclose(method(query), expected, atol=1e-4)


def test_the_surface_may_have_its_own_range_of_t():
    time = TimestepSampler(0.9, 1.0)
    settings = DomainConfig(t_min=Ramp(0, 0.8, 0.2, 10))
    sampler = settings.time(time)
    assert sampler == TimestepSampler(Ramp(0, 0.8, 0.2, 10), 1.0) and DomainConfig().time(time) == time
    objective = ScoreObjective(BallTeacher(), SDS(1.0), time, surface_time=replace(sampler, t_max=0.8))
    images, group = torch.rand(64, 3, 16, 16, generator=seeded()), torch.arange(64)
    for domain, low, high in (("normals", 0.2, 0.8), ("colours", 0.9, 1.0)):
        draw = Draw(images, ["a red ball"] * 64, orbit(64), group, domain=domain)
        t = objective.time_of(draw, 10, seeded())
        assert low <= t.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < t.max() <= high
    with pytest.raises(ValueError, match="domains.t_min and domains.t_max, or those of time .* t_min .0.9. is above"):
        DomainConfig(t_max=Ramp.constant(0.5)).time(time)


def test_an_edited_scene_shows_its_source_in_the_same_domain():
    edited = EditedScene(ball_scene(normals=Ramp.constant(1.0)), ball_scene())
    draw = edited.draw(0, seeded(2))
    assert draw.domain == "normals" and draw.source is not None
    assert (draw.source - draw.images).abs().mean() < 0.01  # the same ball; one render is jittered


def test_the_packaged_teacher_lets_another_answer_for_what_it_has_no_words_for():
    packaged = small.load()
    assert packaged.domains == tuple(domains.WORDS) and packaged.answerer("colours") is packaged
    surface = packaged.answerer("normals")
    assert surface is packaged.answerer("depths") is packaged.answerer("albedo") is not packaged
    assert surface.fingerprint == small.load(small.packaged("surface")).fingerprint
    assert surface.views == packaged.views and surface.sizes == packaged.sizes == (64,)
    assert {*surface.vocabulary} - {*packaged.vocabulary} == {"albedo", "normals", "depths"}
    assert small.load(views="words").answerer("normals").views == "words"


def test_a_critic_starts_from_the_teacher_that_knows_all_that_the_scene_shows():
    teacher = small.load()
    for share, start in ((0.0, teacher), (0.2, teacher.answerer("depths"))):
        config = configs.load("a red mug", {"method": "vsd", "domains": {"normals": share, "depths": share}})
        assert build.build_critic(config, teacher).teacher is start


def test_a_teacher_knows_the_domains_of_its_words():
    packaged = small.load()
    known = (*packaged.vocabulary, "normals")
    assert small.SmallTeacher(packaged.unet, packaged.text, known).domains[:1] == ("colours",)
    assert "normals" in small.SmallTeacher(packaged.unet, packaged.text, known).domains
    assert small.SmallTeacher(packaged.unet, packaged.text, ("a", "mug")).domains == ("colours",)


def test_the_true_teacher_answers_each_prompt_with_its_domain():
    teacher, cameras = TrueTeacher(32), orbit(2, elevation=30.0)
    prompts = ["a red cube", "a red cube, normals", "", "normals"]
    x = torch.randn(4, 3, 32, 32, generator=seeded())
    both = cameras[torch.tensor([0, 1, 0, 1])]
    x0 = teacher.predict(x, torch.full((4,), 0.7), prompts, both).x0
    toy = toybox.parse("a red cube")
    for row, domain in ((0, "colours"), (1, "normals"), (2, "colours"), (3, "normals")):
        true = 2 * toy.render(both[row], 32, domain=domain)[0] - 1
        assert torch.allclose(x0[row], true[0], atol=1e-4)
    with pytest.raises(ValueError, match="needs cameras"):
        teacher.predict(x, torch.full((4,), 0.7), prompts)
    with pytest.raises(ValueError, match="mugg"):
        teacher.check("a red mugg")


@pytest.mark.slow
def test_true_normals_and_depths_mend_the_surface(tmp_path):
    """Colours alone leave a cube's surface pitted; the mean cosine of its rendered normals is the measure."""
    cosines = {}
    toy, cameras = toybox.parse("a red cube"), orbit(6, elevation=25.0)
    for part in (0.0, 0.3):
        layer = {"out": str(tmp_path / str(part)), "domains": {"normals": part, "depths": part}}
        asset, steps = launch.start(configs.load("a red cube", layer, {"steps": 120}), teacher=TrueTeacher())
        for _ in steps:
            pass
        views = asset.scene.render_view(cameras, 64, normals=True)
        depth, normals, hit = toy.surface(cameras, 64)
        assert views.normal is not None
        cosines[part] = torch.cosine_similarity(views.normal, normals)[hit[:, 0]].mean().item()
    assert cosines[0.3] > 0.95 and cosines[0.3] > cosines[0.0] + 0.05, cosines
