"""Pairs of noise and the teacher's sample from it by a deterministic sampler, stored on disk.

DMD's regression trains on them (arXiv 2311.18828, section 3.3). A folder holds parts of PART pairs. Each part is drawn
by itself, so an interrupted run resumes at the first missing part, and a larger count adds parts. Pair i is image i of
SEED (`sds3d.diffusion.seeded_noise`); its prompt is drawn from the number of its part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from sds3d.diffusion.samplers import SAMPLERS, Sampler
from sds3d.diffusion.seeded_noise import in_order
from sds3d.runtime import tensor_files
from sds3d.runtime.files import from_json, read_text, replacing
from sds3d.runtime.ranges import Within
from sds3d.runtime.transfer import onto
from sds3d.teachers.base import Teacher
from sds3d.teachers.drawing import draw_batches

PART = 500
PARTS = "[0-9]*.safetensors"
SEED = 0x9A125  # samples and evaluations begin with other seeds: a generator is not judged on its training noise


@dataclass(frozen=True)
class PairsConfig:
    """Settings of the pairs.

    Args:
        count: number of pairs.
        batch: pairs in a step of the regression.
        sampler, steps: see `sds3d.diffusion.samplers.Sampler`; a deterministic one.
        folder: folder of the pairs; "" is a folder named pairs beside the runs, one for each teacher and sampler.

    Raises:
        ValueError: the count is below the batch, or the sampler adds noise.
    """

    count: Annotated[int, Within(1, 10_000_000)] = 10_000
    batch: Annotated[int, Within(1, 65_536)] = 128
    sampler: str = "heun"
    steps: Annotated[int, Within(1, 1000)] = 18
    folder: str = ""

    def __post_init__(self):
        if self.batch < 1 or self.count < self.batch:
            raise ValueError(f"pairs.count is {self.count}; give at least pairs.batch, {self.batch}")
        Sampler(self.sampler, self.steps)
        if SAMPLERS[self.sampler].stochastic:
            known = ", ".join(name for name, algorithm in SAMPLERS.items() if not algorithm.stochastic)
            raise ValueError(f"pairs.sampler is {self.sampler!r}, which draws fresh noise each time; give {known}")


@dataclass(frozen=True)
class Pairs:
    """Noise (N, C, h, w) of standard deviation 1, the teacher's x (N, C, h, w), and N prompts."""

    noise: Tensor
    x: Tensor
    prompts: list[str]

    def __getitem__(self, index: Tensor) -> Pairs:
        """Select pairs by an index (B,) on the CPU."""
        device_index = onto(index, self.x.device)
        return Pairs(self.noise[device_index], self.x[device_index], [self.prompts[i] for i in index.tolist()])


def make(
    teacher: Teacher,
    identity: str,
    config: PairsConfig,
    prompts: Sequence[str],
    folder: Path,
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Make the parts that are missing in ``folder``; yield the number of pairs after each part.

    Args:
        identity: name and fingerprint of the teacher, recorded in the folder.
        prompts: prompts to draw from, equally likely.

    Raises:
        ValueError: the folder holds pairs with other settings, or cannot be written. Nothing in it is changed.
    """
    settings = {"teacher": identity, "sampler": config.sampler, "steps": config.steps, "guidance": guidance}
    settings |= {"prompts": list(prompts), "dtype": str(teacher.dtype).removeprefix("torch.")}
    _record_settings(folder, settings)
    for part in range(-(-config.count // PART)):
        path = _part(folder, part)
        if not path.is_file():
            _make_part(teacher, config, prompts, path, part, guidance, torch.device(device))
        yield min((part + 1) * PART, config.count)


def _record_settings(folder: Path, settings: dict) -> None:
    """Write the settings of a folder's pairs, or compare them with those recorded there."""
    path = folder / "pairs.json"
    if not path.is_file() and not any(folder.glob(PARTS)):
        with replacing(path) as part:
            part.write_text(json.dumps(settings), encoding="utf-8")
        return
    recorded = _recorded_settings(folder)
    for key, wanted in settings.items():
        if key not in recorded:  # older pairs have any dtype, and those of a pipeline have noise left in them
            raise ValueError(
                f"{path} is of an older version and does not say {key}; give another pairs.folder, or remove {folder} "
                "and the pairs are made again"
            )
        if recorded[key] != wanted:
            raise ValueError(
                f"{folder} holds pairs made with {key}={recorded[key]}, not {wanted}; give another pairs.folder"
            )


def _recorded_settings(folder: Path) -> dict:
    """Return the settings of a folder's pairs. Raises ValueError if they are missing or damaged."""
    path = folder / "pairs.json"
    try:
        recorded = from_json(read_text(path))
        if not isinstance(recorded, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged; remove {folder}, or give another pairs.folder") from error
    return recorded


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
    """Draw the PART pairs of a part and write them."""
    chosen = torch.randint(len(prompts), (PART,), generator=torch.Generator().manual_seed(part))
    part_prompts = [prompts[int(i)] for i in chosen.tolist()]
    sampler = Sampler(config.sampler, config.steps)
    pieces = list(draw_batches(teacher, part_prompts, SEED, sampler, guidance, first=part * PART, device=device))
    order = [row for rows, _, _ in pieces for row in rows]
    noise = in_order(order, [noise[: len(rows)] for rows, noise, _ in pieces]).cpu().float().contiguous()
    x = in_order(order, [x[: len(rows)] for rows, _, x in pieces]).cpu().float().contiguous()
    tensors = {"noise": noise, "x": x, "prompt": chosen}
    with replacing(path) as file:
        file.write_bytes(tensor_files.to_bytes(tensors))


def load(folder: Path, config: PairsConfig, device: torch.device | str = "cpu") -> Pairs:
    """Load the first ``config.count`` pairs of a folder.

    Raises:
        ValueError: there are fewer, or a file is damaged.
    """
    paths = [_part(folder, number) for number in range(-(-config.count // PART))]
    existing = sum(path.is_file() for path in paths)
    if existing < len(paths):
        raise ValueError(f"{folder} holds {existing * PART} pairs and {config.count} are wanted; make them first")
    parts = []
    for path in paths:
        try:
            parts.append(tensor_files.read(path)[0])
        except ValueError as error:
            raise ValueError(f"{path} is damaged; remove it, and it is made again ({error})") from error
    noise, x, index = (torch.cat([part[key] for part in parts])[: config.count] for key in ("noise", "x", "prompt"))
    prompts = _recorded_settings(folder)["prompts"]
    return Pairs(noise.to(device), x.to(device), [prompts[i] for i in index.tolist()])
