"""The settings of a mesh, which a run's config, the exporter and the command line have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sds3d.runtime.ranges import Within
from sds3d.runtime.validation import check

COLOURS = ("texture", "vertex")


@dataclass(frozen=True)
class MeshConfig:
    """Settings of a scene's mesh.

    Args:
        resolution: voxels along each side of the box.
        level: density at the surface; by default that of the scene's own surface (of field.kind=sdf), or the one whose
            silhouettes agree best with the scene's.
        keep: drop pieces below this fraction of the largest piece's area; 1 keeps only the largest, 0 keeps all.
        fill: close cracks and pits narrower than this, in scene units, but no opening through which one can see from
            several sides. Widths below two voxels close nothing.
        smooth: rounds of Taubin smoothing, which does not shrink the surface.
        faces: the largest number of triangles. The default is 5,000, which changes no figure of the toybox's shapes by
            more than 0.001, or twice as many, and so on, where with fewer the surface would not stay closed.
        colours: "texture" or "vertex". PLY can hold only "vertex", and STL has no colours.
        texture: texels a side, such as 1024 or 2048.

    Raises:
        ValueError: a setting is out of its range.
    """

    resolution: Annotated[int, Within(8, 512)] = 96
    level: Annotated[float, Within(0, 1e6, above=True)] | None = None
    keep: Annotated[float, Within(0, 1)] = 0.05
    fill: Annotated[float, Within(0, 0.5)] = 0.05
    smooth: Annotated[int, Within(0, 100)] = 3
    faces: Annotated[int, Within(100, 10_000_000)] | None = None
    colours: str = "texture"
    texture: Annotated[int, Within(64, 4096)] = 1024

    def __post_init__(self):
        check(self, "export.mesh")
        if self.colours not in COLOURS:
            raise ValueError(f"export.mesh.colours is {self.colours!r}; give {' or '.join(COLOURS)}")
