"""The toybox against closed forms, trimesh's own solids, and its own grammar."""

import math

import pytest
import torch
import trimesh

from sds3d import domains
from sds3d.cameras import Cameras, orbit
from sds3d.data import renders, shapes, toybox
from sds3d.data.captions import CaptionDraw
from sds3d.data.kinds import KINDS, STACKS
from sds3d.data.tracing import BOUND, COVERAGE, LAYERS, LIT, NORMAL, POSITION, UNLIT, part_distances, shade, trace
from sds3d.prompts import COLOURS

ALL = KINDS | STACKS


def volume(solid) -> float:
    """By counting a million random points of the box."""
    points = torch.rand(1_000_000, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return float((solid(points) < 0).float().mean()) * 8


def grid(n: int = 48) -> torch.Tensor:
    axis = (torch.arange(n) + 0.5) / n * 2 - 1
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)


def test_it_is_as_rich_as_promised():
    assert len(KINDS) >= 24 and len(COLOURS) == 12
    assert sum(kind.front for kind in KINDS.values()) >= 8
    assert sum(len(kind.parts) > 1 for kind in KINDS.values()) > len(KINDS) / 2
    assert toybox.parse("a red mug with a white handle").second == "white"
    assert toybox.parse("a green cube on a yellow cylinder").second == "yellow"


@pytest.mark.slow
@pytest.mark.parametrize(
    "solid, reference",
    [
        (shapes.sphere((0.1, 0, 0), 0.6), trimesh.creation.icosphere(5, 0.6).apply_translation((0.1, 0, 0))),
        (
            shapes.box((0, 0.1, 0), (0.5, 0.3, 0.4), 0.0),
            trimesh.creation.box((1, 0.6, 0.8)).apply_translation((0, 0.1, 0)),
        ),
        (
            shapes.cylinder((0, 0, 0.1), 0.4, 0.5, "z", 0.0),
            trimesh.creation.cylinder(0.4, 1, 128).apply_translation((0, 0, 0.1)),
        ),
        (shapes.torus((0, 0, 0), 0.5, 0.2, "z"), trimesh.creation.torus(0.5, 0.2, 128, 64)),
        (
            shapes.capsule((0, 0, -0.3), (0, 0, 0.3), 0.3),
            trimesh.creation.capsule(0.6, 0.3, (64, 64)).apply_translation((0, 0, 0)),
        ),
    ],
    ids=["sphere", "box", "cylinder", "torus", "capsule"],
)
def test_solids_agree_with_trimesh(solid, reference):
    points = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = solid(points)
    clear = distance.abs() > 0.01  # trimesh's surfaces are polyhedra
    inside = torch.from_numpy(reference.contains(points.numpy()))
    assert torch.equal(inside[clear], (distance < 0)[clear])
    assert volume(solid) == pytest.approx(reference.volume, rel=0.02)


def test_frustum_is_an_exact_distance():
    cone = shapes.frustum((0, 0, 0), 0.5, 0.2, 0.3)
    assert volume(cone) == pytest.approx(math.pi * 0.6 / 3 * (0.25 + 0.1 + 0.04), rel=0.02)
    assert cone(torch.tensor([[0.0, 0.5, 0.0], [1.0, -0.3, 0.0]])).tolist() == pytest.approx([0.2, 0.5], abs=1e-6)
    points = grid(16).requires_grad_()
    slope = torch.autograd.grad(cone(points).sum(), points)[0].norm(dim=-1)
    assert slope.median() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_every_kind_fits_and_its_distance_never_overshoots(name):
    points = grid(40)
    distance = part_distances(ALL[name], points).amin(-1)
    assert points[distance < 0].norm(dim=-1).max() < BOUND
    # A sphere tracer may step by the distance: no inside point lies nearer than it says.
    inside, outside = points[distance < 0], points[distance > 0.15][::37]
    gap = torch.cdist(outside, inside).amin(-1)
    said = part_distances(ALL[name], outside).amin(-1)
    assert (said * 0.95 <= gap + 0.02).all()


@pytest.mark.slow
def test_every_part_shows():
    cameras = Cameras(
        torch.tensor([30.0, 210.0]), torch.tensor([25.0, -20.0]), torch.full((2,), 3.0), torch.full((2,), 40.0)
    )
    for name, kind in ALL.items():
        layers = trace(kind, cameras, torch.ones(2))
        assert layers[:, 0].sum() > 5, name
        if kind.second:
            assert layers[:, 1].sum() > 5, f"{name}: {kind.second}"


def test_silhouette_of_a_ball_is_its_disc():
    toy = toybox.parse("a blue ball")
    _, coverage = toy.render(Cameras(*(torch.tensor([v]) for v in (40.0, 20.0, 3.0, 40.0))), 128)
    angle = math.asin(0.65 / 3)
    radius = math.tan(angle) / math.tan(math.radians(20)) * 64
    assert coverage.sum() == pytest.approx(math.pi * radius**2, rel=0.01)


def test_mesh_and_views_are_one_object():
    toy = toybox.parse("a red mug with a white handle")
    mesh = toy.mesh(80)
    assert mesh.is_watertight and mesh.volume > 0
    assert mesh.volume == pytest.approx(volume(toy.sdf), rel=0.03)
    assert mesh.bounds[1][0] > 0.7 and mesh.bounds[0][0] > -0.7  # the handle is on +x
    handle = mesh.visual.vertex_colors[mesh.vertices[:, 0] > 0.6][:, :3]
    assert handle.std(axis=1).mean() < 3  # white, lit


