"""Exact teachers: Gaussian mixtures, whose answer at every noise level is known in closed form.

For x ~ sum_k w_k N(m_k, diag s_k^2), x_t = alpha x + sigma eps is again a mixture, of N(alpha m_k, diag V_k) with
V_k = alpha^2 s_k^2 + sigma^2, and with the responsibilities r_k ~ w_k N(x_t; alpha m_k, V_k)

    E[x0 | x_t]  = sum_k r_k (m_k + alpha s_k^2 (x_t - alpha m_k) / V_k)
    E[eps | x_t] = sum_k r_k sigma (x_t - alpha m_k) / V_k            # = -sigma grad log p_t(x_t)

What a perfectly trained network would report. With images as means and s_k = 0 it is the softmax-weighted mean of the
images: the oracle for pictures, and with a camera for each image for scenes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.diffusion.noise import Prediction, Schedule, target
from sds3d.networks.mlp import PointNet
from sds3d.prompts import VIEW_WORDS
from sds3d.teachers.base import decode_pixels, encode_pixels


@dataclass
class Mixture:
    """A mixture of K Gaussians with diagonal covariances, over tensors of any shape (D, ...); float64 inside.

    Args:
        weights: (K,), at least 0; they are normalised.
        means: (K, D, ...).
        stds: shape that broadcasts to means, at least 0; a number for all.

    Raises:
        ValueError: weights or standard deviations that are negative, or no weight at all.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor | float

    def __post_init__(self):
        self.means = self.means.double()
        self.stds = torch.as_tensor(self.stds, dtype=torch.float64).expand(self.means.shape)
        self.weights = self.weights.double()
        if self.weights.shape != self.means.shape[:1]:
            raise ValueError(f"{len(self.means)} components need as many weights, got {tuple(self.weights.shape)}")
        if bool((self.weights < 0).any()) or not bool(self.weights.sum() > 0) or bool((self.stds < 0).any()):
            raise ValueError("a mixture needs weights and standard deviations of at least 0, and some weight")
        self.weights = self.weights / self.weights.sum()

    def log_joint(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, log_prior: Tensor | None = None) -> Tensor:
        """log w_k + log N(x_t; alpha m_k, V_k), (B, K).

        Args:
            x_t: (B, D, ...).
            alpha, sigma: (B,).
            log_prior: (B, K) log weights in place of the mixture's own.
        """
        off, variance = self._off(x_t, alpha, sigma)
        log_normal = -0.5 * (off**2 / variance + variance.log() + math.log(2 * math.pi)).flatten(2).sum(-1)
        return log_normal + (self.weights.log() if log_prior is None else log_prior)

    def log_density(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, log_prior: Tensor | None = None) -> Tensor:
        """log p_t(x_t), (B,); differentiable."""
        return self.log_joint(x_t, alpha, sigma, log_prior).logsumexp(-1)

    def posterior(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, log_prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t] and E[eps | x_t], each (B, D, ...) float64."""
        share = self.log_joint(x_t, alpha, sigma, log_prior).softmax(-1)  # (B, K)
        share = share.view(*share.shape, *[1] * (x_t.dim() - 1))
        off, variance = self._off(x_t, alpha, sigma)
        pull = off / variance
        alpha, sigma = (v.double().view(-1, *[1] * x_t.dim()) for v in (alpha, sigma))
        x0 = (share * (self.means + alpha * self.stds**2 * pull)).sum(1)
        return x0, (share * sigma * pull).sum(1)

    def sample(self, n: int, rng: torch.Generator, weights: Tensor | None = None) -> Tensor:
        """n samples, (n, D, ...) float64; ``weights`` (K,) in place of the mixture's own."""
        which = torch.multinomial(self.weights if weights is None else weights, n, True, generator=rng)
        noise = torch.randn((n, *self.means.shape[1:]), generator=rng, dtype=torch.float64)
        return self.means[which] + torch.as_tensor(self.stds)[which] * noise

    def _off(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x_t - alpha m_k and V_k, each (B, K, D, ...)."""
        alpha, sigma = (v.double().view(-1, *[1] * x_t.dim()) for v in (alpha, sigma))
        variance = (alpha**2 * self.stds**2 + sigma**2).clamp_min(1e-300)  # a point mass without noise stays finite
        return x_t.double()[:, None] - alpha * self.means, variance


class MixtureTeacher:
    """A `sds3d.teachers.base.Teacher` with exact answers.

    Args:
        mixture: what it knows; components are (C, H, W).
        classes: prompt -> weights (K,) of the mixture under it; view words may be part of the prompt. "" is the whole
            mixture.
        schedule: its noise levels.
        kind: what it reports, one of `sds3d.diffusion.noise.KINDS`.
        cameras: K cameras, where component k is a picture taken by camera k; then ``views`` is "camera", and a told
            camera favours the components seen from near it.
        view_width: degrees of arc over which that favour falls off (a Gaussian's standard deviation).
        pixels: whether x is an image in [-1, 1]; otherwise images are taken as they are.

    Raises:
        ValueError: classes whose weights do not fit the mixture.
    """

    dtype = torch.float64

    def __init__(
        self,
        mixture: Mixture,
        classes: Mapping[str, Sequence[float] | Tensor] | None = None,
        schedule: Schedule | None = None,
        kind: str = "eps",
        cameras: Cameras | None = None,
        view_width: float = 10.0,
        pixels: bool = False,
    ):
        self.mixture, self.schedule, self.kind = mixture, schedule or Schedule.cosine(), kind
        self.cameras, self.view_width, self.pixels = cameras, view_width, pixels
        self.views = "words" if cameras is None else "camera"
        self.image_size = mixture.means.shape[-1]
        self.shape = tuple(mixture.means.shape[1:])
        self.classes = {"": mixture.weights}
        for prompt, weights in (classes or {}).items():
            weights = torch.as_tensor(weights, dtype=torch.float64)
            if weights.shape != mixture.weights.shape or bool((weights < 0).any()) or not bool(weights.sum() > 0):
                raise ValueError(
                    f"the class {prompt!r} needs {len(mixture.weights)} weights of at least 0, got {weights}"
                )
            self.classes[prompt] = weights / weights.sum()

    @classmethod
    def of_images(
        cls,
        images: Tensor,  # (K, 3, H, H) in [0, 1]
        std: float = 0.0,
        classes: Mapping[str, Sequence[float] | Tensor] | None = None,
        cameras: Cameras | None = None,
        schedule: Schedule | None = None,
    ) -> MixtureTeacher:
        """Knows these pictures, equally likely, each blurred by noise of ``std`` in [-1, 1]'s units."""
        mixture = Mixture(torch.ones(len(images)), 2 * images - 1, std)
        return cls(mixture, classes, schedule, cameras=cameras, pixels=True)

    def encode(self, images: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.encode`."""
        return encode_pixels(images, self.image_size) if self.pixels else images

    def decode(self, x: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.decode`."""
        return decode_pixels(x) if self.pixels else x

    def check(self, prompt: str) -> None:
        """Raises ValueError for a prompt that is no class."""
        if not prompt or self._class_of(prompt) is None:
            known = ", ".join(repr(p) for p in self.classes if p) or "none: it is unconditional"
            raise ValueError(f"this exact teacher does not know {prompt!r}; its prompts are {known}")

    def weights(self, prompt: str) -> Tensor:
        """(K,) of a class, with or without its view words.

        Raises:
            ValueError: it is no class.
        """
        found = self._class_of(prompt)
        if found is None:
            self.check(prompt)
        assert found is not None, "check refuses what is no class"
        return found

    @torch.no_grad()
    def predict(
        self,
        x_t: Tensor,  # (B, C, H, W)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
    ) -> Prediction:
        """See `sds3d.teachers.base.Teacher.predict`."""
        alpha, sigma = self.schedule.alpha_sigma(t.double())
        rates = self.schedule.rates(t.double())
        x0, eps = self.mixture.posterior(x_t, alpha, sigma, self.log_prior(prompts, cameras, camera_mask))
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        output = target(self.kind, x0, eps, alpha, sigma, rates)
        levels = (alpha.to(dtype), sigma.to(dtype))
        return Prediction(output.to(dtype), x_t, *levels, self.kind, (rates[0].to(dtype), rates[1].to(dtype)))

    @cached_property
    def network(self) -> PointNet:
        """What a critic of this teacher learns: a difference in v, zero at first."""
        return PointNet(self.mixture.means[0].numel())

    extra_width = 0

    def answer(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Prediction:
        """See `sds3d.distill.critics.Trainable.answer`; the network's answer is added to the exact one."""
        exact = self.predict(x_t, t, prompts, cameras, camera_mask)
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        v = exact.v + network(x_t.to(torch.float32), t.to(torch.float32)).to(dtype)
        return Prediction(v, x_t, exact.alpha, exact.sigma, "v")

    def log_prior(
        self, prompts: list[str], cameras: Cameras | None = None, camera_mask: Tensor | None = None
    ) -> Tensor:
        """log weights of the components under each prompt and camera, (B, K), normalised."""
        place = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        log_weights = torch.stack([self.weights(p) for p in place]).log()[[place[p] for p in prompts]]
        if cameras is not None and self.cameras is not None:
            towards, known = (
                torch.nn.functional.normalize(c.positions().double(), dim=-1) for c in (cameras, self.cameras)
            )
            angle = torch.rad2deg(torch.acos((towards @ known.T).clamp(-1, 1)))  # (B, K)
            favour = -0.5 * (angle / self.view_width) ** 2
            told = torch.ones(len(prompts), dtype=torch.bool) if camera_mask is None else camera_mask
            log_weights = log_weights + torch.where(told[:, None], favour, 0.0)
        return log_weights.log_softmax(-1)

    def _class_of(self, prompt: str) -> Tensor | None:
        if prompt in self.classes:
            return self.classes[prompt]
        plain, _, view = prompt.rpartition(", ")
        return self.classes.get(plain) if view in VIEW_WORDS else None
