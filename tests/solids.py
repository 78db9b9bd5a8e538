"""Solids as densities and colours, put where a scene has its field, and rendered by the scene's own renderer."""

import torch

from sds3d import ops
from sds3d.export.source import Seen, Source
from sds3d.students.scene.occupancy import Occupancy, OccupancyConfig
from sds3d.students.scene.render import RenderOptions, render

RED, BLUE = (0.9, 0.1, 0.2), (0.1, 0.2, 0.8)


def solid(inside, edge=0.002):
    """A density of 300 where ``inside(points)`` is positive: 300 / (1 + exp(-inside / edge)).

    The edge is so hard that a ray loses half its light within 0.01 of it: the picture's outline is the solid's.
    """
    return lambda points: 300 * torch.sigmoid(inside(points) / edge)


def ball(centre=(0.0, 0.0, 0.0), radius=0.5):
    return lambda points: radius - (points - torch.tensor(centre)).norm(dim=-1)


def block(low, high):
    low, high = torch.tensor(low), torch.tensor(high)
    return lambda points: torch.minimum(points - low, high - points).min(-1).values


def ring(radius=0.5, thick=0.2):
    """A torus around y."""
    return lambda p: thick - torch.hypot(torch.hypot(p[:, 0], p[:, 2]) - radius, p[:, 1])


def tube(radius, low, high):
    """A cylinder along y."""
    return lambda p: torch.stack([radius - torch.hypot(p[:, 0], p[:, 2]), p[:, 1] - low, high - p[:, 1]]).min(0).values


def union(*parts):
    return lambda points: torch.stack([part(points) for part in parts]).max(0).values


def less(part, hole):
    return lambda points: torch.minimum(part(points), -hole(points))


def plain(colour=RED):
    return lambda points: torch.tensor(colour).expand(len(points), 3)


def halves(right=RED, left=BLUE):
    """One colour where x > 0, another elsewhere."""
    return lambda points: torch.where(points[:, :1] > 0, torch.tensor(right), torch.tensor(left))


class AnalyticField:
    """What `render` asks of a field."""

    width = None

    def __init__(self, density, colour):
        self.density, self.colour, self.backend = density, colour, ops.choose(torch.device("cpu"))

    def __call__(self, points):
        return self.density(points), self.colour(points)

    def normals(self, points):
        """Differences over 0.01, of the density's logarithm: it has the same direction, and an edge is no noise."""

        def logarithm(places):
            return self.density(places).clamp_min(1e-30).log()

        slopes = [logarithm(points + step) - logarithm(points - step) for step in 0.005 * torch.eye(3)]
        return -torch.nn.functional.normalize(torch.stack(slopes, -1), dim=-1)


def source(density, colour=None):
    """A scene to export."""
    colour = colour or plain()
    field, step = AnalyticField(density, colour), 2 / 96
    cells = Occupancy(OccupancyConfig(resolution=8), step)  # all of them: nothing is known to be empty

    @torch.no_grad()
    def view(cameras, size):
        out = render(field, cells, cameras, size, torch.ones(3), RenderOptions(step))
        return out.rgb, out.opacity

    @torch.no_grad()
    def shape(cameras, size):
        out = render(field, cells, cameras, size, torch.ones(3), RenderOptions(step, normals=True))
        return Seen(out.rgb, out.opacity, out.depth, out.normal)

    return Source(density, colour, view, shape)


def checks(points):
    """Three colours in cubes of 0.2."""
    number = (points / 0.2).floor().sum(-1, keepdim=True) % 3
    first, second = torch.tensor([0.95, 0.9, 0.2]), torch.tensor([0.1, 0.6, 0.3])
    return torch.where(number == 0, first, torch.where(number == 1, second, torch.tensor(BLUE)))


def shades(points):
    """A colour for every place."""
    return (points * 0.5 + 0.5).clamp(0, 1)


TWELVE = {  # different scenes: shape, colour
    "ball": (ball(), plain()),
    "two-coloured ball": (ball(radius=0.6), halves()),
    "cube": (block((-0.5,) * 3, (0.5,) * 3), checks),
    "torus": (ring(), shades),
    "cup": (less(tube(0.5, -0.5, 0.6), tube(0.4, -0.35, 1.0)), halves()),
    "stick": (tube(0.06, -0.8, 0.8), plain(BLUE)),
    "plate": (tube(0.8, -0.05, 0.05), shades),
    "snowman": (union(ball((0, -0.3, 0), 0.45), ball((0, 0.35, 0), 0.3)), plain((0.98, 0.98, 0.98))),
    "two balls": (union(ball((-0.5, 0, 0), 0.35), ball((0.5, 0, 0), 0.3)), halves()),
    "ring on a post": (
        union(ring(0.4, 0.1), tube(0.1, -0.8, 0.0), block((-0.5, -0.05, -0.05), (0.5, 0.05, 0.05))),
        checks,
    ),
    "reaches beyond the box": (block((-2.0, -0.4, -0.4), (2.0, 0.4, 0.4)), shades),
    "black table": (
        union(
            block((-0.7, 0.1, -0.5), (0.7, 0.25, 0.5)),
            *(block((x - 0.07, -0.6, z - 0.07), (x + 0.07, 0.15, z + 0.07)) for x in (-0.6, 0.6) for z in (-0.4, 0.4)),
        ),
        plain((0.0, 0.0, 0.0)),
    ),
}
