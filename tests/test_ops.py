"""Kernels against closed forms, finite differences, nerfacc's pure torch, and one another."""

import ctypes
import importlib
import math
import subprocess
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sds3d.ops import Backend, GridSpec, choose, nerfacc_cuda, numba_cpu, reference

SMALL = GridSpec(levels=3, features=2, log2_table=8, base=4, finest=16)  # dense, hashed, hashed
BACKENDS = [choose("cpu", name) for name in ("torch", "numba", "triton")]  # triton is interpreted: see conftest.py
REFERENCE, *OTHERS = BACKENDS
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
# Interpreted programs take minutes over many steps; those are compared with the reference alone.
each_compiled_backend = pytest.mark.parametrize("backend", BACKENDS[:2], ids=lambda backend: backend.name)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, normal: bool = False) -> Tensor:
    """Reproducible numbers, uniform in [0, 1) or normal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn if normal else torch.rand)(*shape, generator=generator, dtype=dtype)


def ball(cells: int, radius: float = 0.7) -> Tensor:
    """(G, G, G) bool: cells whose centre is in the ball."""
    axis = (torch.arange(cells) + 0.5) / cells * 2 - 1
    return axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < radius**2


def rays(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rays from around the box towards it, most of them hitting."""
    origins = torch.nn.functional.normalize(draw(count, 3, seed=1, dtype=dtype, normal=True), dim=-1) * 3
    towards = draw(count, 3, seed=2, dtype=dtype) * 2 - 1
    return origins, torch.nn.functional.normalize(towards - origins, dim=-1)


# --- the grid's shape ---


def test_grid_of_the_default_recipe():
    """Worked by hand: b = 8^(1/11); levels 0-3 have 16^3, 20^3, 24^3, 29^3 = 24,389 -> 24,392 entries."""
    spec = GridSpec(12, 2, 15, 16, 128)
    assert spec.resolutions[:4] == (16, 20, 24, 29) and spec.resolutions[-1] == 128
    assert spec.scales[0] == 15 and spec.scales[-1] == 127  # whole numbers come out whole
    assert spec.sizes == (4096, 8000, 13824, 24392) + (32768,) * 8
    assert spec.dense == (True,) * 4 + (False,) * 8
    assert spec.entries == sum(spec.sizes) and spec.offsets[1:3] == (4096, 12096)
    assert spec.width == 24


