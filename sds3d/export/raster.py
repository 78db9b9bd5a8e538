"""A small software rasteriser of meshes with a z-buffer and textures, without light. It shows a file as a viewer would.

Every face is tested against the pixel centres in its bounding box, by barycentric coordinates (Pineda 1988). 1 / depth
is linear on the screen and attributes are linear in space: a = sum_i w_i a_i / z_i / sum_i w_i / z_i.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.export.model import Model

PAIRS = 1 << 21  # pairs of a face and a pixel tested at once
NEAR = 0.05  # scene units; faces with a corner closer to the camera are not drawn


class Surface(NamedTuple):
    """The shape that views of a model show.

    Args:
        distance: (B, 1, H, W) from the camera, scene units; 0 where a view shows no face.
        normal: (B, 3, H, W) unit normals, between those of the vertices; 0 where a view shows no face.
        behind: (B, 1, H, W) bool, whether the face that is seen points away from the camera, by its winding.
    """

    distance: Tensor
    normal: Tensor
    behind: Tensor


def render(
    model: Model, cameras: Cameras, size: int, background: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Render views of a model in world coordinates, with one sample a pixel and unlit colours.

    Returns:
        images (B, 3, size, size) in [0, 1] and coverage (B, 1, size, size), 0 or 1. A model without colours is black.
    """
    images, covers = [], []
    faces = torch.from_numpy(np.ascontiguousarray(model.faces, dtype=np.int64))
    attributes, texture = _attributes(model)
    for screen in project(model.vertices, cameras, size):
        face, weights = nearest(screen, faces, size)
        covered = face >= 0
        corners = attributes[faces[face[covered]]]  # (P, 3, A)
        values = (weights[covered][..., None] * corners).sum(1)
        rgb = torch.tensor(background).repeat(size * size, 1)
        rgb[covered] = values if texture is None else bilinear(texture, values)
        images.append(rgb.T.reshape(3, size, size))
        covers.append(covered.float().reshape(1, size, size))
    return torch.stack(images), torch.stack(covers)


def surface(model: Model, cameras: Cameras, size: int) -> Surface:
    """Render the shape of a model in world coordinates, with one sample a pixel."""
    depths, normals, behind = [], [], []
    faces = torch.from_numpy(np.ascontiguousarray(model.faces, dtype=np.int64))
    places = torch.from_numpy(model.vertices.astype(np.float32))
    directions = torch.from_numpy(model.normals.astype(np.float32))
    for eye, screen in zip(cameras.positions(), project(model.vertices, cameras, size)):
        face, weights = nearest(screen, faces, size)
        covered = face >= 0
        corners, weight = faces[face[covered]], weights[covered][..., None]
        depth, normal = torch.zeros(size * size, 1), torch.zeros(size * size, 3)
        depth[covered] = ((weight * places[corners]).sum(1) - eye).norm(dim=-1, keepdim=True)
        normal[covered] = F.normalize((weight * directions[corners]).sum(1), dim=-1)
        back = torch.zeros(size * size, 1, dtype=torch.bool)
        a, b, c = screen[corners][..., :2].unbind(1)
        back[covered] = _cross(b - a, c - a)[:, None] > 0  # rows go down: a front face turns clockwise
        for images, image in ((depths, depth), (normals, normal), (behind, back)):
            images.append(image.T.reshape(-1, size, size))
    return Surface(*map(torch.stack, (depths, normals, behind)))


def silhouettes(vertices: np.ndarray, faces: np.ndarray, cameras: Cameras, size: int) -> Tensor:
    """Return the pixels (B, size, size), bool, that a mesh of world vertices (V, 3) and faces (F, 3) covers."""
    index = torch.from_numpy(np.ascontiguousarray(faces, dtype=np.int64))
    covers = []
    for screen in project(vertices, cameras, size):
        covered = torch.zeros(size * size, dtype=torch.bool)
        for _, pixel, _ in _hits(screen, index, size):
            covered[pixel] = True
        covers.append(covered.reshape(size, size))
    return torch.stack(covers)


