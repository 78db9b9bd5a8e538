"""Pictures of a mesh under a light, in grey clay or in its own colours, in which dents, holes and lids are seen.

Faces are flat, so that the pictures show the surface itself, not its smoothed normals. With the unit normal n of a face
and the direction l towards the light, which moves with the camera,

    brightness = AMBIENT + (1 - AMBIENT) max(n . l, 0)

A face that is seen from behind is dark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sds3d.cameras import Cameras, cat, orbit
from sds3d.export import raster
from sds3d.export.model import Model

if TYPE_CHECKING:
    import trimesh

SIZE = 96  # pixels a side
SAMPLES = 2  # a side of a pixel
CLAY = (0.8, 0.78, 0.75)  # RGB
AMBIENT = 0.25
LIGHT = (-0.48, 0.64, 0.6)  # unit direction towards the light in camera axes: to the left, above, behind the camera


def clay_views() -> Cameras:
    """Return the 8 fixed cameras of the pictures: four azimuths at elevation 20, then four at 60."""
    return cat([orbit(4, 20.0, start=20.0), orbit(4, 60.0, start=20.0)])


def lit(mesh: trimesh.Trimesh | None, cameras: Cameras, coloured: bool = False, size: int = SIZE) -> Tensor:
    """Return pictures (B, 3, size, size) of a mesh on white, which are plain white if there is no mesh.

    Args:
        coloured: show the mesh's vertex colours instead of clay.
    """
    if mesh is None:
        return torch.ones(len(cameras), 3, size, size)
    faces = np.asarray(mesh.faces)
    corners = np.asarray(mesh.vertices, dtype=np.float64)[faces]  # (F, 3, 3)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(min=1e-30)
    colours = 255 * np.array(CLAY)
    if coloured:
        visual: Any = mesh.visual  # trimesh's annotation says None
        colours = np.asarray(visual.vertex_colors)[faces, :3]  # (F, 3, 3)
    unwelded = np.arange(3 * len(faces)).reshape(-1, 3)  # each face has vertices of its own
    views = []
    for i, rotation in enumerate(cameras.rotations().double().numpy()):
        facing = (normals @ (rotation @ np.array(LIGHT))).clip(min=0)
        shaded = np.broadcast_to(colours * (AMBIENT + (1 - AMBIENT) * facing)[:, None, None], corners.shape)
        flat = shaded.round().astype(np.uint8).reshape(-1, 3)
        model = Model(corners.reshape(-1, 3), unwelded, normals.repeat(3, 0), flat)
        views.append(raster.render(model, cameras[i], size * SAMPLES)[0])
    return torch.nn.functional.avg_pool2d(torch.cat(views), SAMPLES)
