"""From a density to a mesh: marching cubes (Lorensen and Cline 1987, as in scikit-image), colours, GLB / OBJ / PLY.

What is marched is not the density s but the opacity of a layer as thick as the threshold wants it,

    v = 1 - 2^(-s / threshold)  in [0, 1),   surface at v = 1/2, which is s = threshold.

Densities of a trained scene jump from 0 to hundreds within a voxel. v is bounded, so linear interpolation between
two corners puts the surface where the jump is, not next to the empty corner.

By default the threshold is the one whose surface covers as much of the picture as the scene does: over a few views,
pixels whose ray meets the threshold are as many as pixels whose ray loses half its light. So a soft scene, whose
densities never reach those of a hard one, keeps its outline.

Mesh coordinates are the world's of ``cameras.py`` (y up, front +z), which are glTF's. Vertex colours are sRGB
bytes in memory, in OBJ and in PLY; GLB stores them linear, as glTF 2.0 (3.9.2, COLOR_0) wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sds3d.cameras import cat, orbit
from sds3d.files import replacing

if TYPE_CHECKING:
    import trimesh

FORMATS = (".glb", ".obj", ".ply")
CHUNK = 1 << 17  # points in one call of a field
DEPTHS = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.5, 4.0, 6.0, 9.0)  # voxels below the surface where colours are taken
OUTLINE = 48  # pixels a side of the views that the default threshold compares

Density = Callable[[Tensor], Tensor]  # world points (N, 3) -> density (N,), >= 0
Colour = Callable[[Tensor], Tensor]  # world points (N, 3) -> sRGB (N, 3) in [0, 1]


@torch.no_grad()
def extract(
    density: Density,
    colour: Colour,
    resolution: int = 96,
    threshold: float | None = None,
    box: float = 1.0,
    keep: float = 0.05,
    device: torch.device | str = "cpu",
) -> trimesh.Trimesh:
    """The surface of a density, as a closed mesh with vertex colours and normals that point outwards.

    Args:
        density: world points (N, 3) -> (N,), per scene unit.
        colour: world points (N, 3) -> sRGB (N, 3) in [0, 1].
        resolution: voxels along each side of the box, 8 to 512.
        threshold: the density at the surface; by default the one that keeps the scene's outline.
        box: half the side of the box [-box, box]^3; whatever touches its faces is closed there.
        keep: pieces with less than this share of the largest piece's area are dropped. 1 keeps the largest only,
            0 keeps all. Cavities, which nobody can see, are always dropped.
        device: where the fields want their points.

    Returns:
        trimesh.Trimesh in world coordinates; vertex colours RGBA uint8, sRGB.

    Raises:
        ValueError: nothing is dense enough, or a setting is out of its range.
    """
    if not 8 <= resolution <= 512:
        raise ValueError(f"mesh resolution is {resolution}; give 8 to 512 voxels a side")
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}; give a share in [0, 1]")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"mesh threshold is {threshold}; give a density above 0")
    import trimesh

    voxel = 2 * box / resolution
    volume = _sample_lattice(density, resolution, box, device)
    if threshold is None:
        threshold = _outline_threshold(volume, box)
    vertices, faces = _march(volume, threshold, voxel, box)
    faces = faces[_pieces_worth_keeping(vertices, faces, keep)]
    used, faces = np.unique(faces, return_inverse=True)
    mesh = trimesh.Trimesh(vertices[used], faces.reshape(-1, 3), process=False)
    normals = torch.tensor(np.array(mesh.vertex_normals), dtype=torch.float32, device=device)
    points = torch.tensor(vertices[used], dtype=torch.float32, device=device)
    colours = _seen_colours(density, colour, points, normals, voxel, box)
    rgba = torch.cat([colours, torch.ones_like(colours[:, :1])], -1)
    mesh.visual.vertex_colors = (rgba * 255).round().to(torch.uint8).cpu().numpy()
    return mesh


def save(mesh: trimesh.Trimesh, path: str | Path) -> Path:
    """Write a mesh as GLB, OBJ or PLY, chosen by the suffix; the whole file or nothing.

    Raises:
        ValueError: another suffix, or a place that cannot be written.
    """
    path = Path(path)
    with replacing(path, FORMATS) as temporary:
        if path.suffix.lower() == ".glb":
            linear = mesh.copy(include_visual=True)
            linear.visual.vertex_colors = _recode(mesh.visual.vertex_colors, _to_linear)
            data = linear.export(file_type="glb", include_normals=True, tree_postprocessor=_add_material)
        else:
            data = mesh.export(file_type=path.suffix.lower()[1:])
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def load(path: str | Path) -> trimesh.Trimesh:
    """Read a mesh that ``save`` wrote, with sRGB vertex colours again.

    Raises:
        ValueError: there is no such file, or it is not a mesh.
    """
    import trimesh

    path = Path(path)
    if path.suffix.lower() not in FORMATS or not path.is_file():
        raise ValueError(f"'{path}' is no mesh file; give an existing {', '.join(FORMATS)}")
    try:
        mesh = trimesh.load(path, process=False, force="mesh", skip_materials=True)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"'{path}' is damaged ({error}); export it again") from error
    if path.suffix.lower() == ".glb":
        mesh.visual.vertex_colors = _recode(mesh.visual.vertex_colors, _to_srgb)
    return mesh


def _sample_lattice(density: Density, resolution: int, box: float, device: torch.device | str) -> np.ndarray:
    """Density at the (resolution + 1)^3 corners of the voxels, zero on the box's faces; float32, indexed [x, y, z]."""
    side = torch.linspace(-box, box, resolution + 1, device=device)
    volume = np.zeros((resolution + 1,) * 3, dtype=np.float32)
    slab = max(1, CHUNK // (resolution - 1) ** 2)  # inner corners only, so that the surface closes at the box
    for start in range(1, resolution, slab):
        stop = min(start + slab, resolution)
        points = torch.cartesian_prod(side[start:stop], side[1:-1], side[1:-1])  # (N, 3)
        values = density(points).reshape(stop - start, resolution - 1, resolution - 1)
        volume[start:stop, 1:-1, 1:-1] = values.float().cpu().numpy()
    if not np.isfinite(volume).all():
        raise ValueError("the scene's density is not finite everywhere; the run diverged: lower its learning rates")
    return volume


def _outline_threshold(volume: np.ndarray, box: float) -> float:
    """The middle, in the logarithm, of the thresholds whose surface has the scene's outline to 1 % of its area.

    A hard scene has many of them and the middle stays clear of its fog; a soft one has hardly more than one. Below
    ln 2 / (2 box) matter cannot stop half the light anywhere, so the surface need not follow it.
    """
    cameras = cat([orbit(3, elevation=0.0, start=20.0), orbit(3, elevation=40.0, start=80.0)])
    origins, directions = cameras.rays(OUTLINE)
    depths = torch.linspace(1.3, 4.7, round(1.7 * len(volume)))  # at distance 3, 1.7 reaches the corners of [-1, 1]^3
    points = origins[..., None, :] + depths[:, None] * directions[..., None, :]  # (6, H, W, D, 3), box = [-1, 1]^3
    points = points.reshape(1, len(cameras), -1, len(depths), 3)
    grid = torch.from_numpy(volume.transpose(2, 1, 0).copy())[None, None]  # grid_sample calls the last axis x
    # Nearest: a jump from 0 to 300 interpolated linearly would stop the light a voxel before the surface.
    along = functional.grid_sample(grid, points, mode="nearest", align_corners=True).flatten(0, 3)  # (rays, D)
    passed = torch.exp(-along.sum(-1) * float(depths[1] - depths[0]) * box)
    wanted = int((passed <= 0.5).sum())
    if wanted == 0:
        raise ValueError(
            f"no surface to mesh: the scene lets at least {float(passed.min()):.0%} of the light through everywhere;"
            " try more steps"
        )
    peaks = along.amax(-1).clamp(min=math.log(2) / (2 * box)).sort(descending=True).values  # of rays, above a threshold
    larger, smaller = (peaks[min(int(area * wanted), len(peaks) - 1)] for area in (1.01, 0.99))
    return math.sqrt(float(larger * smaller))


def _march(volume: np.ndarray, threshold: float, voxel: float, box: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) in world coordinates and faces (F, 3), counter-clockwise seen from outside."""
    from skimage.measure import marching_cubes

    if not volume.max() > threshold:
        peak = float(volume.max())
        raise ValueError(
            f"no surface to mesh: nothing is denser than {peak:.3g} and the threshold is {threshold:.3g};"
            " try more steps or a lower threshold"
        )
    opacity = 1 - np.exp2(-volume / threshold)  # v of the module's docstring
    vertices, faces, _, _ = marching_cubes(
        opacity, 0.5, spacing=(voxel,) * 3, gradient_direction="ascent", allow_degenerate=False
    )
    return vertices.astype(np.float64) - box, faces.astype(np.int64)


def _pieces_worth_keeping(vertices: np.ndarray, faces: np.ndarray, keep: float) -> np.ndarray:
    """Which faces (F,) belong to pieces of at least ``keep`` of the largest area and enclose matter, not a hole."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = (np.ones(2 * len(faces), dtype=np.int8), (faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel()))
    _, piece_of_vertex = connected_components(coo_matrix(links, shape=(len(vertices),) * 2), directed=False)
    piece = piece_of_vertex[faces[:, 0]]
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    area = np.bincount(piece, np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2)
    signed = np.bincount(piece, (a * np.cross(b, c)).sum(1) / 6)  # negative where the normals point into a hole
    outer = signed > 0
    good = outer & (area >= keep * area[outer].max())
    return good[piece]


def _seen_colours(
    density: Density, colour: Colour, points: Tensor, normals: Tensor, voxel: float, box: float
) -> Tensor:
    """Colours (V, 3) a camera would see straight above each vertex: composited along the inward normal.

    The field's colour exactly at the surface hardly counts in any rendered pixel; what lies deeper does, the softer
    the scene, the deeper.
    """
    depths = torch.tensor(DEPTHS, device=points.device) * voxel  # (D,)
    edges = torch.cat([depths[:1], (depths[1:] + depths[:-1]) / 2, depths[-1:]])
    rows = CHUNK // len(depths)
    out = []
    for some, inward in zip(points.split(rows), (-normals).split(rows)):
        along = (some[:, None] + depths[:, None] * inward[:, None]).clamp(-box, box)  # (n, D, 3)
        optical = density(along.reshape(-1, 3)).reshape(-1, len(depths)).float() * edges.diff()  # (n, D)
        optical[:, -1] += 1e-3  # somewhere a colour, even where the layer is thin
        passed = torch.exp(optical - optical.cumsum(1))
        weights = passed * -torch.expm1(-optical)
        weights = weights / weights.sum(1, keepdim=True)
        out.append((weights[..., None] * colour(along.reshape(-1, 3)).reshape(along.shape)).sum(1))
    return torch.cat(out).clamp(0, 1)


def _to_linear(x: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] -> linear (IEC 61966-2-1)."""
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def _to_srgb(x: np.ndarray) -> np.ndarray:
    """Linear in [0, 1] -> sRGB (IEC 61966-2-1)."""
    return np.where(x <= 0.0031308, x * 12.92, 1.055 * np.maximum(x, 1e-9) ** (1 / 2.4) - 0.055)


def _recode(rgba: np.ndarray, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """RGBA bytes (V, 4) with the curve applied to their colours."""
    rgba = np.array(rgba)
    rgba[:, :3] = np.round(curve(rgba[:, :3] / 255.0) * 255)
    return rgba


def _add_material(tree: dict) -> None:
    """Give every primitive of a glTF tree a material that shows its colours as they are: they hold the light already.

    Viewers that do not know unlit materials see a matt one; glTF's default is a metal and looks black.
    """
    matt = {"metallicFactor": 0.0, "roughnessFactor": 0.9}
    tree["materials"] = [
        {"name": "as rendered", "pbrMetallicRoughness": matt, "extensions": {"KHR_materials_unlit": {}}}
    ]
    tree["extensionsUsed"] = ["KHR_materials_unlit"]
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive["material"] = 0