def project(vertices: np.ndarray, cameras: Cameras, size: int) -> Iterator[Tensor]:
    """Yield, for each view, vertices (V, 3) as column, row and depth; pixel centres are integers, row 0 is the top."""
    points = torch.from_numpy(np.ascontiguousarray(vertices, dtype=np.float32))
    for position, rotation, fov in zip(cameras.positions(), cameras.rotations(), cameras.fov, strict=True):
        local = (points - position) @ rotation
        depth = -local[:, 2]
        half = size / 2
        flat = local[:, :2] / (depth * torch.tan(torch.deg2rad(fov) / 2))[:, None] * half
        yield torch.stack([flat[:, 0] + half - 0.5, half - 0.5 - flat[:, 1], depth], -1)


def nearest(screen: Tensor, faces: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the nearest face at each pixel, (size^2,), -1 for none, and its corners' weights in space, (size^2, 3)."""
    best = torch.full((size * size,), -torch.inf)
    face = torch.full((size * size,), -1)
    weights = torch.zeros(size * size, 3)
    for index, pixel, inverse in _hits(screen, faces, size):
        near = inverse.sum(-1)  # 1 / depth
        front = best.scatter_reduce(0, pixel, near, "amax")
        wins = (near == front[pixel]) & (near > best[pixel])
        last = torch.full((size * size,), -1).scatter_reduce(0, pixel[wins], torch.nonzero(wins)[:, 0], "amax")
        shown = last >= 0  # of two faces at the same depth, the last one
        face[shown] = index[last[shown]]
        weights[shown] = inverse[last[shown]] / near[last[shown], None]
        best = front
    return face, weights


def _hits(screen: Tensor, faces: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Find all pairs of a face and a pixel whose centre it covers, a part at a time.

    Yields:
        faces (P,), pixels (P,) and w_i / z_i of the three corners (P, 3).
    """
    flat, depth = screen[:, :2][faces], screen[:, 2][faces]  # (F, 3, 2), (F, 3)
    low = flat.amin(1).ceil().clamp(min=0).long()
    extent = (flat.amax(1).floor().clamp(max=size - 1).long() - low + 1).clamp(min=0)  # columns, rows
    a, b, c = flat.unbind(1)
    area = _cross(b - a, c - a)
    count = extent.prod(-1) * ((area != 0) & (depth.amin(1) > NEAR))
    drawn = torch.nonzero(count)[:, 0]
    ends = count[drawn].cumsum(0)
    start, before = 0, 0
    while start < len(drawn):
        stop = max(int(torch.searchsorted(ends, before + PAIRS, right=True)), start + 1)
        part, number = drawn[start:stop], count[drawn[start:stop]]
        index = torch.repeat_interleave(part, number)
        offset = torch.arange(len(index)) - torch.repeat_interleave(number.cumsum(0) - number, number)
        x = low[index, 0] + offset % extent[index, 0]
        y = low[index, 1] + offset // extent[index, 0]
        p = torch.stack([x, y], -1).float()
        wa, wb = (_cross(c[index] - b[index], p - b[index]), _cross(a[index] - c[index], p - c[index]))
        weights = torch.stack([wa, wb], -1) / area[index, None]
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        inside = weights.amin(-1) >= 0
        yield index[inside], (y * size + x)[inside], (weights / depth[index])[inside]
        start, before = stop, int(ends[stop - 1])


def bilinear(texture: Tensor, uv: Tensor) -> Tensor:
    """Return the colours (N, C) of a texture (T, T, C) at uv (N, 2), v down from the top."""
    texel = uv.flip(-1) * torch.tensor(texture.shape[:2]) - 0.5  # row, column
    first = texel.floor()
    fraction = texel - first
    total = torch.zeros(len(uv), texture.shape[2])
    for row in (0, 1):
        for column in (0, 1):
            step = torch.tensor([row, column])
            at = (first.long() + step).clamp(min=0).minimum(torch.tensor(texture.shape[:2]) - 1)
            weight = torch.where(step == 1, fraction, 1 - fraction).prod(-1)
            total += weight[:, None] * texture[at[:, 0], at[:, 1]]
    return total


def _attributes(model: Model) -> tuple[Tensor, Tensor | None]:
    """Return what is interpolated, uv (V, 2) or colours (V, 3), and the texture (T, T, 3) or None; all in [0, 1]."""
    if model.texture is not None and model.uv is not None:
        return torch.from_numpy(model.uv.astype(np.float32)), torch.from_numpy(model.texture.astype(np.float32)) / 255
    colours = np.zeros_like(model.vertices) if model.colours is None else model.colours
    return torch.from_numpy(colours.astype(np.float32)) / 255, None


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
