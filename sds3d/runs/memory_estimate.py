"""How much memory making a scene will take, before anything is loaded: the numbers behind ``sds3d doctor --teacher``.

The teacher and its critic are built in shape only, from a pipeline's settings files, and really run: one answer, one
encoding and its way back, one fit. `sds3d.runtime.memory.Meter` counts what each makes, so that what a part takes is
what its code asks for, byte by byte. The scene is rendered small and what it took is counted per sample. Two figures
alone are taken to be so: ``RAY_SHARE`` and ``RESERVE``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sds3d.config.load import Config
from sds3d.diffusion.noise import Prediction, Schedule
from sds3d.distill.core import surrogate
from sds3d.distill.critics import CriticConfig, Trainable, TrainedCritic
from sds3d.runs import build, scene_parts
from sds3d.runs.memory_savings import is_pipeline
from sds3d.runtime.device import pick_device
from sds3d.runtime.memory import Meter, held, hollow
from sds3d.students.base import Draw
from sds3d.students.scene.field import FieldConfig
from sds3d.students.scene.render import RenderOptions, Shading, render
from sds3d.students.scene.sample_budget import CPU_BYTES, rays_within
from sds3d.students.scene.student import RenderConfig
from sds3d.teachers import small
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.load import load_teacher
from sds3d.teachers.small import SmallTeacher

GIB = 2**30
RAY_SHARE = 0.25  # of render.samples that a ray keeps: a house half grown has 8 of 32, later 6
RESERVE = int(0.6 * GIB)  # a CUDA context and what libraries keep, or Python with its libraries: not measured here
PROBE = 32  # pixels a side of the render that stands for the run's
PROMPT = "a red mug"  # whatever the prompt, it takes the same


@dataclass(frozen=True)
class Place:
    """What a run has to fit on.

    Args:
        name: for people.
        size: bytes there are for it.
        gpu: whether it is one.
    """

    name: str
    size: int
    gpu: bool


@dataclass(frozen=True)
class Estimate:
    """Bytes.

    Args:
        held: what stays from the first step to the last, by part.
        moments: what each moment of a step takes besides, at most; one comes after the other.
        before: in all while prompts are embedded, before the first step.
        weights: how many numbers the teacher's network has.
    """

    held: dict[str, int]
    moments: dict[str, int]
    before: int
    weights: int

    @property
    def peak(self) -> int:
        """The most at once."""
        return max(self.before, sum(self.held.values()) + max(self.moments.values()))


@dataclass(frozen=True)
class Judge:
    """A teacher in shape only.

    Args:
        teacher: answers inside ``mode``.
        modules: its parts.
        encoders: bytes of its text encoders, where they are let go.
    """

    teacher: Trainable
    modules: dict[str, nn.Module]
    encoders: int
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part."""
        return {name: held(part) for name, part in self.modules.items()}


def place(device: str, gigabytes: float | None = None) -> Place:
    """The GPU that is here, or the host's memory; or a GPU of a given size.

    Raises:
        ValueError: a device that is not here, or a size that is none.
    """
    if gigabytes is not None and not gigabytes > 0:
        raise ValueError(f"memory is {gigabytes}; give the GPU's size in GB, as 12")
    if gigabytes is not None and (device.startswith("cuda") or device == "auto"):
        return Place(f"a GPU of {gigabytes:g} GB", int(gigabytes * GIB), True)
    found = pick_device(device)
    if found.type == "cuda":
        return Place(torch.cuda.get_device_name(found), torch.cuda.mem_get_info(found)[0], True)
    if gigabytes is not None:
        return Place(f"a machine of {gigabytes:g} GB", int(gigabytes * GIB), False)
    return Place("this machine, without a GPU", _available(), False)


