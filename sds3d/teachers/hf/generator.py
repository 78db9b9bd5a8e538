"""A one-step generator that started from a diffusers pipeline: when it is asked, and the pipeline that it becomes.

A network of noise levels gets diffusers' LCMScheduler, whose step is

    x0 = x0_theta(x_t, t)        and, where steps are left,        x_s = alpha_s x0 + sigma_s z

at the last of the levels it is given, begun with z itself (its boundary scalings are made 1 and 0 by a large
timestep_scaling). It is given the network's own levels up to the first that the generator is asked at. A flow gets the
FlowMatchEulerDiscreteScheduler with stochastic_sampling, which does the same from sigma = 1 down to its shift_terminal.
Both ship with diffusers: what is saved runs no code of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sds3d.files import from_json, read_text, replacing_folder
from sds3d.teachers.hf.families import Family
from sds3d.teachers.hf.levels import Levels

if TYPE_CHECKING:
    from sds3d.teachers.hf.teacher import DiffusersTeacher

CARD = "generator.json"  # in the pipeline's folder: what diffusers does not ask for
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def scheduler(family: Family, levels: Levels, first: float, steps: int) -> Any:
    """A diffusers scheduler that asks first at the level nearest to t = ``first``, in so many steps.

    A flow begins at pure noise, whatever ``first`` is.
    """
    import diffusers

    if levels.flow:
        shift = levels.schedule.shift
        last = shift / (steps + shift - 1) if steps > 1 else None  # sigma at t = 1 / steps
        return diffusers.FlowMatchEulerDiscreteScheduler(
            levels.count, shift, shift_terminal=last, stochastic_sampling=True
        )
    most = levels.count // steps
    each = min(max(round((first * levels.count + 1) / steps), 2), most)  # levels a step; LCM has none at level 0
    alpha, _ = levels.schedule.alpha_sigma(torch.arange(each * steps, dtype=torch.float64) / levels.count)
    squares = torch.cat([torch.ones(1, dtype=torch.float64), alpha**2])
    told = {"num_train_timesteps": each * steps, "original_inference_steps": steps, "timestep_scaling": 1e6}
    told |= {"trained_betas": (1 - squares[1:] / squares[:-1]).tolist(), "prediction_type": NAMES[levels.kind]}
    found = diffusers.LCMScheduler(**told, steps_offset=1)
    found.register_to_config(**family.SCHEDULER)
    return found


def times(family: Family, levels: Levels, asking: Any, steps: int) -> Tensor:
    """The t (steps,) float64 at which a generator's scheduler asks a network of these levels.

    Raises:
        ValueError: it cannot take so few steps.
    """
    family.ask(asking, steps)
    if not levels.flow:
        return asking.timesteps.double() / levels.count
    sigma = asking.sigmas[:-1].double()
    if not bool(sigma.isfinite().all()):
        raise ValueError(f"this generator's scheduler cannot do with {steps} step(s); leave steps out")
    return levels.schedule.t_of_ratio(sigma / (1 - sigma))


def times_of(levels: Levels, numbers: Tensor) -> Tensor:
    """The t (K,) float64 of the numbers (K,) that a network of these levels is told: CARD's "times"."""
    found = numbers / levels.count
    return levels.schedule.t_of_ratio(found / (1 - found)) if levels.flow else found


def read(folder: Path) -> dict[str, Any]:
    """What CARD says in a generator's pipeline. Raises ValueError where it is damaged: something is missing, or is not
    of the kind that `save` writes."""
    try:
        card = from_json(read_text(folder / CARD))
        if not isinstance(card, dict):
            raise ValueError("it is no object")
        for key in ("generator", "teacher", "method", "steps", "prompts", "call"):
            if not isinstance(card.get(key), str):
                raise ValueError(f"{key} is {card.get(key)!r}, and should be text")
        if not isinstance(card.get("hf"), dict):
            raise ValueError(f"hf is {card.get('hf')!r}, and should be settings")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CARD} is damaged ({error}); train the generator again") from error
    return card


def _as_float32(config_file: Path) -> None:
    """Let a text encoder load in float32 where nobody says a dtype, as diffusers' own parts do, or they do not fit."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2), encoding="utf-8")


def save(teacher: DiffusersTeacher, state: dict[str, Tensor], when: Tensor, told: dict[str, Any], path: Path) -> None:
    """Write the teacher's pipeline with other weights and a generator's scheduler, in the teacher's precision.

    Args:
        state: the weights of a network of the teacher's form.
        when: the t (K,) at which the generator is asked.
        told: what CARD says beside how it is called.

    Raises:
        ValueError: the teacher's files are gone, or the disk is full; what was at ``path`` stays.
    """
    from safetensors import SafetensorError

    family, side = teacher.family, teacher.shape[-1]
    state = {name: value.detach().to("cpu", teacher.dtype).contiguous() for name, value in state.items()}
    config = dict(family.network.config)
    family.adapt(config, state, side)
    with torch.device("meta"):
        network = type(family.network).from_config(config)
    added = {name: torch.zeros(like.shape, dtype=teacher.dtype) for name, like in network.state_dict().items()}
    network.load_state_dict({**added, **state}, assign=True)
    asking = scheduler(family, teacher.levels, float(when[0]), len(when))
    hf = {"size": family.settings.size, "embedded_guidance": family.settings.embedded_guidance}
    told = {**told, "call": family.call(len(when), teacher.image_size), "hf": hf}
    with replacing_folder(path) as folder, teacher.whole() as pipe:
        pipe.register_modules(**{family.PART: network, "scheduler": asking})
        try:
            pipe.save_pretrained(folder)
        except SafetensorError as error:
            raise ValueError(f"cannot write {path}: {error}; make room, or name another place (out=FOLDER)") from error
        for config_file in (file for name in family.ENCODERS for file in folder.glob(f"{name}/config.json")):
            _as_float32(config_file)
        (folder / CARD).write_text(json.dumps(told, indent=1), encoding="utf-8")
