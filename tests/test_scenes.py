"""Scenes: renders against analytic solids, regularisers against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sds3d import ops
from sds3d.cameras import Cameras, Poses, orbit
from sds3d.ops import Samples
from sds3d.runtime.ramp import Ramp
from sds3d.students.representation import Shading
from sds3d.students.scene import regularisers
from sds3d.students.scene.field import Field, FieldConfig, LearnedBackground
from sds3d.students.scene.occupancy import Occupancy, OccupancyConfig
from sds3d.students.scene.render import RenderOptions, Trace, crossings, lead, render
from sds3d.students.scene.sample_budget import SampleBudget, rays_at_a_time

BACKEND = ops.choose("cpu", "torch")
SMALL = FieldConfig(levels=4, log2_table=10, base=4, finest=32, hidden=16)
WHITE = torch.ones(3)
VIEWS = Cameras(
    *(torch.tensor(x) for x in ([0.0, 70.0, 200.0], [0.0, 35.0, -20.0], [3.0, 2.8, 3.3], [40.0, 45.0, 38.0]))
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Solid:
    """A field of constant density inside a shape, red where x > 0 and blue elsewhere."""

    backend, width = BACKEND, None

    def __init__(self, inside, sigma: float):
        self.inside, self.sigma = inside, sigma

    def density(self, points):
        return self.inside(points).float() * self.sigma

    def __call__(self, points):
        red = (points[:, :1] > 0).float()
        return self.density(points), torch.cat([red, torch.zeros_like(red), 1 - red], -1)

    def normals(self, points):
        return torch.nn.functional.normalize(points, dim=-1)


def sphere(radius: float, sigma: float) -> Solid:
    return Solid(lambda p: p.norm(dim=-1) < radius, sigma)


def everywhere(step: float = 0.02) -> Occupancy:
    return Occupancy(OccupancyConfig(), step)  # all cells are occupied until the first update


def chords(cameras: Cameras, resolution: int, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each ray enters a centred sphere and how long it stays, both (B, 1, H, W); 0 where it misses."""
    origins, directions = cameras.rays(resolution)
    along = -(origins * directions).sum(-1)
    half = (radius**2 - (origins.square().sum(-1) - along.square())).clamp_min(0).sqrt()
    return torch.where(half > 0, along - half, 0.0)[:, None], 2 * half[:, None]


@torch.no_grad()
def test_thin_sphere_opacity_follows_beer_lambert():
    step, sigma, radius = 0.01, 1.5, 0.7
    out = render(sphere(radius, sigma), everywhere(), VIEWS, 24, WHITE, RenderOptions(step=step))
    _, chord = chords(VIEWS, 24, radius)
    # each end of the chord is off by at most half a step
    assert (out.opacity - (1 - torch.exp(-sigma * chord))).abs().max() <= sigma * step
    assert out.opacity[chord == 0].abs().max() == 0
    assert torch.equal(out.rgb[:, :, 0, 0], torch.ones(3, 3))


@torch.no_grad()
def test_solid_sphere_silhouette_and_depth():
    step, radius = 0.01, 0.6
    out = render(sphere(radius, 2000.0), everywhere(), VIEWS, 32, WHITE, RenderOptions(step=step))
    enter, chord = chords(VIEWS, 32, radius)
    hit = chord > step
    assert out.opacity[hit].min() > 0.999 and out.opacity[chord == 0].max() == 0
    assert (out.depth - enter)[hit].abs().max() <= step / 2 + 1e-3
    assert out.depth[chord == 0].max() == 0


