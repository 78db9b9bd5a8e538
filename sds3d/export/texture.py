"""Colours of a surface: what a camera sees straight above each place, at vertices or baked into a texture.

The field's colour exactly at the surface hardly counts in any rendered pixel; what lies deeper does, the softer the
scene, the deeper. So colours are composited along the inward normal, as a render would.

The texture's map is made by xatlas. Its time grows faster than the faces of a mesh, so it is given the surface in
blocks (cut at the middle of the longest side, again and again), each of which it cuts into charts and packs with the
rest.
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

DEPTHS = (-0.01, 0.005, 0.02, 0.04, 0.07, 0.12)  # scene units below the surface where colours are taken
DARK = 0.03  # light below which nothing deeper counts
BLOCK = 1500  # faces given to xatlas at a time
PADDING = 4  # texels between charts


def with_vertex_colours(skin: Skin, source: Source, tell: Tell = silent) -> Model:
    """The surface with a colour at each vertex."""
    model = Model(skin.vertices, skin.faces, normals(skin.vertices, skin.faces))
    rgb = seen_colours(source, model.vertices, model.normals, tell)
    return replace(model, colours=(rgb * 255).round().astype(np.uint8))


def with_texture(skin: Skin, source: Source, size: int, tell: Tell = silent) -> Model:
    """The surface with a texture of size x size texels."""
    tell("texture map", 0.0)
    model = unwrapped(skin, size)
    tell("texture map", 1.0)
    assert model.uv is not None, "unwrapped gives every vertex its place"
    place = torch.from_numpy(model.uv.astype(np.float32)) * size - 0.5
    flat = torch.cat([place, torch.ones(len(place), 1)], -1)
    face, weights = raster.nearest(flat, torch.from_numpy(model.faces), size)
    covered = (face >= 0).numpy()
    corners = model.faces[face[covered].numpy()]  # (P, 3)
    shares = weights[covered].numpy()[..., None]
    points, above = (shares * model.vertices[corners]).sum(1), (shares * model.normals[corners]).sum(1)
    above /= np.maximum(np.linalg.norm(above, axis=1, keepdims=True), 1e-9)
    rgb = seen_colours(source, points, above, tell)
    image = np.zeros((size * size, 3), dtype=np.uint8)
    image[covered] = (rgb * 255).round()
    return replace(model, texture=_dilated(image.reshape(size, size, 3), covered.reshape(size, size)))


def unwrapped(skin: Skin, size: int) -> Model:
    """The surface with places on a texture of about size x size texels; vertices are doubled along seams."""
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
        origin, index, place = atlas.get_mesh(i)
        vertices.append(used[origin])
        faces.append(index.astype(np.int64).reshape(-1, 3) + count)
        uv.append(place)
        count += len(origin)
    origin = np.concatenate(vertices)
    return Model(
        skin.vertices[origin],
        np.concatenate(faces),
        smooth[origin],
        uv=np.concatenate(uv).clip(0, 1).astype(np.float32),
    )


def _blocks(centres: np.ndarray, part: np.ndarray) -> Iterator[np.ndarray]:
    """Faces in groups of at most BLOCK that lie together."""
    if len(part) <= BLOCK:
        yield part
        return
    longest = np.ptp(centres[part], axis=0).argmax()
    order = part[np.argsort(centres[part, longest], kind="stable")]
    yield from _blocks(centres, order[: len(order) // 2])
    yield from _blocks(centres, order[len(order) // 2 :])


@torch.no_grad()
def seen_colours(source: Source, points: np.ndarray, above: np.ndarray, tell: Tell = silent) -> np.ndarray:
    """Colours (N, 3) in [0, 1] that a camera sees straight above each point (N, 3), given unit normals (N, 3)."""
    out = []
    rows = CHUNK // 2
    for start in range(0, len(points), rows):
        tell("colours", start / len(points))
        some, inward = (
            torch.tensor(x[start : start + rows], dtype=torch.float32, device=source.device) for x in (points, -above)
        )
        out.append(_composited(source, some, inward).clamp(0, 1).cpu().numpy())
    tell("colours", 1.0)
    return np.concatenate(out)


def _composited(source: Source, points: Tensor, inward: Tensor) -> Tensor:
    """Colours (N, 3) along rays that start a little above the surface; a ray ends where no light is left."""
    depths = torch.tensor(DEPTHS)
    edges = torch.cat([depths[:1], (depths[1:] + depths[:-1]) / 2, depths[-1:]]).diff().tolist()
    total, weight = torch.zeros_like(points), torch.zeros_like(points[:, :1])
    passed = torch.ones_like(weight)
    for depth, thick in zip(DEPTHS, edges, strict=True):
        lit = torch.nonzero(passed[:, 0] > DARK)[:, 0]
        place = (points[lit] + depth * inward[lit]).clamp(-1, 1)
        optical = source.density(place).float()[:, None] * thick
        optical += 1e-4 if depth > 0 else 0.0  # somewhere a colour, even where the layer is thin
        share = passed[lit] * -torch.expm1(-optical)
        total[lit] += share * source.colour(place)
        weight[lit] += share
        passed[lit] *= torch.exp(-optical)
    return total / weight.clamp(min=1e-9)


def _dilated(image: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Every texel that no face covers takes the colour of the nearest one that is: no seam shows, however small."""
    from scipy.ndimage import distance_transform_edt

    if not covered.any():
        return image
    row, column = np.asarray(distance_transform_edt(~covered, return_distances=False, return_indices=True))
    return image[row, column]
