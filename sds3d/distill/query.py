"""The query that a method gets: the teacher's and the critic's predictions on one noised batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sds3d import cameras as cam
from sds3d.cameras import Cameras
from sds3d.diffusion.guidance import Guidance, cfg, cfg_rescale, perp_neg
from sds3d.diffusion.noise import Prediction, per_sample
from sds3d.diffusion.samplers.ddim import ddim
from sds3d.domains import SURFACE, with_domain
from sds3d.prompts import VIEW_WORDS, view_negatives, with_view
from sds3d.runtime.transfer import onto
from sds3d.teachers.base import Teacher

BRANCHES = ("cond", "uncond", "negative", "spoilt", *VIEW_WORDS)
T_CLEAN = 0.02  # t from which an inversion starts; networks predict poorly below


class Critic(Protocol):
    """The score of the student's images, see critics.py."""

    def predict(
        self, x_t: Tensor, t: Tensor, prompts: list[str], cameras: Cameras | None, camera_mask: Tensor | None
    ) -> Prediction:
        """As ``Teacher.predict``, for the distribution of the student's images."""
        ...


@dataclass
class Query:
    """One noised batch, on which a method evaluates teacher and critic.

    A branch is a choice of prompt and camera for the teacher; see ``eps``.

    Args:
        teacher: predicts.
        x: (B, C, H, W), clean, detached.
        x_t: (B, C, H, W).
        noise: (B, C, H, W), the eps in x_t.
        t, alpha, sigma: (B,).
        prompts: B prompts, without the words of a view or a domain.
        cameras: B cameras, or None.
        negative: the negative prompt, "" for none.
        uncond_camera: whether the branches "uncond" and "negative" get the camera (or the view words).
        step: step of the run, for settings that change with it.
        guidance: Perp-Neg and rescaling.
        critic: the critic, for methods that need one.
        source: for methods that edit: the source images (B, C, H, W) and their prompt.
        rng: generator of noise that a method adds.
        domain: what the images show, a key of `sds3d.domains.WORDS`; every branch has its word.
        surface_scale: guidance scale in the domains of the surface, normals and depths, in place of the method's: a
            scale above 1 makes colours purer, and surfaces wrong.
        teacher_images: number of images in each of the teacher's forwards so far.
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
    rng: torch.Generator | None = None
    domain: str = "colours"
    surface_scale: float = 1.0
    teacher_images: list[int] = field(default_factory=list, repr=False)
    _answers: dict[str, Prediction] = field(default_factory=dict, repr=False)

    def at(self, x_t: Tensor) -> Query:
        """Return a query for another x_t (B, C, H, W) at the same t. Predictions for this x_t are not reused."""
        return replace(self, x_t=x_t, _answers={})

    def eps(self, *branches: str) -> tuple[Tensor, ...]:
        """Return the teacher's eps at (x_t, t) for each branch, (B, C, H, W) each.

        "cond" is the prompt, "uncond" the null prompt, "negative" the negative prompt, "spoilt" the prompt followed by
        the negative prompt, and "front view" and so on the prompt followed by these view words. Branches that were not
        evaluated before are evaluated in one batched forward.

        Raises:
            ValueError: a branch is unknown, or needs a negative prompt and there is none.
        """
        return tuple(answer.eps for answer in self.answers(*branches))

    def answers(self, *branches: str) -> tuple[Prediction, ...]:
        """As ``eps``, but return the predictions."""
        missing = [b for b in dict.fromkeys(branches) if b not in self._answers]
        if missing:
            self._answers.update(zip(missing, self.predict(self.x_t, self.t, *missing), strict=True))
        return tuple(self._answers[b] for b in branches)

    def predict(self, x_t: Tensor, t: Tensor, *branches: str, prompt: str | None = None) -> tuple[Prediction, ...]:
        """Return the teacher's predictions for each branch at any (x_t (B, C, H, W), t (B,)), in one batched forward.

        Args:
            prompt: replaces the prompts of all B images.
        """
        size, count = len(x_t), len(branches)
        prompts = [text for branch in branches for text in self._prompts(branch, prompt)]
        cameras = mask = None
        if self.cameras is not None and self.teacher.views == "camera":
            cameras = cam.cat([self.cameras] * count)
            keep_camera = [branch in ("cond", "spoilt") or self.uncond_camera for branch in branches]
            mask = onto(torch.tensor(keep_camera).repeat_interleave(size), x_t.device)
        self.teacher_images.append(size * count)
        with torch.no_grad():
            batch = self.teacher.predict(torch.cat([x_t] * count), torch.cat([t] * count), prompts, cameras, mask)
        return tuple(batch[i * size : (i + 1) * size] for i in range(count))

    def scale(self, scale: float) -> float:
        """Return the guidance scale in this domain, given the method's: the surface has its own."""
        return self.surface_scale if self.domain in SURFACE else scale

    def guided(self, scale: float) -> Tensor:
        """Return the teacher's guided eps at (x_t, t), (B, C, H, W). A negative prompt replaces the null prompt."""
        scale = self.scale(scale)
        return self.guided_at(self.x_t, self.t, scale, base="negative" if self.negative else "uncond", cached=True)

    def guided_at(
        self,
        x_t: Tensor,
        t: Tensor,
        scale: float,
        base: str = "uncond",
        prompt: str | None = None,
        cached: bool = False,
    ) -> Tensor:
        """Return the guided eps at any (x_t, t): base + scale (cond - base).

        At scale 1 only the branch "cond" is evaluated, at scale 0 only the branch ``base``.

        Args:
            prompt: see ``predict``.
            cached: reuse and store predictions, as ``answers`` does; for this query's own (x_t, t) only.
        """
        views = (
            list(VIEW_WORDS[:3]) if self.guidance.perp_neg and self._uses_view_words() and scale not in (0, 1) else []
        )
        branches = [branch for branch, needed in (("cond", scale != 0), (base, scale != 1)) if needed] + views
        predictions = self.answers(*branches) if cached else self.predict(x_t, t, *branches, prompt=prompt)
        if scale in (0, 1):
            return predictions[0].eps
        cond, uncond, *negatives = predictions
        if views:
            assert self.cameras is not None, "view words come from cameras"
            angles = zip(self.cameras.azimuth.tolist(), self.cameras.elevation.tolist(), strict=True)
            by_camera = [view_negatives(*pair) for pair in angles]
            weights = onto(torch.tensor([[w[v] for w in by_camera] for v in views], dtype=x_t.dtype), x_t.device)
            eps = perp_neg(
                uncond.eps,
                cond.eps,
                torch.stack([p.eps for p in negatives]),
                self.guidance.perp_neg * weights,
                scale,
            )
        else:
            eps = cfg(uncond.eps, cond.eps, scale)
        if not self.guidance.rescale:
            return eps
        levels = cond.alpha, cond.sigma
        guided = Prediction(eps, x_t, *levels, "eps", cond.rates)
        kind = "x0" if self.guidance.rescale_on == "x0" else cond.kind
        value = cfg_rescale(getattr(guided, kind), getattr(cond, kind), self.guidance.rescale)
        return Prediction(value, x_t, *levels, kind, cond.rates).eps

    def inverted(self, t: Tensor, steps: int, scale: float, eta: float = 0.0) -> Tensor:
        """Return x noised to t (B,) by DDIM inversion with guidance ``scale``, (B, C, H, W).

        Args:
            steps: number of steps, of equal length in t.
            eta: amount of fresh noise, see `samplers.ddim`.
        """

        def predict(x_s: Tensor, s: Tensor) -> Prediction:
            alpha, sigma = self.teacher.schedule.alpha_sigma(s)
            return Prediction(self.guided_at(x_s, s, scale), x_s, alpha, sigma, "eps")

        start = torch.full_like(t, T_CLEAN).minimum(t)
        alpha, _ = self.teacher.schedule.alpha_sigma(start)
        clean = per_sample(alpha, self.x) * self.x
        *_, (_, _, x_t) = ddim(predict, clean, self.teacher.schedule, steps, eta, self.rng, start, t)
        return x_t

    def critic_eps(self) -> Tensor:
        """Return the critic's eps at (x_t, t) for prompt and camera, without gradient, (B, C, H, W).

        Raises:
            ValueError: there is no critic.
        """
        if self.critic is None:
            raise ValueError("this method needs a critic and got none; give one with critic.kind=lora or copy")
        with torch.no_grad():
            return self.critic.predict(self.x_t, self.t, self._prompts("cond"), self.cameras, None).eps

    def _uses_view_words(self) -> bool:
        return self.cameras is not None and self.teacher.views == "words"

    def _prompts(self, branch: str, prompt: str | None = None) -> list[str]:
        """Return the B prompts of a branch, with view words if the teacher gets the view in words."""
        return with_domain(self._prompts_in_colours(branch, prompt), self.domain)

    def _prompts_in_colours(self, branch: str, prompt: str | None) -> list[str]:
        """Return what ``_prompts`` returns, without the word of the domain."""
        if branch not in BRANCHES:
            raise ValueError(f"unknown branch {branch!r}; accepted: {', '.join(BRANCHES)}")
        if branch in ("negative", "spoilt") and not self.negative:
            raise ValueError("this method needs a negative prompt and got none; give one with negative=...")
        prompts = self.prompts if prompt is None else [prompt] * len(self.x)
        if branch in VIEW_WORDS:
            return [f"{p}, {branch}" for p in prompts]
        if branch in ("uncond", "negative"):
            prompts = [self.negative if branch == "negative" else ""] * len(self.x)
        keep_camera = branch in ("cond", "spoilt") or self.uncond_camera
        if self.cameras is not None and self._uses_view_words() and keep_camera:
            prompts = with_view(prompts, self.cameras)
        return [f"{p}, {self.negative}" for p in prompts] if branch == "spoilt" else prompts
