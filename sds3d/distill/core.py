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
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sds3d import cameras as cam
from sds3d.cameras import Cameras
from sds3d.guidance import Guidance, cfg, perp_neg, rescaled
from sds3d.noise import Prediction, noised, weight
from sds3d.prompts import VIEW_WORDS, view_negatives, with_view
from sds3d.ramp import Ramp
from sds3d.samplers import ddim
from sds3d.students import Draw
from sds3d.teachers.base import Teacher
from sds3d.times import TimeDraw
from sds3d.transfer import onto

BRANCHES = ("cond", "uncond", "negative", "spoilt", *VIEW_WORDS)
NOISES = ("fresh", "fixed")
T_CLEAN = 0.02  # an inversion takes a clean image to be at this t already: below, no network says anything
T_BINS = 5  # |g| is reported for this many equal parts of t in [0, 1]


class Critic(Protocol):
    """What a method may ask of the student's own score (see critics.py)."""

    def predict(
        self, x_t: Tensor, t: Tensor, prompts: list[str], cameras: Cameras | None, camera_mask: Tensor | None
    ) -> Prediction:
        """As the teacher's, for the distribution of the student's images."""
        ...


@dataclass
class Query:
    """What a method may ask about one noisy batch.

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
        guidance: Perp-Neg and rescaling.
        critic: the student's own score, for methods that want it.
        source: for methods that edit: what the student's images were before, (B, C, H, W), and its prompt.
        generator: of whatever noise a method adds.
        asked: images in each of the teacher's forwards so far.
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
    guidance: Guidance = Guidance()
    critic: Critic | None = None
    source: tuple[Tensor, str] | None = None
    generator: torch.Generator | None = None
    asked: list[int] = field(default_factory=list, repr=False)
    _answers: dict[str, Prediction] = field(default_factory=dict, repr=False)

    def eps(self, *branches: str) -> tuple[Tensor, ...]:
        """The teacher's eps at (x_t, t) for each branch, (B, C, H, W) each.

        "cond" is the prompt, "uncond" the null prompt, "negative" the negative prompt, "spoilt" the prompt with the
        negative prompt's words behind it, "front view" and so on the prompt from there. What was not asked before is
        answered in one batched forward.

        Raises:
            ValueError: unknown branch, or a branch that wants a negative prompt and has none.
        """
        return tuple(answer.eps for answer in self.answers(*branches))

    def answers(self, *branches: str) -> tuple[Prediction, ...]:
        """As ``eps``, in full."""
        missing = [b for b in dict.fromkeys(branches) if b not in self._answers]
        if missing:
            self._answers.update(zip(missing, self.predict(self.x_t, self.t, *missing), strict=True))
        return tuple(self._answers[b] for b in branches)

    def predict(self, x_t: Tensor, t: Tensor, *branches: str, prompt: str | None = None) -> tuple[Prediction, ...]:
        """The teacher's answers for each branch at another (x_t (B, C, H, W), t (B,)), in one batched forward.

        Args:
            prompt: stands for the run's own, for all B.
        """
        size, count = len(x_t), len(branches)
        prompts = [text for branch in branches for text in self._prompts(branch, prompt)]
        cameras = mask = None
        if self.cameras is not None and self.teacher.views == "camera":
            cameras = cam.cat([self.cameras] * count)
            told = [branch in ("cond", "spoilt") or self.uncond_camera for branch in branches]
            mask = onto(torch.tensor(told).repeat_interleave(size), x_t.device)
        self.asked.append(size * count)
        with torch.no_grad():
            both = self.teacher.predict(torch.cat([x_t] * count), torch.cat([t] * count), prompts, cameras, mask)
        return tuple(both[i * size : (i + 1) * size] for i in range(count))

    def guided(self, scale: float) -> Tensor:
        """The teacher's guided eps at (x_t, t), (B, C, H, W); a negative prompt takes the null prompt's place."""
        return self.guided_at(self.x_t, self.t, scale, away="negative" if self.negative else "uncond", kept=True)

    def guided_at(
        self, x_t: Tensor, t: Tensor, scale: float, away: str = "uncond", prompt: str | None = None, kept: bool = False
    ) -> Tensor:
        """The guided eps at another (x_t, t). At scale 1 only the prompt is asked, at 0 only ``away``."""
        views = list(VIEW_WORDS[:3]) if self.guidance.perp_neg and self._says_views() and scale not in (0, 1) else []
        branches = [b for b, asked in (("cond", scale != 0), (away, scale != 1)) if asked] + views
        found = self.answers(*branches) if kept else self.predict(x_t, t, *branches, prompt=prompt)
        if scale in (0, 1):
            return found[0].eps
        cond, uncond = found[0], found[1]
        if views:
            weights = [view_negatives(azimuth) for azimuth in self.cameras.azimuth.tolist()]
            each = onto(torch.tensor([[w[v] for w in weights] for v in views], dtype=x_t.dtype), x_t.device)
            eps = perp_neg(
                uncond.eps, cond.eps, torch.stack([p.eps for p in found[2:]]), self.guidance.perp_neg * each, scale
            )
        else:
            eps = cfg(uncond.eps, cond.eps, scale)
        if not self.guidance.rescale:
            return eps
        guided = Prediction(eps, x_t, cond.alpha, cond.sigma, "eps")
        x0 = rescaled(guided.x0, cond.x0, self.guidance.rescale)
        return Prediction(x0, x_t, cond.alpha, cond.sigma, "x0").eps

    def inverted(self, t: Tensor, steps: int, scale: float, eta: float = 0.0) -> Tensor:
        """x carried up to t (B,) by DDIM inversion with guidance ``scale``, (B, C, H, W).

        Args:
            steps: of equal length in t.
            eta: share of fresh noise, see `samplers.ddim`.
        """

        def predict(x_s: Tensor, s: Tensor) -> Prediction:
            alpha, sigma = self.teacher.schedule.alpha_sigma(s)
            return Prediction(self.guided_at(x_s, s, scale), x_s, alpha, sigma, "eps")

        start = torch.full_like(t, T_CLEAN).minimum(t)
        alpha, _ = self.teacher.schedule.alpha_sigma(start)
        clean = alpha.view(-1, *[1] * (self.x.dim() - 1)) * self.x
        *_, (_, _, x_t) = ddim(predict, clean, self.teacher.schedule, steps, eta, self.generator, start, t)
        return x_t

    def critic_eps(self) -> Tensor:
        """The critic's eps at (x_t, t) for the prompt and camera, without gradient, (B, C, H, W).

        Raises:
            ValueError: there is no critic.
        """
        if self.critic is None:
            raise ValueError("this method needs a critic and got none; give one with critic.kind=lora or copy")
        with torch.no_grad():
            return self.critic.predict(self.x_t, self.t, self._prompts("cond"), self.cameras, None).eps

    def _says_views(self) -> bool:
        return self.cameras is not None and self.teacher.views == "words"

    def _prompts(self, branch: str, prompt: str | None = None) -> list[str]:
        """The branch's B prompts, as the teacher reads them."""
        if branch not in BRANCHES:
            raise ValueError(f"unknown branch {branch!r}; accepted: {', '.join(BRANCHES)}")
        if branch in ("negative", "spoilt") and not self.negative:
            raise ValueError("this method needs a negative prompt and got none; give one with negative=...")
        own = self.prompts if prompt is None else [prompt] * len(self.x)
        if branch in VIEW_WORDS:
            return [f"{p}, {branch}" for p in own]
        if branch in ("uncond", "negative"):
            own = [self.negative if branch == "negative" else ""] * len(self.x)
        told = branch in ("cond", "spoilt") or self.uncond_camera
        own = with_view(own, self.cameras) if self._says_views() and told else own
        return [f"{p}, {self.negative}" for p in own] if branch == "spoilt" else own


