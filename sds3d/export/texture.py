"""Colours of a surface, at vertices or baked into a texture: at each point what a camera straight above sees.

The field's colour exactly at the surface contributes little to a rendered pixel. Most of a pixel's colour comes from
below the surface, and the softer the scene, the deeper. So colours are composited along the inward normal, as in a
render.

xatlas makes the texture map. Its time grows faster than the number of faces, so it gets the surface in blocks, which
are made by halving the faces along the longest axis, repeatedly. xatlas cuts each block into charts and packs all
charts together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sds3d.export import raster
from sds3d.export.mesh import Skin, normals
from sds3d.export.model import Model
from sds3d.export.source import CHUNK, Source, Tell, silent

DEPTHS = (-0.01, 0.005, 0.02, 0.04, 0.07, 0.12)  # scene units below the surface at which colours are sampled
DARK = 0.03  # transmittance below which deeper samples are ignored
BLOCK = 1500  # the largest number of faces in a block for xatlas
PADDING = 4  # texels between charts


def with_vertex_colours(skin: Skin, source: Source, tell: Tell = silent) -> Model:
    """Return the surface with a colour at each vertex."""
    model = Model(skin.vertices, skin.faces, normals(skin.vertices, skin.faces))
    rgb = seen_colours(source, model.vertices, model.normals, tell)
    return replace(model, colours=(rgb * 255).round().astype(np.uint8))


def with_texture(skin: Skin, source: Source, size: int, tell: Tell = silent) -> Model:
    """Return the surface with a texture of size x size texels."""
    tell("texture map", 0.0)
    model = unwrapped(skin, size)
    tell("texture map", 1.0)
    assert model.uv is not None, "unwrapped gives every vertex a uv"
    texel = torch.from_numpy(model.uv.astype(np.float32)) * size - 0.5  # (V, 2)
    flat = torch.cat([texel, torch.ones(len(texel), 1)], -1)
    face, weights = raster.nearest(flat, torch.from_numpy(model.faces), size)
    covered = (face >= 0).numpy()
    corners = model.faces[face[covered].numpy()]  # (P, 3)
    barycentric = weights[covered].numpy()[..., None]
    points, outward = (barycentric * model.vertices[corners]).sum(1), (barycentric * model.normals[corners]).sum(1)
    outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-9)
    rgb = seen_colours(source, points, outward, tell)
    image = np.zeros((size * size, 3), dtype=np.uint8)
    image[covered] = (rgb * 255).round()
    return replace(model, texture=_dilated(image.reshape(size, size, 3), covered.reshape(size, size)))


def unwrapped(skin: Skin, size: int) -> Model:
    """Return the surface with uv coordinates for a texture of about size x size texels; seams have two vertices."""
    import xatlas

    smooth = normals(skin.vertices, skin.faces)
    atlas, blocks = xatlas.Atlas(), []
    for part in _blocks(skin.vertices[skin.faces].mean(1), np.arange(len(skin.faces))):
        used, faces = np.unique(skin.faces[part], return_inverse=True)
        faces = faces.reshape(-1, 3).astype(np.uint32)
        atlas.add_mesh(skin.vertices[used].astype(np.float32), faces, smooth[used].astype(np.float32))
        blocks.append(used)
    packing = xatlas.PackOptions()
    packing.resolution, packing.padding, packing.create_image = size, PADDING, False
    atlas.generate(xatlas.ChartOptions(), packing)
    vertices, faces, uv, count = [], [], [], 0
    for i, used in enumerate(blocks):
        origin, index, block_uv = atlas.get_mesh(i)
        vertices.append(used[origin])
        faces.append(index.astype(np.int64).reshape(-1, 3) + count)
        uv.append(block_uv)
        count += len(origin)
    origin = np.concatenate(vertices)
    return Model(
        skin.vertices[origin],
        np.concatenate(faces),
        smooth[origin],
        uv=np.concatenate(uv).clip(0, 1).astype(np.float32),
    )


def _blocks(centres: np.ndarray, part: np.ndarray) -> Iterator[np.ndarray]:
    """Yield groups of at most BLOCK neighbouring faces."""
    if len(part) <= BLOCK:
        yield part
        return
    longest = np.ptp(centres[part], axis=0).argmax()
    order = part[np.argsort(centres[part, longest], kind="stable")]
    yield from _blocks(centres, order[: len(order) // 2])
    yield from _blocks(centres, order[len(order) // 2 :])


@torch.no_grad()
def seen_colours(source: Source, points: np.ndarray, outward: np.ndarray, tell: Tell = silent) -> np.ndarray:
    """Return the colours (N, 3) in [0, 1] that a camera straight above each point sees.

    Args:
        points: (N, 3) on the surface.
        outward: (N, 3) unit normals.
    """
    out = []
    rows = CHUNK // 2
    for start in range(0, len(points), rows):
        tell("colours", start / len(points))
        part, inward = (
            torch.tensor(x[start : start + rows], dtype=torch.float32, device=source.device) for x in (points, -outward)
        )
        out.append(_composited(source, part, inward).clamp(0, 1).cpu().numpy())
    tell("colours", 1.0)
    return np.concatenate(out)


def _composited(source: Source, points: Tensor, inward: Tensor) -> Tensor:
    """Composite colours (N, 3) along rays that start just above the surface and end where the transmittance is low."""
    depths = torch.tensor(DEPTHS)
    edges = torch.cat([depths[:1], (depths[1:] + depths[:-1]) / 2, depths[-1:]]).diff().tolist()
    total, weight = torch.zeros_like(points), torch.zeros_like(points[:, :1])
    transmittance = torch.ones_like(weight)
    for depth, thickness in zip(DEPTHS, edges, strict=True):
        lit = torch.nonzero(transmittance[:, 0] > DARK)[:, 0]
        samples = (points[lit] + depth * inward[lit]).clamp(-1, 1)
        optical = source.density(samples).float()[:, None] * thickness
        optical += 1e-4 if depth > 0 else 0.0  # gives every point a colour, even one of a thin layer
        part = transmittance[lit] * -torch.expm1(-optical)
        total[lit] += part * source.colour(samples)
        weight[lit] += part
        transmittance[lit] *= torch.exp(-optical)
    return total / weight.clamp(min=1e-9)


def _dilated(image: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Give every uncovered texel the colour of the nearest covered one, so that no seam shows at any mip level."""
    from scipy.ndimage import distance_transform_edt

    if not covered.any():
        return image
    row, column = np.asarray(distance_transform_edt(~covered, return_distances=False, return_indices=True))
    return image[row, column]
