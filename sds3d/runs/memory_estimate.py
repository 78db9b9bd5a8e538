"""Estimates the memory that making a scene takes, before any weights are loaded; see ``sds3d doctor --teacher``.

The teacher and its critic are built from a pipeline's settings files, with fake tensors that have shapes and no data.
They are really run: one prediction, one encoding with its backward pass, one fit of the critic.
`sds3d.runtime.memory.Meter` counts the bytes that each allocates. The scene is rendered at a small size, and its bytes
are counted per sample. Only two figures are assumed, not measured: ``KEPT_SAMPLES`` and ``RESERVE``.
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
from sds3d.runtime.memory import Meter, tensor_bytes, use_fake_tensors
from sds3d.students.base import Draw
from sds3d.students.representation import Shading
from sds3d.students.scene.field import FieldConfig
from sds3d.students.scene.render import RenderOptions, render
from sds3d.students.scene.sample_budget import CPU_BYTES, rays_within
from sds3d.students.scene.student import RenderConfig
from sds3d.teachers import small
from sds3d.teachers.base import NormalsConfig, TeacherConfig
from sds3d.teachers.load import load_teacher
from sds3d.teachers.small import SmallTeacher

GIB = 2**30
KEPT_SAMPLES = 0.25  # fraction of render.samples that a ray keeps: a half-trained house keeps 8 of 32, later 6
RESERVE = int(0.6 * GIB)  # a CUDA context with its libraries, or Python with its libraries
PROBE = 32  # pixels a side of the small render
PROMPT = "a red mug"  # memory does not depend on the prompt


@dataclass(frozen=True)
class Machine:
    """The GPU, or the host, that a run has to fit on.

    Args:
        name: its name, for display.
        size: its free memory in bytes.
        gpu: whether it is a GPU.
    """

    name: str
    size: int
    gpu: bool


@dataclass(frozen=True)
class Estimate:
    """The memory of a run, in bytes.

    Args:
        held: memory that is held from the first step to the last, by part.
        moments: further memory of each phase of a step, at its peak; the phases follow one another.
        before: total memory while prompts are embedded, before the first step.
        weights: the number of the network's weights, not bytes.
    """

    held: dict[str, int]
    moments: dict[str, int]
    before: int
    weights: int

    @property
    def peak(self) -> int:
        """The highest total at any time."""
        return max(self.before, sum(self.held.values()) + max(self.moments.values()))


@dataclass(frozen=True)
class FakeTeacher:
    """A teacher whose tensors have shapes and no data.

    Args:
        teacher: the teacher; call it inside ``mode``.
        modules: its networks by name.
        encoders: bytes of its text encoders, if they are released after prompts are embedded; else 0.
    """

    teacher: Trainable
    modules: dict[str, nn.Module]
    encoders: int
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each network."""
        return {name: tensor_bytes(part) for name, part in self.modules.items()}


def find_machine(device: str, gigabytes: float | None = None) -> Machine:
    """Return this machine's GPU or host, or a GPU of a given size.

    Raises:
        ValueError: this machine does not have the device, or the size is not positive.
    """
    if gigabytes is not None and not gigabytes > 0:
        raise ValueError(f"memory is {gigabytes}; give the GPU's size in GB, as 12")
    if gigabytes is not None and (device.startswith("cuda") or device == "auto"):
        return Machine(f"a GPU of {gigabytes:g} GB", int(gigabytes * GIB), True)
    picked = pick_device(device)
    if picked.type == "cuda":
        return Machine(torch.cuda.get_device_name(picked), torch.cuda.mem_get_info(picked)[0], True)
    if gigabytes is not None:
        return Machine(f"a machine of {gigabytes:g} GB", int(gigabytes * GIB), False)
    return Machine("this machine, without a GPU", _available(), False)


