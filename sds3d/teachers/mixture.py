"""Exact teachers: Gaussian mixtures, whose prediction at every noise level is known in closed form.

For x ~ sum_k w_k N(m_k, diag s_k^2), x_t = alpha x + sigma eps is again a mixture, of N(alpha m_k, diag V_k) with
V_k = alpha^2 s_k^2 + sigma^2, and with the responsibilities r_k ~ w_k N(x_t; alpha m_k, V_k)

    E[x0 | x_t]  = sum_k r_k (m_k + alpha s_k^2 (x_t - alpha m_k) / V_k)
    E[eps | x_t] = sum_k r_k sigma (x_t - alpha m_k) / V_k            # = -sigma grad log p_t(x_t)

These are the predictions of a perfectly trained network. With images as means and s_k = 0, E[x0 | x_t] is the
softmax-weighted mean of the images: an oracle for images and, with a camera for each image, for scenes.
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
    """A mixture of K Gaussians with diagonal covariances over tensors of shape (D, ...), computed in float64.

    Args:
        weights: (K,), at least 0; they are normalised.
        means: (K, D, ...).
        stds: at least 0; a number, or a tensor that broadcasts to means.

    Raises:
        ValueError: a weight or a standard deviation is negative, or all weights are 0.
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
        """Return log w_k + log N(x_t; alpha m_k, V_k), (B, K).

        Args:
            x_t: (B, D, ...).
            alpha, sigma: (B,).
            log_prior: (B, K) log weights in place of the mixture's own.
        """
        residual, variance = self._residual(x_t, alpha, sigma)
        log_normal = -0.5 * (residual**2 / variance + variance.log() + math.log(2 * math.pi)).flatten(2).sum(-1)
        return log_normal + (self.weights.log() if log_prior is None else log_prior)

    def log_density(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, log_prior: Tensor | None = None) -> Tensor:
        """Return log p_t(x_t), (B,); differentiable."""
        return self.log_joint(x_t, alpha, sigma, log_prior).logsumexp(-1)

    def posterior(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, log_prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return E[x0 | x_t] and E[eps | x_t], each (B, D, ...) float64."""
        r = self.log_joint(x_t, alpha, sigma, log_prior).softmax(-1)  # (B, K), the responsibilities
        r = r.view(*r.shape, *[1] * (x_t.dim() - 1))
        residual, variance = self._residual(x_t, alpha, sigma)
        scaled = residual / variance
        alpha, sigma = (v.double().view(-1, *[1] * x_t.dim()) for v in (alpha, sigma))
        x0 = (r * (self.means + alpha * self.stds**2 * scaled)).sum(1)
        return x0, (r * sigma * scaled).sum(1)

    def sample(self, n: int, rng: torch.Generator, weights: Tensor | None = None) -> Tensor:
        """Draw n samples, (n, D, ...) float64. ``weights`` (K,) replaces the mixture's own."""
        component = torch.multinomial(self.weights if weights is None else weights, n, True, generator=rng)
        noise = torch.randn((n, *self.means.shape[1:]), generator=rng, dtype=torch.float64)
        return self.means[component] + torch.as_tensor(self.stds)[component] * noise

    def _residual(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t - alpha m_k and V_k, each (B, K, D, ...)."""
        alpha, sigma = (v.double().view(-1, *[1] * x_t.dim()) for v in (alpha, sigma))
        variance = (alpha**2 * self.stds**2 + sigma**2).clamp_min(1e-300)  # a point mass without noise stays finite
        return x_t.double()[:, None] - alpha * self.means, variance


class MixtureTeacher:
    """A `sds3d.teachers.base.Teacher` with exact predictions.

    Args:
        mixture: the data distribution; components are (C, H, W).
        classes: prompt -> weights (K,) of the mixture under it. View words may be part of the prompt. "" is the whole
            mixture.
        schedule: noise schedule.
        kind: what it predicts, one of `sds3d.diffusion.noise.KINDS`.
        cameras: K cameras; component k is a picture taken by camera k. ``views`` is then "camera", and the weights of
            components fall with the angle between their camera and the given one.
        view_width: standard deviation in degrees of that Gaussian fall-off.
        pixels: whether x is an image in [-1, 1]; otherwise x is the image in [0, 1] itself.

    Raises:
        ValueError: the weights of a class do not fit the mixture.
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
        """Return the teacher of these images, equally likely, each with noise of ``std`` in units of [-1, 1]."""
        mixture = Mixture(torch.ones(len(images)), 2 * images - 1, std)
        return cls(mixture, classes, schedule, cameras=cameras, pixels=True)

    def encode(self, images: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.encode`."""
        return encode_pixels(images, self.image_size) if self.pixels else images

    def decode(self, x: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.decode`."""
        return decode_pixels(x) if self.pixels else x

    def check(self, prompt: str) -> None:
        """Raise ValueError for a prompt that is not a class."""
        if not prompt or self._class_of(prompt) is None:
            known = ", ".join(repr(p) for p in self.classes if p) or "none: it is unconditional"
            raise ValueError(f"this exact teacher does not know {prompt!r}; its prompts are {known}")

    def weights(self, prompt: str) -> Tensor:
        """Return the weights (K,) of a class, whose prompt may have view words.

        Raises:
            ValueError: the prompt is not a class.
        """
        weights = self._class_of(prompt)
        if weights is None:
            self.check(prompt)
        assert weights is not None, "check refuses other prompts"
        return weights

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
        """The network that a critic of this teacher trains: a correction of v, zero at first."""
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
        """See `sds3d.distill.critics.Trainable.answer`. The network's output is added to the exact v."""
        exact = self.predict(x_t, t, prompts, cameras, camera_mask)
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        v = exact.v + network(x_t.to(torch.float32), t.to(torch.float32)).to(dtype)
        return Prediction(v, x_t, exact.alpha, exact.sigma, "v")

    def log_prior(
        self, prompts: list[str], cameras: Cameras | None = None, camera_mask: Tensor | None = None
    ) -> Tensor:
        """Return the normalised log weights of the components under each prompt and camera, (B, K)."""
        row = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        log_weights = torch.stack([self.weights(p) for p in row]).log()[[row[p] for p in prompts]]
        if cameras is not None and self.cameras is not None:
            directions, own_directions = (
                torch.nn.functional.normalize(c.positions().double(), dim=-1) for c in (cameras, self.cameras)
            )
            angle = torch.rad2deg(torch.acos((directions @ own_directions.T).clamp(-1, 1)))  # (B, K)
            log_view = -0.5 * (angle / self.view_width) ** 2
            mask = torch.ones(len(prompts), dtype=torch.bool) if camera_mask is None else camera_mask
            log_weights = log_weights + torch.where(mask[:, None], log_view, 0.0)
        return log_weights.log_softmax(-1)

    def _class_of(self, prompt: str) -> Tensor | None:
        if prompt in self.classes:
            return self.classes[prompt]
        without_view, _, view = prompt.rpartition(", ")
        return self.classes.get(without_view) if view in VIEW_WORDS else None