class Method:
    """A score-distillation method: a frozen dataclass of hyper-parameters, and one call.

    Attributes:
        WEIGHT: W(t) where the run names none, one of ``noise.WEIGHTS``.
        NEEDS: what it cannot do without, of "critic", "negative" (a negative prompt), "source" (what to edit).
    """

    WEIGHT: ClassVar[str] = "sigma2"
    NEEDS: ClassVar[tuple[str, ...]] = ()

    def __call__(self, q: Query) -> Tensor:
        """The direction d = eps_teacher - eps_reference, (B, C, H, W), in eps units."""
        raise NotImplementedError


def scale_of(value: Ramp | float, step: int) -> float:
    """A guidance scale at a step."""
    return Ramp.parse(value)(step)


def require_scale(method: Method, *names: str) -> None:
    """Raises ValueError where a method's guidance scale is below 0 at some step."""
    for name in names:
        ramp = Ramp.parse(getattr(method, name))
        if min(ramp.v0, ramp.v1) < 0:
            raise ValueError(f"{type(method).__name__}'s {name} is {getattr(method, name)}; give at least 0")


@dataclass
class Distilled:
    """One step of an objective.

    Args:
        loss: scalar; its gradient is the point, its value means nothing.
        metrics: "g_norm" (mean over the batch of |g|), "t" (mean), "asked" (images the teacher judged), and
            "g_norm/t0.2-0.4" for each part of t drawn.
        query: the step's query; ``query.answers("cond")[0].x0`` is what the teacher would rather see.
    """

    loss: Tensor
    metrics: dict[str, float | Tensor]
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
        weight: name of W, one of ``noise.WEIGHTS``, or "auto", the method's own.
        negative: negative prompt, "" for none.
        uncond_camera: see ``Query``.
        noise: "fresh" every step, or "fixed": the same for every step of the run.
        guidance: see ``Query``.
        critic: see ``Query``.
        source_prompt: what a draw's ``source`` shows.
        noise_seed: of fixed noise.

    Raises:
        ValueError: unknown weight or noise, a negative prompt the teacher cannot read, or something the method needs
            is missing.
    """

    teacher: Teacher
    method: Method
    time: TimeDraw
    weight: str = "auto"
    negative: str = ""
    uncond_camera: bool = False
    noise: str = "fresh"
    guidance: Guidance = Guidance()
    critic: Critic | None = None
    source_prompt: str = ""
    noise_seed: int = 0

    def __post_init__(self):
        self.weight = self.method.WEIGHT if self.weight == "auto" else self.weight
        weight(self.weight, torch.ones(1), torch.ones(1))
        for prompt in filter(None, (self.negative, self.source_prompt)):
            self.teacher.check(prompt)
        if self.noise not in NOISES:
            raise ValueError(f"noise is {self.noise!r}; give {' or '.join(NOISES)}")
        has = {"critic": self.critic is not None, "negative": self.negative, "source": self.source_prompt}
        how = {
            "critic": "a critic: give critic.kind=lora or copy",
            "negative": "a negative prompt: give negative='low quality' or other words the teacher knows",
            "source": "a source: give source.prompt and source.run, what is to be edited",
        }
        for need in self.method.NEEDS:
            if not has[need]:
                raise ValueError(f"{self.name} needs {how[need]}")

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
        t = self.time.draw(step, draw.group, generator, self.teacher.schedule)
        source = generator if self.noise == "fresh" else torch.Generator().manual_seed(self.noise_seed)
        noise = onto(torch.randn(x.shape, generator=source, device=source.device, dtype=x.dtype), x.device)
        query = self.query(draw, x, onto(t, x.device), noise, step, generator)
        g = self.gradient(query)
        return Distilled(surrogate(x, g), _metrics(g, t.tolist()) | {"asked": sum(query.asked)}, query)

    def query(
        self,
        draw: Draw,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        step: int = 0,
        generator: torch.Generator | None = None,
    ) -> Query:
        """The question about clean x (B, C, H, W) at t (B,) with this noise (B, C, H, W)."""
        assert len(draw.prompts) == len(x) == len(t), (len(draw.prompts), x.shape, t.shape)
        x, t = x.detach(), t.to(x.dtype)
        alpha, sigma = self.teacher.schedule.alpha_sigma(t)
        source = None
        if draw.source is not None:
            with torch.no_grad():
                source = (self.teacher.encode(draw.source).to(x.dtype), self.source_prompt)
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
            guidance=self.guidance,
            critic=self.critic,
            source=source,
            generator=generator,
        )

    def gradient(self, q: Query) -> Tensor:
        """g = W N d, (B, C, H, W), detached; the gradient on x is g / B.

        Raises:
            NonFiniteGradient: naming method, step and the first t where it happened. On a GPU nobody looks here, since
                looking would wait: the loop finds it in the loss, when the step has been told.
        """
        with torch.no_grad():
            d = self.method(q)
            assert d.shape == q.x.shape, (d.shape, q.x.shape)
            w = weight(self.weight, q.alpha, q.sigma)  # (B,)
            g = (w.view(-1, *[1] * (d.dim() - 1)) * d).to(q.x.dtype)
        if not g.is_cuda and not bool(g.isfinite().all()):
            bad = int((~g.isfinite()).flatten(1).any(1).nonzero()[0, 0])
            cause = "the teacher's answer or the weight is not finite"
            if not bool(q.x[bad].isfinite().all()):
                cause = "the student's own image is not finite"
            raise NonFiniteGradient(self.name, q.step, float(q.t[bad]), cause)
        return g


def surrogate(x: Tensor, g: Tensor) -> Tensor:
    """The scalar whose gradient on x (B, C, H, W) is g / B."""
    return 0.5 * (x - (x - g).detach()).square().sum() / len(x)


def _metrics(g: Tensor, times: list[float]) -> dict[str, float | Tensor]:
    norms = g.flatten(1).norm(dim=1).unbind()  # left where they are: asking a GPU for a number would wait
    metrics = {"g_norm": sum(norms) / len(norms), "t": sum(times) / len(times)}
    bins: dict[int, list[Tensor]] = {}
    for norm, time in zip(norms, times, strict=True):
        bins.setdefault(min(int(time * T_BINS), T_BINS - 1), []).append(norm)
    for i, members in sorted(bins.items()):
        metrics[f"g_norm/t{i / T_BINS:.1f}-{(i + 1) / T_BINS:.1f}"] = sum(members) / len(members)
    return metrics