@pytest.mark.parametrize("step", [0.02, 0.0625])
@torch.no_grad()
def test_a_solid_lies_where_its_surface_is_however_long_the_steps(step):
    """A step's samples are moved along their ray at random, and the mean over rays has no bias."""
    errors, cells = [], everywhere()
    cells.ema.fill_(100.0)  # all cells are dense, so that a render with a generator visits them all
    for seed in range(8):
        out = render(sphere(0.6, 2000.0), cells, VIEWS, 32, WHITE, RenderOptions(step=step), seeded(seed))
        enter, chord = chords(VIEWS, 32, 0.6)
        errors.append((out.depth - enter)[chord > step])
    mean = torch.cat(errors).mean()
    assert abs(mean) < 0.002, mean  # without the lead it is half a step


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.5, 8.0, 60.0])
def test_the_depth_of_fog_does_not_depend_on_the_steps(sigma):
    """Light that enters a slab at depth 0 and ends before its end at L ends at 1 / sigma - L / (e^(sigma L) - 1)."""
    ray = (torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[0.0, 0.0, -1.0]]))
    length = 2.0
    truth = 1 + 1 / sigma - length / math.expm1(sigma * length)
    for step in (0.02, 0.25, 1.0):
        samples = BACKEND.march(*ray, torch.ones(8, 8, 8, dtype=torch.bool), step, None)
        density = torch.full_like(samples.t, sigma)
        ends = samples.t - lead(density, samples.dt)
        out = BACKEND.composite(density, samples.dt, ends[:, None], samples.offsets, 1e-9)
        torch.testing.assert_close(out.accumulated[0, 0] / out.opacity[0], torch.tensor(truth), atol=2e-4, rtol=0)


def test_the_lead_of_a_sample_has_the_right_gradient():
    sigma = torch.tensor([0.0, 0.01, 1.5, 1.7, 40.0, 1e6], dtype=torch.float64, requires_grad=True)
    dt = torch.full_like(sigma, 0.0625)
    assert torch.autograd.gradcheck(lambda s: lead(s[1:5], dt[1:5]), sigma)
    (slope,) = torch.autograd.grad(lead(sigma, dt).sum(), sigma)
    assert slope.isfinite().all() and slope[0].item() == pytest.approx(0.0625**2 / 12) and slope[-1] >= 0


@torch.no_grad()
def test_solid_box_silhouette_and_axes():
    low, high = torch.tensor([0.1, -0.5, -0.3]), torch.tensor([0.7, 0.2, 0.4])
    solid = Solid(lambda p: ((p > low) & (p < high)).all(-1), 2000.0)
    out = render(solid, everywhere(), VIEWS, 32, WHITE, RenderOptions(step=0.01))
    origins, directions = VIEWS.rays(32)
    a, b = (low - origins) / directions, (high - origins) / directions
    chord = (torch.maximum(a, b).amin(-1) - torch.minimum(a, b).amax(-1))[:, None]
    assert out.opacity[chord > 0.01].min() > 0.999 and out.opacity[chord <= 0].max() == 0
    assert out.opacity[0, 0, :, :14].max() == 0 and out.opacity[0, 0, :, 20:].max() > 0.99  # seen from +z, +x is right
    assert out.rgb[0][:, out.opacity[0, 0] > 0.999].allclose(torch.tensor([[1.0], [0.0], [0.0]]), atol=2e-3)


@torch.no_grad()
def test_chunks_and_backgrounds_change_nothing_else():
    solid, options = sphere(0.5, 8.0), RenderOptions(step=0.04, normals=True)
    whole = render(solid, everywhere(), VIEWS, 16, WHITE, options)
    parts = render(solid, everywhere(), VIEWS, 16, WHITE, RenderOptions(step=0.04, normals=True, chunk=100))
    for name in ("rgb", "opacity", "depth", "normal"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    colours = torch.rand(3, 3, generator=seeded())
    other = render(solid, everywhere(), VIEWS, 16, colours, options)
    expected = whole.rgb + (1 - whole.opacity) * (colours[:, :, None, None] - 1)
    assert other.rgb.allclose(expected, atol=1e-6)


def test_a_narrow_view_is_the_middle_of_the_square_one():
    square, options = VIEWS[1], RenderOptions(step=0.02, normals=True)
    narrow = Poses(square.positions(), square.rotations(), square.fov, aspect=0.5)
    a, b = (render(sphere(0.8, 50.0), everywhere(), c, 24, WHITE, options) for c in (square, narrow))
    assert b.rgb.shape == (1, 3, 24, 12)
    for name in ("rgb", "opacity", "depth", "normal"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name)[..., 6:18], atol=2e-5, rtol=0)