@pytest.mark.parametrize("field", [{"levels": 0}, {"log2_table": 2}, {"features": 0}, {"base": 0}, {"finest": 8}])
def test_grid_refuses_what_cannot_be(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        GridSpec(**field)


# --- hash encoding ---


@pytest.mark.slow
@each_backend
def test_dense_level_interpolates_a_linear_function_exactly(backend: Backend):
    """Entry x + r (y + r z) holds a linear function of the grid point; the value at x * scale + 0.5 follows."""
    spec = GridSpec(levels=1, features=2, log2_table=12, base=8, finest=8)
    z, y, x = torch.meshgrid(*[torch.arange(8.0, dtype=torch.float64)] * 3, indexing="ij")
    table = torch.stack([x + 10 * y + 100 * z, 1 - x], -1).view(-1, 2)
    points = draw(200, 3) * (6.4 / 7)  # position below 7: the far corner is on the grid
    place = points * 7 + 0.5
    expected = torch.stack([place @ torch.tensor([1.0, 10, 100], dtype=torch.float64), 1 - place[:, 0]], -1)
    torch.testing.assert_close(backend.hash_encode(points, table, spec), expected, rtol=0, atol=1e-11)


@pytest.mark.slow
@each_backend
def test_hashed_corner_has_the_papers_address(backend: Backend):
    """At a point that sits on a grid point, the feature is that entry; its address in Python's integers."""
    spec = GridSpec(levels=1, features=1, log2_table=10, base=65, finest=65)
    table = torch.arange(1024.0, dtype=torch.float64)[:, None]
    corners = torch.tensor([[1, 2, 3], [64, 64, 64], [17, 1, 60], [1, 1, 1]])
    points = (corners.double() - 0.5) / 64
    got = backend.hash_encode(points, table, spec)[:, 0]
    for (x, y, z), value in zip(corners.tolist(), got.tolist()):
        address = (x ^ (y * 2654435761 % 2**32) ^ (z * 805459861 % 2**32)) % 1024
        assert value == pytest.approx(address, abs=1e-9)


@pytest.mark.slow
@each_compiled_backend
def test_encoding_against_finite_differences(backend: Backend):
    """First and second derivatives; central differences over a piecewise smooth function."""
    spec = GridSpec(levels=2, features=2, log2_table=5, base=3, finest=6)  # dense, hashed
    points, table = draw(6, 3).requires_grad_(), draw(spec.entries, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, t: backend.hash_encode(p, t, spec), (points, table))
    weights = draw(6, spec.width, seed=2).requires_grad_()

    def slope(table: Tensor, weights: Tensor) -> Tensor:
        out = (backend.hash_encode(points, table, spec) * weights).sum()
        return torch.autograd.grad(out, points, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, (table, weights))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "dtype", "tolerance"),
    [
        (SMALL, torch.float64, 1e-13),
        (GridSpec(levels=2, features=3, log2_table=6, base=3, finest=9), torch.float64, 1e-13),
        # numba fuses x * scale + 0.5: half a float32 ulp of a position up to 128, times a slope near 1
        (GridSpec(), torch.float32, 128 * 6e-8 * 4),
    ],
)
def test_every_backend_encodes_as_the_reference(spec: GridSpec, dtype: torch.dtype, tolerance: float):
    """Features, their gradients in points and table, and what those gradients have in table and weights."""
    points = draw(300, 3, dtype=dtype) * 1.2 - 0.1  # some outside; 300 is no multiple of a chunk
    points[:4] = torch.tensor([[0.0, 0, 0], [1, 1, 1], [math.nan, 0.5, 0.5], [math.inf, -math.inf, 0.3]])
    points[4:40] = ((points[4:40] * spec.scales[-1]).floor() + 0.5) / spec.scales[-1]  # on borders: their slopes jump
    points = points.t().contiguous().t()  # not contiguous
    table, weights = draw(spec.entries, spec.features, seed=1, dtype=dtype), draw(300, spec.width, seed=2, dtype=dtype)
    along, results = draw(300, 3, seed=3, dtype=dtype, normal=True), []
    for backend in BACKENDS:
        p, t, w = (x.clone().requires_grad_() for x in (points, table, weights))
        out = backend.hash_encode(p, t, spec)
        in_points, in_table = torch.autograd.grad(out, (p, t), w, create_graph=True)
        off_borders = torch.cat([in_points[:4], in_points[40:]])
        second = torch.autograd.grad((off_borders * along[36:]).sum(), (t, w))
        results.append([x.detach() for x in (out, off_borders, in_table, *second)])
    names = ("features", "points", "table", "points, then table", "points, then weights")
    for name, expected, *others in zip(names, *results, strict=True):
        size = float(expected.abs().max())
        for backend, got in zip(OTHERS, others, strict=True):
            message = f"{backend.name}: {name}"
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * size, msg=message)


@each_backend
def test_slope_is_the_gradient_in_the_points(backend: Backend):
    """As autograd finds it from the reference's features, with its derivatives in the table and the weights."""
    points = draw(40, 3) * 1.2 - 0.1  # some outside
    table, weights = draw(SMALL.entries, 2, seed=1).requires_grad_(), draw(40, SMALL.width, seed=2).requires_grad_()
    along, moved = draw(40, 3, seed=3, normal=True), points.clone().requires_grad_()
    features = reference.hash_encode(moved, table, SMALL)
    (wanted,) = torch.autograd.grad((features * weights).sum(), moved, create_graph=True)
    got = backend.hash_slope(points, table, weights, SMALL)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad((x * along).sum(), (table, weights)) for x in (got, wanted))):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(backend.hash_slope(points, table, weights, SMALL), got)


