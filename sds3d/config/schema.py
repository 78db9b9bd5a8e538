"""The settings of each kind of run, as nested dataclasses. `sds3d.config.load` fills them from YAML and flags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from sds3d import ops
from sds3d.cameras import CameraRanges
from sds3d.config.typed import nearest
from sds3d.diffusion.guidance import Guidance
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.core import ScoreMethod
from sds3d.distill.critics import CriticConfig
from sds3d.distill.pairs import PairsConfig
from sds3d.distill.perceptual import DISTANCES
from sds3d.distill.score.diffinstruct import DiffInstruct
from sds3d.distill.score.sds import SDS
from sds3d.export.settings import MeshConfig
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import STEPS, Within, shown
from sds3d.runtime.validation import check
from sds3d.students.generator import FewStepGenerator, GeneratorConfig
from sds3d.students.image import ImageConfig, ImageStudent
from sds3d.students.scene.field import FieldConfig
from sds3d.students.scene.occupancy import OccupancyConfig
from sds3d.students.scene.regularisers import RegulariserConfig
from sds3d.students.scene.student import RenderConfig, SceneStudent
from sds3d.students.scene.turns import DomainConfig
from sds3d.teachers.base import TeacherConfig
from sds3d.train import OptimConfig, Plan


@dataclass(frozen=True)
class LogConfig:
    """
    Args:
        save_every: steps between checkpoints.
        picture_every: steps between progress pictures, 0 for none.
    """

    save_every: Annotated[int, Within(1, STEPS)] = 100
    picture_every: Annotated[int, Within(0, STEPS)] = 50


@dataclass(frozen=True)
class ExportConfig:
    """
    Args:
        frames, size, elevation: of the turntable; pixels, degrees. ``size`` is the preview's, too.
    """

    mesh: MeshConfig = MeshConfig()
    frames: Annotated[int, Within(2, 10_000)] = 48
    size: Annotated[int, Within(16, 2048)] = 128
    elevation: Annotated[float, Within(-90, 90)] = 15.0

    def __post_init__(self):
        check(self, "export")
        if self.size % 2:
            raise ValueError(f"export.size is {self.size}; give an even number from 16 to 2048")


@dataclass(frozen=True)
class SourceConfig:
    """What an edit starts from.

    Args:
        prompt: what the source shows.
        run: the run folder of a scene to edit; images begin from image.start.
    """

    prompt: str = ""
    run: str = ""


@dataclass(frozen=True)
class RunConfig:
    """The settings that every kind of run has.

    Args:
        prompt: what to make.
        negative: what not to make; "" for nothing.
        seed: seed of every random draw.
        steps: number of training steps.
        device: "auto", "cpu", "cuda" ...
        deterministic: on a GPU, use algorithms that give the same bits every time, which costs time (a warning names
            operations that have none); a CPU always does.
        out: folder for run folders.
        method: a method of distill.METHODS; in YAML its name and its fields.
        weight: W(t), one of distill.weights.WEIGHTS; "auto" is the method's own.
        uncond_camera: whether the teacher sees the camera together with the null and negative prompts.
        noise: "fresh" every step, or "fixed", the same for every step (some methods compute their own, by inversion).
        guidance: Perp-Neg and CFG rescale, beside the method's own scale.
        time: the timestep sampler.
        critic: the network that learns the student's score, for methods that need it.
        source: what is edited, for methods that edit.

    Raises:
        ValueError: the prompt is empty, or a number is out of range.
    """

    MAKES: ClassVar[str]  # what a run makes: "scene", "images" or "generator"
    NEEDS_PROMPT: ClassVar[bool] = True

    prompt: str
    negative: str = ""
    seed: Annotated[int, Within(0, 2**62 - 1)] = 0
    steps: Annotated[int, Within(1, STEPS)] = 400
    device: str = "auto"
    deterministic: bool = False
    out: str = "outputs"
    teacher: TeacherConfig = TeacherConfig()
    method: Any = SDS()
    weight: str = "auto"
    uncond_camera: bool = False
    noise: str = "fresh"
    guidance: Guidance = Guidance()
    critic: CriticConfig = CriticConfig()
    source: SourceConfig = SourceConfig()
    time: TimestepSampler = dataclasses.field(
        default_factory=lambda: TimestepSampler(Ramp.constant(0.087), Ramp(0, 0.951, 0.5, 300))
    )
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    log: LogConfig = LogConfig()

    def __post_init__(self):
        if not self.prompt.strip() and self.NEEDS_PROMPT:
            raise ValueError('the prompt is empty; say what to make, as in: sds3d generate "a red mug"')
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {shown(self.seed)}; give 0 or more, below 2^62")
        self.plan()
        check(self)

    def plan(self) -> Plan:
        """Return the settings of the training loop."""
        return Plan(self.steps, 2 * self.seed, {}, self.optim, self.log.save_every, self.log.picture_every)

    @property
    def particles(self) -> int:
        """Number of students that share the method's critic."""
        return getattr(self.method, "particles", 1)


