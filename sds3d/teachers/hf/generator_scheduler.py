"""When a generator that started from a diffusers pipeline is called: the scheduler that its pipeline gets.

A network of noise levels gets diffusers' LCMScheduler, whose step is

    x0 = x0_theta(x_t, t)        and, where steps are left,        x_s = alpha_s x0 + sigma_s z

at the last of the levels it is given, begun with z itself (its boundary scalings are made 1 and 0 by a large
timestep_scaling). It is given the network's own levels up to the first that the generator is asked at. A flow gets the
FlowMatchEulerDiscreteScheduler with stochastic_sampling, which does the same from sigma = 1 down to its shift_terminal.
Both ship with diffusers: what is saved runs no code of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sds3d.teachers.hf.families import Family
from sds3d.teachers.hf.levels import Levels

NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def build_scheduler(family: Family, levels: Levels, first: float, steps: int) -> Any:
    """A diffusers scheduler that asks first at the level nearest to t = ``first``, in so many steps.

    A flow begins at pure noise, whatever ``first`` is.
    """
    import diffusers

    if levels.flow:
        shift = levels.shift
        assert shift is not None, "a flow has one"
        last = shift / (steps + shift - 1) if steps > 1 else None  # sigma at t = 1 / steps
        more: dict[str, Any] = {"shift_terminal": last, "stochastic_sampling": True}  # its types miss that None is none
        return diffusers.FlowMatchEulerDiscreteScheduler(levels.count, shift, **more)
    most = levels.count // steps
    each = min(max(round((first * levels.count + 1) / steps), 2), most)  # levels a step; LCM has none at level 0
    alpha, _ = levels.schedule.alpha_sigma(torch.arange(each * steps, dtype=torch.float64) / levels.count)
    squares = torch.cat([torch.ones(1, dtype=torch.float64), alpha**2])
    told = {"num_train_timesteps": each * steps, "original_inference_steps": steps, "timestep_scaling": 1e6}
    told |= {"trained_betas": (1 - squares[1:] / squares[:-1]).tolist(), "prediction_type": NAMES[levels.kind]}
    found = diffusers.LCMScheduler(**told, steps_offset=1)
    found.register_to_config(**family.SCHEDULER)
    return found


def scheduler_times(family: Family, levels: Levels, asking: Any, steps: int) -> Tensor:
    """The t (steps,) float64 at which a generator's scheduler asks a network of these levels.

    Raises:
        ValueError: it cannot take so few steps.
    """
    family.set_timesteps(asking, steps)
    if not levels.flow:
        return asking.timesteps.double() / levels.count
    sigma = asking.sigmas[:-1].double()
    if not bool(sigma.isfinite().all()):
        raise ValueError(f"this generator's scheduler cannot do with {steps} step(s); leave steps out")
    return levels.schedule.t_of_ratio(sigma / (1 - sigma))


def t_of_network_timesteps(levels: Levels, numbers: Tensor) -> Tensor:
    """The t (K,) float64 of the numbers (K,) that a network of these levels is told: CARD's "times"."""
    found = numbers / levels.count
    return levels.schedule.t_of_ratio(found / (1 - found)) if levels.flow else found