@each_backend
def test_points_outside_are_clamped_and_nan_reads_as_zero(backend: Backend):
    table = draw(SMALL.entries, 2)
    points = torch.tensor([[-3, 0.5, 7], [math.nan, 0.2, 0.1]], dtype=torch.float64).requires_grad_()
    clamped = torch.tensor([[0, 0.5, 1], [0, 0.2, 0.1]], dtype=torch.float64)
    out = backend.hash_encode(points, table, SMALL)
    assert torch.equal(out, backend.hash_encode(clamped, table, SMALL))
    (slope,) = torch.autograd.grad(out.sum(), points)
    assert (slope[[0, 0, 1], [0, 2, 0]] == 0).all() and (slope[[0, 1, 1], [1, 1, 2]] != 0).all()


@each_backend
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_tables_are_computed_with_in_full(backend: Backend, half: torch.dtype):
    """Within the half's own rounding of a float64 encoding of the same numbers; so is the gradient."""
    points, weights = (
        draw(300, 3, dtype=torch.float32),
        draw(300, SMALL.width, dtype=torch.float32, normal=True).to(half),
    )
    table = draw(SMALL.entries, 2, dtype=torch.float32, normal=True).to(half).requires_grad_()
    exact = table.detach().double().requires_grad_()
    got, expected = backend.hash_encode(points, table, SMALL), reference.hash_encode(points.double(), exact, SMALL)
    assert got.dtype == half
    slopes = [torch.autograd.grad(x, t, weights.to(x.dtype))[0] for x, t in ((got, table), (expected, exact))]
    for ours, true in ((got.detach(), expected.detach()), slopes):
        rounding = torch.finfo(half).eps
        torch.testing.assert_close(ours.double(), true, rtol=rounding, atol=1e-5)


@pytest.mark.slow
def test_fixed_point_sums_are_the_same_in_any_order():
    """Permuting the points permutes the atomics: float sums may change, whole numbers may not."""
    from sds3d.ops import triton_gpu

    points, along = draw(600, 3, dtype=torch.float32), draw(600, 3, seed=1, dtype=torch.float32, normal=True)
    grad = draw(600, SMALL.width, seed=2, dtype=torch.float32, normal=True) * 1e-3
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    for moving in (None, along):
        turned = None if moving is None else moving[order]
        first = triton_gpu.FIXED_POINT.scatter(points, moving, grad, SMALL)
        assert torch.equal(first, triton_gpu.FIXED_POINT.scatter(points[order], turned, grad[order], SMALL))
        exact = triton_gpu.ATOMIC.scatter(
            points.double(), None if moving is None else moving.double(), grad.double(), SMALL
        )
        torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.slow