def _available() -> int:
    """Bytes of the host's memory that are free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration) as error:
        raise ValueError("this system does not say how much memory is free; give it in GB: --memory 16") from error


def estimate(config: Config, machine: Machine) -> Estimate:
    """Estimate the memory of a run.

    Raises:
        ValueError: the teacher cannot be found, or is not for this method.
    """
    build.require_kind(config)
    if config.teacher.normals.name:
        raise ValueError("memory is estimated with one teacher: leave teacher.normals.name out, and add its weights")
    teacher = dataclasses.replace(config.teacher, normals=NormalsConfig())
    dtype = dtype_of(teacher, machine)
    # The settings on which the network's memory depends, and those on which the VAE's does: fewer keys for the caches.
    for_network, for_vae = teacher, teacher
    if is_pipeline(teacher):
        for_vae = _with(teacher, attention_slicing=False, offload=False, cache="")
        for_network = _with(teacher, checkpointing=True, slicing=False, tiling=False, offload=False, cache="")
    fake, views = _fake_teacher(for_network, dtype), config.render.views
    try:
        scene_parts.check_teacher(config, fake.teacher)
    except ValueError as error:
        raise ValueError(f"memory is estimated for scenes only, and {error}") from error
    resolution = config.render.resolution_at(math.inf)  # the largest, usually
    kept, backward, forward = _encoding(for_vae, dtype, views, resolution)
    render, render_back = _render(config, machine)
    parts, answer = fake.parts, _answer(for_network, dtype, largest_batch(config))
    if teacher.hf.offload and machine.gpu:
        answer += parts.pop("network")
    fit = critic_answer = trained = 0
    if "critic" in config.method.NEEDS:
        if teacher.hf.offload:
            raise ValueError("a critic trains on the network, which teacher.hf.offload moves off the GPU; leave it out")
        trained, critic_answer, fit = _critic(for_network, dtype, config.critic, views)
        parts |= {"critic": trained, "critic's gradients and moments": 3 * trained}
        fit = max(fit, forward, trained if machine.gpu else 0)  # on a GPU, Adam's step makes one copy of the weights
    parts["scene with gradients and moments"] = _scene(config)
    moments = {
        "critic's fit": fit,
        "teacher's answer": render + kept + max(answer, critic_answer),
        "backward through the encoder": render + backward,
        "backward through the scene": render_back,
    }
    parts["reserve"] = RESERVE
    moments = {name: size for name, size in moments.items() if size}
    before = _embedding(fake, sum(fake.parts.values()) + trained + RESERVE, machine)
    return Estimate(parts, moments, before, sum(p.numel() for p in fake.modules["network"].parameters()))


def _embedding(fake: FakeTeacher, resident: int, machine: Machine) -> int:
    """Total bytes while prompts are embedded. On a GPU the network is moved out, and encoders only come if they fit."""
    if not machine.gpu:
        return resident + fake.encoders
    without_network = resident - fake.parts["network"]
    encoders_fit = without_network + 1.2 * fake.encoders < machine.size
    return without_network + (fake.encoders if encoders_fit else 0)


def dtype_of(teacher: TeacherConfig, machine: Machine) -> torch.dtype:
    """Return the dtype that a teacher computes in on a machine. A GPU that is only described has fast bfloat16."""
    if teacher.dtype != "auto":
        return getattr(torch, teacher.dtype)
    if machine.gpu:
        slow_bf16 = torch.cuda.is_available() and not small.fast_bf16(torch.device("cuda"))
        return torch.float32 if slow_bf16 else torch.bfloat16
    return small.pick_dtype(torch.device("cpu"))


def image_size(teacher: TeacherConfig, machine: Machine) -> int:
    """Return the width and height of a teacher's images in pixels."""
    return _fake_teacher(teacher, dtype_of(teacher, machine)).teacher.image_size


def _with(teacher: TeacherConfig, **changed: Any) -> TeacherConfig:
    """A teacher's config with other settings of its pipeline."""
    return dataclasses.replace(teacher, hf=dataclasses.replace(teacher.hf, **changed))


def _load(settings: TeacherConfig, dtype: torch.dtype) -> FakeTeacher:
    """A teacher whose weights are not fake yet: packaged ones are real, a pipeline's are on torch's meta device."""
    if is_pipeline(settings):
        from sds3d.teachers.hf import meta_teacher

        pipeline, encoders = meta_teacher.build_meta_teacher(settings, dtype)
        modules = {"network": pipeline.family.network, "VAE": pipeline.family.vae}
        present = {name: module for name, module in modules.items() if module is not None}
        return FakeTeacher(pipeline, present, tensor_bytes(*encoders))
    exact = dataclasses.replace(settings, dtype=str(dtype).removeprefix("torch."), compile=False)
    teacher = load_teacher(exact, "cpu")
    assert isinstance(teacher, SmallTeacher), type(teacher)
    return FakeTeacher(teacher, {"network": teacher.unet, "text encoder": teacher.text}, 0)


@cache
def _fake_teacher(settings: TeacherConfig, dtype: torch.dtype) -> FakeTeacher:
    fake = _load(settings, dtype)
    with fake.mode:
        for module in fake.modules.values():
            use_fake_tensors(module)
    return fake


@cache
def _answer(settings: TeacherConfig, dtype: torch.dtype, images: int) -> int:
    """Peak bytes of a teacher's prediction for a batch of images."""
    fake = _fake_teacher(settings, dtype)
    with fake.mode, Meter() as meter:
        fake.teacher.predict(*_noisy(fake, images))
    return meter.peak


@cache
def _encoding(settings: TeacherConfig, dtype: torch.dtype, views: int, resolution: int) -> tuple[int, int, int]:
    """Bytes of encoding images: kept for the backward pass, peak of both passes, peak of a forward without gradient."""
    fake = _fake_teacher(settings, dtype)
    with fake.mode:
        images = torch.zeros(views, 3, resolution, resolution, requires_grad=True)
        with Meter() as meter:
            x = fake.teacher.encode(images)
            kept = meter.live
            surrogate(x.float(), x.detach().float()).backward()
        with Meter() as forward, torch.no_grad():
            fake.teacher.encode(images)
    return kept, meter.peak, forward.peak


