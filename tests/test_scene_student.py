"""The scene as a student: the same draws from the same seed, gradients everywhere, state, backgrounds, mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sds3d import ops
from sds3d.cameras import CameraRanges, orbit
from sds3d.export.mesh import extract
from sds3d.export.settings import MeshConfig
from sds3d.export.source import Source
from sds3d.runtime.ramp import Ramp
from sds3d.students.representation import Shading
from sds3d.students.scene.field import FieldConfig
from sds3d.students.scene.occupancy import OccupancyConfig
from sds3d.students.scene.regularisers import RegulariserConfig
from sds3d.students.scene.student import BACKGROUNDS, RenderConfig, SceneConfig, SceneStudent

BACKEND = ops.choose("cpu", "torch")
SMALL = FieldConfig(levels=4, log2_table=10, base=4, finest=32, hidden=16)
VIEWS = orbit(3, elevation=20.0, start=40.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(backend=BACKEND, **render_options) -> SceneStudent:
    regularise = RegulariserConfig(*(Ramp.constant(1.0) for _ in range(6)))
    config = SceneConfig(
        field=SMALL,
        regularise=regularise,
        render=RenderConfig(**{"views": 2, "resolution": 12, "samples": 24} | render_options),
    )
    return SceneStudent(config, seeded(), lambda cameras, where: [f"mug on {where}"] * len(cameras), backend=backend)


def test_student_draws_the_same_with_the_same_seed_and_learns():
    losses = []
    for _ in range(2):
        student = scene()
        optimiser = torch.optim.Adam(
            [p for group in student.param_groups().values() for p in group], lr=1e-2, eps=1e-15
        )
        generator = seeded(5)
        for step in range(4):
            draw = student.draw(step, generator)
            loss = (draw.images - torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)).square().mean()
            optimiser.zero_grad()
            (loss + sum(0.0 * value for value in student.regularisers().values())).backward()
            optimiser.step()
            student.after_step(step, generator)
            losses.append(loss.item())
    assert losses[:4] == losses[4:] and losses[3] < 0.99 * losses[0]


def test_images_grow_at_their_steps():
    student = scene(resolution=((0, 12), (3, 16), (5, 20)))
    assert [student.draw(step, seeded()).images.shape[-1] for step in range(7)] == [12, 12, 12, 16, 16, 20, 20]
    assert student.render_view(VIEWS).rgb.shape[-1] == 20


def test_a_render_grown_since_the_last_asks_for_room_again(monkeypatch):
    """Where the samples are not counted before they are packed, room that was learnt at 12 pixels loses those of 48."""
    monkeypatch.setattr(SceneStudent, "_asks", lambda self: False)
    grown = scene(resolution=((0, 12), (3, 48)))
    for step in range(3):
        grown.draw(step, seeded(step))
    assert torch.equal(grown.draw(3, seeded(3)).images, scene(resolution=48).draw(3, seeded(3)).images)


def test_student_regularisers_have_gradients_and_parameters_have_groups():
    student = scene()
    draw = student.draw(0, seeded(1))
    assert (
        draw.images.shape == (2, 3, 12, 12) and draw.prompts == ["mug on white"] * 2 and draw.group.tolist() == [0, 0]
    )
    values = student.regularisers()
    names = {"sparsity", "opacity_entropy", "orientation", "total_variation", "distortion", "margin", "opacity"}
    assert set(values) == names and all(torch.isfinite(v) for v in values.values())
    for name, value in values.items():
        if name != "opacity":
            student.zero_grad()
            value.backward(retain_graph=True)
            assert (student.field.table.grad.abs().max() > 0) == (name != "margin"), (
                name
            )  # the blob is far from the faces
    grouped = {id(p) for group in student.param_groups().values() for p in group}
    assert grouped == {id(p) for p in student.parameters()}
    learned = scene(background="learned")
    learned.draw(0, seeded()).images.sum().backward()
    assert learned.param_groups()["background"][0].grad.abs().max() > 0
    assert all(p.grad is not None for p in learned.parameters())


def test_student_state_round_trip():
    student, other = scene(), scene()
    with torch.no_grad():
        student.field.table.add_(torch.randn(student.field.table.shape, generator=seeded(8)))
    student.after_step(7, seeded())
    assert not torch.equal(student.render_view(VIEWS).rgb, other.render_view(VIEWS).rgb)
    other.load_state_dict(student.state_dict())
    assert torch.equal(student.render_view(VIEWS).rgb, other.render_view(VIEWS).rgb)
    assert student.render_view(VIEWS, 20, normals=True).normal.shape == (3, 3, 20, 20)


def sdf(field: FieldConfig = replace(SMALL, kind="sdf", width=Ramp(0, 0.1, 0.02, 10)), **weights) -> SceneStudent:
    regularise = RegulariserConfig(**{name: Ramp.constant(1.0) for name in weights})
    config = SceneConfig(field, regularise=regularise, render=RenderConfig(views=2, resolution=12, samples=24))
    return SceneStudent(config, seeded(), backend=BACKEND)


def test_an_sdf_learns_and_its_state_keeps_the_width():
    student, other = sdf(lambda_eikonal=1, lambda_smooth_normals=1), sdf()
    for step in (0, 10):
        loss = (
            (student.draw(step, seeded(step)).images - torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)).square().mean()
        )
        kept = student.regularisers()
        assert {"eikonal", "smooth_normals"} < set(kept)
        (loss + kept["eikonal"] + kept["smooth_normals"]).backward()
        assert all(p.grad.isfinite().all() for p in student.parameters())
        with torch.no_grad():
            for p in student.parameters():
                p -= 0.1 * p.grad
        student.after_step(step + 7, seeded())
    other.load_state_dict(student.state_dict())
    assert other.field.width.item() == pytest.approx(0.02)
    assert torch.equal(student.render_view(VIEWS, normals=True).normal, other.render_view(VIEWS, normals=True).normal)
    assert other.density(torch.zeros(1, 3)).item() == pytest.approx(1 / 0.02, rel=1e-3)


def test_kinds_of_fields_do_not_share_states():
    """A density's state is as it was before there were others; of an SDF it has a width more."""
    assert set(sdf().state_dict()) - set(scene().state_dict()) == {"field.width"}


