"""The noise levels of a pipeline, read from its scheduler's configuration.

A scheduler says two things: which noise the network was trained on, and how its own pipeline walks from noise to an
image. The first is read here. The second is of no consequence, since nobody walks with that scheduler. A field that is
neither is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sds3d.diffusion.noise import Schedule
from sds3d.teachers.hf.fields import KnownFields, refuse_unknown

KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names of what a network may output
BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
SHIFTS = ("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift")
SHIFTS += ("base_image_seq_len", "max_image_seq_len")
WALK = """
    algorithm_type clip_sample clip_sample_range corrector_order disable_corrector dynamic_thresholding_ratio
    euler_at_final final_sigmas_type flow_shift interpolation_type lambda_min_clipped lower_order_final
    original_inference_steps predict_x0 predictor_order sample_max_value set_alpha_to_one shift_terminal sigma_max
    sigma_min skip_prk_steps solver_order solver_p solver_type steps_offset stochastic_sampling tau_func thresholding
    timestep_scaling timestep_spacing upscale_mode use_beta_sigmas use_exponential_sigmas use_karras_sigmas
    use_lu_lambdas variance_type
"""
TABLE = KnownFields(
    handled=frozenset(BETAS),
    values={"prediction_type": (*KINDS,), "timestep_type": ("discrete",), "use_flow_sigmas": (False,)},
    unused=frozenset([*WALK.split(), "use_dynamic_shifting", "time_shift_type"]),
)
FLOW = KnownFields(
    handled=frozenset(SHIFTS),
    values={"time_shift_type": ("exponential", "linear"), "invert_sigmas": (False,)},
    unused=frozenset(WALK.split()),
)


@dataclass(frozen=True)
class Levels:
    """The noise levels a network was trained on.

    Args:
        schedule: of x_t.
        kind: of the network's output, one of `sds3d.diffusion.noise.KINDS`.
        count: of the levels; the network is told numbers from 0 to this.
        flow: whether it is told count * sigma, else count * t.
        shift: of a flow's schedule; None of other schedules.
    """

    schedule: Schedule
    kind: str
    count: int
    flow: bool = False
    shift: float | None = None

    def network_timesteps(self, t: Tensor) -> Tensor:
        """What the network is told at t (B,), (B,)."""
        return self.count * (self.schedule.alpha_sigma(t)[1] if self.flow else t)


def levels(scheduler: Any, patches: int) -> Levels:
    """What a scheduler's configuration says.

    Args:
        patches: the transformer's, of one image, on which a flow's shift may depend.

    Raises:
        ValueError: a scheduler of another kind, or one with a field that is not known here.
    """
    config = scheduler.config
    if "FlowMatch" in type(scheduler).__name__:
        refuse_unknown(scheduler, "the pipeline's scheduler", FLOW)
        shift = _shift(config, patches)
        return Levels(Schedule.flow(shift), "flow", config.num_train_timesteps, flow=True, shift=shift)
    kind = config.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "alphas_cumprod") or kind not in KINDS:
        raise ValueError(
            f"the pipeline's scheduler is a {type(scheduler).__name__} with prediction type {kind!r}; what can be used "
            f"has alphas_cumprod (DDIM, DDPM, Euler, PNDM ...) and predicts {', '.join(KINDS)}, or is of FlowMatch kind"
        )
    refuse_unknown(scheduler, "the pipeline's scheduler", TABLE)
    return Levels(Schedule.table(scheduler.alphas_cumprod), KINDS[kind], len(scheduler.alphas_cumprod))


def _shift(config: Any, patches: int) -> float:
    """A flow's shift; where it is dynamic it grows with the image, as diffusers' FluxPipeline has it."""
    if not config.get("use_dynamic_shifting"):
        return config.shift
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (patches - config.base_image_seq_len)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
