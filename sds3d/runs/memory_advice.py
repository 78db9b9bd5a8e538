"""Chooses settings that make a run fit into memory, from estimates of each setting's effect."""

from __future__ import annotations

from dataclasses import dataclass

from sds3d.config import load as configs
from sds3d.config.load import Config
from sds3d.config.typed import plain
from sds3d.runs import kinds
from sds3d.runs.memory_estimate import Machine, estimate
from sds3d.runs.memory_savings import Saving

LEAST = 0.01  # a setting is left out if it saves less than this fraction of the peak


@dataclass(frozen=True)
class Advice:
    """Settings that save memory when they are used together.

    Args:
        savings: the settings, the most effective first, each with the peak in bytes under it and all before it.
        fits: whether the run fits with all of them.
    """

    savings: list[tuple[Saving, int]]
    fits: bool


def advise(config: Config, machine: Machine, image_size: int) -> Advice:
    """Choose settings with which a run fits, or comes nearest to it.

    Estimates the effect of each setting alone, then adds settings in the order of their effect until the run fits.

    Args:
        image_size: the size of the teacher's images in pixels.
    """
    peak = estimate(config, machine).peak
    alone = [(saving, _peak(config, [saving], machine)) for saving in kinds.of(config).savings(config, image_size)]
    chosen: list[tuple[Saving, int]] = []
    for saving, _ in sorted(alone, key=lambda pair: pair[1]):
        if peak <= machine.size:
            break
        lower = _peak(config, [*(earlier for earlier, _ in chosen), saving], machine)
        if lower < (1 - LEAST) * peak:
            peak = lower
            chosen.append((saving, peak))
    return Advice(chosen, peak <= machine.size)


def _peak(config: Config, savings: list[Saving], machine: Machine) -> int:
    return estimate(_with(config, savings), machine).peak


def _with(config: Config, savings: list[Saving]) -> Config:
    """The config with these settings."""
    values = plain(config)
    values["method"] = {"name": configs.name_of(config.method), **values["method"]}
    return configs.load(None, values, configs.parse_overrides([s.setting for s in savings]), kind=Config)