@each_backend
def test_no_kernel_trusts_a_new_buffer(backend: Backend):
    """torch fills what is not initialised with NaN while its deterministic algorithms are on."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        points, table = draw(40, 3).requires_grad_(), draw(SMALL.entries, 2, seed=1).requires_grad_()
        features = backend.hash_encode(points, table, SMALL)
        slopes = torch.autograd.grad(features.sum(), (points, table), create_graph=True)
        slopes += torch.autograd.grad(slopes[0].sum(), table)
        samples = backend.march(*rays(20), ball(8), 0.1, capacity=400)
        sigma, values = (draw(400) * 50).requires_grad_(), draw(400, 3, seed=2).requires_grad_()  # some rays end early
        out = backend.composite(sigma, samples.dt, values, samples.offsets)
        slopes += torch.autograd.grad(out.opacity.sum() + out.accumulated.sum(), (sigma, values))
        assert all(x.isfinite().all() for x in (features, *slopes, *samples, *out))
    finally:
        torch.use_deterministic_algorithms(False)


@each_backend
def test_no_points(backend: Backend):
    table = draw(SMALL.entries, 2).requires_grad_()
    out = backend.hash_encode(torch.zeros(0, 3, dtype=torch.float64), table, SMALL)
    assert out.shape == (0, 6)
    assert torch.autograd.grad(out.sum(), table)[0].abs().sum() == 0


def test_threads_change_no_bit_and_stay_as_they_were():
    backend, before = choose("cpu", "numba"), torch.get_num_threads()
    points, spec = draw(5000, 3, dtype=torch.float32), GridSpec()
    weights, results = draw(5000, spec.width, dtype=torch.float32), []
    samples = backend.march(*rays(200, torch.float32), ball(16), 0.05)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            table = draw(spec.entries, 2, dtype=torch.float32).requires_grad_()
            out = backend.hash_encode(points, table, spec)
            sigma = (samples.t * 2).requires_grad_()
            blend = backend.composite(sigma, samples.dt, samples.points, samples.offsets)
            (slope,) = torch.autograd.grad(blend.accumulated.sum(), sigma)
            results.append(
                (out.detach(), torch.autograd.grad(out, table, weights)[0], *map(Tensor.detach, blend), slope)
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_kernel_leaves_no_nested_teams_to_torch():
    """numba allows them at every launch; in an OpenMP library that both share, torch's attention would start them."""
    points, table = draw(5000, 3), draw(SMALL.entries, 2)
    numba_cpu.hash_encode(points, table, SMALL)  # numba then knows what runs its loops
    limit = numba_cpu._nesting_limit()
    if limit is None:
        pytest.skip("numba runs its loops without OpenMP here")
    limit(8)
    numba_cpu.hash_encode(points, table, SMALL)
    levels = ctypes.CDLL(importlib.import_module("numba.np.ufunc.omppool").__file__).omp_get_max_active_levels
    assert levels() == 1


def test_checks_name_the_mistake():
    with pytest.raises(AssertionError, match="entries|GridSpec"):
        reference.hash_encode(torch.zeros(1, 3), torch.zeros(5, 2), SMALL)
    with pytest.raises(ValueError, match="step"):
        reference.march(torch.zeros(1, 3), torch.ones(1, 3), ball(4), 0.0)


# --- marching ---


@each_backend
def test_slab_has_its_thickness(backend: Backend):
    """Cells 2 and 3 of 8 along x are the slab -0.5 < x < 0; 0.5 is ten steps of 0.05."""
    occupancy = torch.zeros(8, 8, 8, dtype=torch.bool)
    occupancy[2:4] = True
    origins = torch.tensor([[-3, 0.1, 0.1], [3, 0.1, 0.1]], dtype=torch.float64)
    directions = torch.tensor([[1.0, 0, 0], [-1, 0, 0]], dtype=torch.float64)
    samples = backend.march(origins, directions, occupancy, 0.05)
    assert samples.offsets.tolist() == [0, 10, 20] and samples.ray_index.tolist() == [0] * 10 + [1] * 10
    middles = torch.arange(10, dtype=torch.float64) * 0.05 + 0.025
    torch.testing.assert_close(samples.t[:10], 2.5 + middles, rtol=0, atol=1e-12)  # starts at the box, t = 2
    torch.testing.assert_close(samples.t[10:], 3 + middles, rtol=0, atol=1e-12)
    torch.testing.assert_close(samples.points[:10, 0], -0.5 + middles, rtol=0, atol=1e-12)
    assert (samples.dt == 0.05).all()


@each_backend
def test_jitter_makes_the_chord_unbiased(backend: Backend):
    """Over 100 even jitters the mean of sum(dt) is the length in the box, for any step."""
    origins, directions = rays(1)
    enter, leave = reference.box_interval(origins, directions)
    jitter = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    samples = backend.march(origins.expand(100, 3), directions.expand(100, 3), ball(4, 9.0), 0.37, jitter)
    assert samples.dt.sum().item() / 100 == pytest.approx((leave - enter).item(), abs=0.37 / 100)


