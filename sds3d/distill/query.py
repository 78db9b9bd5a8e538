"""What a method may ask about one noisy batch: the teacher's answers in any branch, and the critic's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sds3d import cameras as cam
from sds3d.cameras import Cameras
from sds3d.diffusion.guidance import Guidance, cfg, cfg_rescale, perp_neg
from sds3d.diffusion.noise import Prediction, per_sample
from sds3d.diffusion.samplers import ddim
from sds3d.prompts import VIEW_WORDS, view_negatives, with_view
from sds3d.runtime.transfer import onto
from sds3d.teachers.base import Teacher

BRANCHES = ("cond", "uncond", "negative", "spoilt", *VIEW_WORDS)
T_CLEAN = 0.02  # an inversion takes a clean image to be at this t already: below, no network says anything


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
        rng: of whatever noise a method adds.
        teacher_images: images in each of the teacher's forwards so far.
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
    teacher_images: list[int] = field(default_factory=list, repr=False)
    _answers: dict[str, Prediction] = field(default_factory=dict, repr=False)

    def at(self, x_t: Tensor) -> Query:
        """The same question about another x_t (B, C, H, W) at the same t, of which nothing has been answered yet."""
        return replace(self, x_t=x_t, _answers={})

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
        self.teacher_images.append(size * count)
        with torch.no_grad():
            both = self.teacher.predict(torch.cat([x_t] * count), torch.cat([t] * count), prompts, cameras, mask)
        return tuple(both[i * size : (i + 1) * size] for i in range(count))

    def guided(self, scale: float) -> Tensor:
        """The teacher's guided eps at (x_t, t), (B, C, H, W); a negative prompt takes the null prompt's place."""
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
        """The guided eps at another (x_t, t). At scale 1 only the prompt is asked, at 0 only ``base``."""
        views = list(VIEW_WORDS[:3]) if self.guidance.perp_neg and self._says_views() and scale not in (0, 1) else []
        branches = [b for b, asked in (("cond", scale != 0), (base, scale != 1)) if asked] + views
        found = self.answers(*branches) if cached else self.predict(x_t, t, *branches, prompt=prompt)
        if scale in (0, 1):
            return found[0].eps
        cond, uncond = found[0], found[1]
        if views:
            assert self.cameras is not None, "who says views has cameras"
            places = zip(self.cameras.azimuth.tolist(), self.cameras.elevation.tolist(), strict=True)
            weights = [view_negatives(*place) for place in places]
            each = onto(torch.tensor([[w[v] for w in weights] for v in views], dtype=x_t.dtype), x_t.device)
            eps = perp_neg(
                uncond.eps, cond.eps, torch.stack([p.eps for p in found[2:]]), self.guidance.perp_neg * each, scale
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
        clean = per_sample(alpha, self.x) * self.x
        *_, (_, _, x_t) = ddim(predict, clean, self.teacher.schedule, steps, eta, self.rng, start, t)
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
        if self.cameras is not None and self._says_views() and told:
            own = with_view(own, self.cameras)
        return [f"{p}, {self.negative}" for p in own] if branch == "spoilt" else own