def test_the_front_faces_plus_z():
    images, _ = toybox.parse("a white snowman").render(orbit(2, elevation=0))
    orange = (images[:, 0] - images[:, 2] > 0.4).flatten(1).sum(1)
    assert orange[0] > 4 and orange[1] == 0


def test_captions_parse_and_never_show_what_is_held_out():
    draw = CaptionDraw(torch.Generator().manual_seed(0))
    for i in range(1500):
        name = list(ALL)[i % len(ALL)]
        shown = draw(name, ("small", "", "large")[i % 3])
        assert not toybox.is_held_out(name, shown.main, shown.second)
        toy = toybox.parse(shown.text + ", back view")
        assert toy.name == name and toy.background == shown.background
        if shown.main in shown.text.split(name.split()[0])[0].split():
            assert toy.main == shown.main


def test_held_out_prompts_are_held_out():
    toys = [toybox.parse(p) for p in toybox.HELD_OUT_PROMPTS]
    assert len({t.name for t in toys}) == 12
    assert all(toybox.is_held_out(t.name, t.main, t.second) for t in toys)


def test_what_a_prompt_leaves_unsaid_is_canonical():
    toy = toybox.parse("a small house, side view")
    assert (toy.main, toy.second, toy.scale, toy.background) == ("yellow", "red", 0.75, "")
    assert toybox.parse("red mug").second == "red"
    assert toybox.parse("a red mug on a grey background").background == "grey"


@pytest.mark.parametrize(
    "prompt, told",
    [
        ("a red mugg", "mug"),
        ("a scarlet mug", "not know .scarlet"),
        ("mug red a", "draws"),
        ("a mug with a red roof", "draws"),
    ],
)
def test_what_it_cannot_draw_is_refused(prompt, told):
    with pytest.raises(ValueError, match=told):
        toybox.parse(prompt)


def seen_from(azimuth: float, elevation: float) -> Cameras:
    return Cameras(*(torch.tensor([v]) for v in (azimuth, elevation, 3.0, 40.0)))


def test_a_ball_has_the_depth_and_the_normals_of_a_sphere():
    toy, cameras = toybox.parse("a blue ball"), seen_from(40.0, 20.0)
    depth, normal, hit = toy.surface(cameras, 65)
    assert depth[0, 0, 32, 32] == pytest.approx(3 - 0.65, abs=3e-3)  # straight at the centre
    towards = cameras.positions()[0] / 3
    assert normal[0, :, 32, 32].tolist() == pytest.approx(towards.tolist(), abs=1e-3)
    origins, directions = cameras.rays(65)
    points = (origins + directions * depth.permute(0, 2, 3, 1))[hit[:, 0]]
    assert (points.norm(dim=-1) - 0.65).abs().max() < 4e-3
    assert torch.allclose(normal.permute(0, 2, 3, 1)[hit[:, 0]], points / 0.65, atol=0.02)
    assert not depth[~hit].any() and not normal.permute(0, 2, 3, 1)[~hit[:, 0]].any()


def test_the_domains_show_one_object():
    """Lit colours are the albedo times the shading of the normals; depths are those of its surface."""
    toy, cameras = toybox.parse("a small red cube"), seen_from(30.0, 35.0)
    views = {domain: toy.render(cameras, 64, 1, domain) for domain in domains.WORDS}
    coverage = views["colours"][1]
    assert all(torch.equal(cover, coverage) for _, cover in views.values())
    inside = coverage[0, 0] == 1
    colours, albedo, normals, depths = (views[domain][0][0, :, inside].T for domain in domains.WORDS)
    assert torch.allclose(albedo, torch.tensor(COLOURS["red"]).expand_as(albedo))
    in_world = domains.values(normals) @ cameras.rotations()[0].T
    assert torch.allclose(colours, albedo * shade(in_world)[:, None], atol=1e-5)
    assert (domains.values(normals)[:, 2] > 0).all()  # what is seen faces the camera
    distance = toy.surface(cameras, 64)[0].permute(0, 2, 3, 1)
    origins, directions = cameras.rays(64)
    towards = cameras.positions()[0] / cameras.positions()[0].norm()
    heights = ((origins + distance * directions) @ towards)[0][inside]
    assert torch.allclose(domains.values(depths), heights[:, None].expand(-1, 3), atol=5e-3)
    grey = views["normals"][0][0, :, ~inside]
    assert (grey == 0.5).all() and (views["albedo"][0][0, :, ~inside] == 1).all()


def test_stored_renders_keep_every_layer(tmp_path):
    for _ in renders.build(tmp_path, 20, seed=3, workers=1):
        pass
    store = renders.Renders(tmp_path)
    stored = store.batch(torch.arange(20))
    assert stored.shape == (20, LAYERS, 64, 64)
    missed = (stored[:, COVERAGE] == 0).expand(-1, 3, -1, -1)
    assert not stored[:, NORMAL][missed].any() and not stored[:, POSITION][missed].any()
    whole = stored[:, COVERAGE] == 1  # there the stored vectors are means of four rays'
    towards = store.cameras.positions()[:, :, None, None] - stored[:, POSITION]
    facing = (stored[:, NORMAL] * towards).sum(1, keepdim=True)[whole]
    assert (facing > -0.1).all() and facing.mean() > 1  # a visible surface faces the camera, 3 units away
    back = (stored[:, LIT][:, :1] - stored[:, UNLIT][:, :1] * shade(stored[:, NORMAL].movedim(1, -1))[:, None])[whole]
    assert back.abs().mean() < 0.01  # a ball of one colour: brightness follows from the normals
