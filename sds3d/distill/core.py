"""The distillation core: turns a teacher's predictions on noised images into a gradient on the images.

A method returns a direction d in eps units, shape of x. The core does the rest (DreamFusion, arXiv 2209.14988, eq. 3,
is the case d = eps_teacher - eps):

    x_t  = alpha x + sigma eps                            # t from the timestep sampler, one t for each group
    g    = stop_grad(W(t) N d)                            # weight W by name, normaliser N (1 unless a method has one),
                                                          # times the draw's weight
    loss = 0.5 |x - stop_grad(x - g)|^2 / B               # summed over a sample, mean over the batch

The gradient on x is g / B. The value of the loss has no meaning. The teacher is never differentiated.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sds3d.diffusion.guidance import Guidance
from sds3d.diffusion.noise import Prediction, noised, per_sample
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.query import Critic, Query
from sds3d.distill.weights import weight
from sds3d.domains import SURFACE
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.transfer import onto
from sds3d.students.base import Draw
from sds3d.teachers.base import Teacher, answerer

NOISES = ("fresh", "fixed")
T_BINS = 5  # |g| is reported for this many equal intervals of t in [0, 1]


class Method:
    """A distillation method: a frozen dataclass of hyper-parameters.

    Attributes:
        NEEDS: what the method requires, of "critic", "negative" (a negative prompt), "source" (images to edit), "pairs"
            (noise and the teacher's sample from it; such a method has a guidance ``scale`` and a weight ``regression``)
            and "real" (real images). A run adds the objectives that use them.
        DENOISER: whether a generator trained with the method still denoises at every t, as its teacher does. Such a
            generator can be the teacher of another run.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ()
    DENOISER: ClassVar[bool] = False


class ScoreMethod(Method):
    """A score-distillation method. Its call returns a direction, which `ScoreObjective` turns into a loss.

    Attributes:
        WEIGHT: the default of W(t), one of ``distill.weights.WEIGHTS``.
    """

    WEIGHT: ClassVar[str] = "sigma2"

    def __call__(self, q: Query) -> Tensor:
        """Return the direction d = eps_teacher - eps_reference, (B, C, H, W), in eps units."""
        raise NotImplementedError

    def normaliser(self, q: Query) -> Tensor | float:
        """Return N, a number or (B,)."""
        return 1.0

    def unused_negative(self) -> str:
        """Return why a negative prompt has no effect with these settings, and what to do; "" if it has an effect."""
        return ""


class ScoreDifference(ScoreMethod):
    """The teacher's guided score minus the critic's, d = eps_s - eps_phi: the gradient of a KL divergence.

    VSD, Diff-Instruct and DMD are subclasses. They differ in W, in N and in how they draw t. A subclass has a
    guidance ``scale``.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("critic",)
    scale: Ramp | float

    def __post_init__(self):
        require_scale(self, "scale")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        """See `ScoreMethod`."""
        return q.guided(scale_of(self.scale, q.step)) - q.critic_eps()


def scale_of(value: Ramp | float, step: int) -> float:
    """Return a guidance scale at a step."""
    return Ramp.parse(value)(step)


def require_scale(method: Method, *names: str) -> None:
    """Raise ValueError if one of the method's settings ``names`` is below 0 at some step."""
    for name in names:
        ramp = Ramp.parse(getattr(method, name))
        if min(ramp.v0, ramp.v1) < 0:
            raise ValueError(f"{type(method).__name__}'s {name} is {getattr(method, name)}; give at least 0")


def image_normaliser(q: Query, scale: float, floor: float) -> Tensor:
    """Return 1 / mean |x - x0_s| over each sample, (B,): it equalises |g| over images (DMD, arXiv 2311.18828, eq. 8).

    Args:
        scale: guidance scale of x0_s, the teacher's denoised image.
        floor: lower bound of the mean.
    """
    x0 = Prediction(q.guided(scale), q.x_t, q.alpha, q.sigma, "eps").x0
    return 1 / (q.x - x0).abs().flatten(1).mean(1).clamp_min(floor)


@dataclass
class ObjectiveResult:
    """What an objective returns in one step.

    Args:
        loss: scalar. For a score method only its gradient has a meaning.
        metrics: values to log, by name.
    """

    loss: Tensor
    metrics: dict[str, float | Tensor]


@dataclass
class ScoreResult(ObjectiveResult):
    """What a score method's objective returns in one step.

    Args:
        metrics: "g_norm" (mean over the batch of |g|), "t" (mean), "asked" (images in the teacher's forwards), and
            "g_norm/t0.2-0.4" and so on for each interval of t in the batch.
        query: the step's query; ``query.answers("cond")[0].x0`` is the teacher's denoised image.
    """

    query: Query


class NonFiniteGradient(ArithmeticError):
    """A gradient is not finite. The run must stop before it updates the student."""

    def __init__(self, method: str, step: int, t: float, cause: str):
        self.method, self.step, self.t = method, step, t
        super().__init__(
            f"{method}: non-finite gradient at step {step}, t = {t:.4g}: {cause}: "
            "lower the learning rate or the guidance scale"
        )


@dataclass
class ScoreObjective:
    """The loss of a score method: adds noise, weight, a check for finiteness, detaching and reduction to it.

    Args:
        teacher: predicts on the noised images.
        method: returns the direction.
        time: draws t.
        weight: name of W, one of ``distill.weights.WEIGHTS``, or "auto" for the method's default.
        negative: negative prompt, "" for none.
        uncond_camera: see ``Query``.
        noise: "fresh" noise in every step, or "fixed" noise for the whole run.
        guidance: see ``Query``.
        critic: see ``Query``.
        source_prompt: prompt of the source images, for methods that edit.
        noise_seed: seed of fixed noise.
        surface_scale: see ``Query``.
        surface_time: draws t in the domains of the surface; None is ``time``.

    Raises:
        ValueError: weight or noise is unknown, the teacher cannot read a prompt, or something the method needs is
            missing.
    """

    teacher: Teacher
    method: ScoreMethod
    time: TimestepSampler
    weight: str = "auto"
    negative: str = ""
    uncond_camera: bool = False
    noise: str = "fresh"
    guidance: Guidance = Guidance()
    critic: Critic | None = None
    source_prompt: str = ""
    noise_seed: int = 0
    surface_scale: float = 1.0
    surface_time: TimestepSampler | None = None

    def __post_init__(self):
        self.weight = self.method.WEIGHT if self.weight == "auto" else self.weight
        weight(self.weight, torch.ones(1), torch.ones(1))
        for prompt in filter(None, (self.negative, self.source_prompt)):
            self.teacher.check(prompt)
        if self.noise not in NOISES:
            raise ValueError(f"noise is {self.noise!r}; give {' or '.join(NOISES)}")
        given = {"critic": self.critic is not None, "negative": self.negative, "source": self.source_prompt}
        remedies = {
            "critic": "a critic: give critic.kind=lora or copy",
            "negative": "a negative prompt: give negative='low quality' or other words the teacher knows",
            "source": "a source: give source.prompt and source.run, the images to edit",
        }
        for need in self.method.NEEDS:
            if not given.get(need, True):
                raise ValueError(f"{self.name} needs {remedies[need]}")
        unused = self.method.unused_negative() if self.negative else ""
        if unused:
            warnings.warn(f"the negative prompt changes nothing: {unused}", stacklevel=2)

    @property
    def name(self) -> str:
        """Name of the method's class."""
        return type(self.method).__name__

    def __call__(self, draw: Draw, step: int, rng: torch.Generator) -> ScoreResult:
        """Return the loss on a draw's images. ``rng`` draws t and the noise.

        Raises:
            NonFiniteGradient: g is not finite.
        """
        x = draw.x(answerer(self.teacher, draw.domain).encode)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        t = self.time_of(draw, step, rng)
        noise_rng = rng if self.noise == "fresh" else torch.Generator().manual_seed(self.noise_seed)
        noise = onto(draw.processes.randn(x.shape, noise_rng, x.dtype), x.device)
        query = self.query(draw, x, onto(t, x.device), noise, step, rng)
        g = draw.weight * self.gradient(query)
        return ScoreResult(surrogate(x, g), _metrics(g, t.tolist()) | {"asked": sum(query.teacher_images)}, query)

    def time_of(self, draw: Draw, step: int, rng: torch.Generator) -> Tensor:
        """Draw t (B,) for a draw's images."""
        group, processes = draw.group, draw.processes
        groups = torch.cat([group + i * (int(group.max()) + 1) for i in range(processes.world_size)])  # of all ranks
        schedule = answerer(self.teacher, draw.domain).schedule
        time = self.surface_time if self.surface_time and draw.domain in SURFACE else self.time
        return processes.rows(time.draw(step, groups, rng, schedule))

    def query(
        self,
        draw: Draw,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        step: int = 0,
        rng: torch.Generator | None = None,
    ) -> Query:
        """Return the query for clean x (B, C, H, W) noised with ``noise`` (B, C, H, W) at t (B,)."""
        assert len(draw.prompts) == len(x) == len(t), (len(draw.prompts), x.shape, t.shape)
        x, t, teacher = x.detach(), t.to(x.dtype), answerer(self.teacher, draw.domain)
        alpha, sigma = teacher.schedule.alpha_sigma(t)
        source = None
        if draw.source is not None:
            with torch.no_grad():
                source = (teacher.encode(draw.source).to(x.dtype), self.source_prompt)
        return Query(
            teacher=teacher,
            x=x,
            x_t=noised(x, noise, alpha, sigma),
            noise=noise,
            t=t,
            alpha=alpha,
            sigma=sigma,
            prompts=draw.prompts,
            cameras=draw.cameras,
            domain=draw.domain,
            surface_scale=self.surface_scale,
            negative=self.negative,
            uncond_camera=self.uncond_camera,
            step=step,
            guidance=self.guidance,
            critic=self.critic,
            source=source,
            rng=rng,
        )

    def gradient(self, q: Query) -> Tensor:
        """Return g = W N d, (B, C, H, W), detached. The gradient on x is g / B.

        Raises:
            NonFiniteGradient: g is not finite; names the method, the step and t of the first such sample. On a GPU
                there is no check here, since it would synchronise. The training loop checks the logged loss instead.
        """
        with torch.no_grad():
            d = self.method(q)
            assert d.shape == q.x.shape, (d.shape, q.x.shape)
            w = weight(self.weight, q.alpha, q.sigma) * self.method.normaliser(q)  # (B,)
            g = (per_sample(w, d) * d).to(q.x.dtype)
        if not g.is_cuda and not bool(g.isfinite().all()):
            bad = int((~g.isfinite()).flatten(1).any(1).nonzero()[0, 0])
            cause = "the teacher's prediction or the weight is not finite"
            if not bool(q.x[bad].isfinite().all()):
                cause = "the student's own image is not finite"
            raise NonFiniteGradient(self.name, q.step, float(q.t[bad]), cause)
        return g


def surrogate(x: Tensor, g: Tensor) -> Tensor:
    """Return a scalar whose gradient on x (B, C, H, W) is g / B."""
    return 0.5 * (x - (x - g).detach()).square().sum() / len(x)


def _metrics(g: Tensor, times: list[float]) -> dict[str, float | Tensor]:
    norms = g.flatten(1).norm(dim=1)  # stay on their device: reading a number from a GPU would synchronise
    bins = torch.tensor([min(int(time * T_BINS), T_BINS - 1) for time in times])
    occupied = bins.unique()
    members = (bins == occupied[:, None]).to(norms.dtype)
    means = onto(members / members.sum(1, keepdim=True), norms.device) @ norms
    metrics = {"g_norm": norms.mean(), "t": sum(times) / len(times)}
    for i, mean in zip(occupied.tolist(), means.unbind(), strict=True):
        metrics[f"g_norm/t{i / T_BINS:.1f}-{(i + 1) / T_BINS:.1f}"] = mean
    return metrics
