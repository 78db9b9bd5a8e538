"""Trains a small teacher: denoising with v-prediction on the cosine schedule (Salimans and Ho, arXiv 2202.00512).

The training images come from a `Source`: the toybox, scikit-learn's digits, or a folder of captioned pictures.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sds3d import cameras as cam
from sds3d.diffusion.noise import noised, target
from sds3d.networks.ema import EMA
from sds3d.networks.muon import Muon
from sds3d.networks.text import TextEncoder
from sds3d.networks.unet import UNet
from sds3d.runtime import tensor_files
from sds3d.runtime.errors import Diverged
from sds3d.runtime.files import from_json, lock, read_text, replacing, require_folder, sweep
from sds3d.runtime.torch_modes import stepwise_training
from sds3d.teachers import small
from sds3d.teachers.base import PACKAGED
from sds3d.teachers.drawing import sample
from sds3d.teachers.training.settings import FitConfig
from sds3d.teachers.training.sources import Batch, Source


@dataclass(frozen=True)
class FitStep:
    """One training step: its number (from 1), the total, the mean of recent losses, seconds in this session."""

    step: int
    total: int
    loss: float
    seconds: float


def is_inner(name: str, weight: Tensor) -> bool:
    """Return whether Muon trains a weight: a hidden matrix or convolution, no embedding and no first or last layer."""
    return weight.ndim >= 2 and name.split(".")[1] not in ("words", "places", "first", "last", "rays", "time", "camera")


class Fit:
    """The state of a training: networks, their running mean, optimisers, random state.

    Args:
        dtype: torch.bfloat16 trains under autocast, torch.float32 does not; None takes bfloat16 where that is fast.
    """

    def __init__(
        self,
        config: FitConfig,
        source: Source,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        self.config, self.source, self.step, self.device = config, source, 0, torch.device(device)
        self.dtype = small.pick_dtype(self.device, dtype)
        with torch.random.fork_rng(devices=[]):  # modules draw their initial weights from the global stream
            torch.manual_seed(config.seed)
            text = TextEncoder(source.vocabulary, source.network.text)
            self.nets = nn.ModuleDict({"unet": UNet(source.network), "text": text})
        # the annotation of Module.to lacks memory_format
        self.nets.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if config.start:
            self._begin_from(config.start)
        self.ema = EMA(self.nets, config.ema)
        inner, outer = [], []
        for name, p in self.nets.named_parameters():
            (inner if is_inner(name, p) else outer).append(p)
        adam = torch.optim.AdamW(outer, config.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.optimisers = [Muon(inner, config.lr), adam]
        self.rng = torch.Generator().manual_seed(config.seed)
        self.losses: list[float] = []

    @torch.no_grad()
    def _begin_from(self, start: str) -> None:
        """Copy the weights of a teacher; words that it does not know keep theirs.

        Raises:
            ValueError: see `small.load`; or the teacher's network has another size.
        """
        teacher = small.load(small.packaged(start) if start in PACKAGED else start, device=self.device)
        unet, text = _parts(self.nets)
        if teacher.unet.config != replace(unet.config, dropout=teacher.unet.config.dropout):
            raise ValueError(f"start={start} has a network of another size; give weights of this kind of data")
        unet.load_state_dict(teacher.unet.state_dict())
        known = {**teacher.text.state_dict(), "words.weight": text.words.weight.clone()}
        for word, row in text.index.items():
            if word in teacher.text.index:
                known["words.weight"][row] = teacher.text.words.weight[teacher.text.index[word]]
        known["words.weight"][:2] = teacher.text.words.weight[:2]  # padding and the start of a caption
        text.load_state_dict(known)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean squared error of v at random t. Larger t are more likely: there caption and camera matter
        most."""
        b, clean, weight = len(batch.x), batch.x, torch.ones(())
        if self.config.is_coarse(self.step):
            clean = F.avg_pool2d(clean, 2)
            if batch.part is not None:
                weight = 1 + self.config.part * F.avg_pool2d(batch.part, 2)
        if batch.weight is not None:
            weight = weight * batch.weight.view(-1, 1, 1, 1)
        strata = (torch.arange(b) + torch.rand(b, generator=self.rng)) / b
        t = strata[torch.randperm(b, generator=self.rng)] ** (1 / 3)
        eps = torch.randn(clean.shape, generator=self.rng)
        clean, eps, t, weight = (x.to(self.device) for x in (clean, eps, t, weight))
        alpha, sigma = small.SmallTeacher.schedule.alpha_sigma(t)
        unet, text = _parts(self.nets)
        encoded = text(text.tokens(batch.captions).to(self.device))
        cameras = None if batch.cameras is None else batch.cameras.to(self.device)
        camera_mask = None if batch.camera_mask is None else batch.camera_mask.float().to(self.device)
        with (
            self._dropout_noise(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16),
        ):
            v = unet(noised(clean, eps, alpha, sigma), t, encoded, cameras, camera_mask)
        return (weight * (v.float() - target("v", clean, eps, alpha, sigma)).square()).mean()

    @contextmanager
    def _dropout_noise(self) -> Iterator[None]:
        """Seed the global stream, from which dropout draws, for this step; restore it afterwards."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            yield

    def advance(self, batch: Batch) -> float:
        """Take one optimiser step and return the loss.

        Raises:
            Diverged: the loss or its gradient is not finite; no step is taken.
        """
        loss = self.loss(batch)
        self.nets.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        if not bool(torch.isfinite(loss.detach() + norm)):
            raise Diverged(f"the teacher's loss or its gradient is not finite at step {self.step}: lower lr")
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.config.rate(self.step)
            optimiser.step()
        self.ema.update(self.nets, self.step)
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def save(self, out: Path) -> None:
        """Write checkpoint, fp16 weights and settings. Each file is replaced atomically.

        Raises:
            Diverged: a weight is not finite; the files of before stay.
            ValueError: a file cannot be written.
        """
        for name, weight in (*self.nets.state_dict().items(), *self.ema.module.state_dict().items()):
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                raise Diverged(f"the teacher's {name} is not finite after step {self.step}: lower lr")
        state = {
            "nets": self.nets.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.rng.get_state(),
            "losses": torch.tensor(self.losses),
            "source": self._source(),
        }
        state["sha256"] = _digest(state)
        data = io.BytesIO()  # on a full disk torch's own writer fails with "unexpected pos"
        torch.save(state, data)
        with replacing(out / "state.pt") as part:
            part.write_bytes(data.getbuffer())
        small.save(
            out / small.FILE, *_parts(self.ema.module), self.source.vocabulary, self.source.prompts,
            sizes=self.config.sizes,
        )  # fmt: skip
        with replacing(out / "fit.json") as part:
            part.write_text(json.dumps({"step": self.step, **asdict(self.config)}, indent=1))

    def _source(self) -> tuple[int, tuple[str, ...]]:
        """Return the side in pixels and the vocabulary; the order of the words defines their token numbers."""
        return self.source.network.size, self.source.vocabulary

    def load(self, out: Path) -> None:
        """Load the state that `save` wrote to ``out``. States of older versions have no digest and are not checked.

        Raises:
            ValueError: the state is damaged, of another version or of other data, or has done all its steps.
        """
        path = out / "state.pt"
        with _undamaged(path):
            state = torch.load(path, map_location="cpu", weights_only=True)  # does not detect changed numbers
            digest, _ = state.pop("sha256", None), state.pop("digest", None)  # the second is of an older version
            if digest not in (None, _digest(state)):
                raise ValueError("its content is not what was written")
            trained, given = state.get("source", self._source()), self._source()  # older states have no "source"
        if trained != given:
            new, gone = (sorted(set(a[1]) - set(b[1])) for a, b in ((given, trained), (trained, given)))
            raise ValueError(
                f"{out} was trained on {trained[0]} pixels a side and {len(trained[1])} words, not on {given[0]} and "
                f"{len(given[1])} (new: {' '.join(new[:5]) or 'none'}; gone: {' '.join(gone[:5]) or 'none'}); give the "
                "same size and captions, or another --out"
            )
        with _undamaged(path):
            self.nets.load_state_dict(state["nets"])
            self.ema.module.load_state_dict(state["ema"])
            for optimiser, values in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(values)
            self.rng.set_state(state["generator"])
            self.losses = state["losses"].tolist()
        self.step = len(self.losses)
        if self.step >= self.config.steps:
            raise ValueError(f"{out} has done {self.step} of {self.config.steps} steps; give more, as in steps=20000")


def _parts(nets: nn.ModuleDict) -> tuple[UNet, TextEncoder]:
    """Return the networks that `Fit` trains."""
    unet, text = nets["unet"], nets["text"]
    assert isinstance(unet, UNet) and isinstance(text, TextEncoder)
    return unet, text


def _digest(state: dict[str, Any]) -> str:
    """Return a digest of everything in a state."""
    tensors: dict[str, Tensor] = {}
    return tensor_files.digest(tensors, tensor_files.flatten(state, tensors))


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Raise any error of reading a state as a ValueError of one sentence."""
    try:
        yield
    except (
        pickle.UnpicklingError,
        struct.error,
        EOFError,
        OSError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is damaged or of another version ({reason}); start a new folder") from error


@stepwise_training
def train(
    out: Path, config: FitConfig, source: Source, resume: bool = False, device: torch.device | str = "cpu"
) -> Generator[FitStep]:
    """Train a teacher into a folder, and yield every step.

    Writes state.pt, teacher.safetensors, fit.json, loss.png, and a sample grid at every save. If the iteration is
    stopped, the state is saved first, so that the training can be resumed.

    Raises:
        ValueError: ``out`` holds a training and ``resume`` is False, or holds none and it is True; the training there
            is damaged, finished or of other data; a batch is larger than the data; another process trains there; or
            the folder cannot be written, which is checked first.
        Diverged: a loss, a gradient or a weight is not finite. The last saved state is good and is not replaced.
    """
    require(out, config, source)
    with lock(out / ".lock", f"{out} is in use: wait until that training is done, or stop it"):
        sweep(out, r"state|teacher|fit|loss|grid-\d+")
        try:
            yield from _train(out, config, source, resume, device)
        except Diverged as error:
            saved = (out / "state.pt").exists()
            state = f"{out / 'state.pt'} is from before, and good" if saved else "Nothing was saved yet"
            raise Diverged(f"{error}. {state}") from error


def require(out: Path, config: FitConfig, source: Source) -> None:
    """Raise ValueError if a training cannot begin: a batch is larger than the data, or the folder cannot be written."""
    size = source.size(config.images)
    if config.batch > size:
        raise ValueError(f"batch is {config.batch} and there are {size} images; give batch={size} or more images")
    require_folder(out)


def _train(out: Path, config: FitConfig, source: Source, resume: bool, device: torch.device | str) -> Iterator[FitStep]:
    """See `train`."""
    if (out / "state.pt").exists() != resume:
        raise ValueError(
            f"{out} has no training to resume: leave --resume out" if resume else f"{out} holds a training: --resume it"
        )
    for _ in source.prepare(out, config.images, config.seed):
        pass
    fit = Fit(config, source, device)
    if resume:
        fit.load(out)
    draw_batch, start = source.batches(out, fit.rng), time.monotonic()
    while fit.step < config.steps:
        fit.advance(draw_batch(config.batch * (2 if config.is_coarse(fit.step) else 1)))
        recent = fit.losses[-200:]
        if fit.step % config.save_every == 0 or fit.step == config.steps:
            fit.save(out)
            save_grid(
                small.load(out / small.FILE, device=device), source.prompts[:10], out / f"grid-{fit.step:06d}.png"
            )
            save_curve(fit.losses, out / "loss.png")
        try:
            yield FitStep(fit.step, config.steps, sum(recent) / len(recent), time.monotonic() - start)
        except GeneratorExit:
            fit.save(out)
            raise


def settings_of(out: Path) -> dict[str, Any]:
    """Return the settings of the training in a folder, by field of FitConfig.

    Raises:
        ValueError: the folder holds no training.
    """
    try:
        values = from_json(read_text(out / "fit.json"))
        return {field.name: values.get(field.name, field.default) for field in fields(FitConfig)}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{out} has no training to resume (no fit.json): leave --resume out") from error


def save_curve(losses: list[float], path: Path) -> None:
    """Plot the loss of every step, and its mean over 100 steps."""
    from sds3d.media.chart import chart

    mean = F.avg_pool1d(torch.tensor(losses)[None], min(100, len(losses)), 1)[0]
    steps = torch.arange(len(losses)) + 1
    mean_steps = steps[len(losses) - len(mean) :]
    curves = {"step": (steps, torch.tensor(losses)), "mean of 100": (mean_steps, mean)}
    chart(curves, path, "step", "mean squared error of v")


def save_grid(teacher: small.SmallTeacher, prompts: Sequence[str], path: Path) -> None:
    """Draw samples of a few prompts, one prompt in a row: four views, or eight images if the teacher has no camera."""
    from sds3d.media.sheet import contact_sheet, seen

    cameras = cam.orbit(4, elevation=20, start=30) if teacher.views == "camera" else None
    number = 8 if cameras is None else 4
    rows = [sample(teacher, [p] * number, steps=16, guidance=2.0, cameras=cameras) for p in prompts]
    contact_sheet(rows, path, list(prompts), seen(rows[0]))
