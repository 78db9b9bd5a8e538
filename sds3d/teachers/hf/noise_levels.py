"""The noise levels of a pipeline, read from its scheduler's configuration.

The configuration describes the noise levels that the network was trained on, and the scheduler's own sampling. The
first is read here. The second is ignored, since the scheduler is never used for sampling. Other fields are refused by
name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sds3d.diffusion.noise import Schedule
from sds3d.teachers.hf.config_fields import KnownFields, refuse_unknown

KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' prediction types
BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
SHIFTS = ("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift")
SHIFTS += ("base_image_seq_len", "max_image_seq_len")
SAMPLING = """
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
    unused=frozenset([*SAMPLING.split(), "use_dynamic_shifting", "time_shift_type"]),
)
FLOW = KnownFields(
    handled=frozenset(SHIFTS),
    values={"time_shift_type": ("exponential", "linear"), "invert_sigmas": (False,)},
    unused=frozenset(SAMPLING.split()),
)


@dataclass(frozen=True)
class Levels:
    """The noise levels a network was trained on.

    Args:
        schedule: noise schedule.
        kind: what the network predicts, one of `sds3d.diffusion.noise.KINDS`.
        count: number of levels; the network's timesteps go from 0 to this.
        flow: whether the network's timestep is count * sigma; otherwise it is count * t.
        shift: shift of a flow's schedule, None for other schedules.
    """

    schedule: Schedule
    kind: str
    count: int
    flow: bool = False
    shift: float | None = None

    def network_timesteps(self, t: Tensor) -> Tensor:
        """Return the timesteps (B,) that the network takes as input at t (B,)."""
        return self.count * (self.schedule.alpha_sigma(t)[1] if self.flow else t)


def levels(scheduler: Any, patches: int) -> Levels:
    """Read the noise levels from a scheduler's configuration.

    Args:
        patches: number of patches of one image in the transformer; a flow's shift may depend on it.

    Raises:
        ValueError: the scheduler is of another kind, or has an unknown field.
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
    """Return a flow's shift. A dynamic shift grows with the image, as in diffusers' FluxPipeline."""
    if not config.get("use_dynamic_shifting"):
        return config.shift
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (patches - config.base_image_seq_len)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