def test_chunks_with_gradients_give_the_same_and_keep_no_samples():
    """Images, traces and regularisers alike; each chunk's field is asked once more for its gradients."""
    field = Field(SMALL, BACKEND, seeded())
    asked, found = [], []
    field.register_forward_pre_hook(lambda module, points: asked.append(len(points[0])))
    for chunk in (10_000, 100):
        out = render(field, everywhere(), VIEWS, 16, WHITE, RenderOptions(0.1, chunk=chunk, normals=True), seeded())
        kept = regularisers.measure({"sparsity", "margin", "distortion", "orientation"}, field, out.trace, seeded())
        pull = (out.rgb * torch.linspace(0, 1, 16)).sum() + sum(kept.values())
        slopes = torch.autograd.grad(pull, list(field.parameters()))
        found.append((out.rgb, out.depth, *out.trace.samples, out.trace.weights, *kept.values(), *slopes))
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=2e-5, atol=2e-6)
    whole, *chunks = asked
    assert sum(chunks) == 2 * whole and max(chunks) < whole / 4


def test_rays_at_a_time_follow_the_memory():
    assert rays_at_a_time(torch.device("cpu"), 32, 24, 32) > 4 * 64 * 64  # the default recipe is one chunk
    assert rays_at_a_time(torch.device("cpu"), 64, 24, 32) == rays_at_a_time(torch.device("cpu"), 32, 24, 32) // 2


def test_room_follows_the_last_count():
    """With slack; a room that was too small doubles, and a count is looked at once."""

    def seen(count: int, rows: int) -> Samples:
        empty = torch.zeros(rows)
        return Samples(empty, empty, empty, empty, torch.tensor([0, count]))

    room = SampleBudget()
    assert room.rows() is None
    room.saw(seen(10_000, 10_000))
    assert room.rows() == 4 * 4096  # 15,000, rounded up
    room.saw(seen(30_000, 16_384)._replace(offsets=torch.tensor([0, 16_384])))  # cut off
    assert room.rows() == 8 * 4096
    room.saw(seen(9_000, 8 * 4096))
    assert room.rows() == 4 * 4096 and room.rows() == 4 * 4096


@torch.no_grad()
def test_lambertian_sphere_closed_form():
    camera, light = orbit(1, elevation=0), torch.tensor([0.0, 2.0, 2.0])
    shading = Shading("textureless", light=light, ambient=0.2)
    out = render(sphere(0.6, 2000.0), everywhere(), camera, 33, torch.zeros(3), RenderOptions(0.005, shading))
    enter, chord = chords(camera, 33, 0.6)
    origins, directions = camera.rays(33)
    normal = (origins + enter[0, 0, ..., None] * directions) / 0.6
    expected = 0.2 + 0.8 * (normal @ torch.nn.functional.normalize(light, dim=0)).clamp_min(0)
    inner = chord[0, 0] > 0.5
    assert (out.rgb[0, 0] - expected[0])[inner].abs().max() < 0.02  # step / radius
    assert (out.normal[0].permute(1, 2, 0) - normal[0])[inner].abs().max() < 0.02
    lit = render(
        sphere(0.6, 2000.0), everywhere(), camera, 33, torch.zeros(3), RenderOptions(0.005, Shading("lambertian"))
    )
    assert lit.rgb[0, :, 16, 16].sum() == pytest.approx(1.0, abs=0.01)  # a light at the camera, met head-on


def test_new_field_is_a_grey_blob():
    field = Field(SMALL, BACKEND, seeded())
    radii = torch.tensor([0.0, 0.25, 0.5, 0.6, 1.7])
    points = radii[:, None] * torch.tensor([[1.0, 0.0, 0.0]])
    sigma, colour = field(points)
    expected = torch.nn.functional.softplus(10 * (1 - radii / 0.5))
    assert sigma.allclose(expected, atol=1e-3) and colour.allclose(torch.full((5, 3), 0.5), atol=1e-3)


@pytest.mark.parametrize("kind", ["density", "sdf"])
def test_head_gradient_against_finite_differences(kind: str):
    field = Field(replace(SMALL, kind=kind), BACKEND, seeded()).double()
    points = (torch.rand(20, 3, generator=seeded(1)) * 2 - 1).double()
    with torch.no_grad():
        field.table.mul_(1e4)
    weights = torch.randn(20, 4, generator=seeded(2)).double()

    def loss(w1, b1, w2, b2, table):
        state = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "table": table}
        sigma, rgb = torch.func.functional_call(field, state, (points,))
        return (torch.cat([sigma[:, None], rgb], -1) * weights).sum()

    parameters = (field.w1, field.b1, field.w2, field.b2, field.table)
    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)
    assert field(points)[0].allclose(field.density(points), rtol=1e-12)


