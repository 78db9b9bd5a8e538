"""Score distillation sampling in one file: four images of an object, from four sides, by the packaged teacher.

    python examples/sds.py "a red mug" --steps 300 --out mug.png

DreamFusion (arXiv 2209.14988, eq. 3) on a grid of pixels. With x_t = alpha x + sigma eps and the guided prediction
eps_s = eps_u + s (eps_c - eps_u), the gradient on x is W(t) (eps_s - eps); the teacher is never differentiated.
``sds3d.generate("a red mug")`` does the same with a scene instead of pixels.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from torch import Tensor

from sds3d.cameras import cat, orbit
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.load import load_teacher

VIEWS = 4  # cameras around the object


def paint(prompt: str, steps: int = 300, scale: float = 2.0, seed: int = 0) -> Tensor:
    """Return images (4, 3, 64, 64) in [0, 1] of the prompt, from the front, the sides and the back."""
    teacher = load_teacher(TeacherConfig("small"), "cpu")
    teacher.check(prompt)  # raises ValueError for unknown words
    rng = torch.Generator().manual_seed(seed)
    cameras = orbit(VIEWS, elevation=15.0)
    size = teacher.image_size
    images = (0.5 + 0.1 * torch.randn(VIEWS, 3, size, size, generator=rng)).requires_grad_()
    optimiser = torch.optim.Adam([images], lr=0.03, eps=1e-8)

    for step in range(steps):
        x = teacher.encode(images)  # [0, 1] -> [-1, 1]
        done = step / steps
        t = torch.empty(VIEWS).uniform_(0.95 - 0.35 * done, 1.0 - 0.1 * done, generator=rng)  # less noise with time
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in teacher.schedule.alpha_sigma(t))
        eps = torch.randn(x.shape, generator=rng)
        x_t = alpha * x.detach() + sigma * eps

        # The prompt with its cameras, and the null prompt without cameras, in one forward pass.
        answer = teacher.predict(
            torch.cat([x_t, x_t]),
            torch.cat([t, t]),
            [prompt] * VIEWS + [""] * VIEWS,
            cat([cameras, cameras]),
            torch.arange(2 * VIEWS) < VIEWS,  # which rows use their camera
        )
        eps_c, eps_u = answer.eps.chunk(2)
        eps_s = eps_u + scale * (eps_c - eps_u)

        optimiser.zero_grad()
        weight = sigma / alpha.clamp_min(1e-3)  # W(t): eps_s - eps as a difference of denoised images
        x.backward(weight * (eps_s - eps) / VIEWS)
        optimiser.step()
    return images.detach().clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red mug")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", default="sds.png")
    options = parser.parse_args()
    row = torch.cat(list(paint(options.prompt, options.steps)), dim=2)  # (3, 64, 256)
    Image.fromarray((255 * row).byte().permute(1, 2, 0).numpy()).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
