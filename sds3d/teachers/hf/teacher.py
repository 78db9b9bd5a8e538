"""Any diffusers pipeline as a teacher: what its families have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.diffusion.noise import Prediction, Schedule
from sds3d.prompts import warn_of_weights
from sds3d.runtime.transfer import onto
from sds3d.teachers.base import decode_pixels, encode_pixels
from sds3d.teachers.hf import generator_scheduler
from sds3d.teachers.hf.adapter import Adapter, save
from sds3d.teachers.hf.families import Family
from sds3d.teachers.hf.words import Condition, Embedder, warn_of_cut


class DiffusersTeacher:
    """A `sds3d.teachers.base.Teacher`, and a `sds3d.distill.critics.Trainable`, around a pipeline's frozen parts.

    Args:
        family: the parts, on their device.
        words: embeds prompts.
        views: "words", or "camera": prompts then carry no view words and the cameras' angles blend them in.
        dtype: of the network.
        compiled: whether ``predict`` runs the network through torch.compile.

    Attributes:
        fingerprint: of the files it was loaded from.
        whole: gives the pipeline with its text encoders, for the time of a with block.
    """

    extra_width = 0
    fingerprint = ""
    whole: Callable[[], contextlib.AbstractContextManager[Any]]

    def __init__(self, family: Family, words: Embedder, views: str, dtype: torch.dtype, compiled: bool = False):
        self.family, self.words, self.views, self.dtype, self.device = family, words, views, dtype, words.device
        side = (family.settings.size or family.side * family.cell) // family.cell
        self.image_size, self.shape = side * family.cell, (family.channels, side, side)
        self.levels = family.levels(side)
        self.schedule: Schedule = self.levels.schedule
        self.views_per_set = family.views_per_set
        self._judge: nn.Module = cast(nn.Module, torch.compile(family.network)) if compiled else family.network
        self._shift, self._scale = (value.to(self.device) for value in _latent_scale(family.vae))

    def check(self, prompt: str) -> None:
        """Warn of what its text encoders cut from a prompt and of weights, and expect it to be asked for.

        Raises:
            ValueError: an empty prompt.
        """
        if not prompt.strip():
            raise ValueError('the prompt is empty: say what to make, for example "a DSLR photo of a corgi"')
        warn_of_weights(prompt)
        for name, length in self.family.TOKENIZERS.items():
            tokenizer = self.family.pipe.components.get(name)
            if tokenizer is not None:
                warn_of_cut(tokenizer, length or tokenizer.model_max_length, f"{prompt}, overhead view")
        self.words.expect(prompt)

    def encode(self, images: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.encode`; of latents the mean, without the noise that the VAE offers."""
        vae = self.family.vae
        pixels = encode_pixels(images, self.image_size, self.family.channels if vae is None else 3)
        if vae is None:
            return pixels
        found = vae.encode(pixels.to(vae.dtype))  # a tiny autoencoder has no distribution
        latents = (found.latents if hasattr(found, "latents") else found.latent_dist.mode()).to(pixels.dtype)
        if vae.dtype == torch.float16 and latents.requires_grad:
            _keep_gradient_near_one(pixels, latents)
        return (latents - self._shift) * self._scale

    def decode(self, x: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.decode`."""
        vae = self.family.vae
        return decode_pixels(
            x if vae is None else vae.decode((x / self._scale + self._shift).to(vae.dtype)).sample.float()
        )

    @property
    def network(self) -> nn.Module:
        """Raises ValueError where it is kept off the GPU."""
        if self.family.settings.offload:
            raise ValueError("a critic trains on the network, which teacher.hf.offload keeps away; leave that out")
        return self.family.network

    def adapter(
        self, rank: int, rng: torch.Generator, targets: tuple[str, ...], dtype: torch.dtype, checkpointing: bool
    ) -> Adapter:
        """See `sds3d.distill.critics.Adaptable.adapter`."""
        return Adapter(self.network, rank, rng, targets, dtype, checkpointing)

    def save_adapter(self, adapter: Adapter, folder: Path) -> Path | None:
        """See `sds3d.distill.critics.Adaptable.save_adapter`."""
        return save(adapter, self.family.pipe, self.family.PART, folder)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What a generator learns where nobody says: something to say, where prompts mean nothing."""
        return () if self.family.ENCODERS else ("an image",)

    @property
    def feature_width(self) -> int:
        """Raises ValueError where the network has no features."""
        return self.family.feature_width

    def nearest_times(self, times: Tensor) -> tuple[Tensor, float]:
        """See `sds3d.students.generator.Network.nearest_times`; the times are those of the generator's scheduler."""
        scheduler = generator_scheduler.scheduler(self.family, self.levels, float(times[0]), len(times))
        return generator_scheduler.times(self.family, self.levels, scheduler, len(times)), 1.0

    @torch.no_grad()
    def predict(
        self,
        x_t: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
    ) -> Prediction:
        """See `sds3d.teachers.base.Teacher.predict`."""
        condition = self._condition(prompts, cameras, camera_mask)
        with self._present(), torch.autocast(x_t.device.type, enabled=False):  # a caller's changes no answer
            return self._ask(self._judge, x_t, t, condition)

    def answer(
        self,
        network: nn.Module,
        x_t: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
        extra: Tensor | None = None,
    ) -> Prediction:
        """See `sds3d.distill.critics.Trainable.answer`. In half precision the network's weights may be in
        float32; an adapter answers as ``predict`` does, without autocast."""
        assert extra is None, "it has no place for an extra condition"
        condition = self._condition(prompts, cameras, camera_mask)
        with torch.autocast(x_t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._ask(network, x_t, t, condition)

    def features(self, network: nn.Module, x_t: Tensor, t: Tensor, prompts: list[str]) -> list[Tensor]:
        """See `sds3d.distill.critics.Featured.features`."""
        condition = self._condition(prompts, None, None)
        with torch.autocast(x_t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = self.family.features(network, x_t.to(self.dtype), self.levels.told(t).float(), condition)
        return [maps.to(torch.promote_types(x_t.dtype, torch.float32)) for maps in found]

    def _ask(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        output = self.family.answer(network, x_t.to(self.dtype), self.levels.told(t).float(), condition)
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Prediction(output.to(torch.promote_types(x_t.dtype, torch.float32)), x_t, alpha, sigma, self.levels.kind)

    def _condition(self, prompts: list[str], cameras: Cameras | None, mask: Tensor | None) -> Condition:
        if not self.family.ENCODERS:
            return {}
        if self.views == "words" or cameras is None:
            return self.words(prompts)
        seen = self.family.sees(cameras, mask)
        if seen is not None:
            return self.words(prompts) | {name: onto(value, self.device) for name, value in seen.items()}
        return self.words.seen(prompts, cameras, mask)

    @contextlib.contextmanager
    def _present(self) -> Iterator[None]:
        """The network is on the device inside; where it is offloaded, only there."""
        if not self.family.settings.offload:
            yield
            return
        waiting = {p: p.data for p in [*self.family.network.parameters(), *self.family.network.buffers()]}
        for tensor, host in waiting.items():
            tensor.data = host.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, host in waiting.items():
                tensor.data = host


def _keep_gradient_near_one(pixels: Tensor, latents: Tensor) -> None:
    """Let the gradient on the latents be at most 1 on its way back to the pixels, and there what it was: float16 has
    nothing below 6e-8, nor above 65,504. A power of two, so it changes no digit, found without asking a GPU."""
    power: list[Tensor] = []

    def enter(gradient: Tensor) -> Tensor:
        power[:] = [torch.frexp(gradient.abs().amax())[1]]
        return torch.ldexp(gradient, -power[0])

    latents.register_hook(enter)
    pixels.register_hook(lambda gradient: torch.ldexp(gradient, power[0]))


def _latent_scale(vae: Any) -> tuple[Tensor, Tensor]:
    """A latent is (what the VAE says - shift) * scale; both (C, 1, 1) or ()."""
    if vae is None:
        return torch.zeros(()), torch.ones(())
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return torch.tensor(mean).view(-1, 1, 1), config.scaling_factor / torch.tensor(std).view(-1, 1, 1)
    return torch.tensor(config.get("shift_factor") or 0.0), torch.tensor(config.scaling_factor)