def test_normals_of_the_blob_point_outwards():
    field = Field(SMALL, BACKEND, seeded())
    points = torch.nn.functional.normalize(torch.randn(50, 3, generator=seeded(2)), dim=-1) * 0.4
    assert (field.normals(points) * points / 0.4).sum(-1).min() > 0.995


def rough(backend: ops.Backend, **settings) -> tuple[Field, torch.Tensor]:
    """A field of float64 whose table says something, and points in the middle of the finest level's cells."""
    field = Field(replace(SMALL, **settings), backend, seeded()).double()
    with torch.no_grad():
        field.table.mul_(1e4)
    scale = field.spec.scales[-1]
    places = (torch.randint(1, int(scale) - 1, (24, 3), generator=seeded(1)) + 0.5 - 0.25) / scale
    return field, (places.double() * 2 - 1)


@pytest.mark.parametrize("kind", ["density", "sdf"])
@pytest.mark.parametrize("name", ["torch", "numba", "triton"])
def test_slope_of_the_field_against_finite_differences(name: str, kind: str):
    """Inside a cell and away from the hidden layer's kinks the density's logit is smooth."""
    field, points = rough(ops.choose("cpu", name), open_levels=Ramp.constant(3.5), kind=kind)
    field.open(0)
    step = 1e-6
    with torch.no_grad():
        shifts = torch.eye(3).double() * step
        wanted = torch.stack([(field.logit(points + s) - field.logit(points - s)) / (2 * step) for s in shifts], -1)
    torch.testing.assert_close(field.slope(points).detach(), wanted, rtol=1e-6, atol=1e-6)
    blob = torch.nn.functional.normalize(points, dim=-1) * field.blob(torch.zeros(1, 3)) / field.config.blob_radius
    assert (wanted + blob).std() > 0.1 * blob.std()  # the table counts, not the blob alone


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_gradients_of_the_normals_against_finite_differences(name: str):
    field, points = rough(ops.choose("cpu", name))

    def normals(table, w1, w2):
        state = {**dict(field.named_parameters()), "table": table, "w1": w1, "w2": w2}
        weights = torch.linspace(-1, 1, points.numel()).double().view_as(points)
        return (
            torch.func.functional_call(_Normals(field), {f"field.{k}": v for k, v in state.items()}, points) * weights
        )

    assert torch.autograd.gradcheck(normals, (field.table, field.w1, field.w2), fast_mode=True)


class _Normals(torch.nn.Module):
    def __init__(self, field: Field):
        super().__init__()
        self.field = field

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.field.normals(points)


@pytest.mark.parametrize("shading", [Shading(), Shading("lambertian"), Shading("textureless")])
def test_faint_samples_need_no_normals(shading: Shading):
    """Images, normals and the orientation regulariser are as with all normals, at a small part of the samples."""
    field = Field(SMALL, BACKEND, seeded())
    with torch.no_grad():
        field.table.normal_(std=0.1, generator=seeded(3))
    asked, outs, away = [], [], []
    options = RenderOptions(0.05, shading, normals=True)
    for chosen in (replace(options, faint=0.0), options):
        out = render(field, everywhere(), VIEWS, 24, WHITE, chosen, seeded())
        asked.append((out.trace.normals.norm(dim=-1) > 0).sum().item())
        outs.append(out)
        away.append(regularisers.orientation(out.trace).item())
    full, some = outs
    assert asked[1] < 0.5 * asked[0]
    assert (some.normal - full.normal).abs().max() < 0.05 and (some.normal - full.normal).abs().mean() < 0.005
    assert (some.rgb - full.rgb).abs().max() < 0.05
    assert away[1] == pytest.approx(away[0], rel=0.1) and away[1] > 0


SDF = replace(SMALL, kind="sdf", width=Ramp(0, 0.1, 0.02, 100))


