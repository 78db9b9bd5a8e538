"""Turns: which domain (see `sds3d.domains`) the images of a step show."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated

from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import Within
from sds3d.runtime.validation import check

COLOURS = ("colours", "albedo")
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, fill [0, 1) evenly
_NEVER = Ramp.constant(0.0)


@dataclass(frozen=True)
class DomainConfig:
    """The domains on which the teacher judges a scene, in turn.

    A run keeps only those that its teacher knows (see `known`), and its config.yaml says so.

    Args:
        colours: what the scene's colours are: "colours" under the teacher's light, or "albedo", without light.
        normals, depths: fraction of the steps that show the normals or the depths of the surface, a Ramp.
        weight_normals, weight_depths: factors of the gradient in these steps. Depths need a large one: a surface
            that is off by a tenth of the box changes its pixels by a twentieth, and Adam steps by the largest
            gradients.
        guidance: guidance scale in these steps, in place of the method's.
        t_min, t_max: range of t in these steps, in place of that of ``time``, whose unit and kind they have; null is
            that of ``time``.
        resolution: largest number of pixels a side of the images in these steps; 0 is that of the images in colours. 32
            pixels take a quarter of the time of 64. A teacher that does not know this size enlarges the images.

    Raises:
        ValueError: a setting is out of range, or the fractions add up to more than 1.

    Examples:
        >>> turns = DomainConfig(normals=Ramp.constant(0.5))
        >>> [turns.at(step) for step in range(4)]
        ['normals', 'colours', 'normals', 'colours']
    """

    colours: str = "colours"
    normals: Annotated[Ramp, Within(0, 1)] = _NEVER
    depths: Annotated[Ramp, Within(0, 1)] = _NEVER
    weight_normals: Annotated[float, Within(0, 1e6)] = 1.0
    weight_depths: Annotated[float, Within(0, 1e6)] = 20.0
    guidance: Annotated[float, Within(0, 1000)] = 1.0
    t_min: Annotated[Ramp, Within(0, 1e4)] | None = None
    t_max: Annotated[Ramp, Within(0, 1e4)] | None = None
    resolution: Annotated[int, Within(0, 1024)] = 0

    def __post_init__(self):
        check(self, "domains")
        if self.colours not in COLOURS:
            raise ValueError(f"domains.colours is {self.colours!r}; give {' or '.join(COLOURS)}")
        ramps = self._ramps()
        for step in {edge for ramp in ramps.values() for edge in (ramp.start, ramp.end)}:
            total = sum(ramp(step) for ramp in ramps.values())
            if total > 1 + 1e-9:
                raise ValueError(
                    f"domains.{' and domains.'.join(ramps)} add up to {total:g} at step {step:g}; give at most 1 in "
                    "all (the recipe of the packaged teacher has 0.2 of each; 0 turns a domain off)"
                )

    def known(self, domains: Collection[str]) -> DomainConfig:
        """Return these settings without the domains that a teacher does not know; their steps show colours."""
        missing = {name: _NEVER for name in self._ramps() if name not in domains}
        return replace(self, colours=self.colours if self.colours in domains else "colours", **missing)

    def shown(self) -> tuple[str, ...]:
        """Return the domains that at least one step shows, the colours' first."""
        return (self.colours, *(name for name, ramp in self._ramps().items() if max(ramp.v0, ramp.v1) > 0))

    def at(self, step: int) -> str:
        """Return the domain of a step, counted from 0.

        The turns follow a low-discrepancy sequence: any few steps in a row have each domain nearly in its fraction.
        """
        place, bound = step * _GOLDEN % 1, 0.0
        for domain, ramp in self._ramps().items():
            bound += ramp(step)
            if place < bound:
                return domain
        return self.colours

    def resolution_at(self, domain: str, in_colours: int) -> int:
        """Return the pixels a side of a step's images, given what it is for images in colours."""
        return in_colours if domain in COLOURS or not self.resolution else min(self.resolution, in_colours)

    def time(self, time: TimestepSampler) -> TimestepSampler:
        """Return the sampler of t in the steps that show the surface, given that of all others.

        Raises:
            ValueError: the range is empty at some step.
        """
        bounds = {"t_min": self.t_min, "t_max": self.t_max}
        try:
            return replace(time, **{name: bound for name, bound in bounds.items() if bound is not None})
        except ValueError as error:
            raise ValueError(
                f"domains.t_min and domains.t_max, or those of time where they are not given: {error}"
            ) from error

    def weight(self, domain: str) -> float:
        """Return the factor of the gradient on images of a domain."""
        return {"normals": self.weight_normals, "depths": self.weight_depths}.get(domain, 1.0)

    def _ramps(self) -> dict[str, Ramp]:
        return {"normals": self.normals, "depths": self.depths}
