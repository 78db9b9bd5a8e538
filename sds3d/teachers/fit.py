"""Trains the embedded teacher on the toybox.

Denoising with v-prediction on the cosine schedule (Salimans and Ho, arXiv 2202.00512). Every use of a render draws
colours, caption, background, degradation, t and noise anew. The caption is dropped in a tenth of the images for
guidance (Ho and Salimans, arXiv 2207.12598); the exact camera is dropped in a fifth, whose captions then nearly
always carry view words. Guidance by default compares with neither caption nor camera, so half of the dropped captions
drop the camera too.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sds3d import cameras as cam
from sds3d.cameras import Cameras
from sds3d.data import renders
from sds3d.data.captions import CaptionDraw
from sds3d.data.toybox import VOCABULARY, background_colour
from sds3d.data.tracing import paint
from sds3d.files import replacing
from sds3d.guidance import cfg
from sds3d.networks.ema import EMA
from sds3d.networks.muon import Muon
from sds3d.networks.text import TextEncoder
from sds3d.networks.unet import UNet, UNetConfig
from sds3d.noise import Prediction, noised, target
from sds3d.prompts import COLOURS, with_view
from sds3d.samplers import ddim
from sds3d.teachers import small

GRID_PROMPTS = (  # none is held out
    "a red mug with a white handle",
    "a red rocket",
    "a blue chair",
    "a red house",
    "a white snowman",
    "a yellow car",
    "a green fish",
    "a yellow ball",
)


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Args:
        steps: in all; may be changed on resuming.
        batch: images a step; a coarse step takes twice as many.
        coarse: for so many first steps the images are shrunk to 32 x 32, which halves the time of one; what words and
            cameras mean is learnt there, detail afterwards.
        part: in the coarse steps, how much more than others a pixel weighs that shows the second colour: handles and
            stems are small, and their colours are what is learnt last.
        lr: learning rate after 200 steps of warm-up; falls linearly to 0 over the last ``decay`` of the steps.
        images: renders to draw from.
        ema: decay of the weights' running mean, which is what is saved.
        seed: of everything.
        save_every: steps between checkpoints, each with a sample grid.
    """

    steps: int = 16_000
    batch: int = 32
    coarse: int = 12_000
    part: float = 3.0
    lr: float = 1e-3
    decay: float = 0.25
    images: int = 16_800
    ema: float = 0.998
    seed: int = 0
    save_every: int = 500

    def __post_init__(self):
        for name, low, high in (
            ("steps", 1, math.inf),
            ("batch", 1, math.inf),
            ("coarse", 0, math.inf),
            ("part", 0, math.inf),
            ("lr", 1e-9, 1),
            ("decay", 1e-3, 1),
            ("images", 1, math.inf),
            ("ema", 0, 1),
            ("seed", 0, 2**62),
            ("save_every", 1, math.inf),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from {low:g} to {high:g}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / 200, left)


@dataclass(frozen=True)
class FitStep:
    """One training step: number (from 1), total, running loss, seconds since the start of this session."""

    step: int
    total: int
    loss: float
    seconds: float


@dataclass
class Batch:
    """Training images.

    Args:
        x: (B, 3, 64, 64) clean, in [-1, 1].
        part: (B, 1, 64, 64), 1 where the second colour shows, else 0.
        captions, cameras: B each.
        seen: (B,) bool, whether the network is told the camera.
    """

    x: Tensor
    part: Tensor
    captions: list[str]
    cameras: Cameras
    seen: Tensor