def _available() -> int:
    """Bytes of the host's memory that nobody uses."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration) as error:
        raise ValueError("this system does not say how much memory is free; give it in GB: --memory 16") from error


def estimate(config: Config, where: Place) -> Estimate:
    """What a run takes.

    Raises:
        ValueError: the teacher cannot be found, or is not for this method.
    """
    build.require_kind(config)
    teacher, dtype = config.teacher, dtype_of(config.teacher, where)
    bare, painter = teacher, teacher  # without settings that the network's, or the VAE's, memory does not depend on
    if is_pipeline(teacher):
        painter = _with(teacher, attention_slicing=False, offload=False, cache="")
        bare = _with(teacher, checkpointing=True, slicing=False, tiling=False, offload=False, cache="")
    judge, views = _judge(bare, dtype), config.render.views
    try:
        scene_parts.check_teacher(config, judge.teacher)
    except ValueError as error:
        raise ValueError(f"the memory that is estimated is a scene's, and {error}") from error
    resolution = config.render.resolution_at(math.inf)  # the largest, usually
    kept, backward, forward = _encoding(painter, dtype, views, resolution)
    render, render_back = _render(config, where)
    parts, answer = judge.parts, _answer(bare, dtype, images_asked(config))
    if teacher.hf.offload and where.gpu:
        answer += parts.pop("network")
    fit = said = trained = 0
    if "critic" in config.method.NEEDS:
        if teacher.hf.offload:
            raise ValueError("a critic trains on the network, which teacher.hf.offload keeps away; leave that out")
        trained, said, fit = _critic(bare, dtype, config.critic, views)
        parts |= {"critic": trained, "critic's gradients and moments": 3 * trained}
        fit = max(fit, forward, trained if where.gpu else 0)  # Adam's step over many weights at once has one copy
    parts["scene with gradients and moments"] = _scene(config)
    moments = {
        "critic's fit": fit,
        "teacher's answer": render + kept + max(answer, said),
        "backward through the encoder": render + backward,
        "backward through the scene": render_back,
    }
    parts["reserve"] = RESERVE
    moments = {name: size for name, size in moments.items() if size}
    before = _embedding(judge, sum(judge.parts.values()) + trained + RESERVE, where)
    return Estimate(parts, moments, before, sum(p.numel() for p in judge.modules["network"].parameters()))


def _embedding(judge: Judge, resident: int, where: Place) -> int:
    """Bytes while prompts are embedded: a GPU is left by the network, and spared encoders that do not fit."""
    if not where.gpu:
        return resident + judge.encoders
    taken = resident - judge.parts["network"]
    return taken + (judge.encoders if taken + 1.2 * judge.encoders < where.size else 0)


def dtype_of(teacher: TeacherConfig, where: Place) -> torch.dtype:
    """What the teacher computes in there. A GPU that is only spoken of has bfloat16."""
    if teacher.dtype != "auto":
        return getattr(torch, teacher.dtype)
    if where.gpu:
        here = torch.cuda.is_available() and not small.fast_bf16(torch.device("cuda"))
        return torch.float32 if here else torch.bfloat16
    return small.pick_dtype(torch.device("cpu"))


def image_size(teacher: TeacherConfig, where: Place) -> int:
    """What a teacher sees, pixels a side."""
    return _judge(teacher, dtype_of(teacher, where)).teacher.image_size


def _with(teacher: TeacherConfig, **changed: Any) -> TeacherConfig:
    """With other settings of a pipeline's."""
    return dataclasses.replace(teacher, hf=dataclasses.replace(teacher.hf, **changed))


def _load(settings: TeacherConfig, dtype: torch.dtype) -> Judge:
    """A teacher whose weights are not fake yet: read from the package, or on torch's meta device."""
    if is_pipeline(settings):
        from sds3d.teachers.hf import sketch

        drawn, encoders = sketch.build_meta_teacher(settings, dtype)
        found = {"network": drawn.family.network, "VAE": drawn.family.vae}
        return Judge(drawn, {name: part for name, part in found.items() if part is not None}, held(*encoders))
    exact = dataclasses.replace(settings, dtype=str(dtype).removeprefix("torch."), compile=False)
    teacher = load_teacher(exact, "cpu")
    assert isinstance(teacher, SmallTeacher), type(teacher)
    return Judge(teacher, {"network": teacher.unet, "text encoder": teacher.text}, 0)


@cache
def _judge(settings: TeacherConfig, dtype: torch.dtype) -> Judge:
    judge = _load(settings, dtype)
    with judge.mode:
        for part in judge.modules.values():
            hollow(part)
    return judge


@cache
def _answer(settings: TeacherConfig, dtype: torch.dtype, images: int) -> int:
    """Bytes that a teacher's answer about so many images makes, at most."""
    judge = _judge(settings, dtype)
    with judge.mode, Meter() as meter:
        judge.teacher.predict(*_noisy(judge, images))
    return meter.peak


@cache
def _encoding(settings: TeacherConfig, dtype: torch.dtype, views: int, resolution: int) -> tuple[int, int, int]:
    """Bytes of encoding images: what it keeps for its backward pass, both passes at most, and one without gradient."""
    judge = _judge(settings, dtype)
    with judge.mode:
        images = torch.zeros(views, 3, resolution, resolution, requires_grad=True)
        with Meter() as meter:
            x = judge.teacher.encode(images)
            kept = meter.live
            surrogate(x.float(), x.detach().float()).backward()
        with Meter() as alone, torch.no_grad():
            judge.teacher.encode(images)
    return kept, meter.peak, alone.peak