def test_a_mesh_of_an_sdf_lies_where_the_distance_is_zero():
    """The level that agrees best with its silhouettes is nearly the same: they lie at the surface, too."""
    student = sdf(replace(SMALL, kind="sdf", width=Ramp.constant(0.02)))

    def view(cameras, size):
        out = student.render_view(cameras, size)
        return out.rgb, out.opacity

    assert student.surface_density == pytest.approx(25.0) and scene().surface_density is None
    source = Source(student.density, student.colours, view, detail=student.detail)
    for level in (student.surface_density, None):
        skin = extract(replace(source, level=level), MeshConfig(resolution=64))
        radius = torch.as_tensor(skin.vertices).norm(dim=-1)
        assert radius.min() > 0.492 and radius.max() < 0.506, (skin.level, radius.min(), radius.max())


def test_a_checkpoint_renders_alike_in_both_cpu_backends():
    pytest.importorskip("numba")
    student, other = scene(), scene(ops.choose("cpu", "numba"))
    with torch.no_grad():
        student.field.table.add_(0.1 * torch.randn(student.field.table.shape, generator=seeded(8)))
    other.load_state_dict(student.state_dict())
    grads = []
    for each in (student, other):
        images = each.draw(0, seeded(3)).images
        (images * torch.rand(images.shape, generator=seeded(4))).sum().backward()
        grads.append((images.detach(), each.field.table.grad))
    (image, grad), (other_image, other_grad) = grads
    # float32; a sample on the edge of a cell may fall on either side of it
    assert (image - other_image).abs().mean() < 1e-4 and (grad - other_grad).norm() < 1e-2 * grad.norm()


def test_random_backgrounds_are_named_and_seen():
    student, generator, seen = scene(background="random"), seeded(2), set()
    for step in range(12):
        draw = student.draw(step, generator)
        seen.add(student.background_name)
        assert draw.images[:, :, 0, 0].allclose(
            torch.tensor(BACKGROUNDS[student.background_name]).expand(2, 3), atol=0.02
        )
        assert draw.prompts[0] == f"mug on {student.background_name}"
    assert seen == set(BACKGROUNDS)
    student.render_view(VIEWS)
    plain = scene(background="#ff8000").render_view(VIEWS).rgb[0, :, 0, 0]
    assert plain.allclose(torch.tensor([1.0, 128 / 255, 0.0]), atol=0.02)


