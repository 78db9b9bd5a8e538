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
class Stand:
    """How files of a format stand, so that other programs show them upright and in a size that makes sense.

    Args:
        up: the axis that points up, "y" or "z"; the front then looks along +z or -y, as Blender's front view wants.
        unit: what a file's 1 is, "m" or "mm".
        height: of the asset, in units.

    Raises:
        ValueError: another axis, or a height below 0.001 or above a million.
    """

    up: str
    unit: str
    height: float

    def __post_init__(self):
        if self.up not in ("y", "z"):
            raise ValueError(f"up is {self.up!r}; give y or z")
        if not 1e-3 <= self.height <= 1e6:  # single precision holds no more in a file
            raise ValueError(f"height is {self.height}; give 0.001 to 1000000, in mm for STL and in metres otherwise")


STANDS = {  # glTF's axes are part of its standard; a slicer takes an STL's numbers for mm, and lays z upwards
    ".glb": Stand("y", "m", 1.0),
    ".obj": Stand("y", "m", 1.0),
    ".ply": Stand("z", "m", 1.0),
    ".stl": Stand("z", "mm", 100.0),
}


def stand(suffix: str, up: str | None = None, height: float | None = None) -> Stand:
    """How a file with this suffix stands.

    Args:
        up: "y" or "z"; None is the format's own.
        height: in the format's unit; None is the format's own.

    Raises:
        ValueError: see ``Stand``; or a GLB with z up.
    """
    usual = STANDS[suffix]
    if suffix == ".glb" and up not in (None, "y"):
        raise ValueError(f"up is {up!r}, and a GLB has y up by its standard; leave it out, or write another format")
    return replace(usual, up=usual.up if up is None else up, height=usual.height if height is None else height)


@dataclass(frozen=True)
class Placement:
    """From the world of ``cameras.py`` (y up) to a file: file = turned(scale * (world - origin)).

    Args:
        scale: the file's units a scene unit.
        origin: (x, y, z) of the world that is (0, 0, 0) in the file.
        up: "y" turns nothing; "z" turns (x, y, z) to (x, -z, y).
    """

    scale: float
    origin: tuple[float, float, float]
    up: str = "y"

    @classmethod
    def standing(cls, vertices: np.ndarray, stands: Stand = STANDS[".glb"]) -> Placement:
        """On the ground, the middle of its box above the origin; for world vertices (V, 3)."""
        low, high = vertices.min(0), vertices.max(0)
        middle = (low + high) / 2
        origin = float(middle[0]), float(low[1]), float(middle[2])
        return cls(stands.height / float(high[1] - low[1]), origin, stands.up)

    def to_file(self, model: Model) -> Model:
        """A model in world coordinates, in the file's."""
        vertices = self.scale * (model.vertices - np.array(self.origin))
        return replace(model, vertices=self._turned(vertices, 1), normals=self._turned(model.normals, 1))

    def to_world(self, model: Model) -> Model:
        """A model in the file's coordinates, in the world's."""
        vertices = self._turned(model.vertices, -1) / self.scale + np.array(self.origin)
        return replace(model, vertices=vertices, normals=self._turned(model.normals, -1))

    def _turned(self, rows: np.ndarray, sign: int) -> np.ndarray:
        """(V, 3) rows a quarter turn about x, forth (1) or back (-1), where z is up."""
        if self.up == "y":
            return rows
        return np.stack([rows[:, 0], -sign * rows[:, 2], sign * rows[:, 1]], -1)
