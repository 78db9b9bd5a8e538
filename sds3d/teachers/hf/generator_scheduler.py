"""The scheduler of a generator that was distilled from a diffusers pipeline.

A network with a table of noise levels gets diffusers' LCMScheduler, whose step is

    x0 = x0_theta(x_t, t)        and, if steps are left,        x_s = alpha_s x0 + sigma_s z

starting from noise z at the last of its levels. Its boundary scalings are set to 1 and 0 by a large timestep_scaling.
Its levels are the network's levels up to the first t of the generator. A flow gets the FlowMatchEulerDiscreteScheduler
with stochastic_sampling, which does the same from sigma = 1 down to its shift_terminal. Both schedulers are part of
diffusers, so a saved generator needs no code of sds3d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sds3d.teachers.hf.families import Family
from sds3d.teachers.hf.noise_levels import Levels

NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def build_scheduler(family: Family, levels: Levels, first: float, steps: int) -> Any:
    """Return a diffusers scheduler of ``steps`` steps that starts at the level nearest to t = ``first``.

    A flow starts at pure noise, whatever ``first`` is.
    """
    import diffusers

    if levels.flow:
        shift = levels.shift
        assert shift is not None, "the schedule of a flow has a shift"
        last = shift / (steps + shift - 1) if steps > 1 else None  # sigma at t = 1 / steps
        # Any, since the annotation of shift_terminal lacks None
        options: dict[str, Any] = {"shift_terminal": last, "stochastic_sampling": True}
        return diffusers.FlowMatchEulerDiscreteScheduler(levels.count, shift, **options)
    limit = levels.count // steps
    stride = min(max(round((first * levels.count + 1) / steps), 2), limit)  # levels a step; LCM has none at level 0
    alpha, _ = levels.schedule.alpha_sigma(torch.arange(stride * steps, dtype=torch.float64) / levels.count)
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha**2])
    config = {"num_train_timesteps": stride * steps, "original_inference_steps": steps, "timestep_scaling": 1e6}
    config |= {"trained_betas": (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist(), "prediction_type": NAMES[levels.kind]}
    scheduler = diffusers.LCMScheduler(**config, steps_offset=1)
    scheduler.register_to_config(**family.SCHEDULER)
    return scheduler


def scheduler_times(family: Family, levels: Levels, scheduler: Any, steps: int) -> Tensor:
    """Return the t (steps,) float64 of the steps of a generator's scheduler, for a network of these levels.

    Raises:
        ValueError: the scheduler cannot take so few steps.
    """
    family.set_timesteps(scheduler, steps)
    if not levels.flow:
        return scheduler.timesteps.double() / levels.count
    sigma = scheduler.sigmas[:-1].double()
    if not bool(sigma.isfinite().all()):
        raise ValueError(f"this generator's scheduler cannot do with {steps} step(s); leave steps out")
    return levels.schedule.t_of_ratio(sigma / (1 - sigma))


def t_of_network_timesteps(levels: Levels, timesteps: Tensor) -> Tensor:
    """Return t (K,) float64 of the network's timesteps (K,), the inverse of `Levels.network_timesteps`.

    The card of a generator stores such timesteps as "times".
    """
    fraction = timesteps / levels.count  # sigma for a flow, else t
    return levels.schedule.t_of_ratio(fraction / (1 - fraction)) if levels.flow else fraction
