"""The programs of `triton_gpu`.

Names in capitals are compile-time constants. Everything is computed in the dtype of the points or rays.
"""

# pyright reads Triton's language as Python; but its constants are plain numbers and static_range loops are unrolled.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def touch(out):
    """Store one number: the smallest kernel, which shows that a launch works."""
    tl.store(out, 1.0)


@triton.jit
def _axis(points, n, live, axis: tl.constexpr, scale):
    """Return each point's grid cell (uint32) along an axis, and its fraction inside the cell. NaN reads as 0."""
    x = tl.load(points + 3 * n + axis, mask=live, other=0.0)
    x = tl.where(x > 0, x, 0.0)
    x = tl.where(x < 1, x, 1.0)
    position = x.to(scale.dtype) * scale + 0.5
    cell = tl.floor(position)
    return cell.to(tl.int32).to(tl.uint32, bitcast=True), position - cell


@triton.jit
def _block(points, count, scales, levels, BLOCK: tl.constexpr):
    """Return this program's points: index, mask, the level's scale, cell (see `_entry`), fractions x, y, z."""
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
    """Return the table's row (int64) of corner k of a cell. A cell is: x, y, z; then, of its level, the strides of y
    and z, size, first entry, 1 if dense."""
    x, y, z, sy, sz, size, first, dense = cell
    x, y, z = x + (k & 1), (y + (k >> 1 & 1)) * sy, (z + (k >> 2)) * sz
    line = x + y + z
    line = tl.where(line >= size, line - size, line)
    hashed = (x ^ y ^ z) & (size - 1)
    return first + tl.where(dense == 1, line, hashed).to(tl.int64)


@triton.jit
def _weight(k: tl.constexpr, fx, fy, fz, vx, vy, vz, ALONG: tl.constexpr):
    """Return the trilinear weight of corner k, or, with ALONG, its derivative along (vx, vy, vz)."""
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
def _direction(along, n, live, scale, ALONG: tl.constexpr):
    """Return the direction (vx, vy, vz) of the derivative at each point, in cells; zeros without ALONG."""
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
    """Set out (N, L F) to the sum of weight * table over the corners."""
    n, live, scale, cell, fx, fy, fz = _block(points, count, scales, levels, BLOCK)
    f = tl.arange(0, FP)
    vx, vy, vz = _direction(along, n, live, scale, ALONG)
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
    """Add weight * grad (N, L F) to out (entries, F); with FIXED as whole multiples of 1 / factor."""
    n, live, scale, cell, fx, fy, fz = _block(points, count, scales, levels, BLOCK)
    f = tl.arange(0, FP)
    vx, vy, vz = _direction(along, n, live, scale, ALONG)
    mask = live[:, None] & (f < F)[None, :]
    place = grad + (n * width + tl.program_id(1) * F)[:, None] + f[None, :]
    incoming = tl.load(place, mask=mask, other=0.0).to(scale.dtype)
    mask = mask & (incoming != 0)  # padding rows all lie at one point: their atomics would wait for each other
    for k in tl.static_range(8):
        entry = _entry(k, cell)
        part = _weight(k, fx, fy, fz, vx, vy, vz, ALONG)[:, None] * incoming
        target = out + entry[:, None] * F + f[None, :]
        if FIXED:
            whole = tl.floor(part.to(tl.float64) * tl.load(factor) + 0.5).to(tl.int64)
            tl.atomic_add(target, whole, mask=mask, sem="relaxed")
        else:
            tl.atomic_add(target, part, mask=mask, sem="relaxed")


@triton.jit
def point_gradient(
    points, grad, table, scales, levels, out, count, width, F: tl.constexpr, FP: tl.constexpr, BLOCK: tl.constexpr
):
    """Set out (L, N, 3) to each level's part of the points' gradient."""
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
    """Return a / b rounded as IEEE 754 requires; Triton's float32 division is off by an ulp or two."""
    if a.dtype == tl.float32:
        quotient = tl.div_rn(a, b)
    else:
        quotient = a / b
    return quotient


