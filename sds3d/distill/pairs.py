"""Pairs of noise and what the teacher makes of it by a deterministic sampler: made once, kept on disk, resumable.

DMD's regression learns from them (arXiv 2311.18828, section 3.3). A folder holds parts of at most PART pairs, each
drawn by itself, so that an interrupted making goes on where it stopped, and a longer one adds to it: pair i is image i
of SEED (`sds3d.diffusion.draws`), whose prompt comes from its part's number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from sds3d.diffusion.draws import in_order
from sds3d.diffusion.samplers import Sampler
from sds3d.runtime import tensor_files
from sds3d.runtime.files import from_json, read_text, replacing
from sds3d.runtime.ranges import Within
from sds3d.runtime.transfer import onto
from sds3d.teachers.base import Teacher
from sds3d.teachers.drawing import draw_batches

PART = 500
PARTS = "[0-9]*.safetensors"
SEED = 0x9A125  # none that samples and evaluations begin with: a generator is not judged by the noise it learnt from


@dataclass(frozen=True)
class PairsConfig:
    """
    Args:
        count: how many.
        batch: of them in a step of the regression.
        sampler, steps: see `sds3d.diffusion.samplers.Sampler`; deterministic.
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
    told |= {"prompts": list(prompts), "dtype": str(teacher.dtype).removeprefix("torch.")}
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
        if key not in there:  # older pairs: any precision, and of a pipeline's levels with noise left in
            raise ValueError(
                f"{path} is of an older version and does not say {key}; give another pairs.folder, or remove {folder} "
                "and the pairs are made again"
            )
        if there[key] != wanted:
            raise ValueError(
                f"{folder} holds pairs made with {key}={there[key]}, not {wanted}; give another pairs.folder"
            )


def _claimed(folder: Path) -> dict:
    """What the folder's pairs are. Raises ValueError where nobody can say."""
    path = folder / "pairs.json"
    try:
        there = from_json(read_text(path))
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
    """The PART pairs of a part."""
    chosen = torch.randint(len(prompts), (PART,), generator=torch.Generator().manual_seed(part))
    told = [prompts[int(i)] for i in chosen.tolist()]
    sampler = Sampler(config.sampler, config.steps)
    pieces = list(draw_batches(teacher, told, SEED, sampler, guidance, first=part * PART, device=device))
    order = [row for rows, _, _ in pieces for row in rows]
    noise = in_order(order, [noise[: len(rows)] for rows, noise, _ in pieces]).cpu().float().contiguous()
    x = in_order(order, [x[: len(rows)] for rows, _, x in pieces]).cpu().float().contiguous()
    row = {"noise": noise, "x": x, "prompt": chosen}
    with replacing(path) as file:
        file.write_bytes(tensor_files.to_bytes(row))


def load(folder: Path, config: PairsConfig, device: torch.device | str = "cpu") -> Pairs:
    """The first ``config.count`` pairs of a folder.

    Raises:
        ValueError: there are fewer, or a file is damaged.
    """
    parts = [_part(folder, number) for number in range(-(-config.count // PART))]
    there = sum(path.is_file() for path in parts)
    if there < len(parts):
        raise ValueError(f"{folder} holds {there * PART} pairs and {config.count} are wanted; make them first")
    rows = []
    for path in parts:
        try:
            rows.append(tensor_files.read(path)[0])
        except ValueError as error:
            raise ValueError(f"{path} is damaged; remove it, and it is made again ({error})") from error
    noise, x, which = (torch.cat([row[key] for row in rows])[: config.count] for key in ("noise", "x", "prompt"))
    prompts = _claimed(folder)["prompts"]
    return Pairs(noise.to(device), x.to(device), [prompts[i] for i in which.tolist()])
