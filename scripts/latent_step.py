"""Measure how much of a step at Stable Diffusion 2.1's size is not the teacher's networks.

    python scripts/latent_step.py --device cuda            its architecture, random weights, 512 x 512, CFG
    python scripts/latent_step.py --tiny                   the same code with small networks, on a CPU

The networks' passes are the U-Net's forward (prompt and null prompt in one batch) and the VAE encoder's forward and
backward. The rest (render, core, backward of the scene, Adam) should take less than 15 % of the step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from torch import Tensor

from sds3d.config.load import load
from sds3d.diffusion.noise import Prediction, Schedule
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.core import ScoreObjective
from sds3d.distill.score import METHODS
from sds3d.runs.scene_parts import build_scene
from sds3d.runtime.machine import machine
from sds3d.train import train

TEXT = 1024  # width of the text embedding


class Latent:
    """A `sds3d.teachers.base.Teacher` of Stable Diffusion 2.1's architecture with random weights.

    Args:
        tiny: whether to build narrow networks.
        device, dtype: of both networks.
    """

    schedule, views = Schedule.linear(), "words"

    def __init__(self, tiny: bool, device: torch.device, dtype: torch.dtype):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        widths, heads = ((32, 64), 4) if tiny else ((320, 640, 1280, 1280), [5, 10, 20, 20])
        attending = len(widths) - 1
        self.unet = UNet2DConditionModel(
            sample_size=8 if tiny else 64,
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
            cross_attention_dim=TEXT,
            attention_head_dim=heads,
            use_linear_projection=True,
        )
        stages = (32, 32) if tiny else (128, 256, 512, 512)
        self.vae = AutoencoderKL(
            block_out_channels=stages,
            down_block_types=("DownEncoderBlock2D",) * len(stages),
            up_block_types=("UpDecoderBlock2D",) * len(stages),
            layers_per_block=2,
            latent_channels=4,
        )
        self.image_size = 16 if tiny else 512
        self.clock = Clock(device)
        for network in (self.unet, self.vae):
            network.requires_grad_(False).eval().to(device, dtype, memory_format=torch.channels_last)
        self.words = {"": torch.randn(77, TEXT, generator=torch.Generator().manual_seed(0)).to(device, dtype)}
        self.dtype = dtype

    def check(self, prompt: str) -> None:
        """Accept any prompt."""

    def decode(self, x: Tensor) -> Tensor:
        return self.vae.decode(x.to(self.dtype)).sample.float()

    def encode(self, images: Tensor) -> Tensor:
        images = 2 * images - 1  # rendered at the teacher's own size
        images.register_hook(lambda g: self.clock.mark("end"))
        self.clock.mark("begin")
        latent = self.vae.encode(images.to(self.dtype)).latent_dist.mean.float()
        self.clock.mark("end")
        latent.register_hook(lambda g: self.clock.mark("begin"))
        return latent * 0.18215

    @torch.inference_mode()
    def predict(self, x_t: Tensor, t: Tensor, prompts: list[str], cameras=None, camera_mask=None) -> Prediction:
        text = torch.stack([self.words[""]] * len(prompts))
        self.clock.mark("begin")
        v = self.unet(x_t.to(self.dtype), t * 999, text).sample.float()
        self.clock.mark("end")
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Prediction(v, x_t, alpha, sigma, "v")


class Clock:
    """Time marks in the order of the device's work."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def read(self) -> tuple[float, float]:
        """Return the milliseconds from the first mark to the last and those of "begin" to "end"; clear the marks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

        def between(a, b) -> float:
            return a.elapsed_time(b) if self.device.type == "cuda" else 1e3 * (b - a)

        pairs = list(zip(self.marks, self.marks[1:]))
        whole = between(self.marks[0][1], self.marks[-1][1])
        inside = sum(between(a, b) for (left, a), (right, b) in pairs if (left, right) == ("begin", "end"))
        self.marks.clear()
        return whole, inside


def measure(tiny: bool, device: torch.device, rounds: int) -> dict[str, float]:
    """Return the milliseconds of the median step, of its networks and of the rest."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    teacher = Latent(tiny, device, dtype)
    layer = {"device": str(device), "render.resolution": teacher.image_size, "render.views": 1, "log.picture_every": 0}
    settings = load("a red mug", layer, {"steps": rounds + 3})
    student = build_scene(settings, torch.Generator().manual_seed(0))
    objective = ScoreObjective(teacher, METHODS["sds"](scale=100.0), TimestepSampler(0.02, 0.98))
    loop, steps = train(student, {"sds": objective}, settings.plan()), []
    for _ in range(rounds + 3):
        teacher.clock.mark("start")
        next(loop)
        teacher.clock.mark("stop")
        steps.append(teacher.clock.read())
    whole, inside = sorted(steps[3:])[rounds // 2]
    return {"step_ms": whole, "networks_ms": inside, "rest_ms": whole - inside, "rest_share": 1 - inside / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script itself")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(json.dumps(measure(options.tiny, device, options.rounds)))
    print(json.dumps(machine(device)), file=sys.stderr)


if __name__ == "__main__":
    main()
