"""Measure how well a teacher knows the surface: errors of its denoised images of normals and depths.

    python scripts/surface_accuracy.py
    python scripts/surface_accuracy.py --weights outputs/toybox-teacher/teacher.safetensors --side 64

The true images of the twelve held-out prompts, from random cameras, get noise at level t, and the teacher denoises
them once. Images of another side than the teacher's are resized, as in a run. Depths are in scene units; a mean below
0 is too far from the camera.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d import domains
from sds3d.cameras import CameraRanges, Cameras
from sds3d.data import toybox
from sds3d.diffusion.noise import noised
from sds3d.teachers import small
from sds3d.teachers.base import Teacher, answerer

TIMES = (0.95, 0.7, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a teacher; the packaged one by default")
    parser.add_argument("--side", type=int, default=32, help="pixels a side of the true images (32)")
    parser.add_argument("--cameras", type=int, default=6, help="cameras a prompt (6)")
    options = parser.parse_args()
    teacher = small.load(options.weights)
    for t in TIMES:
        angle, error, mean = errors(teacher, t, options.side, options.cameras)
        print(f"t {t:g}: normals {angle:.1f} degrees off, depths {error:.4f} (mean {mean:+.4f})", flush=True)


def errors(teacher: Teacher, t: float, side: int, count: int) -> tuple[float, float, float]:
    """Return the mean angle between normals in degrees, the mean error of depths, and its mean with its sign.

    The mean is over the pixels that lie wholly inside the outline.
    """
    rng = torch.Generator().manual_seed(0)
    found = []
    for prompt in toybox.HELD_OUT_PROMPTS:
        toy = toybox.parse(prompt)
        cameras = CameraRanges(elevation=(-20.0, 80.0)).sample(count, rng)
        normals, depths = (
            _denoised(teacher, toy.render(cameras, side, domain=domain)[0], t, domain, prompt, cameras, rng)
            for domain in domains.SURFACE
        )
        coverage = F.interpolate(toy.render(cameras, side)[1], depths[0].shape[-1], mode="bilinear")
        inside = coverage[:, 0] > 0.999
        cosine = F.cosine_similarity(*normals)[inside].clamp(-1, 1)
        distance = (depths[0] - depths[1]).mean(1)[inside]
        found.append([cosine.acos().rad2deg().mean(), distance.abs().mean(), distance.mean()])
    angle, error, mean = torch.tensor(found).mean(0).tolist()
    return angle, error, mean


def _denoised(
    teacher: Teacher, images: Tensor, t: float, domain: str, prompt: str, cameras: Cameras, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The teacher's denoised values and the true ones, (B, 3, S, S) in [-1, 1]."""
    one = answerer(teacher, domain)
    x, times = one.encode(images), torch.full((len(images),), t)
    noise = torch.randn(x.shape, generator=rng)
    x_t = noised(x, noise, *one.schedule.alpha_sigma(times))
    return one.predict(x_t, times, domains.with_domain([prompt] * len(x), domain), cameras).x0, x


if __name__ == "__main__":
    main()
