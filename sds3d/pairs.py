"""Pairs of noise and what the teacher makes of it by a deterministic sampler: made once, kept on disk, resumable.

DMD's regression learns from them (arXiv 2311.18828, section 3.3). A folder holds parts of at most PART pairs, each
drawn from a seed of its own, so that an interrupted making goes on where it stopped, and a longer one adds to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from sds3d.files import replacing
from sds3d.ranges import Within
from sds3d.samplers import Sampler
from sds3d.teachers.base import Teacher
from sds3d.teachers.drawing import draw
from sds3d.transfer import onto

PART = 500
PARTS = "[0-9]*.safetensors"


@dataclass(frozen=True)
class PairsConfig:
    """
    Args:
        count: how many.
        batch: of them in a step of the regression.
        sampler, steps: see `sds3d.samplers.Sampler`; deterministic.
        folder: where they are kept; "" is a folder pairs beside the runs, one for each teacher and sampler.

    Raises:
        ValueError: too few, or a sampler that adds noise.
    """

    count: Annotated[int, Within(1, 10_000_000)] = 10_000
    batch: Annotated[int, Within(1, 65_536)] = 128
    sampler: str = "heun"
    steps: Annotated[int, Within(1, 1000)] = 18
    folder: str = ""

    def __post_init__(self):
        if self.batch < 1 or self.count < self.batch:
            raise ValueError(f"pairs.count is {self.count}; give at least pairs.batch, {self.batch}")
        if self.sampler == "ddpm":
            raise ValueError("pairs.sampler is 'ddpm', which draws anew each time; give heun, dpm++ or ddim")
        Sampler(self.sampler, self.steps)


@dataclass(frozen=True)
class Pairs:
    """Noise (N, C, h, w) of standard deviation 1, the teacher's x (N, C, h, w), and N prompts."""

    noise: Tensor
    x: Tensor
    prompts: list[str]

    def __getitem__(self, index: Tensor) -> Pairs:
        """Some of them, by index (B,) on the CPU."""
        there = onto(index, self.x.device)
        return Pairs(self.noise[there], self.x[there], [self.prompts[i] for i in index.tolist()])


def make(
    teacher: Teacher,
    identity: str,
    config: PairsConfig,
    prompts: Sequence[str],
    folder: Path,
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Make what is missing in ``folder``; yields how many pairs are there after each part.

    Args:
        identity: the teacher's, which the folder remembers.
        prompts: drawn from with equal chances.

    Raises:
        ValueError: the folder holds other pairs, or the disk says no; what was there stays.
    """
    told = {"teacher": identity, "sampler": config.sampler, "steps": config.steps, "guidance": guidance}
    told |= {"prompts": list(prompts)}
    _claim(folder, told)
    for part in range(-(-config.count // PART)):
        path = _part(folder, part)
        if not path.is_file():
            _make_part(teacher, config, prompts, path, part, guidance, torch.device(device))
        yield min((part + 1) * PART, config.count)


def _claim(folder: Path, told: dict) -> None:
    """Write what the folder's pairs are, or compare."""
    path = folder / "pairs.json"
    if not path.is_file() and not any(folder.glob(PARTS)):
        with replacing(path) as part:
            part.write_text(json.dumps(told), encoding="utf-8")
        return
    there = _claimed(folder)
    for key, wanted in told.items():
        if there.get(key) != wanted:
            raise ValueError(
                f"{folder} holds pairs made with {key}={there.get(key)}, not {wanted}; give another pairs.folder"
            )


def _claimed(folder: Path) -> dict:
    """What the folder's pairs are. Raises ValueError where nobody can say."""
    path = folder / "pairs.json"
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(there, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged; remove {folder}, or give another pairs.folder") from error
    return there


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _make_part(
    teacher: Teacher,
    config: PairsConfig,
    prompts: Sequence[str],
    path: Path,
    part: int,
    guidance: float,
    device: torch.device,
) -> None:
    """PART pairs, from a seed that is the part's number."""
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(part)
    chosen = torch.randint(len(prompts), (PART,), generator=generator)
    noise = torch.randn((PART, *teacher.shape), generator=generator)
    sampler, found = Sampler(config.sampler, config.steps), []
    for index in range(0, PART, config.batch):
        piece, told = noise[index : index + config.batch], chosen[index : index + config.batch].tolist()
        found.append(draw(teacher, onto(piece, device), [prompts[i] for i in told], sampler, guidance).cpu())
    with replacing(path) as file:
        file.write_bytes(save({"noise": noise, "x": torch.cat(found).float().contiguous(), "prompt": chosen}))


def load(folder: Path, config: PairsConfig, device: torch.device | str = "cpu") -> Pairs:
    """The first ``config.count`` pairs of a folder.

    Raises:
        ValueError: there are fewer, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    parts = [_part(folder, number) for number in range(-(-config.count // PART))]
    there = sum(path.is_file() for path in parts)
    if there < len(parts):
        raise ValueError(f"{folder} holds {there * PART} pairs and {config.count} are wanted; make them first")
    rows = []
    for path in parts:
        try:
            rows.append(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged; remove it, and it is made again") from error
    noise, x, which = (torch.cat([row[key] for row in rows])[: config.count] for key in ("noise", "x", "prompt"))
    prompts = _claimed(folder)["prompts"]
    return Pairs(noise.to(device), x.to(device), [prompts[i] for i in which.tolist()])
