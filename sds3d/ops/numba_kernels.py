"""The compiled loops of `numba_cpu`: plain arrays in, plain arrays out.

Speed: points are split into chunks whose scratch arrays stay in the first-level cache. For each chunk and level, a loop
without branches finds the eight corners (LLVM vectorises it) and a second loop gathers or scatters.

Determinism: gathers are parallel over chunks. Scatters are parallel over levels, so that no two threads write the same
entry. Marching is parallel over rays, and compositing over groups of rays whose size does not depend on the number of
threads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

RAYS = 64  # rays in a task of compositing
CHUNK = 256  # points; a compile-time constant, so the compiler knows the distance between planes of the scratch arrays


def can_cache(function: Callable) -> bool:
    """Return whether numba finds a folder in which to cache a compiled function; warn if it finds none."""
    try:
        njit(cache=True)(function)
    except RuntimeError:
        warnings.warn(
            f"compiled kernels cannot be cached, neither beside {__file__} nor in your cache folder, so each start "
            "takes a minute longer; set NUMBA_CACHE_DIR to a folder that you can write",
            stacklevel=2,
        )
        return False
    return True


CACHE = can_cache(can_cache)
FAST = {"error_model": "numpy", "fastmath": {"contract", "nsz"}, "cache": CACHE}
EXACT = {"error_model": "numpy", "cache": CACHE}  # marching must find the same samples as the reference

u32, word = np.uint32, np.uintp  # unsigned: numba then omits the check for negative indices


@njit(**FAST)
def _planes(rows, first, count, out):
    """Copy (count, 3) rows of a flat (N, 3) array into planes of x, y, z."""
    for j in range(count):
        for axis in range(3):
            out[word(axis * CHUNK + j)] = rows[word(3 * (first + j) + axis)]


@njit(**FAST)
def _clamp(xyz, count):
    """Clamp points to [0, 1]; NaN becomes 0."""
    zero, one = xyz.dtype.type(0), xyz.dtype.type(1)
    for axis in range(3):
        for j in range(axis * CHUNK, axis * CHUNK + count):
            value = xyz[word(j)]
            value = value if value > zero else zero
            xyz[word(j)] = value if value < one else one


@njit(**FAST)
def _corners(xyz, count, scale, level, index, weight):
    """Compute entries and trilinear weights of the eight corners around each point, in eight planes each.

    level: uint32 (stride of y, stride of z, size, first entry, 1 if dense).
    """
    real = xyz.dtype.type
    half, one = real(0.5), real(1)
    sy, sz, size, first = level[0], level[1], level[2], level[3]
    mask = u32(size - u32(1))
    dense = level[4] == 1
    for j in range(count):
        px, py, pz = xyz[j] * scale + half, xyz[CHUNK + j] * scale + half, xyz[2 * CHUNK + j] * scale + half
        ix, iy, iz = np.int32(px), np.int32(py), np.int32(pz)
        fx, fy, fz = px - real(ix), py - real(iy), pz - real(iz)
        x0, y0, z0 = u32(ix), u32(u32(iy) * sy), u32(u32(iz) * sz)
        for k in range(8):
            x = u32(x0 + u32(1)) if k & 1 else x0
            y = u32(y0 + sy) if k & 2 else y0
            z = u32(z0 + sz) if k & 4 else z0
            if dense:  # min(i, i - size) in uint32 is i modulo size while i < 2 size
                entry = u32(u32(x + y) + z)
                entry = min(entry, u32(entry - size))
            else:
                entry = (x ^ y ^ z) & mask
            index[k * CHUNK + j] = entry + first
            wx = fx if k & 1 else one - fx
            wy = fy if k & 2 else one - fy
            wz = fz if k & 4 else one - fz
            weight[k * CHUNK + j] = wx * (wy * wz)


@njit(**FAST)
def _slopes(xyz, count, scale, along, weight):
    """Compute the derivative of the eight weights along the direction `along` (planes of x, y, z) of each point."""
    real = xyz.dtype.type
    half, one = real(0.5), real(1)
    for j in range(count):
        px, py, pz = xyz[j] * scale + half, xyz[CHUNK + j] * scale + half, xyz[2 * CHUNK + j] * scale + half
        fx, fy, fz = px - real(np.int32(px)), py - real(np.int32(py)), pz - real(np.int32(pz))
        vx, vy, vz = along[j] * scale, along[CHUNK + j] * scale, along[2 * CHUNK + j] * scale
        for k in range(8):
            wx, dx = (fx, vx) if k & 1 else (one - fx, -vx)
            wy, dy = (fy, vy) if k & 2 else (one - fy, -vy)
            wz, dz = (fz, vz) if k & 4 else (one - fz, -vz)
            weight[k * CHUNK + j] = dx * (wy * wz) + wx * (dy * wz + wy * dz)


@njit(**FAST)
def _read(index, weight, count, table, lanes, place, width, out):
    """Set out[place + j width + f] to the sum of weight * table over the corners, two features at a time."""
    zero, features = table.dtype.type(0), word(len(lanes))
    for j in range(count):
        row = word(place + j * width)
        for f in range(0, len(lanes) - 1, 2):
            left, right = zero, zero
            for k in range(8):
                entry, w = word(index[k * CHUNK + j]) * features + word(f), weight[k * CHUNK + j]
                left += w * table[entry]
                right += w * table[entry + word(1)]
            out[row + word(f)], out[row + word(f + 1)] = left, right
        if len(lanes) % 2:
            left, last = zero, features - word(1)
            for k in range(8):
                left += weight[k * CHUNK + j] * table[word(index[k * CHUNK + j]) * features + last]
            out[row + last] = left


@njit(**FAST)
def _add(index, weight, count, grad, lanes, place, width, out):
    """Add weight * grad[place + j width + f] to out at every corner: the transpose of `_read`."""
    features = word(len(lanes))
    for j in range(count):
        row = word(place + j * width)
        for f in range(0, len(lanes) - 1, 2):
            left, right = grad[row + word(f)], grad[row + word(f + 1)]
            for k in range(8):
                entry, w = word(index[k * CHUNK + j]) * features + word(f), weight[k * CHUNK + j]
                out[entry] += w * left
                out[entry + word(1)] += w * right
        if len(lanes) % 2:
            last = features - word(1)
            left = grad[row + last]
            for k in range(8):
                out[word(index[k * CHUNK + j]) * features + last] += weight[k * CHUNK + j] * left


@njit(parallel=True, **FAST)
def gather(points, along, table, scales, levels, lanes, block, out):
    """Set out (N, L * F) to the corners' sum of weight * table, or, with `along` (N, 3), to its derivative along it.

    points: flat. lanes: a tuple of F zeros, whose length gives the compiler the number of features.
    block: points a task. A task processes all its points level by level, so that a level's entries stay in the cache.
    """
    count_all, width = points.size // 3, scales.size * len(lanes)
    for task in prange((count_all + block - 1) // block):
        xyz, direction = np.empty(3 * CHUNK, points.dtype), np.empty(3 * CHUNK, points.dtype)
        index, weight = np.empty(8 * CHUNK, np.uint32), np.empty(8 * CHUNK, points.dtype)
        stop = min(count_all, (task + 1) * block)
        for level in range(scales.size):
            for first in range(task * block, stop, CHUNK):
                count = min(CHUNK, stop - first)
                _planes(points, first, count, xyz)
                _clamp(xyz, count)
                _corners(xyz, count, scales[level], levels[level], index, weight)
                if along.size:
                    _planes(along, first, count, direction)
                    _slopes(xyz, count, scales[level], direction, weight)
                _read(index, weight, count, table, lanes, first * width + level * len(lanes), width, out)


@njit(parallel=True, **FAST)
def scatter(points, along, grad, scales, levels, lanes, groups, block, out):
    """Add weight * grad (N, L * F) to out (entries, F): the transpose of `gather`.

    There are `groups` tasks. Each one owns every groups-th level and processes the points in order.
    """
    count_all, width = points.size // 3, scales.size * len(lanes)
    for group in prange(groups):
        xyz, direction = np.empty(3 * CHUNK, points.dtype), np.empty(3 * CHUNK, points.dtype)
        index, weight = np.empty(8 * CHUNK, np.uint32), np.empty(8 * CHUNK, points.dtype)
        for begin in range(0, count_all, block):
            stop = min(count_all, begin + block)
            for level in range(group, scales.size, groups):
                for first in range(begin, stop, CHUNK):
                    count = min(CHUNK, stop - first)
                    _planes(points, first, count, xyz)
                    _clamp(xyz, count)
                    _corners(xyz, count, scales[level], levels[level], index, weight)
                    if along.size:
                        _planes(along, first, count, direction)
                        _slopes(xyz, count, scales[level], direction, weight)
                    _add(index, weight, count, grad, lanes, first * width + level * len(lanes), width, out)


@njit(**FAST)
def _dots(index, count, table, grad, lanes, place, width, out):
    """Set the eight planes of out to the dot product of grad[place + j width ...] and each corner's entry."""
    zero, features = table.dtype.type(0), word(len(lanes))
    for j in range(count):
        row = word(place + j * width)
        for k in range(8):
            first, dot = word(index[k * CHUNK + j]) * features, zero
            for f in range(len(lanes)):
                dot += grad[row + word(f)] * table[first + word(f)]
            out[word(k * CHUNK + j)] = dot


