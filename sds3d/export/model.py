"""A mesh as files hold it: vertices, faces, normals, and colours as a texture or at the vertices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Model:
    """A mesh with its colours, sRGB.

    Args:
        vertices: (V, 3) float; a seam of the texture has a vertex on each side.
        faces: (F, 3) int, counter-clockwise seen from outside.
        normals: (V, 3) float, unit length, outwards.
        colours: (V, 3) uint8, or None.
        uv: (V, 2) float in [0, 1], or None; u to the right and v down from the texture's top left, as in glTF.
        texture: (T, T, 3) uint8, or None.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    colours: np.ndarray | None = None
    uv: np.ndarray | None = None
    texture: np.ndarray | None = None


@dataclass(frozen=True)
class Placement:
    """From the world of ``cameras.py`` to a file: file = scale * (world - origin). Neither turns anything.

    Args:
        scale: metres a scene unit.
        origin: (x, y, z) of the world that is (0, 0, 0) in the file.
    """

    scale: float
    origin: tuple[float, float, float]

    @classmethod
    def standing(cls, vertices: np.ndarray) -> Placement:
        """Unit height, standing on y = 0, the middle of its box above the origin; for world vertices (V, 3)."""
        low, high = vertices.min(0), vertices.max(0)
        middle = (low + high) / 2
        return cls(1 / float(high[1] - low[1]), (float(middle[0]), float(low[1]), float(middle[2])))

    def to_file(self, model: Model) -> Model:
        return replace(model, vertices=self.scale * (model.vertices - np.array(self.origin)))

    def to_world(self, model: Model) -> Model:
        return replace(model, vertices=model.vertices / self.scale + np.array(self.origin))
