"""Noise schedules, and conversions between what diffusion networks predict.

``x_t = alpha_t x + sigma_t eps`` with eps ~ N(0, I) and t in [0, 1]. Levels are compared by sigma/alpha,
never by t. A network may predict

    eps      x0      v = alpha eps - sigma x0      flow = alpha' x0 + sigma' eps      score = -eps / sigma

(v: Salimans & Ho, arXiv 2202.00512, app. D; flow: Lipman et al., arXiv 2210.02747, and Liu et al., arXiv 2209.03003,
whose rectified flow has alpha = 1 - t, sigma = t, alpha' = -1, sigma' = 1; primes are derivatives in t).
Each is a linear combination of x0 and eps, and so is x_t. Each is therefore a combination of x_t and the output.
``Prediction`` solves for its two coefficients directly, without a third quantity in between.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

KINDS = ("eps", "x0", "v", "flow", "score")


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshape ``value`` (B,) so that it broadcasts over the samples of ``like`` (B, C, H, W)."""
    return value.view(-1, *[1] * (like.dim() - 1))


class Schedule(ABC):
    """Noise levels over t in [0, 1]; make one with ``cosine``, ``linear``, ``table``, ``ve`` or ``flow``.

    Attributes:
        t_noisiest: t of the noisiest level that a network is trained on, where sampling begins.
        t_clean: t at which equally spaced steps reach sigma = 0. It is below 0 for a table, whose first level has some
            noise; nothing is evaluated there, the last prediction of x0 is the result.
    """

    t_noisiest, t_clean = 1.0, 0.0

    @staticmethod
    def cosine() -> Schedule:
        """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
        return _Cosine()

    @staticmethod
    def linear() -> Schedule:
        """Stable Diffusion's ``table`` of 1,000 levels: sqrt(beta) is linear from 0.00085^0.5 to 0.012^0.5."""
        return _linear()

    @staticmethod
    def table(alpha_bar: Tensor) -> Schedule:
        """Schedule of a network trained on N levels with alpha_t^2 = alpha_bar (N,), falling, as in diffusers.

        t = index / N, so t = 0 is index 0, which has some noise. Between indices log(sigma/alpha) is linear. It is
        extrapolated to t = 1, one level beyond those the network is trained on.

        Raises:
            ValueError: alpha_bar does not fall, or leaves [0, 1).
        """
        alpha_bar = alpha_bar.double().cpu()
        if len(alpha_bar) < 2 or not bool((alpha_bar.diff() < 0).all() and alpha_bar[0] < 1 and alpha_bar[-1] >= 0):
            raise ValueError("alpha_bar must fall from below 1 to 0 or more, over two levels at least")
        return _Table(torch.log(alpha_bar.clamp_min(1e-20)))  # 0 is a level of pure noise, which has no log

    @staticmethod
    def ve(sigma_min: float = 0.01, sigma_max: float = 80.0) -> Schedule:
        """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t."""
        return _VE(float(sigma_min), float(sigma_max))

    @staticmethod
    def flow(shift: float = 1.0) -> Schedule:
        """Rectified flow: alpha = 1 - sigma, sigma = shift t / (1 + (shift - 1) t); shift 1 gives sigma = t.

        Models of larger images have a larger shift (Esser et al., arXiv 2403.03206, eq. 23).
        """
        return _Flow(float(shift))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha (B,) and sigma (B,) at t (B,), computed in float64, in t's dtype (at least float32)."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        alpha, sigma = self._levels(t.double())
        return alpha.to(dtype), sigma.to(dtype)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return d alpha / dt (B,) and d sigma / dt (B,) at t (B,); predictions of flow need them."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        alpha_rate, sigma_rate = self._rates(t.double())
        return alpha_rate.to(dtype), sigma_rate.to(dtype)

    def t_of_ratio(self, sigma_over_alpha: Tensor | float) -> Tensor:
        """Return the t at which sigma/alpha has the given value, same shape.

        Raises:
            ValueError: the value is outside this schedule's range.
        """
        ratio = torch.as_tensor(sigma_over_alpha)
        dtype = torch.promote_types(ratio.dtype, torch.float32)
        t = self._invert(ratio.double())
        if not bool(((t > -1e-6) & (t < 1 + 1e-6)).all()):
            alpha, sigma = self._levels(torch.tensor([0.0, 1.0], dtype=torch.float64))
            low, high = (sigma / alpha.clamp_min(1e-12)).tolist()
            raise ValueError(f"sigma/alpha {sigma_over_alpha} is outside this schedule's range [{low:.3g}, {high:.3g}]")
        return t.clamp(0, 1).to(dtype)

    @abstractmethod
    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at t; all float64, shape of t."""

    @abstractmethod
    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives of alpha and sigma in t."""

    @abstractmethod
    def _invert(self, ratio: Tensor) -> Tensor:
        """Return t of sigma/alpha; a value outside [0, 1] or NaN if there is none."""


