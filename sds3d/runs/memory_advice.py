"""Settings that make a run take less memory: what is still open, what each costs, and which of them make a run fit."""

from __future__ import annotations

from dataclasses import dataclass

from sds3d.config import load as configs
from sds3d.config.load import Config
from sds3d.config.typed import plain
from sds3d.runs import kinds
from sds3d.runs.memory_estimate import Place, estimate
from sds3d.runs.memory_savings import Saving

LEAST = 0.01  # a setting that saves a smaller share than this of the peak is not worth its line


@dataclass(frozen=True)
class Advice:
    """
    Args:
        savings: settings to take together, the most effective first, and the peak in bytes with it and all before it.
        fits: whether they suffice.
    """

    savings: list[tuple[Saving, int]]
    fits: bool


def advise(config: Config, where: Place, image_size: int) -> Advice:
    """What makes a run fit, or comes nearest to it: single effects are measured, then added up in their order."""
    peak = estimate(config, where).peak
    tried = [(saving, _peak(config, [saving], where)) for saving in kinds.of(config).savings(config, image_size)]
    taken: list[Saving] = []
    found: list[tuple[Saving, int]] = []
    for saving, _ in sorted(tried, key=lambda pair: pair[1]):
        if peak <= where.size:
            break
        now = _peak(config, [*taken, saving], where)
        if now < (1 - LEAST) * peak:
            peak = now
            taken.append(saving)
            found.append((saving, peak))
    return Advice(found, peak <= where.size)


def _peak(config: Config, savings: list[Saving], where: Place) -> int:
    return estimate(_changed(config, savings), where).peak


def _changed(config: Config, savings: list[Saving]) -> Config:
    """The config with these settings."""
    values = plain(config)
    values["method"] = {"name": configs.name_of(config.method), **values["method"]}
    return configs.load(None, values, configs.parse_overrides([s.setting for s in savings]), kind=Config)