def test_mixed_shading_starts_late():
    student = scene(shading="mixed", shading_start=2)
    kinds = [student._shading(step, VIEWS, seeded(step)).kind for step in range(40)]
    assert set(kinds[:2]) == {"albedo"} and set(kinds[2:]) == {"albedo", "lambertian", "textureless"}
    student.draw(5, seeded()).images.sum().backward()
    assert student.field.table.grad.abs().max() > 0


def test_a_scene_that_has_died_still_goes_backward():
    student = scene()
    with torch.no_grad():
        student.field.b2[0] = -200.0
    student.occupancy.cells.zero_()
    student.occupancy.ema.zero_()
    draw = student.draw(0, seeded())
    (draw.images.sum() + sum(student.regularisers().values())).backward()
    assert torch.equal(draw.images.detach(), torch.ones(2, 3, 12, 12)) and student.field.table.grad.abs().max() == 0
    student.after_step(7, seeded())
    assert student.occupancy.cells.all()


def test_density_and_colours_for_the_mesh():
    student = scene()
    points = torch.tensor([[0.0, 0.0, 0.0], [0.95, 0.95, 0.95], [1.2, 0.0, 0.0]])
    density = student.density(points)
    assert density[0] == pytest.approx(10, abs=0.01) and density[1:].tolist() == [0, 0]
    assert student.colours(points).allclose(torch.full((3, 3), 0.5), atol=1e-3)


@pytest.mark.parametrize(
    "build",
    [
        lambda: RenderConfig(views=0),
        lambda: RenderConfig(resolution=100000),
        lambda: RenderConfig(shading="phong"),
        lambda: RenderConfig(ambient=2.0),
        lambda: RenderConfig(dark=0.0),
        lambda: OccupancyConfig(resolution=2),
        lambda: OccupancyConfig(rim=0.0),
        lambda: FieldConfig(density_gain=0.0),
        lambda: FieldConfig(hidden=0),
        lambda: FieldConfig(kind="mesh"),
        lambda: FieldConfig(normals="smooth"),
        lambda: FieldConfig(kind="sdf", distance_gain=0.0),
        lambda: FieldConfig(kind="sdf", width=Ramp.constant(0.0)),
        lambda: SceneConfig(regularise=RegulariserConfig(lambda_eikonal=Ramp.constant(1.0))),
        lambda: FieldConfig(blob_radius=0.0),
        lambda: scene(background="mauve"),
        lambda: scene(background="#12"),
        lambda: Shading("phong"),
        lambda: CameraRanges(elevation=(60.0, -20.0)),
    ],
)
def test_mistakes_are_told(build):
    with pytest.raises(ValueError, match="give one of|; give|as #ffffff"):
        build()


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("sdf", {"density_gain": 1.0}),
        ("sdf", {"blob_strength": 5.0}),
        ("density", {"distance_gain": 0.1}),
        ("density", {"width": Ramp.constant(0.1)}),
    ],
)
def test_settings_of_the_other_kind_are_refused(kind: str, setting: dict):
    with pytest.raises(
        ValueError, match=f"field.{next(iter(setting))} is for field.kind=.*and field.kind is {kind}; leave"
    ):
        FieldConfig(kind=kind, **setting)


def test_a_scene_that_never_asks_for_its_samples_draws_the_same(monkeypatch):
    """As on a GPU: with room for more samples than there are, and in a critic's draws without gradients."""
    asking, guessing = scene(), scene()
    monkeypatch.setattr(guessing, "_asks", lambda: False)
    generators = seeded(1), seeded(1)
    for step in range(4):
        for student, generator in zip((asking, guessing), generators, strict=True):
            with torch.no_grad():
                student.draw(step, generator)
        drawn = [student.draw(step, generator) for student, generator in zip((asking, guessing), generators)]
        torch.testing.assert_close(drawn[1].images, drawn[0].images, rtol=1e-6, atol=1e-6)
        found = [student.regularisers() for student in (asking, guessing)]
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
        for student, draw, kept in zip((asking, guessing), drawn, found):
            (draw.images.sum() + sum(v for v in kept.values() if v.requires_grad)).backward()
            student.after_step(step, seeded(step))
    assert all(room.rows() for room in guessing._rooms.values()) and not any(
        room.rows() for room in asking._rooms.values()
    )
    for one, other in zip(asking.parameters(), guessing.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)
