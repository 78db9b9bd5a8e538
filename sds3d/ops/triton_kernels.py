"""The programs of `triton_gpu`.

Names in capitals are constants of the compiled code; everything is computed in the points' or the rays' own dtype.
"""

# Triton's language only looks like Python: constants are plain numbers, and loops over static_range are unrolled.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def touch(out):
    """The smallest kernel: shows that kernels can be launched at all."""
    tl.store(out, 1.0)


@triton.jit
def _axis(points, n, live, axis: tl.constexpr, scale):
    """Grid cell (uint32) below each point along an axis, and the fraction beyond it. NaN reads as 0."""
    x = tl.load(points + 3 * n + axis, mask=live, other=0.0)
    x = tl.where(x > 0, x, 0.0)
    x = tl.where(x < 1, x, 1.0)
    position = x.to(scale.dtype) * scale + 0.5
    cell = tl.floor(position)
    return cell.to(tl.int32).to(tl.uint32, bitcast=True), position - cell


@triton.jit
def _block(points, count, scales, levels, BLOCK: tl.constexpr):
    """This program's points: index, whether there is one, the level's scale, its cell (see `_entry`), fractions."""
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live, level, row = n < count, tl.program_id(1), levels + 5 * tl.program_id(1)
    scale = tl.load(scales + level)
    x, fx = _axis(points, n, live, 0, scale)
    y, fy = _axis(points, n, live, 1, scale)
    z, fz = _axis(points, n, live, 2, scale)
    sy, sz, size = tl.load(row).to(tl.uint32), tl.load(row + 1).to(tl.uint32), tl.load(row + 2).to(tl.uint32)
    return n, live, scale, (x, y, z, sy, sz, size, tl.load(row + 3), tl.load(row + 4)), fx, fy, fz


@triton.jit
def _entry(k: tl.constexpr, cell):
    """Row of the table (int64) of a cell's corner k. A cell is its x, y, z; and of its level: strides of y and z,
    size, first entry, 1 if dense."""
    x, y, z, sy, sz, size, first, dense = cell
    x, y, z = x + (k & 1), (y + (k >> 1 & 1)) * sy, (z + (k >> 2)) * sz
    line = x + y + z
    line = tl.where(line >= size, line - size, line)
    hashed = (x ^ y ^ z) & (size - 1)
    return first + tl.where(dense == 1, line, hashed).to(tl.int64)


@triton.jit
def _weight(k: tl.constexpr, fx, fy, fz, vx, vy, vz, ALONG: tl.constexpr):
    """Trilinear weight of corner k, or its change as the point moves with velocity v."""
    wx = fx if k & 1 else 1 - fx
    wy = fy if k & 2 else 1 - fy
    wz = fz if k & 4 else 1 - fz
    if ALONG:
        dx = vx if k & 1 else -vx
        dy = vy if k & 2 else -vy
        dz = vz if k & 4 else -vz
        return dx * (wy * wz) + wx * (dy * wz + wy * dz)
    return wx * (wy * wz)


@triton.jit
def _velocity(along, n, live, scale, ALONG: tl.constexpr):
    """The points' velocity, in cells along each axis; nothing where they stand still."""
    vx, vy, vz = 0.0, 0.0, 0.0
    if ALONG:
        vx = tl.load(along + 3 * n, mask=live, other=0.0) * scale
        vy = tl.load(along + 3 * n + 1, mask=live, other=0.0) * scale
        vz = tl.load(along + 3 * n + 2, mask=live, other=0.0) * scale
    return vx, vy, vz