@njit(**FAST)
def _gradients(xyz, count, scale, dots, out):
    """Add to the planes of x, y, z of out the gradient in the points of the trilinear interpolation of the dots."""
    real = xyz.dtype.type
    half, one = real(0.5), real(1)
    for j in range(count):
        px, py, pz = xyz[j] * scale + half, xyz[CHUNK + j] * scale + half, xyz[2 * CHUNK + j] * scale + half
        fx, fy, fz = px - real(np.int32(px)), py - real(np.int32(py)), pz - real(np.int32(pz))
        ex, ey, ez = one - fx, one - fy, one - fz
        a, b, c, d = dots[j], dots[CHUNK + j], dots[2 * CHUNK + j], dots[3 * CHUNK + j]
        e, f, g, h = dots[4 * CHUNK + j], dots[5 * CHUNK + j], dots[6 * CHUNK + j], dots[7 * CHUNK + j]
        out[j] += scale * (ez * (ey * (b - a) + fy * (d - c)) + fz * (ey * (f - e) + fy * (h - g)))
        out[CHUNK + j] += scale * (ez * (ex * (c - a) + fx * (d - b)) + fz * (ex * (g - e) + fx * (h - f)))
        out[2 * CHUNK + j] += scale * (ey * (ex * (e - a) + fx * (f - b)) + fy * (ex * (g - c) + fx * (h - d)))