def test_new_sdf_is_a_ball_of_the_width():
    """Half the largest density at the surface, a tail outside, and the width that the step has."""
    field = Field(SDF, BACKEND, seeded())
    radii = torch.tensor([0.0, 0.4, 0.5, 0.6, 0.7])
    points = radii[:, None] * torch.tensor([[1.0, 0.0, 0.0]])
    for step, width in ((0, 0.1), (50, 0.06), (100, 0.02)):
        field.open(step)
        expected = torch.tensor([1 / (1 + math.exp((r - 0.5) / width)) for r in radii.tolist()]) / width
        sigma, colour = field(points)
        torch.testing.assert_close(sigma, expected, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(field.density(points), sigma)
        assert colour.allclose(torch.full((5, 3), 0.5), atol=1e-3)
    torch.testing.assert_close(field.slope(points[1:]).norm(dim=-1), torch.ones(4), rtol=1e-2, atol=0)
    assert (field.normals(points[1:]) @ torch.tensor([1.0, 0, 0])).min() > 0.999


@torch.no_grad()
def test_a_ball_of_an_sdf_is_drawn_where_it_is():
    field = Field(replace(SDF, width=Ramp.constant(0.005)), BACKEND, seeded())
    out = render(field, everywhere(), VIEWS, 32, WHITE, RenderOptions(step=0.005, normals=True))
    enter, chord = chords(VIEWS, 32, 0.5)
    inner = chord > 0.4
    assert out.opacity[inner].min() > 0.99 and out.opacity[chords(VIEWS, 32, 0.55)[1] == 0].max() < 0.05
    assert (out.depth - enter)[inner].abs().max() < 0.02
    origins, directions = VIEWS.rays(32)
    normal = ((origins + enter[:, 0, ..., None] * directions) / 0.5).permute(0, 3, 1, 2)
    assert (out.normal - normal)[inner.expand(-1, 3, -1, -1)].abs().max() < 0.05


class SignedBox(Solid):
    """The SDF of a cube with half a side of 0.5."""

    def __init__(self, width: float):
        super().__init__(lambda p: p.abs().amax(-1) < 0.5, 1 / width)
        self.width = torch.tensor(width)

    def raw(self, points):
        return 0.5 - points.abs().amax(-1), self(points)[1]


@pytest.mark.parametrize("step", [0.02, 0.0625])
@torch.no_grad()
def test_sides_and_silhouettes_of_an_sdf_agree(step):
    """From the front of a cube, rays graze its sides. They are half gone at the surface, and the front lies at it."""
    cells, far = everywhere(), Cameras(*(torch.tensor([x]) for x in (0.0, 0.0, 30.0, 2.5)))
    cells.ema.fill_(100.0)
    for width in (0.01, 0.03):
        depths, areas = [], []
        for seed in range(8):
            out = render(SignedBox(width), cells, far, 64, WHITE, RenderOptions(step=step), seeded(seed))
            pixel = 2 * 30 * math.tan(math.radians(1.25)) / 64
            areas.append((out.opacity.sum() * pixel**2).item())
            depths.append(out.depth[..., 24:40, 24:40].mean().item() - 29.5)
        area = (30 / 29.5) ** 2  # of the front side, in the plane through the middle
        assert sum(areas) / 8 == pytest.approx(area, abs=0.4 * width), width
        assert abs(sum(depths) / 8) < 0.003, (width, depths)


@pytest.mark.parametrize("kind", ["density", "sdf"])
def test_rows_to_spare_change_no_gradient(kind):
    """A GPU's render allocates more rows than there are samples, with dt = 0."""
    settings = {"width": Ramp.constant(0.03)} if kind == "sdf" else {}
    grads = []
    for spare in (None, 0, 100):
        field = Field(replace(SMALL, kind=kind, **settings), BACKEND, seeded())
        one = Cameras(*(x[:1] for x in (VIEWS.azimuth, VIEWS.elevation, VIEWS.distance, VIEWS.fov)))
        whole = render(field, everywhere(), one, 12, WHITE, RenderOptions(step=0.05))
        assert whole.trace is not None
        capacity = None if spare is None else len(whole.trace.sigma) + spare
        out = render(field, everywhere(), one, 12, WHITE, RenderOptions(step=0.05, capacity=capacity))
        (out.depth.sum() + out.rgb.square().sum() + out.opacity.sum()).backward()
        grads.append([p.grad for p in field.parameters()])
    for other in grads[1:]:
        for ours, theirs in zip(grads[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("slope", [0.005, 0.1, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("width", [0.002, 0.01, 0.1, 1.0, 10.0])
def test_the_crossings_of_an_sdf_against_an_integral(width, slope):
    """The end of the light in a step where the depth below the surface grows evenly, from many places of its begin."""
    for dt in (0.005, 0.0625, 0.25):
        begin = torch.linspace(-0.3, 0.3, 61).double() * max(1.0, width)
        fine = torch.linspace(0, 1, 20_001).double()
        passed = 1 / (1 + torch.exp((begin[:, None] + slope * dt * fine) / width))
        passed = passed / passed[:, :1]
        lost = 1 - passed[:, -1]
        mean = (torch.trapezoid(passed, fine) - passed[:, -1]) / lost * dt  # behind the begin of the step
        pairs = torch.stack([begin, begin + slope * dt], -1).reshape(-1).float()
        rays = torch.arange(len(begin)).repeat_interleave(2)
        t = torch.tensor([1.0, 1.0 + dt]).repeat(len(begin))
        offsets = torch.arange(0, 2 * len(begin) + 1, 2)
        samples = Samples(rays, torch.zeros(len(t), 3), t, torch.full_like(t, dt), offsets)
        sigma, ends = crossings(pairs, samples, torch.tensor(width))
        seen = lost > 0.02
        torch.testing.assert_close((1 - torch.exp(-sigma * dt))[1::2].double(), lost, atol=1e-4, rtol=1e-3)
        assert ((ends[1::2] - 1).double() - mean)[seen].abs().max() < 0.02 * dt if seen.any() else True, (dt, width)


def test_the_crossings_of_an_sdf_have_the_right_gradient():
    samples = Samples(
        torch.tensor([0, 0, 0, 1, 1]),
        torch.zeros(5, 3),
        torch.tensor([1.0, 1.1, 1.2, 0.5, 1.5]).double(),
        torch.full((5,), 0.1).double(),
        torch.tensor([0, 3, 5]),
    )
    inside = torch.tensor([-0.07, 0.01, 0.08, -0.02, 0.03]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crossings(x, samples, torch.tensor(0.02).double()), inside)
    sigma, ends = crossings(inside, samples, torch.tensor(1e-4).double())
    # the second sample's step reaches the surface after 7 of 8 parts; after a gap it is met head-on
    assert ends[1].item() == pytest.approx(1.0 + 0.1 * 7 / 8, abs=1e-3)
    assert ends[4].item() == pytest.approx(1.47, abs=1e-3)
    assert sigma[0] < 1e-6 and sigma[3] < 1e-6 and sigma[2].item() * 0.1 == pytest.approx(0.07 / 1e-4, rel=1e-3)


def test_occupancy_of_an_sdf_follows_its_surface():
    field, grid = Field(SDF, BACKEND, seeded()), Occupancy(OccupancyConfig(grow=0), 1 / 16)
    fractions = []
    for step in (0, 96):
        field.open(step)
        for _ in range(20):
            grid.update(field, 0, seeded(step))
        fractions.append(grid.occupied_fraction())
    reach = [0.5 + width * math.log(1 / (width * grid.threshold) - 1) for width in (0.1, SDF.width(96))]
    for fraction, radius in zip(fractions, reach):
        assert fraction == pytest.approx(4 / 3 * math.pi * radius**3 / 8, rel=0.1)


def test_closed_levels_get_no_gradient_and_give_nothing():
    field = Field(replace(SMALL, open_levels=Ramp(0, 2, 4, 10)), BACKEND, seeded())
    points = torch.rand(64, 3, generator=seeded()) * 2 - 1
    border = field.spec.offsets[2]
    for step, closed in ((0, True), (10, False)):
        field.open(step)
        field.zero_grad()
        field(points)[1].sum().backward()
        assert (field.table.grad[border:].abs().max() == 0) == closed
        assert field.table.grad[:border].abs().max() > 0


def test_occupancy_keeps_the_blob_and_skips_the_rest():
    field, step = Field(SMALL, BACKEND, seeded()), 2 / 48
    occupancy = Occupancy(OccupancyConfig(grow=1), step)
    full = render(field, occupancy, VIEWS, 16, WHITE, RenderOptions(step))
    assert occupancy.update(field, 0, seeded())
    radius = torch.linspace(-1, 1, 65)[1::2]
    radius = torch.stack(torch.meshgrid(radius, radius, radius, indexing="ij")).norm(dim=0)
    assert occupancy.cells[radius < 0.5].all() and not occupancy.cells[radius > 0.8].any()
    assert occupancy.occupied_fraction() < 0.2
    skipped = render(field, occupancy, VIEWS, 16, WHITE, RenderOptions(step))
    assert len(skipped.trace.sigma) < 0.5 * len(full.trace.sigma)
    assert (
        skipped.rgb - full.rgb
    ).abs().max() < occupancy.config.opacity  # what is skipped is less opaque than one step may be
    assert not occupancy.update(field, 1, seeded()) and occupancy.update(field, occupancy.config.every, seeded())


def test_occupancy_grows_by_whole_cells_and_finds_its_points():
    solid = Solid(lambda p: ((p > 0) & (p < 0.25)).all(-1), 100.0)  # cells 4 of 8 on each axis
    occupancy = Occupancy(OccupancyConfig(resolution=8, grow=1), 0.05)
    occupancy.update(solid, 0, seeded())
    expected = torch.zeros(8, 8, 8, dtype=torch.bool)
    expected[3:6, 3:6, 3:6] = True
    assert torch.equal(occupancy.cells, expected)
    assert occupancy.at(torch.tensor([[0.1, 0.1, 0.1], [-0.3, 0.1, 0.1], [1.0, 0.1, 0.1]])).tolist() == [
        True,
        False,
        False,
    ]


def test_thinned_occupancy_keeps_what_is_dense():
    occupancy = Occupancy(OccupancyConfig(rim=0.25), 0.05)
    occupancy.update(sphere(0.5, 100.0), 0, seeded())
    core, thinned = occupancy.ema > occupancy.threshold, occupancy.thinned(seeded())
    assert thinned[core].all() and not thinned[~occupancy.cells].any()
    rim = occupancy.cells & ~core
    assert thinned[rim].float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / rim.sum().item()) ** 0.5)


def test_occupancy_forgets_and_an_empty_grid_looks_everywhere():
    occupancy = Occupancy(OccupancyConfig(resolution=8, decay=0.5), 0.05)
    occupancy.update(sphere(0.5, 100.0), 0, seeded())
    assert 0 < occupancy.occupied_fraction() < 0.5
    for update in range(1, 12):
        occupancy.update(sphere(0.5, 0.0), 8 * update, seeded())
    assert occupancy.ema.max() < 0.1 and occupancy.cells.all()


def trace_of(t, weights, rays: int, ray, points=None, normals=None, directions=None) -> Trace:
    """A trace with given weights; dt 0.1."""
    t, weights, ray = torch.tensor(t), torch.tensor(weights, requires_grad=True), torch.tensor(ray)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(ray, minlength=rays).cumsum(0)])
    opacity = torch.zeros(rays).index_add(0, ray, weights)
    points = torch.zeros(len(t), 3) if points is None else points
    samples = Samples(ray, points, t, torch.full_like(t, 0.1), offsets)
    return Trace(samples, weights / 0.1, weights, opacity, normals, directions)


def test_regularisers_closed_forms():
    assert regularisers.sparsity(torch.zeros(9)) == pytest.approx(0, abs=1e-7)
    assert regularisers.sparsity(torch.ones(9)) == pytest.approx(math.sqrt(1.01) - 0.1, abs=1e-6)
    assert regularisers.opacity_entropy(torch.full((7,), 0.5)) == pytest.approx(math.log(2), abs=1e-6)
    assert regularisers.opacity_entropy(torch.tensor([0.0, 1.0])) < 2e-3
    points = torch.tensor([[0.0, 0.95, 0.0], [0.5, -0.5, 0.89], [-1.0, 0.0, 0.0]])
    trace = trace_of([1.0, 2.0, 3.0], [0.5, 0.3, 0.1], 2, [0, 0, 1], points)
    assert regularisers.margin(trace).item() == pytest.approx((0.5 * 0.25 + 0.1) / 2, abs=1e-6)
    normals = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [0.6, 0.0, 0.8]])
    trace = trace_of(
        [1.0, 2.0, 3.0], [0.5, 0.3, 0.1], 2, [0, 0, 1], points, normals, torch.tensor([[0.0, 0.0, 1.0]] * 2)
    )
    assert regularisers.orientation(trace) == pytest.approx((0.5 + 0.1 * 0.64) / 2, abs=1e-6)