@dataclass(frozen=True)
class _Cosine(Schedule):
    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # alpha as a sine of 1 - t is exactly 0 at t = 1; cos(pi / 2) is not
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._levels(t)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha

    def _invert(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) * (2 / math.pi)


@dataclass(frozen=True)
class _Flow(Schedule):
    shift: float

    def __post_init__(self):
        if not 0 < self.shift < math.inf:
            raise ValueError(f"a flow's shift is {self.shift}; give a number above 0")

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        denominator = 1 + (self.shift - 1) * t
        return (1 - t) / denominator, self.shift * t / denominator

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.shift / (1 + (self.shift - 1) * t) ** 2
        return -rate, rate

    def _invert(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + self.shift / ratio)


@dataclass(frozen=True)
class _VE(Schedule):
    sigma_min: float
    sigma_max: float

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"give 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), math.log(self.sigma_max / self.sigma_min) * self._levels(t)[1]

    def _invert(self, ratio: Tensor) -> Tensor:
        return torch.log(ratio / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


class _Table(Schedule):
    """See ``Schedule.table``; takes log alpha_bar (N,), float64."""

    def __init__(self, log_alpha_bar: Tensor):
        log_ratio = (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar) / 2
        self.count = len(log_ratio)
        self.t_noisiest, self.t_clean = 1 - 1 / self.count, -1 / self.count
        log_ratio = torch.cat([log_ratio, 2 * log_ratio[-1:] - log_ratio[-2:-1]])  # (N + 1,)
        self._tables = {log_ratio.device: log_ratio}

    def _table(self, device: torch.device) -> Tensor:
        """Return log(sigma/alpha) at indices 0 ... N on a device."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _log_ratio(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return log(sigma/alpha) at t, and its derivative in t."""
        table = self._table(t.device)
        index = (t * self.count).floor().clamp(0, self.count - 1).long()
        slope = (table[index + 1] - table[index]) * self.count
        return table[index] + slope * (t - index.double() / self.count), slope

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.atan(self._log_ratio(t)[0].exp())
        return torch.cos(angle), torch.sin(angle)

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._levels(t)
        angle_rate = self._log_ratio(t)[1] * alpha * sigma  # d atan(e^l) = e^l / (1 + e^2l) dl
        return -sigma * angle_rate, alpha * angle_rate

    def _invert(self, ratio: Tensor) -> Tensor:
        table, wanted = self._table(ratio.device), torch.log(ratio)
        index = (torch.searchsorted(table, wanted.contiguous()) - 1).clamp(0, self.count - 1)
        return (index + (wanted - table[index]) / (table[index + 1] - table[index])) / self.count


@cache
def _linear() -> _Table:
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return _Table(torch.log1p(-beta).cumsum(0))


@dataclass(frozen=True)
class Prediction:
    """A network's output at (x_t, t), and the x0, eps, v, flow and score it implies.

    Args:
        output: (B, C, H, W), the network's output; any shape that starts with B works.
        x_t: shape of output.
        alpha, sigma: (B,) at t.
        kind: what the output is, one of ``KINDS``.
        rates: (alpha', sigma'), each (B,); only flow needs them. None means rectified flow, (-1, 1).

    The properties ``eps``, ``x0``, ``v``, ``flow`` and ``score`` have the shape of output. They are computed in
    float64 and returned in the output's dtype (at least float32).
    """

    output: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    kind: str
    rates: tuple[Tensor, Tensor] | None = None

    def __post_init__(self):
        _check_kind(self.kind)
        assert self.output.shape == self.x_t.shape, (self.output.shape, self.x_t.shape)
        assert self.alpha.shape == self.sigma.shape == self.x_t.shape[:1], (self.alpha.shape, self.sigma.shape)

    def __getitem__(self, index: slice | Tensor) -> Prediction:
        """Select samples by a slice, a mask or an index tensor."""
        rates = None if self.rates is None else (self.rates[0][index], self.rates[1][index])
        return Prediction(
            self.output[index], self.x_t[index], self.alpha[index], self.sigma[index], self.kind, rates=rates
        )

    @property
    def eps(self) -> Tensor:
        """The noise."""
        return self._as("eps")

    @property
    def x0(self) -> Tensor:
        """The clean images."""
        return self._as("x0")

    @property
    def v(self) -> Tensor:
        """The velocity, alpha eps - sigma x0."""
        return self._as("v")

    @property
    def flow(self) -> Tensor:
        """dx_t/dt: alpha' x0 + sigma' eps."""
        return self._as("flow")

    @property
    def score(self) -> Tensor:
        """The gradient of log p_t at x_t, -eps / sigma."""
        return self._as("score")

    def _as(self, wanted: str) -> Tensor:
        dtype = torch.promote_types(self.output.dtype, torch.float32)
        if wanted == self.kind:
            return self.output.to(dtype)
        from_x_t, from_output = self._coefficients(wanted)
        x_t, output = self.x_t.double(), self.output.double()
        return (per_sample(from_x_t, x_t) * x_t + per_sample(from_output, output) * output).to(dtype)

    def _coefficients(self, wanted: str) -> tuple[Tensor, Tensor]:
        """Return coefficients a and b, each (B,) float64, with wanted = a x_t + b output."""
        alpha, sigma = self.alpha.double(), self.sigma.double()
        rates = None if self.rates is None else (self.rates[0].double(), self.rates[1].double())
        # score is treated as a multiple of eps, so that converting one into the other works at alpha = 0
        unscore = -sigma if self.kind == "score" else torch.ones_like(sigma)
        rescore = -1 / sigma if wanted == "score" else torch.ones_like(sigma)
        k, w = (_plain("eps" if kind == "score" else kind, alpha, sigma, rates) for kind in (self.kind, wanted))
        if {self.kind, wanted} == {"eps", "score"}:
            return torch.zeros_like(alpha), unscore * rescore
        # solve w = p (alpha, sigma) + q k for p and q
        det = alpha * k[1] - sigma * k[0]
        p = (w[0] * k[1] - w[1] * k[0]) / det
        q = (alpha * w[1] - sigma * w[0]) / det
        return p * rescore, q * rescore * unscore


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of prediction {kind!r}; accepted: {', '.join(KINDS)}")


def _plain(kind: str, alpha: Tensor, sigma: Tensor, rates: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return the coefficients of x0 and of eps in a kind of prediction, each (B,)."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "eps":
        return zero, one
    if kind == "x0":
        return one, zero
    if kind == "v":
        return -sigma, alpha
    if kind == "score":
        return zero, -1 / sigma
    return rates if rates is not None else (-one, one)


def noised(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x_t = alpha x + sigma eps for x and eps (B, C, H, W), alpha and sigma (B,)."""
    return per_sample(alpha, x) * x + per_sample(sigma, x) * eps


def target(
    kind: str, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, rates: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return the training target of a network of this kind for clean x and noise eps, both (B, C, H, W).

    Raises:
        ValueError: the kind is unknown.
    """
    _check_kind(kind)
    from_x, from_eps = _plain(kind, alpha, sigma, rates)
    return per_sample(from_x, x) * x + per_sample(from_eps, x) * eps
