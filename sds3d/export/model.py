"""The contents of a mesh file: vertices, faces, normals, colours, and how the mesh is placed in the file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Model:
    """A mesh with its sRGB colours.

    Args:
        vertices: (V, 3) float; along a seam of the texture there is a vertex for each side.
        faces: (F, 3) int, counter-clockwise seen from outside.
        normals: (V, 3) float, unit length, outwards.
        colours: (V, 3) uint8, or None.
        uv: (V, 2) float in [0, 1], or None; from the texture's top left, u to the right and v down, as in glTF.
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
    """Axes, unit and size of the files of a format, so that other programs show a mesh upright and at a sensible size.

    Args:
        up: the axis that points up, "y" or "z". The front faces +z if y is up, and -y, as Blender's front view
            expects, if z is up.
        unit: length of 1 in a file, "m" or "mm".
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
        if not 1e-3 <= self.height <= 1e6:  # files hold single precision
            raise ValueError(f"height is {self.height}; give 0.001 to 1000000, in mm for STL and in metres otherwise")


STANDS = {  # glTF's standard fixes the axes; slicers read an STL in mm, with z up
    ".glb": Stand("y", "m", 1.0),
    ".obj": Stand("y", "m", 1.0),
    ".ply": Stand("z", "m", 1.0),
    ".stl": Stand("z", "mm", 100.0),
}


def stand(suffix: str, up: str | None = None, height: float | None = None) -> Stand:
    """Return axes, unit and size for a file with this suffix.

    Args:
        up: "y" or "z"; None is the format's default.
        height: in the format's unit; None is the format's default.

    Raises:
        ValueError: see ``Stand``; or a GLB with z up.
    """
    usual = STANDS[suffix]
    if suffix == ".glb" and up not in (None, "y"):
        raise ValueError(f"up is {up!r}, and a GLB has y up by its standard; leave it out, or write another format")
    return replace(usual, up=usual.up if up is None else up, height=usual.height if height is None else height)


@dataclass(frozen=True)
class Placement:
    """The transform from the world of ``cameras.py`` (y up) to a file: file = rotate(scale * (world - origin)).

    Args:
        scale: file units per scene unit.
        origin: the world's (x, y, z) that becomes (0, 0, 0) in the file.
        up: "y" does not rotate; "z" rotates (x, y, z) to (x, -z, y).
    """

    scale: float
    origin: tuple[float, float, float]
    up: str = "y"

    @classmethod
    def standing(cls, vertices: np.ndarray, stands: Stand = STANDS[".glb"]) -> Placement:
        """Return the placement that puts world vertices (V, 3) on the ground, their box's centre above the origin."""
        low, high = vertices.min(0), vertices.max(0)
        middle = (low + high) / 2
        origin = float(middle[0]), float(low[1]), float(middle[2])
        return cls(stands.height / float(high[1] - low[1]), origin, stands.up)

    def to_file(self, model: Model) -> Model:
        """Transform a model from world coordinates to the file's."""
        vertices = self.scale * (model.vertices - np.array(self.origin))
        return replace(model, vertices=self._rotated(vertices, 1), normals=self._rotated(model.normals, 1))

    def to_world(self, model: Model) -> Model:
        """Transform a model from the file's coordinates to the world's."""
        vertices = self._rotated(model.vertices, -1) / self.scale + np.array(self.origin)
        return replace(model, vertices=vertices, normals=self._rotated(model.normals, -1))

    def _rotated(self, rows: np.ndarray, sign: int) -> np.ndarray:
        """Rotate (V, 3) rows by a quarter turn about x if z is up: to the file (1) or back (-1)."""
        if self.up == "y":
            return rows
        return np.stack([rows[:, 0], -sign * rows[:, 2], sign * rows[:, 1]], -1)
