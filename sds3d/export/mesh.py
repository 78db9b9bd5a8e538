"""From a density to a closed mesh: marching cubes (Lorensen and Cline 1987, as in scikit-image), cleaning, decimation.

Marching cubes runs on a bounded opacity instead of the density s,

    v = 1 - 2^(-max((s / level)^2, D / ln 2))  in [0, 1),   surface at v = 1/2,

so the surface lies where s equals the level, or where D equals ln 2. D(x) is the second smallest of the optical depths
from x to the outside along 98 directions (visibility.py). Where D is larger than ln 2, more than half the light is lost
in every direction but at most one: no camera sees this part, and it counts as solid. So a soft scene, which is foam
inside, becomes a solid body with one skin. Because v is bounded, linear interpolation between two corners puts the
surface at a jump of the density. Cracks are closed (grey closing of v), but not where light passes right through the
scene along several lines: a mug's handle stays open.

v is smoothed by the size of the smallest detail that the scene can represent.

Where the scene has a surface of its own, as the zero of a signed distance, its density there is the level. Otherwise
the level is chosen so that the mesh's silhouettes from 12 views agree best with the scene's rendered opacity
(mean IoU). If several levels agree equally, as in a hard scene, the highest is chosen, since it excludes fog.

Meshes are in the world of ``cameras.py`` (y up, front +z).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from sds3d.cameras import Cameras
from sds3d.export import raster
from sds3d.export.settings import MeshConfig
from sds3d.export.source import CHUNK, Source, Tell, choosing_views, silent
from sds3d.export.visibility import HALF, Sight, sight

CHOICE_RESOLUTION = 128  # the largest number of voxels a side of the meshes that choose the level
THREADS = 2  # levels tried at the same time
POWERS = 12  # levels tried: the largest density divided by 2, 4, 8 ...
ALIKE = 0.001  # levels whose IoU differs by less count as equal: about one pixel a view
BLUR = 0.7  # the least smoothing of v, in voxels: closes pinholes, keeps corners within a voxel
FACES = 5_000  # the usual number of faces
HASTE = (2, 4, 7)  # fast_simplification's agg: a low one pinches fewer thin parts, but may stop above the target
TAUBIN = (0.5, -0.53)  # one round of smoothing: shrink, then expand slightly more (Taubin 1995)


@dataclass(frozen=True)
class Skin:
    """A surface in world coordinates.

    Args:
        vertices: (V, 3) float64.
        faces: (F, 3) int64, counter-clockwise seen from outside.
        level: the density at the surface.
        level_iou: mean IoU of that level's silhouettes with the rendered ones; None if the scene or the user gave it.
    """

    vertices: np.ndarray
    faces: np.ndarray
    level: float
    level_iou: float | None


@torch.no_grad()
def extract(source: Source, settings: MeshConfig = MeshConfig(), tell: Tell = silent) -> Skin:
    """Return the closed surface of a scene, with faces that point outwards.

    Raises:
        ValueError: the scene is empty, or nothing is as dense as the level. The message says how dense it is.
    """
    density = _sample_lattice(source, settings.resolution, tell)
    seen = sight(density, 2 / settings.resolution)
    if not density.max() > 0:
        raise ValueError("no surface to mesh: the scene is empty, its density is 0 everywhere; try more steps")
    level, iou = source.level if settings.level is None else settings.level, None
    if level is None:
        level, iou = _choose_level(source, density, seen, settings, tell)
    tell("surface", 0.0)
    vertices, faces = _march(density, seen, level, settings, source.detail)
    vertices, faces = _smooth(vertices, faces, settings.smooth), faces
    tell("surface", 0.5)
    vertices, faces = _thinned(vertices, faces, settings.faces)
    tell("surface", 1.0)
    return Skin(vertices, faces, level, iou)


def normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return unit normals (V, 3) of vertices: the area-weighted mean of their faces' normals, (0, 1, 0) if it is 0."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    each = np.cross(b - a, c - a)
    total = np.stack([np.bincount(faces.ravel(), np.repeat(each[:, i], 3), len(vertices)) for i in range(3)], -1)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.where(length > 1e-20, total / np.maximum(length, 1e-20), [0.0, 1.0, 0.0])


def _sample_lattice(source: Source, resolution: int, tell: Tell) -> np.ndarray:
    """Return the density at the voxels' corners, (resolution + 1)^3 float32, indexed [x, y, z]; 0 on the box faces."""
    side = torch.linspace(-1, 1, resolution + 1, device=source.device)
    volume = np.zeros((resolution + 1,) * 3, dtype=np.float32)
    slab = max(1, CHUNK // (resolution - 1) ** 2)  # only inner corners, so that the surface is closed at the box
    for start in range(1, resolution, slab):
        tell("density", start / resolution)
        stop = min(start + slab, resolution)
        points = torch.cartesian_prod(side[start:stop], side[1:-1], side[1:-1])  # (N, 3)
        values = source.density(points).reshape(stop - start, resolution - 1, resolution - 1)
        volume[start:stop, 1:-1, 1:-1] = values.float().cpu().numpy()
    tell("density", 1.0)
    if not np.isfinite(volume).all():
        raise ValueError("the scene's density is not finite everywhere; the run diverged: lower its learning rates")
    return volume


def _choose_level(
    source: Source, density: np.ndarray, seen: Sight, settings: MeshConfig, tell: Tell
) -> tuple[float, float]:
    """Return the level whose silhouettes agree best with the rendered opacity, and their mean IoU."""
    tell("level", 0.0)
    cameras = choosing_views()
    opacity = source.view(cameras, source.pixels * 2 // 3)[1].float().cpu()
    wanted = opacity[:, 0] >= 0.5
    if not wanted.any():
        raise ValueError(
            f"no surface to mesh: nothing is visible, the largest opacity from {len(cameras)} views is"
            f" {float(opacity.max()):.2g} and a surface needs 0.5; try more steps"
        )
    step = -(-settings.resolution // CHOICE_RESOLUTION)
    if settings.resolution % step:
        step = 1
    coarse = density[::step, ::step, ::step], seen.strided(step)
    tried: dict[float, float] = {}

    def agreement(power: float) -> float:
        """Return the mean IoU of the level 2^-power times the largest density; 0 if that has no surface."""
        try:
            skin = _march(*coarse, float(density.max()) * 2**-power, settings, source.detail)
        except ValueError:
            return 0.0
        return _silhouette_iou(skin, wanted, cameras)

    def try_all(powers: Iterable[float]) -> float:
        """Try the powers, and return the best one so far."""
        new = [power for power in powers if power not in tried]
        for power, iou in zip(new, pool.map(agreement, new)):
            tried[power] = iou
            tell("level", min(0.9, 0.3 + len(tried) / 25))
        return max(tried, key=tried.__getitem__)

    with ThreadPoolExecutor(THREADS) as pool:  # numpy and scipy release the GIL
        best = try_all(range(1, POWERS + 1))  # all of them: a dense speck can make a second maximum
        for stride in (0.5, 0.25):
            best = try_all((best - stride, best + stride))
    most = tried[best]
    best = min(power for power, iou in tried.items() if iou >= most - ALIKE)
    if not most:
        raise ValueError(
            f"no surface to mesh: what is visible (opacity up to {float(opacity.max()):.2g}) is thinner than a voxel; "
            "give a higher resolution, or a level"
        )
    tell("level", 1.0)
    return float(density.max()) * 2**-best, tried[best]


def _silhouette_iou(mesh: tuple[np.ndarray, np.ndarray], wanted: torch.Tensor, cameras: Cameras) -> float:
    """Return the mean IoU of a mesh's silhouettes with those wanted, (B, H, H) bool."""
    shown = raster.silhouettes(*mesh, cameras, wanted.shape[-1])
    both, either = (shown & wanted).flatten(1).sum(1), (shown | wanted).flatten(1).sum(1)
    return float((both / either.clamp(min=1)).mean())


def _blurred(opacity: np.ndarray, width: float) -> np.ndarray:
    """Return 2 G v - G G v: a Gaussian blur, corrected to first order for its shrinking of round bodies."""
    from scipy.ndimage import gaussian_filter

    once = gaussian_filter(opacity, width)
    return 2 * once - gaussian_filter(once, width)


def _march(
    density: np.ndarray, seen: Sight, level: float, settings: MeshConfig, detail: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices (V, 3) in world coordinates and faces (F, 3) of the pieces to keep."""
    from scipy.ndimage import grey_closing
    from skimage.measure import marching_cubes

    voxel = 2 / (len(density) - 1)
    opacity = 1 - np.exp2(-np.maximum((density / np.float32(level)) ** 2, seen.buried / np.float32(HALF)))
    reach = int(settings.fill / voxel / 2)  # voxels from either side
    if reach:
        opacity = np.where(seen.crossed, opacity, grey_closing(opacity, size=(2 * reach + 1,) * 3))
    opacity = _blurred(opacity, max(BLUR, detail / voxel))
    opacity[[0, -1]] = opacity[:, [0, -1]] = opacity[:, :, [0, -1]] = 0  # closes the surface at the box
    if not opacity.max() > 0.5:
        raise ValueError(
            f"no surface to mesh: nothing is denser than {float(density.max()):.3g} and the level is {level:.3g};"
            " give a lower level, or none"
        )
    vertices, faces, _, _ = marching_cubes(
        opacity, 0.5, spacing=(voxel,) * 3, gradient_direction="ascent", allow_degenerate=False
    )
    vertices, faces = vertices.astype(np.float64) - 1, faces.astype(np.int64)
    faces = faces[_pieces_worth_keeping(vertices, faces, settings.keep)]
    used, faces = np.unique(faces, return_inverse=True)
    return vertices[used], faces.reshape(-1, 3)


def _pieces_worth_keeping(vertices: np.ndarray, faces: np.ndarray, keep: float) -> np.ndarray:
    """Return which faces (F,) belong to a piece with at least ``keep`` of the largest area that is not a cavity."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = (np.ones(2 * len(faces), dtype=np.int8), (faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel()))
    _, piece_of_vertex = connected_components(coo_matrix(links, shape=(len(vertices),) * 2), directed=False)
    piece = piece_of_vertex[faces[:, 0]]
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    area = np.bincount(piece, np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2)
    signed = np.bincount(piece, (a * np.cross(b, c)).sum(1) / 6)  # the volume: negative for a cavity
    outer = signed > 0
    good = outer & (area >= keep * area[outer].max())
    return good[piece]


def _smooth(vertices: np.ndarray, faces: np.ndarray, rounds: int) -> np.ndarray:
    """Return vertices (V, 3) after Taubin smoothing: each moves towards its neighbours' mean, then away from it."""
    from scipy.sparse import coo_matrix, diags

    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)  # each edge twice, in both directions, once for each face
    links = coo_matrix((np.ones(len(edges)), edges.T), shape=(len(vertices),) * 2).tocsr()
    mean = diags(1 / np.maximum(np.asarray(links.sum(1)).ravel(), 1)) @ links
    for _ in range(rounds):
        for factor in TAUBIN:
            vertices = vertices + factor * (mean @ vertices - vertices)
    return vertices.clip(-1, 1)


def _thinned(vertices: np.ndarray, faces: np.ndarray, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a mesh to at most ``most`` faces; None is ``FACES``, doubled until the surface stays closed."""
    target = most or FACES
    while True:
        thin = _reduced(vertices, faces, target)
        if most is not None or target >= len(faces) or _is_closed(thin[1]):
            return thin
        target *= 2


def _is_closed(faces: np.ndarray) -> bool:
    """Return whether every edge belongs to two faces (F, 3)."""
    ends = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    return bool((np.unique(ends @ [faces.max() + 1, 1], return_counts=True)[1] == 2).all())


def _reduced(vertices: np.ndarray, faces: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a mesh to at most ``most`` faces by collapsing edges of least error (Garland and Heckbert 1997)."""
    import fast_simplification

    for haste in HASTE:
        if len(faces) <= most:
            break
        small = vertices.astype(np.float32)
        # the function takes float32 and float64, but its type hints name one of them
        thin = fast_simplification.simplify(small, faces, target_count=most, agg=haste)  # pyright: ignore[reportArgumentType]
        vertices, faces = thin[0].astype(np.float64).clip(-1, 1), thin[1].astype(np.int64)
    return vertices, faces