@triton.jit
def _slab(origins, directions, ray, live, axis: tl.constexpr, start, stop):
    """Clip a ray's interval to the box along one axis. Return origin, direction and the interval, which is empty
    (start > stop) if the ray misses or holds a NaN."""
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
    """Return the index of the occupancy cell along an axis."""
    place = tl.maximum((x + 1) * (cells * 0.5), 0.0)
    return tl.minimum(place, cells * 1.0 - 1.0).to(tl.int32)


@triton.jit
def march(
    origins, directions, occupancy, jitter, scalars, offsets, ray_index, points, t, rays, cells,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the samples of every ray into offsets[1:], or, with WRITE, write the samples at offsets[:-1].

    scalars: (step, near, far) in the rays' dtype.
    """
    ray = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = ray < rays
    step, near, far = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    shift = tl.load(jitter + ray, mask=live, other=0.5)
    start, stop = near + 0 * shift, far + 0 * shift
    ox, dx, start, stop = _slab(origins, directions, ray, live, 0, start, stop)
    oy, dy, start, stop = _slab(origins, directions, ray, live, 1, start, stop)
    oz, dz, start, stop = _slab(origins, directions, ray, live, 2, start, stop)
    hit = live & (stop > start) & (stop < float("inf"))
    reach = tl.where(hit, stop - start, 0.0)
    steps = (tl.max(reach, axis=0) / step).to(tl.int32) + 2  # of the block's longest interval
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
    """Return 1 - exp(-depth) without cancellation."""
    series = depth * (1 - depth / 2 * (1 - depth / 3 * (1 - depth / 4 * (1 - depth / 5))))
    return tl.where(depth < 0.01, series, 1 - tl.exp(-depth))


@triton.jit
def blend(
    sigma, dt, values, offsets, limit, weights, transmittance, opacity, accumulated, C: tl.constexpr, CP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute weights (S,) and transmittance behind each sample (S,), both 0 before, opacity (R,), sums (R, C)."""
    ray = tl.program_id(0).to(tl.int64)
    first, end = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    threshold, c = tl.load(limit), tl.arange(0, CP)
    before, total = threshold * 0, threshold * 0
    sums = tl.zeros((CP,), dtype=threshold.dtype)
    while (first < end) & (tl.exp(-before) >= threshold):
        s = first + tl.arange(0, BLOCK)
        live = s < end
        follows = live & (s > first)  # sum the depths before each sample; subtracting its own fails if it is infinite
        depth = tl.load(sigma + s, mask=live, other=0.0) * tl.load(dt + s, mask=live, other=0.0)
        last = tl.load(sigma + s - 1, mask=follows, other=0.0) * tl.load(dt + s - 1, mask=follows, other=0.0)
        passed = before + tl.cumsum(last, axis=0)
        reaching = tl.exp(-passed)
        lit = reaching >= threshold
        weight = tl.where(lit, reaching * _absorbed(depth), 0.0)
        tl.store(weights + s, weight, mask=live)
        tl.store(transmittance + s, tl.where(lit, tl.exp(-(passed + depth)), 0.0), mask=live)
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
    dt, values, offsets, weights, transmittance, in_weights, in_opacity, in_accumulated, g_sigma, g_values,
    C: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dL/dsigma_k = dt_k (T_{k+1} g_k - sum_{i>k} w_i g_i), g_i the total gradient in w_i, from the far end."""
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
        part = weight * g
        suffix = tl.cumsum(part, axis=0, reverse=True)
        step, past = tl.load(dt + s, mask=live, other=0.0), tl.load(transmittance + s, mask=live, other=0.0)
        tl.store(g_sigma + s, step * (past * g - (behind + suffix - part)), mask=live)
        behind += tl.sum(part, axis=0)
        end -= BLOCK