@dataclass(frozen=True)
class Config(RunConfig):
    """The settings of a run that makes a scene.

    Args:
        backend: backend of the kernels, one of ops.BACKENDS.
    """

    MAKES: ClassVar[str] = "scene"

    optim: OptimConfig = SceneStudent.OPTIM
    backend: str = "auto"
    field: FieldConfig = FieldConfig()
    occupancy: OccupancyConfig = OccupancyConfig()
    render: RenderConfig = RenderConfig()
    camera: CameraRanges = CameraRanges()
    domains: DomainConfig = DomainConfig()
    regularise: RegulariserConfig = RegulariserConfig()
    export: ExportConfig = ExportConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.backend not in ops.BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; {nearest(self.backend, ops.BACKENDS)}")
        self.regularise.check(self.field.kind)
        self.domains.time(self.time)
        if self.render.views % self.camera.ring:
            raise ValueError(
                f"render.views is {self.render.views} and camera.ring {self.camera.ring}; give a multiple of the ring"
            )

    def plan(self) -> Plan:
        """Return the settings of the training loop, with the weights of the scene's regularisers."""
        return dataclasses.replace(super().plan(), lambdas=self.regularise.ramps())


@dataclass(frozen=True)
class PaintConfig(RunConfig):
    """The settings of a run that makes images without a scene."""

    MAKES: ClassVar[str] = "images"

    steps: Annotated[int, Within(1, STEPS)] = 200
    optim: OptimConfig = ImageStudent.OPTIM
    log: LogConfig = LogConfig(picture_every=25)
    image: ImageConfig = ImageConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.particles > 1:
            raise ValueError("method.particles counts scenes; for images give image.count")


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """The settings of a run that trains a few-step generator.

    Args:
        prompt: the only prompt to learn; "" for all prompts the teacher was trained on, or those of generator.prompts.
        generator: the student.
        pairs: for methods with a regression on pairs.
        distance: distance of that regression, one of perceptual.DISTANCES.
        real: real images for methods with a discriminator: "digits", or a folder of pictures captioned with the
            generator's prompts; "" is the digits for the teacher digits.
        fsdp: with several processes (torchrun), shard the trained weights, their gradients and Adam's moments over them
            (torch's fully_shard); false keeps all in each. It does not change a single process.
    """

    MAKES: ClassVar[str] = "generator"
    NEEDS_PROMPT: ClassVar[bool] = False  # "" means all prompts that the teacher knows

    prompt: str = ""
    steps: Annotated[int, Within(1, STEPS)] = 1000
    teacher: TeacherConfig = TeacherConfig("digits", views="words")
    method: Any = DiffInstruct()
    time: TimestepSampler = dataclasses.field(
        default_factory=lambda: TimestepSampler(Ramp.constant(0.02), Ramp.constant(0.98))
    )
    critic: CriticConfig = CriticConfig(kind="copy", lr=5e-4, betas=(0.0, 0.999))
    optim: OptimConfig = FewStepGenerator.OPTIM
    log: LogConfig = LogConfig(save_every=500, picture_every=250)
    generator: GeneratorConfig = GeneratorConfig()
    pairs: PairsConfig = PairsConfig()
    distance: str = "teacher"
    real: str = ""
    fsdp: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.method, ScoreMethod) and "critic" not in self.method.NEEDS:
            raise ValueError(
                f"{type(self.method).__name__} does not see what the generator draws, and would make it draw one image "
                "per prompt; give diffinstruct, vsd, dmd or dmd2"
            )
        if "real" in self.method.NEEDS and self.critic.kind != "copy":
            raise ValueError(f"critic.kind is {self.critic.kind}; the discriminator of DMD2 needs copy")
        if "pairs" in self.method.NEEDS and self.negative:
            name = type(self.method).__name__
            raise ValueError(f"negative is not used in {name}'s pairs; leave it out, or give dmd2 or diffinstruct")
        if self.particles > 1:
            raise ValueError("method.particles counts scenes; a generator draws generator.batch images")
        if self.source != SourceConfig():
            raise ValueError("source is what sds3d generate and paint edit; a generator edits nothing: leave it out")
        if self.critic.camera_drop != CriticConfig().camera_drop:
            raise ValueError("critic.camera_drop is about a scene's cameras; a generator has none: leave it out")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance is {self.distance!r}; give {', '.join(DISTANCES)}")