@each_backend
def test_rays_that_have_no_samples(backend: Backend):
    nan, inf = math.nan, math.inf
    origins = torch.tensor([[0, 5, 3], [0, 0, 3], [0, 0, 0], [nan, 0, 3], [0, 0, inf], [2, 0, 0]], dtype=torch.float64)
    directions = torch.tensor([[0.0, 0, -1]] * 6, dtype=torch.float64)
    directions[1], directions[2] = torch.tensor([0.0, 0, 1]), 0  # turned away; of no direction
    samples = backend.march(origins, directions, ball(4, 9.0), 0.1)
    assert samples.offsets.tolist() == [0] * 7 and samples.points.shape == (0, 3)


@each_backend
def test_near_far_and_an_origin_inside(backend: Backend):
    origins, directions = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0.0, 1, 0]], dtype=torch.float64)
    assert len(backend.march(origins, directions, ball(4, 9.0), 0.125).t) == 8  # from 0 to the wall at 1
    bounded = backend.march(origins, directions, ball(4, 9.0), 0.125, near=0.25, far=0.75)
    assert bounded.t.tolist() == [0.3125, 0.4375, 0.5625, 0.6875]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_backend_marches_as_the_reference(dtype: torch.dtype):
    """Bit for bit: all take the same steps in the same order, without fused products."""
    origins, directions = rays(300, dtype)
    jitter = draw(300, dtype=dtype)
    for options in ({}, {"jitter": jitter}, {"jitter": jitter, "near": 2.1, "far": 3.4}):
        expected, *others = (backend.march(origins, directions, ball(16), 0.07, **options) for backend in BACKENDS)
        assert expected.t.numel() > 500
        for got in others:
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, got))


@pytest.mark.slow
@each_backend
def test_room_cuts_off_or_fills_up(backend: Backend):
    """More capacity leaves rows of 0 that weigh nothing and get no gradient; less cuts the last rays off."""
    full = backend.march(*rays(30), ball(8), 0.1)
    count = len(full.t)
    wide, tight = (backend.march(*rays(30), ball(8), 0.1, capacity=count + more) for more in (9, -9))
    for field, got, less in zip(full, wide, tight, strict=True):
        if field.shape == full.offsets.shape:
            assert torch.equal(got, field) and torch.equal(less, field.clamp(max=count - 9))
        else:
            assert len(got) == count + 9 and torch.equal(got[:count], field) and not got[count:].any()
            assert torch.equal(less, field[: count - 9])
    sigma, values = draw(count + 9).mul(5).requires_grad_(), draw(count + 9, 2, seed=1).requires_grad_()
    exact = backend.composite(sigma[:count], full.dt, values[:count], full.offsets)
    filled = backend.composite(sigma, wide.dt, values, wide.offsets)
    assert torch.equal(filled.weights[:count], exact.weights) and not filled.weights[count:].any()
    assert torch.equal(filled.accumulated, exact.accumulated) and torch.equal(filled.opacity, exact.opacity)
    pull = [(out.weights[:count].square().sum() + out.accumulated.sum()) for out in (exact, filled)]
    slopes = [torch.autograd.grad(x, (sigma, values)) for x in pull]
    for once, again in zip(*slopes, strict=True):
        torch.testing.assert_close(again, once, rtol=1e-12, atol=1e-14)
        assert not again[count:].any()


@each_backend
def test_no_rays(backend: Backend):
    empty = torch.zeros(0, 3)
    samples = backend.march(empty, empty, ball(4), 0.1)
    out = backend.composite(samples.t, samples.dt, torch.zeros(0, 3), samples.offsets)
    assert samples.offsets.tolist() == [0] and out.accumulated.shape == (0, 3)


# --- compositing ---


