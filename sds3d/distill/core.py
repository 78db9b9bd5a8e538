"""The distillation core: a teacher's judgement of images, turned into a gradient on them.

A method returns a direction d in eps units, shape of x. Everything else is here, once (DreamFusion,
arXiv 2209.14988, eq. 3, is the case d = eps_teacher - eps):

    x_t  = alpha x + sigma eps                            # t from the schedule's draw, one t a group
    g    = stop_grad(W(t) N d)                            # weight W by name, normaliser N (1 unless a method has one)
    loss = 0.5 |x - stop_grad(x - g)|^2 / B               # summed over a sample, mean over the batch

so the gradient on x is g / B, and the loss's value means nothing. The teacher is never differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sds3d import cameras as cam
from sds3d.cameras import Cameras
from sds3d.noise import Prediction, TimeDraw, noised, weight
from sds3d.prompts import with_view
from sds3d.students import Draw
from sds3d.teachers.base import Teacher

BRANCHES = ("cond", "uncond", "negative")
T_BINS = 5  # |g| is reported for this many equal parts of t in [0, 1]


@dataclass
class Query:
    """What a method may ask of the teacher about one noisy batch.

    Args:
        teacher: answers.
        x: (B, C, H, W), clean, detached.
        x_t: (B, C, H, W).
        noise: (B, C, H, W), the eps in x_t.
        t, alpha, sigma: (B,).
        prompts: B prompts, without view words.
        cameras: B cameras, or None.
        negative: the negative prompt, "" where there is none.
        uncond_camera: whether the "uncond" and "negative" branches are told the camera (or the view words).
        step: of the run, for what changes with it.
    """

    teacher: Teacher
    x: Tensor
    x_t: Tensor
    noise: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    prompts: list[str]
    cameras: Cameras | None = None
    negative: str = ""
    uncond_camera: bool = False
    step: int = 0
    _answers: dict[str, Prediction] = field(default_factory=dict, repr=False)

    def eps(self, *branches: str) -> tuple[Tensor, ...]:
        """The teacher's eps at (x_t, t) for each branch, (B, C, H, W) each.

        "cond" is the prompt, "uncond" the null prompt, "negative" the negative prompt. What was not asked before is
        answered in one batched forward.

        Raises:
            ValueError: unknown branch, or "negative" without a negative prompt.
        """
        return tuple(answer.eps for answer in self.answers(*branches))

    def answers(self, *branches: str) -> tuple[Prediction, ...]:
        """As ``eps``, in full."""
        missing = [b for b in dict.fromkeys(branches) if b not in self._answers]
        if missing:
            self._answers.update(zip(missing, self.predict(self.x_t, self.t, *missing), strict=True))
        return tuple(self._answers[b] for b in branches)

    def predict(self, x_t: Tensor, t: Tensor, *branches: str) -> tuple[Prediction, ...]:
        """The teacher's answers for each branch at another (x_t (B, C, H, W), t (B,)), in one batched forward."""
        size, count = len(x_t), len(branches)
        prompts = [prompt for branch in branches for prompt in self._prompts(branch)]
        cameras = mask = None
        if self.cameras is not None and self.teacher.views == "camera":
            cameras = cam.cat([self.cameras] * count)
            told = [branch == "cond" or self.uncond_camera for branch in branches]
            mask = torch.tensor(told, device=x_t.device).repeat_interleave(size)
        with torch.no_grad():
            both = self.teacher.predict(torch.cat([x_t] * count), torch.cat([t] * count), prompts, cameras, mask)
        return tuple(both[i * size : (i + 1) * size] for i in range(count))

    def _prompts(self, branch: str) -> list[str]:
        """The branch's B prompts, as the teacher reads them."""
        if branch not in BRANCHES:
            raise ValueError(f"unknown branch {branch!r}; accepted: {', '.join(BRANCHES)}")
        if branch == "negative" and not self.negative:
            raise ValueError("this method needs a negative prompt and got none; give one with negative=...")
        prompts = self.prompts if branch == "cond" else [self.negative if branch == "negative" else ""] * len(self.x)
        words = self.cameras is not None and self.teacher.views == "words"
        return with_view(prompts, self.cameras) if words and (branch == "cond" or self.uncond_camera) else prompts


class Method(Protocol):
    """A score-distillation method: a frozen dataclass of hyper-parameters and this call."""

    def __call__(self, q: Query) -> Tensor:
        """The direction d = eps_teacher - eps_reference, (B, C, H, W), in eps units."""
        ...