def test_eikonal_is_zero_for_a_distance_and_one_for_nothing():
    """grad |x| is 1 everywhere; with the ball undone by the network's bias alone, no slope is left: (0 - 1)^2."""
    field = Field(SDF, BACKEND, seeded())
    with torch.no_grad():
        field.table.zero_()
    points = torch.rand(50, 3, generator=seeded(1)) - 0.5
    trace = trace_of([1.0] * 50, [0.02] * 50, 1, [0] * 50, points)
    assert regularisers.eikonal(field, trace, seeded()).item() == pytest.approx(0, abs=1e-6)
    field._strength = 0.0
    assert regularisers.eikonal(field, trace, seeded()).item() == pytest.approx(1, abs=1e-6)
    field._strength = 3 * SDF.blob_radius
    assert regularisers.eikonal(field, trace, seeded()).item() == pytest.approx(4, abs=1e-4)
    none = torch.zeros(0)
    empty = Trace(
        Samples(none.long(), none.view(0, 3), none, none, torch.zeros(2).long()), none, none, none, None, none
    )
    assert regularisers.eikonal(field, empty, seeded()).item() == pytest.approx(4, abs=1e-4)
    assert regularisers.smooth_normals(field, empty, seeded()).item() == 0


def test_smooth_normals_see_what_is_seen():
    """A ball's normals turn by the angle between neighbours; a sample without weight does not count."""
    field = Field(SDF, BACKEND, seeded())
    with torch.no_grad():
        field.table.zero_()
    points = torch.tensor([[0.5, 0.0, 0.0], [1e-4, 0.0, 0.0]])
    seen, unseen = (
        regularisers.smooth_normals(field, trace_of([1.0, 1.0], w, 1, [0, 0], points), seeded()).item()
        for w in ([1.0, 0.0], [0.0, 1.0])
    )
    # the shift is uniform in +-1/16 along each axis; E sqrt(y^2 + z^2) of a unit square is 0.7652 of its half side
    assert seen == pytest.approx(0.7652 / 16 / 0.5, rel=0.05) and unseen > 0.8