@each_compiled_backend
def test_fog_of_even_density_follows_beer_lambert(backend: Backend):
    """Through the ball's cells: opacity = 1 - exp(-sigma length), however it is cut; depth in closed form."""
    origins = torch.tensor([[0, 0, 3.0]], dtype=torch.float64)
    directions = torch.tensor([[0, 0, -1.0]], dtype=torch.float64)
    for step in (0.1, 0.001):
        samples = backend.march(origins, directions, ball(4, 9.0), step)
        sigma = torch.full_like(samples.t, 1.5)
        out = backend.composite(sigma, samples.dt, samples.t[:, None], samples.offsets)
        assert out.opacity.item() == pytest.approx(1 - math.exp(-3), rel=1e-9)
    depth = 2 + 1 / 1.5 - 2 * math.exp(-3) / (1 - math.exp(-3))  # mean of t under sigma exp(-sigma (t - 2))
    assert out.accumulated.item() / out.opacity.item() == pytest.approx(depth, abs=1e-6)


@each_backend
def test_two_samples_and_an_empty_ray_by_hand(backend: Backend):
    half = math.log(2)  # takes half of the light
    sigma, dt = torch.tensor([half, 2 * half], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    values = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)
    out = backend.composite(sigma, dt, values, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(out.weights, torch.tensor([0.5, 0.375], dtype=torch.float64))
    torch.testing.assert_close(out.opacity, torch.tensor([0, 0.875], dtype=torch.float64))
    torch.testing.assert_close(out.accumulated, torch.tensor([[0, 0], [0.5, 0.375]], dtype=torch.float64))


@each_backend
def test_a_finished_ray_takes_no_more(backend: Backend):
    """Light before the samples: 1, 0.1, 0.01; under a threshold of 0.05 the third weighs nothing."""
    sigma = torch.full((3,), math.log(10.0), dtype=torch.float64, requires_grad=True)
    values = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    out = backend.composite(sigma, torch.ones(3, dtype=torch.float64), values, torch.tensor([0, 3]), threshold=0.05)
    torch.testing.assert_close(out.weights.detach(), torch.tensor([0.9, 0.09, 0], dtype=torch.float64))
    in_sigma, in_values = torch.autograd.grad(out.accumulated.sum(), (sigma, values))
    torch.testing.assert_close(in_sigma, torch.tensor([0.01, 0.01, 0], dtype=torch.float64))  # light behind both
    torch.testing.assert_close(in_values[:, 0], out.weights.detach())


@pytest.mark.slow
@each_backend
def test_compositing_against_finite_differences(backend: Backend):
    sigma, values = (draw(9) * 3).requires_grad_(), draw(9, 3, seed=1).requires_grad_()
    offsets = torch.tensor([0, 4, 4, 9])
    assert torch.autograd.gradcheck(
        lambda s, v: tuple(backend.composite(s, draw(9, seed=2), v, offsets, threshold=0.0)), (sigma, values)
    )


@each_backend
def test_solid_and_hollow_samples(backend: Backend):
    """An infinite density stops the ray, a zero one does nothing, and no gradient is NaN."""
    sigma = torch.tensor([0, math.inf, 5.0], dtype=torch.float64, requires_grad=True)
    out = backend.composite(sigma, torch.ones(3, dtype=torch.float64), draw(3, 2), torch.tensor([0, 3]))
    assert out.weights.tolist() == [0, 1, 0]
    assert torch.autograd.grad(out.opacity.sum(), sigma)[0].tolist() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_every_backend_composites_as_the_reference(dtype: torch.dtype, tolerance: float):
    """float32: the light is a product here and the exponential of a sum there, some 40 roundings apart."""
    samples = reference.march(*rays(200, dtype), ball(16), 0.05)
    count = samples.t.numel()
    results = []
    for backend in BACKENDS:
        sigma, values = (draw(count, dtype=dtype) * 4).requires_grad_(), draw(count, 4, dtype=dtype).requires_grad_()
        out = backend.composite(sigma, samples.dt, values, samples.offsets)
        pull = sum((x * draw(*x.shape, seed=i, dtype=dtype)).sum() for i, x in enumerate(out))
        results.append((*(x.detach() for x in out), *torch.autograd.grad(pull, (sigma, values))))
    for expected, *others in zip(*results):
        for got in others:
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_numba_absorbs_to_the_last_bit():
    """float32 takes a polynomial for the exponential: one sample a ray, against float64, within one last place."""
    sigma = torch.cat([torch.logspace(-30, 3, 100_000), torch.tensor([0.0, 1e-38, math.inf, math.nan])])
    offsets = torch.arange(len(sigma) + 1)
    weights = choose("cpu", "numba").composite(sigma, torch.ones_like(sigma), sigma[:, None], offsets).weights
    exact = -torch.expm1(-sigma.double())
    torch.testing.assert_close(weights.double(), exact, rtol=2.0**-23, atol=0, equal_nan=True)


@each_backend
def test_nerfacc_composites_the_same(backend: Backend):
    """nerfacc's own pure torch path, on a dense (rays, samples) tensor; it ends no ray early."""
    nerfacc = pytest.importorskip("nerfacc")
    sigma, dt, values = draw(6, 10) * 5, draw(6, 10, seed=1), draw(6, 10, 3, seed=2)
    ends = dt.cumsum(-1)
    weights, _, _ = nerfacc.render_weight_from_density(ends - dt, ends, sigma)
    offsets = torch.arange(7) * 10
    out = backend.composite(sigma.view(-1), dt.view(-1), values.view(-1, 3), offsets, threshold=0.0)
    torch.testing.assert_close(out.weights.view(6, 10), weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.opacity, nerfacc.accumulate_along_rays(weights)[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(out.accumulated, nerfacc.accumulate_along_rays(weights, values), rtol=0, atol=1e-12)


class Walk(NamedTuple):
    """What nerfacc's traversal gives, as far as it is read."""

    vals: Tensor
    ray_indices: Tensor


def walk(origins, directions, grids, boxes, near_planes, far_planes, step_size, t_sorted, t_indices, hits):
    """nerfacc's traverse_grids of one grid, which runs on CUDA only, as its source (0.5.3) reads: the middles of whole
    steps from the near plane, inside the box and before the far plane, in occupied cells."""
    assert t_indices.tolist() == [[0, 1]] * len(origins) and boxes.tolist() == [[-1, -1, -1, 1, 1, 1]]
    middle = near_planes[:, None] + (torch.arange(200) + 0.5) * step_size
    points = origins[:, None] + middle[..., None] * directions[:, None]
    cells = grids.shape[-1]
    x, y, z = torch.where(points.isnan(), 0, (points + 1) * cells / 2).clamp(0, cells - 1).long().unbind(-1)
    first, last = torch.maximum(t_sorted[:, 0], near_planes), torch.minimum(t_sorted[:, 1], far_planes)
    keep = hits & (middle >= first[:, None]) & (middle < last[:, None]) & grids[0, x, y, z]
    return None, Walk(middle[keep], keep.nonzero()[:, 0]), None


@pytest.mark.parametrize("near", [0.0, 2.3])
@pytest.mark.parametrize("shifted", [False, True])
def test_nerfacc_is_asked_for_the_samples_of_the_definition(near: float, shifted: bool, monkeypatch):
    nerfacc = pytest.importorskip("nerfacc")
    monkeypatch.setattr(nerfacc, "traverse_grids", walk)
    origins, directions = rays(100)
    origins[:20] /= 10  # from inside
    directions[20], origins[21] = 0, math.nan
    jitter = draw(100, seed=5) if shifted else None
    for count in (100, 0):
        arguments = origins[:count], directions[:count], ball(16), 0.05, jitter if count or not shifted else jitter[:0]
        for got, wanted in zip(
            nerfacc_cuda.march(*arguments, near=near, far=3.5), reference.march(*arguments, near=near, far=3.5)
        ):
            assert torch.equal(got, wanted)


# --- the choice ---


def test_choice_says_what_and_why():
    assert choose("cpu").name == "numba" and "CPU" in str(choose("cpu"))
    assert choose("cpu", "torch").hash_encode is reference.hash_encode
    assert choose("cuda").name == "triton" and "GPU" in str(choose("cuda"))
    for device, wanted in (("cpu", "nerfacc"), ("cpu", "tinycudann"), ("cuda", "numba"), ("cpu", "metal")):
        with pytest.raises(ValueError, match=wanted) as caught:
            choose(device, wanted)
        if wanted != "metal":
            assert str(caught.value).endswith(f"--backend auto, which takes {choose(device).name} here")


def test_choice_without_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="triton runs on CUDA, not on cpu"):
        choose("cpu", "triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert choose("cuda").name == "torch" and "C compiler" in str(choose("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose("cuda").name == "torch" and "pip install triton" in str(choose("cuda"))
    with pytest.raises(ValueError, match="pip install triton"):
        choose("cuda", "triton")


def test_choice_where_triton_cannot_launch(monkeypatch):
    """A compiler without Python's headers, say: found out by one launch, told, and torch taken."""
    from sds3d.ops import triton_gpu

    class Broken:
        tries = 0

        def __getitem__(self, programs: tuple):
            Broken.tries += 1
            raise subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"])

    here = torch.device("cpu")
    triton_gpu.launch_error.cache_clear()
    assert triton_gpu.launch_error(here) == ""
    triton_gpu.launch_error.cache_clear()
    monkeypatch.setattr(triton_gpu.triton_kernels, "touch", Broken())
    reasons = {triton_gpu.launch_error(here) for _ in range(2)}
    triton_gpu.launch_error.cache_clear()
    assert Broken.tries == 1 and "CalledProcessError" in (reason := reasons.pop()) and "cuda_utils.c" in reason
    monkeypatch.setattr(triton_gpu, "launch_error", lambda device: reason)
    assert choose("cuda").name == "triton"  # interpreted: nothing is launched
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("CC", "gcc")
    assert choose("cuda").name == "torch" and "python3-dev" in str(choose("cuda")) and reason in str(choose("cuda"))
    with pytest.raises(ValueError, match="python3-dev.*which takes torch here"):
        choose("cuda", "triton")
    assert choose("cpu").name == "numba"


@pytest.mark.gpu
def test_nerfacc_marches_to_the_samples_of_the_definition():
    """But for those within rounding of a cell's border, which either may keep."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("nerfacc")
    arguments = (*(x.cuda() for x in rays(2000, torch.float32)), ball(16).cuda(), 0.05)
    jitter = draw(2000, seed=5, dtype=torch.float32).cuda()
    got, wanted = (choose("cuda", name).march(*arguments, jitter) for name in ("nerfacc", "torch"))
    found, right = (set(zip(s.ray_index.tolist(), (s.t / 0.01).round().tolist())) for s in (got, wanted))
    assert len(found ^ right) < 0.001 * len(right)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tinycudann", "nerfacc"])
def test_cuda_adapters_match_the_reference(name: str):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("tinycudann" if name == "tinycudann" else "nerfacc")
    backend, spec = choose("cuda", name), GridSpec()
    points, table = draw(1000, 3, dtype=torch.float32).cuda(), draw(spec.entries, 2, dtype=torch.float32).cuda()
    table.requires_grad_()
    sigma, values = (draw(1000, dtype=torch.float32) * 4).cuda().requires_grad_(), points
    dt, offsets = torch.full_like(sigma, 0.05), torch.tensor([0, 300, 300, 1000]).cuda()
    for kernel in (
        lambda b: b.hash_encode(points, table, spec),
        lambda b: b.hash_slope(points, table, torch.ones(1000, spec.width, device="cuda"), spec) / spec.finest,
        lambda b: b.composite(sigma, dt, values, offsets).accumulated,
    ):
        expected, got = kernel(choose("cuda", "torch")), kernel(backend)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # float32 positions and atomics
        for wanted in (table, sigma):
            slopes = [torch.autograd.grad(x.sum(), wanted, allow_unused=True)[0] for x in (kernel(backend), expected)]
            if slopes[1] is not None:
                torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)
            expected = kernel(choose("cuda", "torch"))
