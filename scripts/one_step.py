"""Measure the teacher's one-step denoising of noisy true views: the PSNR (dB) of its x0 inside the true silhouette.

    python scripts/one_step.py                                 the packaged weights
    python scripts/one_step.py --weights teacher.safetensors   other weights

Eight prompts that are not held out, eight cameras each. "true" starts from the true view. "grey" starts from the true
silhouette in grey, so that the colour can come from the prompt only.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from sds3d.cameras import orbit
from sds3d.data import toybox
from sds3d.diffusion.guidance import cfg
from sds3d.diffusion.noise import Prediction, noised
from sds3d.runtime.machine import machine
from sds3d.teachers import small
from sds3d.teachers.training.sources import GRID_PROMPTS

LEVELS = (1.0, 0.98, 0.9, 0.8, 0.65, 0.5, 0.3)
SCALES = (1.0, 2.0, 5.0)
CAMERAS = 8


def psnr(ours: Tensor, true: Tensor, mask: Tensor) -> float:
    """Return the mean over images (B, 3, H, W) of the PSNR of the pixels where mask (B, 1, H, W) is 1."""
    error = ((ours - true).square() * mask).flatten(1).sum(1) / (3 * mask.flatten(1).sum(1))
    return float((-10 * error.log10()).mean())


def measure(teacher: small.SmallTeacher, prompt: str, generator: torch.Generator) -> dict[tuple, float]:
    """Return the PSNR by (start, scale, t)."""
    cameras, values = orbit(CAMERAS, elevation=20, start=10), {}
    images, coverage = toybox.parse(prompt).render(cameras, teacher.image_size)
    inside, true = (coverage > 0.5).float(), 2 * images - 1
    for start, x in (("true", true), ("grey", torch.where(inside > 0, 0.0, true))):
        for level in LEVELS:
            t = torch.full((CAMERAS,), level)
            alpha, sigma = teacher.schedule.alpha_sigma(t)
            x_t = noised(x, torch.randn(x.shape, generator=generator), alpha, sigma)
            cond = teacher.predict(x_t, t, [prompt] * CAMERAS, cameras)
            away = teacher.predict(x_t, t, [""] * CAMERAS, cameras, torch.zeros(CAMERAS, dtype=torch.bool))
            for scale in SCALES:
                x0 = Prediction(cfg(away.v, cond.v, scale), x_t, alpha, sigma, "v").x0.clamp(-1, 1)
                values[start, scale, level] = psnr(x0 / 2 + 0.5, images, inside)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a teacher; the packaged one by default")
    teacher = small.load(parser.parse_args().weights)
    generator, values = torch.Generator().manual_seed(0), defaultdict(list)
    for prompt in GRID_PROMPTS:
        for key, value in measure(teacher, prompt, generator).items():
            values[key].append(value)
    print(*(f"{key}: {value}" for key, value in machine(teacher.device).items()), sep="\n")
    print("start  s  ", *(f"t={level:<5}" for level in LEVELS))
    for start in ("true", "grey"):
        for scale in SCALES:
            row = [sum(values[start, scale, level]) / len(GRID_PROMPTS) for level in LEVELS]
            print(f"{start}  {scale:<4}", *(f"{value:<7.1f}" for value in row))


if __name__ == "__main__":
    main()