@cache
def _critic(settings: TeacherConfig, dtype: torch.dtype, config: CriticConfig, views: int) -> tuple[int, int, int]:
    """Bytes of a critic: what is trained, and, at most, what its answer and its fit make besides."""
    judge = _load(settings, dtype)
    critic = TrainedCritic(judge.teacher, config, torch.Generator().manual_seed(0))
    with judge.mode:
        for part in (*judge.modules.values(), *critic.parts()):
            hollow(part)
        x, t, prompts, cameras = _noisy(judge, views)
        with Meter() as answer, torch.no_grad():
            critic.predict(x, t, prompts, cameras, None)
        trained = sum(p.numel() * p.element_size() for p in critic.parameters())
        draw = Draw(x, prompts, cameras, torch.zeros(views, dtype=torch.long))
        with Meter() as fit:
            loss = critic.loss(draw, x, torch.Generator().manual_seed(0))
            forward = fit.peak
            loss.backward()
    return trained, answer.peak, max(forward, fit.peak - trained)  # old gradients go when new ones come


def _noisy(judge: Judge, images: int) -> tuple:
    """What a teacher is asked about so many images: x_t, t, prompts, cameras."""
    cameras = Config(PROMPT).camera.sample(images, torch.Generator().manual_seed(0))
    told = cameras if judge.teacher.views == "camera" else None
    known = getattr(judge.teacher, "vocabulary", None)
    prompt = PROMPT if known is None or set(PROMPT.split()) <= set(known) else min(known)
    return torch.zeros(images, *judge.teacher.shape), torch.full((images,), 0.5), [prompt] * images, told


class _Silent:
    """A teacher, and a critic, that has nothing to say: for counting what it is asked."""

    schedule, shape, image_size = Schedule.cosine(), (3, 8, 8), 8

    def __init__(self, views: str):
        self.views = views

    def encode(self, images: Tensor) -> Tensor:
        return images

    def check(self, prompt: str) -> None:
        pass

    def predict(self, x_t: Tensor, t: Tensor, *_: Any) -> Prediction:
        return Prediction(torch.zeros_like(x_t), x_t, *self.schedule.alpha_sigma(t), "eps")


def images_asked(config: Config) -> int:
    """Images in the largest of the teacher's forwards, at the run's first step or its last.

    Raises:
        ValueError: the method lacks what it needs.
    """
    mute: Any = _Silent(config.teacher.views)  # stands for both, as far as they are asked
    rng = torch.Generator().manual_seed(0)
    objective, views, asked = build.build_objective(config, mute, mute), config.render.views, []
    assert objective is not None, "a scene's methods have a score"
    for step in (0, config.steps - 1):
        cameras = config.camera.sample(views, rng)
        images = torch.full((views, *mute.shape), 0.5)
        group = torch.zeros(views, dtype=torch.long)
        draw = Draw(images, [config.prompt] * views, cameras, group, source=images if config.source.prompt else None)
        asked += objective(draw, step, rng).query.teacher_images
    return max(asked, default=0)


def _scene(config: Config) -> int:
    """Bytes of the scenes' tables, their gradients and Adam's moments."""
    table = 4 * config.field.grid().entries * config.field.features
    return table * (3 * config.particles + 1)  # only the particle that was drawn has gradients


def _render(config: Config, where: Place) -> tuple[int, int]:
    """Bytes of a step's render: what it keeps for its backward pass, and both passes at most."""
    told, width = config.render, config.field.grid().width
    memory = where.size // 4 if where.gpu else CPU_BYTES
    rays, chunk = told.views * told.resolution_at(math.inf) ** 2, told.chunk
    chunk = chunk or rays_within(memory, told.samples, width, config.field.hidden)
    normals = told.shading != "albedo" or "orientation" in config.regularise.active(config.steps - 1)
    kept, peak = _probe(config.field, told.samples, told.shading, normals, min(1.0, chunk / rays))
    count = rays * told.samples * RAY_SHARE
    return int(kept * count), int(peak * count)


@cache
def _probe(grid: FieldConfig, samples: int, shading: str, normals: bool, share: float) -> tuple[float, float]:
    """What a small render takes per sample, kept and at most, where so large a share of its rays goes at a time."""
    small_grid, rng = dataclasses.replace(grid, log2_table=10), torch.Generator().manual_seed(0)
    config = Config(PROMPT, device="cpu", field=small_grid, render=RenderConfig(samples=samples))
    scene, cameras = scene_parts.build_scene(config, rng), config.camera.sample(1, rng)
    kind = Shading("lambertian" if shading == "mixed" else shading)
    options = RenderOptions(2 / samples, kind, normals, chunk=max(1, int(share * PROBE**2)))
    with Meter() as meter:
        out = render(scene.field, scene.occupancy, cameras, PROBE, torch.ones(3), options, rng)
        assert out.trace is not None, "gradients are on"
        kept, count = meter.live, len(out.trace.samples.t)
        out.rgb.sum().backward()
    return kept / count, (meter.peak - held(scene.field)) / count
