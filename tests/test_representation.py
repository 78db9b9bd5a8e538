"""A scene that is no hash-grid density: what every representation can do is all that the rest of the package uses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sds3d.cameras import Cameras, orbit
from sds3d.config.load import load, parse_overrides, to_yaml
from sds3d.export import formats
from sds3d.runs.folder import Run
from sds3d.runs.scene import Asset
from sds3d.runtime.ramp import Ramp
from sds3d.students.base import Draw
from sds3d.students.edited_scene import EditedScene
from sds3d.students.optim import OptimConfig
from sds3d.students.render_layers import LAYERS, layers
from sds3d.students.representation import ALBEDO, Scene, Views


class Ball(nn.Module):
    """A ball of one colour, found on each ray by its quadratic equation: no field, no grid, no occupancy."""

    OPTIM = OptimConfig({"surface": Ramp.constant(1e-2)})
    kernels, detail, background_name = "a quadratic equation", 0.01, "white"
    device = torch.device("cpu")

    def __init__(self, radius=0.6, colour=(0.9, 0.1, 0.2)):
        super().__init__()
        self.radius, self.colour = nn.Parameter(torch.tensor(radius)), nn.Parameter(torch.tensor(colour))
        self.backgrounds = {"white": torch.ones(3)}

    def seen(self, cameras, resolution):
        origins, directions = cameras.rays(resolution)  # (B, H, W, 3)
        nearest = -(origins * directions).sum(-1, keepdim=True)
        inside = self.radius**2 - (origins + nearest * directions).square().sum(-1, keepdim=True)
        opacity = torch.sigmoid(inside / 0.005)
        depth = nearest - inside.clamp_min(0).sqrt()
        normal = F.normalize(origins + depth * directions, dim=-1) * opacity
        rgb = opacity * self.colour + 1 - opacity
        return Views(*(image.permute(0, 3, 1, 2) for image in (rgb, opacity, depth, normal)))

    def draw(self, step, rng):
        cameras = orbit(2)
        return Draw(self.seen(cameras, 16).rgb, ["a red ball"] * 2, cameras, torch.zeros(2, dtype=torch.long))

    def regularisers(self):
        return {"radius": self.radius.square()}

    def param_groups(self):
        return {"surface": [self.radius, self.colour]}

    def after_step(self, step, rng):
        pass

    surface_density = None

    def learn_backgrounds(self, backgrounds, /):
        self.backgrounds |= backgrounds

    @torch.no_grad()
    def render_view(self, cameras, resolution=None, shading=ALBEDO, normals=False, background=None):
        return self.seen(cameras, resolution or 16)

    @torch.no_grad()
    def density(self, points):
        return 300 * torch.sigmoid((self.radius - points.norm(dim=-1)) / 0.002)

    @torch.no_grad()
    def colours(self, points):
        return self.colour.expand(len(points), 3)


@pytest.fixture
def asset(tmp_path):
    config = load("a red ball", parse_overrides(["export.mesh.resolution=48", "export.size=32", "export.frames=2"]))
    return Asset(Run.create(tmp_path, config.prompt, to_yaml(config)), config, Ball())


def test_it_is_a_scene():
    assert isinstance(Ball(), Scene)
    assert not isinstance(nn.Linear(1, 1), Scene)


def test_it_is_shown(asset):
    assert asset.kernels == "cpu, a quadratic equation"
    assert asset.render(azimuth=30, resolution=32).size == (32, 32)
    found = layers(asset.scene, orbit(2), 24, LAYERS)
    assert set(found) == set(LAYERS) and all(image.shape == (2, 3, 24, 24) for image in found.values())
    assert not asset.doubt()


def test_it_is_exported_as_it_looks(asset):
    exporter = asset.exporter()
    report = exporter.write(asset.file("mesh.glb"))
    assert report["iou"] > 0.985 and report["psnr"] > 30 and report["watertight"] and not exporter.shortfalls()
    model = formats.read(asset.file("mesh.glb"))
    assert len(model.vertices) > 500
    assert asset.mesh().volume == pytest.approx(4 / 3 * torch.pi * 0.6**3, rel=0.03)


def test_it_is_edited_beside_what_it_was():
    edited = EditedScene(Ball(0.4), Ball(0.7))
    draw = edited.draw(0, torch.Generator())
    assert draw.images.requires_grad and not draw.source.requires_grad
    assert draw.source.mean() < draw.images.mean()  # the larger ball hides more of the white
    camera = Cameras(*(torch.tensor([value]) for value in (0.0, 15.0, 3.0, 40.0)))
    assert edited.source.render_view(camera).rgb.shape == (1, 3, 16, 16)
