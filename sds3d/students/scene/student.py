"""A scene as a student: a few views a step, rendered from cameras drawn around it.

The loop (train.py) knows only `sds3d.students.base.Student`; previews, export and metrics know only
`sds3d.students.representation.Scene`, whose members never build a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as default
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from sds3d.cameras import CameraRanges, Cameras, Poses
from sds3d.ops import Backend, choose
from sds3d.prompts import COLOURS
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import STEPS, Within, shown
from sds3d.runtime.transfer import onto
from sds3d.students.base import Draw
from sds3d.students.optim import OptimConfig
from sds3d.students.representation import ALBEDO, SHADINGS, Shading, domain_image
from sds3d.students.scene.field import Field, FieldConfig, LearnedBackground
from sds3d.students.scene.occupancy import Occupancy, OccupancyConfig
from sds3d.students.scene.regularisers import RegulariserConfig, measure
from sds3d.students.scene.render import RenderOptions, RenderOut, Trace, render
from sds3d.students.scene.sample_budget import SampleBudget, rays_at_a_time
from sds3d.students.scene.turns import COLOURS as IN_COLOURS
from sds3d.students.scene.turns import DomainConfig

BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "grey": COLOURS["grey"], "black": COLOURS["black"]}

PIXELS = 2**26  # the largest number of pixels of a step's images: 256 images of 512 x 512

Prompts = Callable[[Cameras, str], list[str]]  # cameras (B), the background's name -> B prompts


@dataclass(frozen=True)
class RenderConfig:
    """Settings of a step's images.

    Args:
        views: images a step, one camera each.
        resolution: pixels a side; or a list of [step, pixels], in the order of the steps and from step 0 on, such as
            [[0,64],[2000,256],[5000,512]]. It starts coarse, so that empty space is known before fine renders.
        samples: sample steps along one side of the box in training; each is 2 / samples long.
        fine_samples: the same for previews, videos and scores.
        background: a name known to the student ("white", ...), "#rrggbb", "learned", or "random", which
            draws one of the known names each step.
        other_share: with "random", the fraction of steps whose background is not the first known one.
        shading: "albedo", "lambertian", "textureless", or "mixed": albedo before step ``shading_start``, then a quarter
            albedo, half Lambertian, a quarter textureless.
        shading_start: first step of "mixed" shading.
        ambient: fraction of ambient light, 0 to 1.
        dark: samples with a transmittance below this have weight 0.
        chunk: rays rendered at a time; 0 chooses by the device's memory. A training render with more rays than this
            renders each chunk twice.
    """

    views: Annotated[int, Within(1, 256)] = 4
    resolution: int | tuple[tuple[int, int], ...] = 64
    samples: Annotated[int, Within(8, 1024)] = 32
    fine_samples: Annotated[int, Within(8, 1024)] = 96
    background: str = "white"
    other_share: Annotated[float, Within(0, 1)] = 0.5
    shading: str = "albedo"
    shading_start: Annotated[int, Within(0, STEPS)] = 100
    ambient: Annotated[float, Within(0, 1)] = 0.3
    dark: Annotated[float, Within(0, 1, above=True)] = 1e-3
    chunk: Annotated[int, Within(0, 2**30)] = 0

    def __post_init__(self):
        for name, low, high in (
            ("views", 1, 256),
            ("samples", 8, 1024),
            ("fine_samples", 8, 1024),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"render.{name} is {value}; give a number from {low} to {high}")
        self._check_resolution()
        for name in ("other_share", "ambient"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"render.{name} is {getattr(self, name)}; give a number from 0 to 1")
        if self.chunk < 0:
            raise ValueError(f"render.chunk is {self.chunk}; give a number of rays, or 0 to have it chosen")
        if not 0 < self.dark < 1:
            raise ValueError(f"render.dark is {self.dark}; give a transmittance between 0 and 1, such as 0.001")
        if self.shading not in (*SHADINGS, "mixed"):
            raise ValueError(f"render.shading is {self.shading!r}; give one of {', '.join(SHADINGS)}, mixed")

    def resolution_at(self, step: float) -> int:
        """Return the pixels a side of a step's images."""
        if isinstance(self.resolution, int):
            return self.resolution
        return next(pixels for since, pixels in reversed(self.resolution) if step >= since)

    def _check_resolution(self) -> None:
        stages = ((0, self.resolution),) if isinstance(self.resolution, int) else self.resolution
        steps = [step for step, _ in stages]
        if steps[:1] != [0] or steps != sorted({*steps}):
            raise ValueError(
                f"render.resolution is {shown(self.resolution)}; give pixels, or [step, pixels] with growing steps "
                "from 0 on, such as [[0,64],[2000,256],[5000,512]]"
            )
        for _, pixels in stages:
            if not 4 <= pixels <= 1024:
                raise ValueError(f"render.resolution is {shown(pixels)}; give a number from 4 to 1024")
        most = max(pixels for _, pixels in stages)
        if steps[-1] > STEPS:
            raise ValueError(f"render.resolution has a stage from step {shown(steps[-1])}; give steps up to {STEPS}")
        if self.views * most**2 > PIXELS:
            raise ValueError(
                f"render.views={self.views} of {most} pixels a side are {self.views * most**2:.2g} pixels a step; at "
                f"most {PIXELS:.2g} are taken: lower render.views or render.resolution"
            )


