"""A teacher from any supported diffusers pipeline."""

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
from sds3d.teachers.hf.prompt_embedder import Condition, Embedder, warn_of_cut


class DiffusersTeacher:
    """A `sds3d.teachers.base.Teacher` and a `sds3d.distill.critics.Trainable` around a pipeline's frozen parts.

    Args:
        family: the parts, on their device.
        embedder: embeds prompts.
        views: "words", or "camera": prompts then have no view words, and embeddings with view words are blended by the
            camera's angles.
        dtype: dtype of the network.
        compiled: whether ``predict`` runs the network through torch.compile.

    Attributes:
        fingerprint: fingerprint of the loaded files.
        full_pipeline: returns a context manager that gives the pipeline with its text encoders.
    """

    extra_width = 0
    fingerprint = ""
    full_pipeline: Callable[[], contextlib.AbstractContextManager[Any]]

    def __init__(self, family: Family, embedder: Embedder, views: str, dtype: torch.dtype, compiled: bool = False):
        self.family, self.embedder, self.views, self.dtype = family, embedder, views, dtype
        self.device = embedder.device
        side = (family.settings.size or family.side * family.cell) // family.cell
        self.image_size, self.shape = side * family.cell, (family.channels, side, side)
        self.levels = family.levels(side)
        self.schedule: Schedule = self.levels.schedule
        self.views_per_set = family.views_per_set
        self._predict_network = cast(nn.Module, torch.compile(family.network)) if compiled else family.network
        self._shift, self._scale = (value.to(self.device) for value in _latent_scale(family.vae))

    def check(self, prompt: str) -> None:
        """Warn if the text encoders cut a prompt or if it has weights, and announce it to the embedder.

        Raises:
            ValueError: the prompt is empty.
        """
        if not prompt.strip():
            raise ValueError('the prompt is empty: say what to make, for example "a DSLR photo of a corgi"')
        warn_of_weights(prompt)
        for name, length in self.family.TOKENIZERS.items():
            tokenizer = self.family.pipe.components.get(name)
            if tokenizer is not None:
                warn_of_cut(tokenizer, length or tokenizer.model_max_length, f"{prompt}, overhead view")
        self.embedder.expect(prompt)

    def encode(self, images: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.encode`. Latents are the mode of the VAE's distribution, without noise."""
        vae = self.family.vae
        pixels = encode_pixels(images, self.image_size, self.family.channels if vae is None else 3)
        if vae is None:
            return pixels
        encoded = vae.encode(pixels.to(vae.dtype))  # a tiny autoencoder has no distribution
        latents = (encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).to(pixels.dtype)
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
        """See `sds3d.distill.critics.Trainable`. Raises ValueError if the network is offloaded."""
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
        """Default prompts of a generator: a placeholder for an unconditional model, none for others."""
        return () if self.family.ENCODERS else ("an image",)

    @property
    def feature_width(self) -> int:
        """See `sds3d.distill.critics.Featured`. Raises ValueError if the network has no feature maps."""
        return self.family.feature_width

    def nearest_times(self, times: Tensor) -> tuple[Tensor, float]:
        """See `sds3d.students.generator.Network.nearest_times`. The times are those of the saved generator's
        scheduler."""
        scheduler = generator_scheduler.build_scheduler(self.family, self.levels, float(times[0]), len(times))
        return generator_scheduler.scheduler_times(self.family, self.levels, scheduler, len(times)), 1.0

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
        with self._on_device(), torch.autocast(x_t.device.type, enabled=False):  # independent of the caller's autocast
            return self._predict(self._predict_network, x_t, t, condition)

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
        """See `sds3d.distill.critics.Trainable.answer`.

        Runs under autocast if ``self.dtype`` is a half precision, since the network's weights may be float32. An
        adapter turns autocast off again, as ``predict`` does.
        """
        assert extra is None, "the network takes no extra condition"
        condition = self._condition(prompts, cameras, camera_mask)
        with torch.autocast(x_t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._predict(network, x_t, t, condition)

    def features(self, network: nn.Module, x_t: Tensor, t: Tensor, prompts: list[str]) -> list[Tensor]:
        """See `sds3d.distill.critics.Featured.features`."""
        condition = self._condition(prompts, None, None)
        with torch.autocast(x_t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            timesteps = self.levels.network_timesteps(t).float()
            maps = self.family.features(network, x_t.to(self.dtype), timesteps, condition)
        return [features.to(torch.promote_types(x_t.dtype, torch.float32)) for features in maps]

    def _predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        output = self.family.answer(network, x_t.to(self.dtype), self.levels.network_timesteps(t).float(), condition)
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Prediction(output.to(torch.promote_types(x_t.dtype, torch.float32)), x_t, alpha, sigma, self.levels.kind)

    def _condition(self, prompts: list[str], cameras: Cameras | None, mask: Tensor | None) -> Condition:
        if not self.family.ENCODERS:
            return {}
        if self.views == "words" or cameras is None:
            return self.embedder(prompts)
        by_camera = self.family.camera_condition(cameras, mask)
        if by_camera is not None:
            return self.embedder(prompts) | {name: onto(value, self.device) for name, value in by_camera.items()}
        return self.embedder.with_cameras(prompts, cameras, mask)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Move an offloaded network to the device for the time of a with block."""
        if not self.family.settings.offload:
            yield
            return
        host_data = {p: p.data for p in [*self.family.network.parameters(), *self.family.network.buffers()]}
        for tensor, data in host_data.items():
            tensor.data = data.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, data in host_data.items():
                tensor.data = data


def _keep_gradient_near_one(pixels: Tensor, latents: Tensor) -> None:
    """Scale the gradient on the latents to at most 1 in the backward pass to the pixels, and scale it back there.

    float16 has no numbers below 6e-8 or above 65,504. The factor is a power of two, so scaling is exact, and it stays
    on the device, so a GPU is not synchronised.
    """
    exponent: list[Tensor] = []

    def scale_down(gradient: Tensor) -> Tensor:
        exponent[:] = [torch.frexp(gradient.abs().amax())[1]]
        return torch.ldexp(gradient, -exponent[0])

    latents.register_hook(scale_down)
    pixels.register_hook(lambda gradient: torch.ldexp(gradient, exponent[0]))


def _latent_scale(vae: Any) -> tuple[Tensor, Tensor]:
    """Return shift and scale, each (C, 1, 1) or (), such that a latent is (output of the VAE - shift) * scale."""
    if vae is None:
        return torch.zeros(()), torch.ones(())
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return torch.tensor(mean).view(-1, 1, 1), config.scaling_factor / torch.tensor(std).view(-1, 1, 1)
    return torch.tensor(config.get("shift_factor") or 0.0), torch.tensor(config.scaling_factor)