@triton.jit
def gather(
    points, along, table, scales, levels, out, count, width, F: tl.constexpr, FP: tl.constexpr,
    ALONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (N, L F) = sum over corners of weight * table."""
    n, live, scale, cell, fx, fy, fz = _block(points, count, scales, levels, BLOCK)
    f = tl.arange(0, FP)
    vx, vy, vz = _velocity(along, n, live, scale, ALONG)
    mask = live[:, None] & (f < F)[None, :]
    total = tl.zeros((BLOCK, FP), dtype=scale.dtype)
    for k in tl.static_range(8):
        entry = _entry(k, cell)
        weight = _weight(k, fx, fy, fz, vx, vy, vz, ALONG)
        rows = tl.load(table + entry[:, None] * F + f[None, :], mask=mask, other=0.0)
        total += weight[:, None] * rows.to(scale.dtype)
    place = out + (n * width + tl.program_id(1) * F)[:, None] + f[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def scatter(
    points, along, grad, scales, levels, factor, out, count, width, F: tl.constexpr, FP: tl.constexpr,
    ALONG: tl.constexpr, FIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (entries, F) += weight * grad (N, L F); with FIXED in whole numbers of 1 / factor."""
    n, live, scale, cell, fx, fy, fz = _block(points, count, scales, levels, BLOCK)
    f = tl.arange(0, FP)
    vx, vy, vz = _velocity(along, n, live, scale, ALONG)
    mask = live[:, None] & (f < F)[None, :]
    place = grad + (n * width + tl.program_id(1) * F)[:, None] + f[None, :]
    incoming = tl.load(place, mask=mask, other=0.0).to(scale.dtype)
    mask = mask & (incoming != 0)  # rows that belong to no ray all lie at one place: nobody waits for their zeros
    for k in tl.static_range(8):
        entry = _entry(k, cell)
        share = _weight(k, fx, fy, fz, vx, vy, vz, ALONG)[:, None] * incoming
        target = out + entry[:, None] * F + f[None, :]
        if FIXED:
            whole = tl.floor(share.to(tl.float64) * tl.load(factor) + 0.5).to(tl.int64)
            tl.atomic_add(target, whole, mask=mask, sem="relaxed")
        else:
            tl.atomic_add(target, share, mask=mask, sem="relaxed")


@triton.jit
def point_gradient(
    points, grad, table, scales, levels, out, count, width, F: tl.constexpr, FP: tl.constexpr, BLOCK: tl.constexpr
):
    """out (L, N, 3) = each level's part of the gradient in the points."""
    n, live, scale, cell, fx, fy, fz = _block(points, count, scales, levels, BLOCK)
    f = tl.arange(0, FP)
    mask = live[:, None] & (f < F)[None, :]
    place = grad + (n * width + tl.program_id(1) * F)[:, None] + f[None, :]
    incoming = tl.load(place, mask=mask, other=0.0).to(scale.dtype)
    gx = tl.zeros((BLOCK,), dtype=scale.dtype)
    gy = tl.zeros((BLOCK,), dtype=scale.dtype)
    gz = tl.zeros((BLOCK,), dtype=scale.dtype)
    for k in tl.static_range(8):
        entry = _entry(k, cell)
        rows = tl.load(table + entry[:, None] * F + f[None, :], mask=mask, other=0.0)
        dot = tl.sum(rows.to(scale.dtype) * incoming, axis=1) * scale
        wx = fx if k & 1 else 1 - fx
        wy = fy if k & 2 else 1 - fy
        wz = fz if k & 4 else 1 - fz
        gx += (dot if k & 1 else -dot) * (wy * wz)
        gy += (dot if k & 2 else -dot) * (wx * wz)
        gz += (dot if k & 4 else -dot) * (wx * wy)
    row = out + 3 * (tl.program_id(1).to(tl.int64) * count + n)
    tl.store(row, gx, mask=live)
    tl.store(row + 1, gy, mask=live)
    tl.store(row + 2, gz, mask=live)


@triton.jit
def _exact_quotient(a, b):
    """a / b as IEEE rounds it: in float32 a plain division is an ulp or two off."""
    if a.dtype == tl.float32:
        quotient = tl.div_rn(a, b)
    else:
        quotient = a / b
    return quotient


@triton.jit
def _slab(origins, directions, ray, live, axis: tl.constexpr, start, stop):
    """Narrow a ray's interval to the box along one axis; (1, 0) where it misses or holds a NaN."""
    o = tl.load(origins + 3 * ray + axis, mask=live, other=0.0)
    d = tl.load(directions + 3 * ray + axis, mask=live, other=1.0)
    still = d == 0
    safe = tl.where(still, 1.0, d)
    a, b = _exact_quotient(-1 - o, safe), _exact_quotient(1 - o, safe)
    enter, leave = tl.minimum(a, b), tl.maximum(a, b)
    inside = (o >= -1) & (o <= 1)
    good = tl.where(still, inside, (a == a) & (b == b))
    enter, leave = tl.where(still, start, enter), tl.where(still, stop, leave)
    return o, d, tl.where(good, tl.maximum(start, enter), 1.0), tl.where(good, tl.minimum(stop, leave), -1.0)


@triton.jit
def _cell(x, cells):
    """Index of the occupancy cell along an axis."""
    place = tl.maximum((x + 1) * (cells * 0.5), 0.0)
    return tl.minimum(place, cells * 1.0 - 1.0).to(tl.int32)


@triton.jit
def march(
    origins, directions, occupancy, jitter, setting, offsets, ray_index, points, t, rays, cells,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the samples of every ray into offsets[1:], or write them at offsets[:-1]."""
    ray = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = ray < rays
    step, near, far = tl.load(setting), tl.load(setting + 1), tl.load(setting + 2)
    shift = tl.load(jitter + ray, mask=live, other=0.5)
    start, stop = near + 0 * shift, far + 0 * shift
    ox, dx, start, stop = _slab(origins, directions, ray, live, 0, start, stop)
    oy, dy, start, stop = _slab(origins, directions, ray, live, 1, start, stop)
    oz, dz, start, stop = _slab(origins, directions, ray, live, 2, start, stop)
    hit = live & (stop > start) & (stop < float("inf"))
    reach = tl.where(hit, stop - start, 0.0)
    steps = (tl.max(reach, axis=0) / step).to(tl.int32) + 2  # of the block's longest way through the box
    place = tl.zeros((BLOCK,), dtype=tl.int64)
    if WRITE:
        place, end = tl.load(offsets + ray, mask=live, other=0), tl.load(offsets + ray + 1, mask=live, other=0)
    for i in range(steps):
        along = (shift + i) * step
        distance = start + along
        x, y, z = ox + distance * dx, oy + distance * dy, oz + distance * dz
        cell = (_cell(x, cells) * cells + _cell(y, cells)) * cells
        cell += _cell(z, cells)
        near_end = hit & (along < reach)
        kept = near_end & (tl.load(occupancy + cell, mask=near_end, other=0) != 0)
        if WRITE:
            kept = kept & (place < end)
            tl.store(ray_index + place, ray, mask=kept)
            tl.store(t + place, distance, mask=kept)
            tl.store(points + 3 * place, x, mask=kept)
            tl.store(points + 3 * place + 1, y, mask=kept)
            tl.store(points + 3 * place + 2, z, mask=kept)
        place += kept.to(tl.int64)
    if not WRITE:
        tl.store(offsets + 1 + ray, place, mask=live)


@triton.jit
def _absorbed(depth):
    """1 - exp(-depth) without cancellation."""
    series = depth * (1 - depth / 2 * (1 - depth / 3 * (1 - depth / 4 * (1 - depth / 5))))
    return tl.where(depth < 0.01, series, 1 - tl.exp(-depth))


@triton.jit
def blend(
    sigma, dt, values, offsets, limit, weights, light, opacity, accumulated, C: tl.constexpr, CP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights (S,), light behind each sample (S,), both 0 before, opacity (R,) and accumulated values (R, C)."""
    ray = tl.program_id(0).to(tl.int64)
    first, end = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    threshold, c = tl.load(limit), tl.arange(0, CP)
    before, total = threshold * 0, threshold * 0
    sums = tl.zeros((CP,), dtype=threshold.dtype)
    while (first < end) & (tl.exp(-before) >= threshold):
        s = first + tl.arange(0, BLOCK)
        live = s < end
        follows = live & (s > first)  # the sums before each sample, not after: a density may be infinite
        depth = tl.load(sigma + s, mask=live, other=0.0) * tl.load(dt + s, mask=live, other=0.0)
        last = tl.load(sigma + s - 1, mask=follows, other=0.0) * tl.load(dt + s - 1, mask=follows, other=0.0)
        passed = before + tl.cumsum(last, axis=0)
        reaching = tl.exp(-passed)
        lit = reaching >= threshold
        weight = tl.where(lit, reaching * _absorbed(depth), 0.0)
        tl.store(weights + s, weight, mask=live)
        tl.store(light + s, tl.where(lit, tl.exp(-(passed + depth)), 0.0), mask=live)
        if C > 0:
            mask = (live & lit)[:, None] & (c < C)[None, :]
            rows = tl.load(values + s[:, None] * C + c[None, :], mask=mask, other=0.0)
            sums += tl.sum(weight[:, None] * rows, axis=0)
        total += tl.sum(weight, axis=0)
        before += tl.sum(depth, axis=0)
        first += BLOCK
    tl.store(opacity + ray, total)
    if C > 0:
        tl.store(accumulated + ray * C + c, sums, mask=c < C)


@triton.jit
def blend_backward(
    dt, values, offsets, weights, light, in_weights, in_opacity, in_accumulated, g_sigma, g_values, C: tl.constexpr,
    CP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dsigma_k = dt_k (T_{k+1} g_k - sum_{i>k} w_i g_i), g_i the whole gradient in w_i; from the far end."""
    ray = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    c = tl.arange(0, CP)
    whole = tl.load(in_opacity + ray)
    behind = whole * 0
    if C > 0:
        colour = tl.load(in_accumulated + ray * C + c, mask=c < C, other=0.0)
    while end > begin:
        s = end - BLOCK + tl.arange(0, BLOCK)
        live = s >= begin
        weight = tl.load(weights + s, mask=live, other=0.0)
        g = tl.load(in_weights + s, mask=live, other=0.0) + whole
        if C > 0:
            mask = live[:, None] & (c < C)[None, :]
            rows = tl.load(values + s[:, None] * C + c[None, :], mask=mask, other=0.0)
            g += tl.sum(rows * colour[None, :], axis=1)
            tl.store(g_values + s[:, None] * C + c[None, :], weight[:, None] * colour[None, :], mask=mask)
        share = weight * g
        suffix = tl.cumsum(share, axis=0, reverse=True)
        step, past = tl.load(dt + s, mask=live, other=0.0), tl.load(light + s, mask=live, other=0.0)
        tl.store(g_sigma + s, step * (past * g - (behind + suffix - share)), mask=live)
        behind += tl.sum(share, axis=0)
        end -= BLOCK