def test_distortion_against_the_double_sum():
    t, w, ray = [1.0, 1.4, 2.0, 0.5, 0.9, 3.0], [0.3, 0.2, 0.4, 0.1, 0.6, 0.7], [0, 0, 0, 2, 2, 3]
    trace = trace_of(t, w, 5, ray)
    pairs = sum(w[i] * w[j] * abs(t[i] - t[j]) for i in range(6) for j in range(6) if ray[i] == ray[j])
    expected = (pairs + sum(x * x * 0.1 / 3 for x in w)) / 5
    value = regularisers.distortion(trace)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert torch.isfinite(trace.weights.grad).all()


def test_total_variation_is_zero_in_constant_density():
    class Spec:
        spec = SMALL.grid()

        def __init__(self, density):
            self.density = density

    trace = trace_of([1.0, 2.0], [0.5, 0.3], 1, [0, 0], torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.0, 0.1]]))
    assert regularisers.total_variation(Spec(lambda p: torch.full((len(p),), 3.0)), trace, seeded()) == 0
    slope = regularisers.total_variation(Spec(lambda p: 0.01 * (2 + p[:, 0])), trace, seeded())
    assert slope.item() == pytest.approx(0.1 * 0.01 * (2 / 32) / 2, rel=0.05)  # mean |u_x| is half the reach


def test_learned_background_starts_plain():
    directions = torch.nn.functional.normalize(torch.randn(20, 3, generator=seeded()), dim=-1)
    colours = LearnedBackground((0.9, 0.5, 0.2))(directions)
    assert colours.allclose(torch.tensor([0.9, 0.5, 0.2]).expand(20, 3), atol=1e-6)