@dataclass
class Distilled:
    """One step of an objective.

    Args:
        loss: scalar; its gradient is the point, its value means nothing.
        metrics: "g_norm" (mean over the batch of |g|), "t" (mean), and "g_norm/t0.2-0.4" for each part of t drawn.
        query: the step's query; ``query.answers("cond")[0].x0`` is what the teacher would rather see.
    """

    loss: Tensor
    metrics: dict[str, float]
    query: Query


class NonFiniteGradient(ArithmeticError):
    """A gradient that is not finite: the run must stop before it reaches the student."""

    def __init__(self, method: str, step: int, t: float, cause: str):
        self.method, self.step, self.t = method, step, t
        super().__init__(
            f"{method}: non-finite gradient at step {step}, t = {t:.4g}: {cause}. "
            "Resume from the last checkpoint with a smaller learning rate or guidance scale."
        )


@dataclass
class ScoreObjective:
    """A method with what the core adds to it: noise, weight, finiteness, detaching, reduction.

    Args:
        teacher: the judge.
        method: gives the direction.
        time: where t comes from.
        weight: name of W, one of ``noise.WEIGHTS``.
        negative: negative prompt, "" for none.
        uncond_camera: see ``Query``.

    Raises:
        ValueError: unknown weight, or a negative prompt the teacher cannot read.
    """

    teacher: Teacher
    method: Method
    time: TimeDraw
    weight: str = "sigma2"
    negative: str = ""
    uncond_camera: bool = False

    def __post_init__(self):
        weight(self.weight, torch.ones(1), torch.ones(1))
        if self.negative:
            self.teacher.check(self.negative)

    @property
    def name(self) -> str:
        return type(self.method).__name__

    def __call__(self, draw: Draw, step: int, generator: torch.Generator) -> Distilled:
        """The loss on a draw's images; t and noise come from the generator.

        Raises:
            NonFiniteGradient: g is not finite.
        """
        x = self.teacher.encode(draw.images)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        t = self.time.draw(step, draw.group.to(x.device), generator)
        noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
        query = self.query(draw, x, t, noise, step)
        g = self.gradient(query)
        return Distilled(surrogate(x, g), _metrics(g, query.t), query)

    def query(self, draw: Draw, x: Tensor, t: Tensor, noise: Tensor, step: int = 0) -> Query:
        """The question about clean x (B, C, H, W) at t (B,) with this noise (B, C, H, W)."""
        assert len(draw.prompts) == len(x) == len(t), (len(draw.prompts), x.shape, t.shape)
        x, t = x.detach(), t.to(x.dtype)
        alpha, sigma = self.teacher.schedule.alpha_sigma(t)
        return Query(
            teacher=self.teacher,
            x=x,
            x_t=noised(x, noise, alpha, sigma),
            noise=noise,
            t=t,
            alpha=alpha,
            sigma=sigma,
            prompts=draw.prompts,
            cameras=draw.cameras,
            negative=self.negative,
            uncond_camera=self.uncond_camera,
            step=step,
        )

    def gradient(self, q: Query) -> Tensor:
        """g = W N d, (B, C, H, W), detached; the gradient on x is g / B.

        Raises:
            NonFiniteGradient: naming method, step and the first t where it happened.
        """
        with torch.no_grad():
            d = self.method(q)
            assert d.shape == q.x.shape, (d.shape, q.x.shape)
            w = weight(self.weight, q.alpha, q.sigma)  # (B,)
            g = (w.view(-1, *[1] * (d.dim() - 1)) * d).to(q.x.dtype)
        if not bool(g.isfinite().all()):
            bad = int((~g.isfinite()).flatten(1).any(1).nonzero()[0, 0])
            cause = "the teacher's answer or the weight is not finite"
            if not bool(q.x[bad].isfinite().all()):
                cause = "the student's own image is not finite"
            raise NonFiniteGradient(self.name, q.step, float(q.t[bad]), cause)
        return g


def surrogate(x: Tensor, g: Tensor) -> Tensor:
    """The scalar whose gradient on x (B, C, H, W) is g / B."""
    return 0.5 * (x - (x - g).detach()).square().sum() / len(x)


def _metrics(g: Tensor, t: Tensor) -> dict[str, float]:
    norms, times = g.flatten(1).norm(dim=1).tolist(), t.tolist()
    metrics = {"g_norm": sum(norms) / len(norms), "t": sum(times) / len(times)}
    bins: dict[int, list[float]] = {}
    for norm, time in zip(norms, times, strict=True):
        bins.setdefault(min(int(time * T_BINS), T_BINS - 1), []).append(norm)
    for i, members in sorted(bins.items()):
        metrics[f"g_norm/t{i / T_BINS:.1f}-{(i + 1) / T_BINS:.1f}"] = sum(members) / len(members)
    return metrics