@cache
def _critic(settings: TeacherConfig, dtype: torch.dtype, config: CriticConfig, views: int) -> tuple[int, int, int]:
    """Bytes of a critic: its trained weights, the peak of its prediction, and the peak of its fit without weights."""
    fake = _load(settings, dtype)
    critic = TrainedCritic(fake.teacher, config, torch.Generator().manual_seed(0))
    with fake.mode:
        for module in (*fake.modules.values(), *critic.parts()):
            use_fake_tensors(module)
        x, t, prompts, cameras = _noisy(fake, views)
        with Meter() as answer, torch.no_grad():
            critic.predict(x, t, prompts, cameras, None)
        trained = sum(p.numel() * p.element_size() for p in critic.parameters())
        draw = Draw(x, prompts, cameras, torch.zeros(views, dtype=torch.long))
        with Meter() as fit:
            loss = critic.loss(draw, x, torch.Generator().manual_seed(0))
            forward = fit.peak
            loss.backward()
    return trained, answer.peak, max(forward, fit.peak - trained)  # the new gradients replace those that are counted


def _noisy(fake: FakeTeacher, images: int) -> tuple:
    """Arguments of a teacher's prediction for a batch of images: x_t, t, prompts, cameras."""
    cameras = Config(PROMPT).camera.sample(images, torch.Generator().manual_seed(0))
    known = getattr(fake.teacher, "vocabulary", None)
    prompt = PROMPT if known is None or set(PROMPT.split()) <= set(known) else min(known)
    x_t, t = torch.zeros(images, *fake.teacher.shape), torch.full((images,), 0.5)
    return x_t, t, [prompt] * images, cameras if fake.teacher.views == "camera" else None


class _ZeroTeacher:
    """A teacher, and a critic, that predicts zeros: used to count the images of each forward."""

    schedule, shape, image_size = Schedule.cosine(), (3, 8, 8), 8

    def __init__(self, views: str):
        self.views = views

    def encode(self, images: Tensor) -> Tensor:
        return images

    def check(self, prompt: str) -> None:
        pass

    def predict(self, x_t: Tensor, t: Tensor, *_: Any) -> Prediction:
        return Prediction(torch.zeros_like(x_t), x_t, *self.schedule.alpha_sigma(t), "eps")


def largest_batch(config: Config) -> int:
    """Return the number of images in the teacher's largest forward, at the run's first or last step.

    Raises:
        ValueError: the method lacks what it needs.
    """
    zero: Any = _ZeroTeacher(config.teacher.views)  # is both the teacher and the critic
    rng = torch.Generator().manual_seed(0)
    objective, views, counts = build.build_objective(config, zero, zero), config.render.views, []
    assert objective is not None, "a scene's methods have a score"
    for step in (0, config.steps - 1):
        cameras = config.camera.sample(views, rng)
        images = torch.full((views, *zero.shape), 0.5)
        group = torch.zeros(views, dtype=torch.long)
        draw = Draw(images, [config.prompt] * views, cameras, group, source=images if config.source.prompt else None)
        counts += objective(draw, step, rng).query.teacher_images
    return max(counts, default=0)


def _scene(config: Config) -> int:
    """Bytes of the scenes' tables, their gradients and Adam's moments."""
    table = 4 * config.field.grid().entries * config.field.features
    return table * (3 * config.particles + 1)  # only the particle that was drawn has gradients


def _render(config: Config, machine: Machine) -> tuple[int, int]:
    """Bytes of a step's render: kept for the backward pass, and the peak of both passes."""
    options, width = config.render, config.field.grid().width
    memory = machine.size // 4 if machine.gpu else CPU_BYTES
    rays, chunk = options.views * options.resolution_at(math.inf) ** 2, options.chunk
    chunk = chunk or rays_within(memory, options.samples, width, config.field.hidden)
    normals = options.shading != "albedo" or "orientation" in config.regularise.active(config.steps - 1)
    kept, peak = _probe(config.field, options.samples, options.shading, normals, min(1.0, chunk / rays))
    count = rays * options.samples * KEPT_SAMPLES
    return int(kept * count), int(peak * count)


@cache
def _probe(grid: FieldConfig, samples: int, shading: str, normals: bool, fraction: float) -> tuple[float, float]:
    """Bytes per sample of a small render that is done in chunks of this fraction of its rays: kept, and peak."""
    small_grid, rng = dataclasses.replace(grid, log2_table=10), torch.Generator().manual_seed(0)
    config = Config(PROMPT, device="cpu", field=small_grid, render=RenderConfig(samples=samples))
    scene, cameras = scene_parts.build_scene(config, rng), config.camera.sample(1, rng)
    kind = Shading("lambertian" if shading == "mixed" else shading)
    options = RenderOptions(2 / samples, kind, normals, chunk=max(1, int(fraction * PROBE**2)))
    with Meter() as meter:
        out = render(scene.field, scene.occupancy, cameras, PROBE, torch.ones(3), options, rng)
        assert out.trace is not None, "gradients are on"
        kept, count = meter.live, len(out.trace.samples.t)
        out.rgb.sum().backward()
    return kept / count, (meter.peak - tensor_bytes(scene.field)) / count