def degrade(image: Tensor, quality: str, generator: torch.Generator) -> Tensor:
    """Spoil an image (3, H, W) in [0, 1] in the way a key of `toybox.QUALITIES` names."""
    amount = torch.rand((), generator=generator).item()
    if quality == "blur":
        small_side = int(22 - 10 * amount)
        return F.interpolate(F.interpolate(image[None], small_side, mode="area"), image.shape[-1], mode="bicubic")[
            0
        ].clamp(0, 1)
    if quality == "coarse":
        small_side = 16 if amount < 0.5 else 8
        return F.interpolate(F.interpolate(image[None], small_side, mode="area"), image.shape[-1])[0]
    if quality == "noise":
        return (image + (0.1 + 0.2 * amount) * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    mean = image.mean(0, keepdim=True)
    if quality == "fade":
        return 0.6 + (0.2 + 0.3 * amount) * (image - 0.6)
    if quality == "burn":
        return (0.5 + (1.3 + amount) * (mean + (1.5 + amount) * (image - mean) - 0.5)).clamp(0, 1)
    return image * (0.25 + 0.3 * amount)  # "darken"


class Batches:
    """Draws training batches from stored renders."""

    def __init__(self, store: renders.Renders, generator: torch.Generator):
        self.store, self.generator = store, generator
        self.captions = CaptionDraw(generator)

    def __call__(self, size: int) -> Batch:
        """``size`` training images."""
        index = torch.randint(len(self.store), (size,), generator=self.generator)
        rows = [self.captions(self.store.names[i], self.store.sizes[i]) for i in index.tolist()]
        main, second = (torch.tensor([COLOURS[getattr(r, k)] for r in rows]) for k in ("main", "second"))
        layers = self.store.batch(index)
        rgb, coverage = paint(layers, main, second)
        behind = torch.stack([background_colour(r.background) for r in rows])
        images = rgb + (1 - coverage) * behind[:, :, None, None]
        for i, row in enumerate(rows):
            if row.quality:
                images[i] = degrade(images[i], row.quality, self.generator)
        cameras = self.store.cameras[index]
        draws = torch.rand(3, size, generator=self.generator)
        dropped = draws[2] < 0.1
        seen = (draws[0] < 0.8) & ~(dropped & (draws[1] < 0.5))
        viewed = with_view([r.text for r in rows], cameras)
        said = draws[1] < torch.where(seen, 0.15, 0.9)
        texts = [v if s else r.text for v, s, r in zip(viewed, said.tolist(), rows)]
        captions = ["" if drop else text for text, drop in zip(texts, dropped.tolist())]
        return Batch(images * 2 - 1, (layers[:, 1:2] > 0).float(), captions, cameras, seen)


def is_inner(name: str, weight: Tensor) -> bool:
    """Whether Muon steps a weight: hidden matrices and convolutions, neither embeddings nor first and last layers."""
    return weight.ndim >= 2 and name.split(".")[1] not in ("words", "places", "first", "last", "rays", "time", "camera")


class Fit:
    """A training in progress: networks, their mean, optimiser, random state."""

    def __init__(self, config: FitConfig, device: torch.device | str = "cpu"):
        self.config, self.step, self.device = config, 0, torch.device(device)
        with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global stream
            torch.manual_seed(config.seed)
            self.nets = nn.ModuleDict({"unet": UNet(UNetConfig()), "text": TextEncoder(VOCABULARY)})
        self.nets.to(self.device, memory_format=torch.channels_last)
        self.ema = EMA(self.nets, config.ema)
        inner, outer = [], []
        for name, p in self.nets.named_parameters():
            (inner if is_inner(name, p) else outer).append(p)
        adam = torch.optim.AdamW(outer, config.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.optimisers = [Muon(inner, config.lr), adam]
        self.generator = torch.Generator().manual_seed(config.seed)
        self.losses: list[float] = []

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of v at drawn t; t leans towards 1, where the caption and the camera decide most."""
        b, clean, weight = len(batch.x), batch.x, torch.ones(())
        if self.step < self.config.coarse:
            clean, weight = F.avg_pool2d(clean, 2), 1 + self.config.part * F.avg_pool2d(batch.part, 2)
        strata = (torch.arange(b) + torch.rand(b, generator=self.generator)) / b
        t = strata[torch.randperm(b, generator=self.generator)] ** (1 / 3)
        eps = torch.randn(clean.shape, generator=self.generator)
        clean, eps, t, weight, seen = (x.to(self.device) for x in (clean, eps, t, weight, batch.seen.float()))
        alpha, sigma = small.SmallTeacher.schedule.alpha_sigma(t)
        text: TextEncoder = self.nets["text"]
        known = text(text.tokens(batch.captions).to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=small.fast_bf16(self.device)):
            v = self.nets["unet"](noised(clean, eps, alpha, sigma), t, known, batch.cameras.to(self.device), seen)
        return (weight * (v.float() - target("v", clean, eps, alpha, sigma)).square()).mean()

    def advance(self, batch: Batch) -> float:
        """One optimiser step; returns the loss."""
        loss = self.loss(batch)
        self.nets.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.config.rate(self.step)
            optimiser.step()
        self.ema.update(self.nets, self.step)
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def save(self, out: Path) -> None:
        """Checkpoint, fp16 weights and loss log, each replaced atomically."""
        state = {
            "nets": self.nets.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.generator.get_state(),
            "losses": torch.tensor(self.losses),
        }
        with replacing(out / "state.pt") as part:
            torch.save(state, part)
        small.save(out / "teacher.safetensors", self.ema.module["unet"], self.ema.module["text"], VOCABULARY)
        with replacing(out / "fit.json") as part:
            part.write_text(json.dumps({"step": self.step, **asdict(self.config)}, indent=1))

    def load(self, out: Path) -> None:
        """Take up the state that `save` left in ``out``.

        Raises:
            ValueError: it is damaged, of another version, or has done all its steps.
        """
        path = out / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.nets.load_state_dict(state["nets"])
            self.ema.module.load_state_dict(state["ema"])
            for optimiser, values in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(values)
            self.generator.set_state(state["generator"])
            self.losses = state["losses"].tolist()
        except (
            pickle.UnpicklingError,
            struct.error,
            EOFError,
            OSError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} is damaged or of another version ({reason}); start a new folder") from error
        self.step = len(self.losses)
        if self.step >= self.config.steps:
            raise ValueError(f"{out} has done {self.step} of {self.config.steps} steps; give more, as in steps=20000")


def train(
    out: Path, config: FitConfig = FitConfig(), resume: bool = False, device: torch.device | str = "cpu"
) -> Iterator[FitStep]:
    """Train a teacher into a folder: state.pt, teacher.safetensors, fit.json, loss.png, a sample grid at every save.

    Whoever stops iterating leaves a state to resume from.

    Raises:
        ValueError: if ``out`` already holds a training and ``resume`` is not asked for, or the other way round; if the
            training there is damaged or finished; if the disk says no.
    """
    if (out / "state.pt").exists() != resume:
        raise ValueError(
            f"{out} has no training to resume: leave --resume out" if resume else f"{out} holds a training: --resume it"
        )
    for _ in renders.build(out / "renders", config.images, config.seed):
        pass
    fit = Fit(config, device)
    if resume:
        fit.load(out)
    batches, begun = Batches(renders.Renders(out / "renders"), fit.generator), time.monotonic()
    while fit.step < config.steps:
        fit.advance(batches(config.batch * (2 if fit.step < config.coarse else 1)))
        recent = fit.losses[-200:]
        if fit.step % config.save_every == 0 or fit.step == config.steps:
            fit.save(out)
            save_grid(small.load(out / "teacher.safetensors", device=device), out / f"grid-{fit.step:06d}.png")
            save_curve(fit.losses, out / "loss.png")
        try:
            yield FitStep(fit.step, config.steps, sum(recent) / len(recent), time.monotonic() - begun)
        except GeneratorExit:
            fit.save(out)
            raise


def settings_of(out: Path) -> dict[str, Any]:
    """The settings of the training in a folder, by field of FitConfig.

    Raises:
        ValueError: there is none.
    """
    try:
        values = json.loads((out / "fit.json").read_text())
        return {field.name: values.get(field.name, field.default) for field in fields(FitConfig)}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{out} has no training to resume (no fit.json): leave --resume out") from error


def save_curve(losses: list[float], path: Path) -> None:
    """The loss of every step, and its mean over 100 steps."""
    from sds3d.export.chart import chart

    mean = F.avg_pool1d(torch.tensor(losses)[None], min(100, len(losses)), 1)[0]
    late = torch.arange(len(mean)) + len(losses) - len(mean) + 1
    each = torch.arange(len(losses)) + 1
    chart({"step": (each, torch.tensor(losses)), "mean of 100": (late, mean)}, path, "step", "mean squared error of v")


def save_grid(teacher: small.SmallTeacher, path: Path) -> None:
    """Samples of a few prompts, four views each, one prompt a row."""
    from sds3d.export.sheet import contact_sheet

    views = cam.orbit(4, elevation=20, start=30)
    contact_sheet([sample(teacher, p, 4, cameras=views, steps=16) for p in GRID_PROMPTS], path, list(GRID_PROMPTS))


def sample(
    teacher: small.SmallTeacher,
    prompt: str,
    n: int,
    seed: int = 0,
    guidance: float = 2.0,
    cameras: Cameras | None = None,
    steps: int = 30,
) -> Tensor:
    """Images the teacher draws, (n, 3, 64, 64) in [0, 1], by DDIM.

    Args:
        cameras: n exact cameras, or None to leave the view to the prompt's words.
    """
    x = torch.randn((n, 3, 64, 64), generator=torch.Generator().manual_seed(seed)).to(teacher.device)
    both = cam.cat([cameras] * 2).to(teacher.device) if cameras else None
    mask = (torch.arange(2 * n, device=teacher.device) < n) if cameras else None

    def predict(x_t: Tensor, t: Tensor):
        answer = teacher.predict(torch.cat([x_t] * 2), torch.cat([t] * 2), [prompt] * n + [""] * n, both, mask)
        cond, uncond = answer[:n], answer[n:]
        return Prediction(cfg(uncond.v, cond.v, guidance), x_t, cond.alpha, cond.sigma, "v")

    *_, (_, x0, _) = ddim(predict, x, teacher.schedule, steps)
    return teacher.decode(x0)