@dataclass(frozen=True)
class SceneConfig:
    """All settings of a scene."""

    field: FieldConfig = default(default_factory=FieldConfig)
    occupancy: OccupancyConfig = default(default_factory=OccupancyConfig)
    render: RenderConfig = default(default_factory=RenderConfig)
    camera: CameraRanges = default(default_factory=CameraRanges)
    domains: DomainConfig = default(default_factory=DomainConfig)
    regularise: RegulariserConfig = default(default_factory=RegulariserConfig)

    def __post_init__(self):
        self.regularise.check(self.field.kind)


class SceneStudent(nn.Module):
    """A hash-grid scene that draws stratified views of itself.

    Args:
        config: sizes, cameras, rendering, regularisers.
        rng: CPU generator of the initial values.
        prompts: function from a draw's cameras and the name of its background to the draw's prompts.
        backgrounds: name -> RGB in [0, 1] of the known plain backgrounds; the first one is the default.
        backend: kernels; None chooses for the device.
        device: where parameters and images live.

    Attributes:
        OPTIM: the default learning rates. The hash table needs a tiny eps, since most of its gradients are tiny.
        background_name: name of the last draw's background: a key of ``backgrounds``, "#rrggbb" or "learned".

    Raises:
        ValueError: the background is not known.
    """

    OPTIM: ClassVar[OptimConfig] = OptimConfig(
        {"grid": Ramp.constant(1e-2), "mlp": Ramp.constant(1e-3), "background": Ramp.constant(1e-3)}, eps=1e-15
    )

    def __init__(
        self,
        config: SceneConfig,
        rng: torch.Generator,
        prompts: Prompts = lambda cameras, background: [""] * len(cameras),
        backgrounds: Mapping[str, tuple[float, float, float]] | None = None,
        backend: Backend | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.config, self.prompts, self.device = config, prompts, torch.device(device)
        self.field = Field(config.field, backend or choose(self.device), rng)
        self.occupancy = Occupancy(config.occupancy, 2 / config.render.samples)
        self.learned = LearnedBackground() if config.render.background == "learned" else None
        self.backgrounds = {name: torch.tensor(rgb) for name, rgb in (backgrounds or BACKGROUNDS).items()}
        wanted = config.render.background
        if wanted.startswith("#"):
            self.backgrounds[wanted] = _hex_colour(wanted)
        elif wanted not in ("learned", "random", *self.backgrounds):
            known = ", ".join(self.backgrounds)
            raise ValueError(f"render.background is {wanted!r}; give one of {known}, #rrggbb, learned, random")
        self.background_name = next(iter(self.backgrounds)) if wanted == "random" else wanted
        self._chunk = config.render.chunk or rays_at_a_time(
            self.device, config.render.samples, self.field.spec.width, config.field.hidden
        )
        self._rooms: dict[int, SampleBudget] = {}  # pixels a side -> budget
        self._trace: Trace | None = None
        self._active: set[str] = set()
        self._noise = rng
        self.to(self.device)
        self.occupancy.update(self.field, 0, rng)

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """Render this step's views, with gradients."""
        settings = self.config.render
        self.field.open(step)
        cameras = self.config.camera.sample(settings.views, rng)
        domain = self.config.domains.at(step)
        in_colours = domain in IN_COLOURS
        self.background_name = self._choose_background(rng) if in_colours else self._default_background()
        shading = self._shading(step, cameras, rng) if in_colours else ALBEDO
        self._active, self._noise = self.config.regularise.active(step), rng
        resolution = self.config.domains.resolution_at(domain, settings.resolution_at(step))
        room = self._rooms.setdefault(resolution, SampleBudget())
        ask = self._asks()
        options = RenderOptions(
            2 / settings.samples,
            shading,
            domain == "normals" or "orientation" in self._active,
            settings.dark,
            self._chunk,
            None if ask else room.rows(),
        )
        out = render(
            self.field, self.occupancy, cameras.to(self.device), resolution,
            self._background(self.background_name), options, rng,
        )  # fmt: skip
        self._trace = out.trace
        if not ask and out.trace is not None:  # a critic's draws have no trace
            room.saw(out.trace.samples)
        group = torch.zeros(settings.views, dtype=torch.long)
        images = domain_image(out, cameras.to(self.device), domain)
        prompts, weight = self.prompts(cameras, self.background_name), self.config.domains.weight(domain)
        return Draw(images, prompts, cameras, group, domain=domain, weight=weight)

    def regularisers(self) -> dict[str, Tensor]:
        """Return the last draw's regularisers whose weight is not 0, unweighted, and the mean opacity, detached."""
        assert self._trace is not None, "regularisers come after a draw"
        measured = measure(self._active, self.field, self._trace, self._noise)
        return measured | {"opacity": self._trace.opacity.detach().mean()}

    def param_groups(self) -> dict[str, list[Parameter]]:
        """Return the groups "grid", "mlp" and "background", which is empty unless the background is learned."""
        f = self.field
        background = [] if self.learned is None else list(self.learned.parameters())
        return {"grid": [f.table], "mlp": [f.w1, f.b1, f.w2, f.b2], "background": background}

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Update the occupancy grid if an update is due."""
        self._trace = None
        self.occupancy.update(self.field, step + 1, rng)

    @property
    def kernels(self) -> str:
        """See `sds3d.students.representation.Scene`."""
        return str(self.field.backend)

    @property
    def detail(self) -> float:
        """The size of a cell of the finest level, in scene units."""
        return 2 / self.config.field.finest

    @property
    def surface_density(self) -> float | None:
        """The density where the signed distance is 0; None for a field of kind "density"."""
        width = self.field.width
        return None if width is None else 0.5 / width.item()

    def learn_backgrounds(self, backgrounds: Mapping[str, Tensor], /) -> None:
        """Add plain backgrounds, name -> RGB (3,) in [0, 1], to those that this scene knows."""
        self.backgrounds |= backgrounds

    @torch.no_grad()
    def render_view(
        self,
        cameras: Cameras | Poses,
        resolution: int | None = None,
        shading: Shading = ALBEDO,
        normals: bool = False,
        background: str | None = None,
    ) -> RenderOut:
        """Render views deterministically, without gradients.

        Args:
            cameras: any number of views; the memory is that of one chunk of rays.
            resolution: height in pixels; None is that of the last training steps.
            shading, normals: as in RenderOptions.
            background: a known name or "#rrggbb"; None is the run's default.
        """
        if background is None:
            background = self._default_background()
        behind = self._background(background)
        size = self.config.render.resolution_at(math.inf) if resolution is None else resolution
        chunk = self._chunk if self.device.type == "cuda" else min(self._chunk, RenderOptions.chunk)
        options = RenderOptions(2 / self.config.render.fine_samples, shading, normals, self.config.render.dark, chunk)
        return render(self.field, self.occupancy, cameras.to(self.device), size, behind, options)

    @torch.no_grad()
    def density(self, points: Tensor) -> Tensor:
        """Return the densities (N,) that a render sees at points (N, 3): 0 outside the box and in empty cells."""
        points = points.to(self.device)
        density = torch.zeros(len(points), device=self.device)
        kept = torch.nonzero((points.abs().amax(-1) <= 1) & self.occupancy.at(points))[:, 0]
        for some in kept.split(65536):
            density[some] = self.field.density(points[some])
        return density

    @torch.no_grad()
    def colours(self, points: Tensor) -> Tensor:
        """Return colours (N, 3) in [0, 1] at points (N, 3), which are clamped to the box."""
        parts = [self.field(part.clamp(-1, 1))[1] for part in points.to(self.device).split(65536)]
        return torch.cat(parts) if parts else points.new_zeros(0, 3)

    def _asks(self) -> bool:
        """Return whether a render counts its samples first: on a GPU only if the run must be repeatable."""
        return self.device.type != "cuda" or torch.are_deterministic_algorithms_enabled()

    def _choose_background(self, rng: torch.Generator) -> str:
        """Return the name of this step's background."""
        settings, names = self.config.render, list(self.backgrounds)
        if settings.background != "random":
            return settings.background
        chance, which = torch.rand(2, generator=rng).tolist()
        if chance >= settings.other_share or len(names) == 1:
            return names[0]
        return names[1 + int(which * (len(names) - 1))]

    def _default_background(self) -> str:
        """Return the name of the background of a view that is given none."""
        wanted = self.config.render.background
        return next(iter(self.backgrounds)) if wanted == "random" else wanted

    def _background(self, name: str) -> Tensor | nn.Module:
        """Return the named background as `render` takes it."""
        if name == "learned":
            assert self.learned is not None, "this scene has no learned background"
            return self.learned
        return onto(_hex_colour(name) if name.startswith("#") else self.backgrounds[name], self.device)

    def _shading(self, step: int, cameras: Cameras, rng: torch.Generator) -> Shading:
        """Return this step's shading, with a random light near each view's camera."""
        settings, kind = self.config.render, self.config.render.shading
        if kind == "mixed":
            place = torch.rand(1, generator=rng).item()
            kind = "albedo" if step < settings.shading_start or place < 0.25 else "lambertian"
            kind = "textureless" if step >= settings.shading_start and place >= 0.75 else kind
        if kind == "albedo":
            return ALBEDO
        light = F.normalize(cameras.positions(), dim=-1) + 0.5 * torch.randn(len(cameras), 3, generator=rng)
        return Shading(kind, light, settings.ambient)


def _hex_colour(text: str) -> Tensor:
    """Return the RGB (3,) of "#rrggbb"."""
    try:
        values = bytes.fromhex(text[1:])
    except ValueError:
        values = b""
    if len(values) != 3:
        raise ValueError(f"render.background is {text!r}; give # and six hexadecimal digits, such as #ffffff")
    return torch.tensor(list(values)) / 255