@njit(parallel=True, **FAST)
def point_gradient(points, grad, table, scales, levels, lanes, out):
    """Set out (N, 3) to the points' gradient, given grad (N, L * F)."""
    count_all, width = points.size // 3, scales.size * len(lanes)
    for chunk in prange((count_all + CHUNK - 1) // CHUNK):
        first = chunk * CHUNK
        count = min(CHUNK, count_all - first)
        xyz, dots = np.empty(3 * CHUNK, points.dtype), np.empty(8 * CHUNK, points.dtype)
        index, total = np.empty(8 * CHUNK, np.uint32), np.zeros(3 * CHUNK, points.dtype)
        _planes(points, first, count, xyz)
        _clamp(xyz, count)
        for level in range(scales.size):
            _corners(xyz, count, scales[level], levels[level], index, dots)
            _dots(index, count, table, grad, lanes, first * width + level * len(lanes), width, dots)
            _gradients(xyz, count, scales[level], dots, total)
        for j in range(count):
            for axis in range(3):
                out[word(3 * (first + j) + axis)] = total[word(axis * CHUNK + j)]


@njit(**EXACT)
def _interval(origin, direction, near, far):
    """Return the distance at which a ray enters the box and its length inside: 0, 0 if it misses or holds a NaN."""
    real = origin.dtype.type  # a plain 0 would promote the results to float64
    start, stop, zero, one = near, far, real(0), real(1)
    for axis in range(3):
        o, d = origin[axis], direction[axis]
        if d != 0:
            a, b = (-one - o) / d, (one - o) / d
            if not (a == a and b == b):
                return zero, zero
            start, stop = max(start, min(a, b)), min(stop, max(a, b))
        elif not (-one <= o <= one):
            return zero, zero
    if not (stop > start and stop < np.inf):
        return zero, zero
    return start, stop - start


@njit(parallel=True, **EXACT)
def march(origins, directions, occupancy, jitter, scalars, offsets, ray_index, points, t):
    """If t is empty, count the samples of every ray into offsets[1:]; else write the samples at offsets[:-1].

    scalars: (step, near, far) in the rays' dtype.
    """
    real = origins.dtype.type
    step, near, far, one = scalars[0], scalars[1], scalars[2], real(1)
    cells = occupancy.shape[0]
    scale, last = real(cells) / real(2), real(cells - 1)
    write = t.size > 0
    for ray in prange(origins.shape[0]):
        start, reach = _interval(origins[ray], directions[ray], near, far)
        ox, oy, oz = origins[ray, 0], origins[ray, 1], origins[ray, 2]
        dx, dy, dz = directions[ray, 0], directions[ray, 1], directions[ray, 2]
        place = word(offsets[ray]) if write else word(0)
        for i in range(np.int64(reach / step) + 2):
            along = (real(i) + jitter[ray]) * step
            if not along < reach or (write and place == word(offsets[ray + 1])):
                break
            distance = start + along
            x, y, z = ox + distance * dx, oy + distance * dy, oz + distance * dz
            cx = word(min(max((x + one) * scale, real(0)), last))
            cy = word(min(max((y + one) * scale, real(0)), last))
            cz = word(min(max((z + one) * scale, real(0)), last))
            if occupancy[cx, cy, cz]:
                if write:
                    ray_index[place], t[place] = ray, distance
                    points[place, 0], points[place, 1], points[place, 2] = x, y, z
                place += word(1)
        if not write:
            offsets[ray + 1] = place


def _absorbed(depth):
    """Return 1 - exp(-depth)."""
    return -math.expm1(-depth)


@overload(_absorbed)
def _absorbed_fast(depth):
    """Compute float64 by the C library, and float32 within 0.85 ulp for depth >= 0, by code that LLVM vectorises.

    -depth = n log 2 + r, |r| <= log 2 / 2; exp(r) - 1 by its Taylor series. Beyond a depth of 20 the result is 1 in
    float32.
    """
    if depth != types.float32:
        return _absorbed
    a, b, c, d, e, f = (np.float32(1 / math.factorial(k)) for k in range(2, 8))
    one, most, per_log2 = np.float32(1), np.float32(20), np.float32(1 / math.log(2))
    high = np.float32(0.693359375)  # of log 2: 9 bits, so that n times it is exact
    low, rounding, bias = np.float32(math.log(2) - 0.693359375), np.float32(1.5 * 2**23), np.int32(127)

    def fast(depth):
        bounded = most if depth > most else depth  # keeps a NaN
        n = (rounding - bounded * per_log2) - rounding  # to the nearest whole number
        r = (-bounded - n * high) - n * low
        grown = (((((f * r + e) * r + d) * r + c) * r + b) * r + a) * (r * r) + r
        power = np.int32((np.int32(n) + bias) << np.int32(23)).view(np.float32)  # 2^n, from its exponent bits
        return (one - power) - power * grown

    return fast


@njit(parallel=True, **FAST)
def composite(sigma, dt, values, offsets, threshold, lanes, weights, transmittance, opacity, accumulated):
    """Compute weights (S,), transmittance behind each sample (S,), opacity (R,) and accumulated (R, C), which starts as
    0.

    values, accumulated: flat. lanes: a tuple of C zeros, whose length gives the compiler the number of channels.
    """
    one, zero = sigma.dtype.type(1), sigma.dtype.type(0)
    channels = word(len(lanes))
    for task in prange((opacity.size + RAYS - 1) // RAYS):
        begin, end = task * RAYS, min(opacity.size, (task + 1) * RAYS)
        for s in range(offsets[begin], offsets[end]):  # samples do not depend on each other here: LLVM vectorises this
            weights[word(s)] = _absorbed(sigma[word(s)] * dt[word(s)])
        for ray in range(begin, end):
            remaining, total, row = one, zero, word(ray) * channels
            for s in range(offsets[ray], offsets[ray + 1]):
                i = word(s)
                alive, absorbed = remaining >= threshold, weights[i]
                weight = remaining * absorbed if alive else zero
                remaining *= one - absorbed
                weights[i], transmittance[i] = weight, remaining if alive else zero
                total += weight
                for c in range(len(lanes)):
                    accumulated[row + word(c)] += weight * values[i * channels + word(c)]
            opacity[ray] = total


@njit(parallel=True, **FAST)
def composite_backward(
    dt, values, offsets, weights, transmittance, lanes, g_weights, g_opacity, g_accumulated, g_sigma, g_values
):
    """Compute dL/dsigma_k = dt_k (T_{k+1} g_k - sum_{i>k} w_i g_i), where g_i is the total gradient in w_i.

    values, g_accumulated, g_values: flat. lanes: as in `composite`.
    """
    channels = word(len(lanes))
    for task in prange((g_opacity.size + RAYS - 1) // RAYS):
        for ray in range(task * RAYS, min(g_opacity.size, (task + 1) * RAYS)):
            behind, row = dt.dtype.type(0), word(ray) * channels
            for s in range(offsets[ray + 1] - 1, offsets[ray] - 1, -1):
                i = word(s)
                weight, g = weights[i], g_weights[i] + g_opacity[ray]
                for c in range(len(lanes)):
                    g += g_accumulated[row + word(c)] * values[i * channels + word(c)]
                    g_values[i * channels + word(c)] = weight * g_accumulated[row + word(c)]
                g_sigma[i] = dt[i] * (transmittance[i] * g - behind)
                behind += weight * g
