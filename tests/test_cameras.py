"""Cameras against geometry worked out by hand."""

import math

import pytest
import torch

from sds3d.cameras import CameraRanges, Cameras, Poses, cat, orbit


def one(azimuth=0.0, elevation=0.0, distance=3.0, fov=40.0) -> Cameras:
    return Cameras(*(torch.tensor([v], dtype=torch.float64) for v in (azimuth, elevation, distance, fov)))


def project(camera: Cameras, points: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """World points (N, 3) -> pixel coordinates (N, 2) as (column, row), by the textbook pinhole camera.

    Built from a look-at matrix, not from ``Cameras.rotations``.
    """
    eye = camera.positions()[0]
    forward = -eye / eye.norm()
    right = torch.linalg.cross(forward, torch.tensor([0.0, 1.0, 0.0], dtype=eye.dtype))
    right = right / right.norm()
    up = torch.linalg.cross(right, forward)
    local = points - eye
    depth = local @ forward
    focal = height / 2 / math.tan(math.radians(camera.fov.item()) / 2)  # pixels
    return torch.stack([width / 2 + focal * (local @ right) / depth, height / 2 - focal * (local @ up) / depth], -1)


@pytest.mark.parametrize(
    "azimuth, elevation, where",
    [
        (0, 0, (0, 0, 1)),
        (90, 0, (1, 0, 0)),
        (180, 0, (0, 0, -1)),
        (270, 0, (-1, 0, 0)),
        (0, 90, (0, 1, 0)),
        (33, -90, (0, -1, 0)),
        (45, 0, (math.sqrt(0.5), 0, math.sqrt(0.5))),
        (0, 30, (0, 0.5, math.sqrt(0.75))),
    ],
)
def test_positions_by_hand(azimuth, elevation, where):
    position = one(azimuth, elevation, distance=2.5).positions()[0]
    torch.testing.assert_close(position, 2.5 * torch.tensor(where, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("azimuth, elevation", [(0, 0), (77, 35), (200, -60), (10, 90), (10, -90)])
def test_rotations_are_right_handed_and_look_at_the_origin(azimuth, elevation):
    camera = one(azimuth, elevation)
    rotation = camera.rotations()[0]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.linalg.det(rotation).item() == pytest.approx(1.0)
    torch.testing.assert_close(3 * rotation[:, 2], camera.positions()[0], atol=1e-12, rtol=0)
    assert rotation[1, 0].abs() < 1e-12  # no roll: right is level


@pytest.mark.parametrize("azimuth, elevation", [(0, 0), (123, 41), (271, -19), (305, 80)])
@pytest.mark.parametrize("height, width", [(8, 8), (6, 10)])
def test_every_ray_projects_back_to_its_pixel_centre(azimuth, elevation, height, width):
    camera = one(azimuth, elevation, distance=2.7, fov=50)
    origins, directions = camera.rays(height, width)
    assert origins.shape == directions.shape == (1, height, width, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(1, height, width, dtype=torch.float64))
    pixels = project(camera, (origins + 1.7 * directions).reshape(-1, 3), height, width)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    expected = torch.stack([columns.reshape(-1) + 0.5, rows.reshape(-1) + 0.5], -1).double()
    torch.testing.assert_close(pixels, expected, atol=1e-9, rtol=0)


def test_the_middle_ray_meets_the_origin():
    origins, directions = one(211, 33, distance=4).rays(5)
    torch.testing.assert_close(
        (origins + 4 * directions)[0, 2, 2], torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_left_right_up_down_as_an_onlooker_sees_them():
    """From the front +x is right; from azimuth 90 (standing on +x) the front, +z, is left; up is row 0."""

    def ray_nearest(camera, point):
        _, directions = camera.rays(9)
        wanted = torch.tensor(point, dtype=torch.float64) - camera.positions()[0]
        best = (directions[0] @ (wanted / wanted.norm())).argmax().item()
        return divmod(best, 9)  # (row, column)

    assert ray_nearest(one(0), (0.8, 0, 0)) == (4, 7)
    assert ray_nearest(one(90), (0, 0, 0.8)) == (4, 1)
    assert ray_nearest(one(180), (0.8, 0, 0)) == (4, 1)
    assert ray_nearest(one(0), (0, 0.8, 0)) == (1, 4)
    assert ray_nearest(one(0, 89.999), (0, 0, 0.8)) == (7, 4)  # from above, the front is below


def test_the_edge_of_the_field_of_view():
    """With fov 90 at distance 2, the image plane through the origin is 4 units tall."""
    origins, directions = one(0, 0, distance=2, fov=90).rays(4)
    hit = origins + directions * (-origins[..., 2:] / directions[..., 2:])  # on the plane z = 0
    torch.testing.assert_close(hit[0, :, 0, 1], torch.tensor([1.5, 0.5, -0.5, -1.5], dtype=torch.float64))
    torch.testing.assert_close(hit[0, 0, :, 0], torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64))


def test_orbit_goes_round_from_its_start():
    cameras = orbit(4, elevation=10, distance=2.5, fov=35, start=350)
    torch.testing.assert_close(cameras.azimuth, torch.tensor([350.0, 80.0, 170.0, 260.0]))
    assert set(cameras.elevation.tolist()) == {10.0} and set(cameras.distance.tolist()) == {2.5}
    with pytest.raises(ValueError, match="at least 1"):
        orbit(0)


def test_selecting_and_joining():
    cameras = orbit(5)
    assert cameras[2].azimuth.tolist() == [144.0] and cameras[-1].azimuth.tolist() == [288.0]
    assert cat([cameras[:2], cameras[2:]]).azimuth.tolist() == cameras.azimuth.tolist()
    assert cameras[cameras.azimuth > 200].azimuth.tolist() == [216.0, 288.0]


@pytest.mark.parametrize("seed", range(5))
def test_sampling_is_stratified_in_azimuth_and_elevation(seed):
    ranges = CameraRanges(azimuth=(-60, 100), elevation=(-20, 60), distance=(2, 3), fov=(30, 50))
    n = 8
    cameras = ranges.sample(n, torch.Generator().manual_seed(seed))
    azimuth = torch.where(cameras.azimuth > 180, cameras.azimuth - 360, cameras.azimuth)
    assert ((azimuth + 60) / 160 * n).floor().long().sort().values.tolist() == list(range(n))
    assert ((cameras.elevation + 20) / 80 * n).floor().long().sort().values.tolist() == list(range(n))
    assert ((cameras.distance >= 2) & (cameras.distance <= 3)).all()
    assert ((cameras.fov >= 30) & (cameras.fov <= 50)).all()


def test_a_full_circle_is_cut_at_a_random_place_and_covered_evenly():
    generator = torch.Generator().manual_seed(0)
    draws = [CameraRanges().sample(4, generator) for _ in range(500)]
    for cameras in draws[:50]:
        azimuth = cameras.azimuth.sort().values
        gaps = torch.cat([azimuth[1:] - azimuth[:-1], azimuth[:1] + 360 - azimuth[-1:]])
        assert gaps.max() < 180  # neighbours in neighbouring quarters are never further apart
        assert ((azimuth >= 0) & (azimuth < 360)).all()
    every = torch.cat([cameras.azimuth for cameras in draws])
    counts = torch.histc(every, bins=8, min=0, max=360)
    assert (counts / 250 - 1).abs().max() < 0.2  # 250 expected, 3 standard deviations are 47
    first = torch.stack([cameras.azimuth[0] for cameras in draws])
    assert torch.histc(first, bins=4, min=0, max=360).min() > 80  # no view is tied to a quarter


def test_azimuth_and_elevation_are_not_tied_together():
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (c.azimuth, c.elevation) for c in (CameraRanges(azimuth=(0, 300)).sample(4, generator) for _ in range(400))
    ]
    azimuth, elevation = (torch.cat(x) for x in zip(*pairs))
    assert torch.corrcoef(torch.stack([azimuth, elevation]))[0, 1].abs() < 0.08


def test_the_same_seed_gives_the_same_cameras():
    a, b = (CameraRanges().sample(3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a.azimuth, b.azimuth) and torch.equal(a.fov, b.fov)


@pytest.mark.parametrize(
    "bad", [{"elevation": (60, -20)}, {"elevation": (-91, 0)}, {"distance": (0.5, 3)}, {"fov": (0, 40)}]
)
def test_impossible_ranges_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"camera.{next(iter(bad))}"):
        CameraRanges(**bad)


def test_poses_of_the_same_place_have_the_same_rays_and_any_aspect():
    camera = one(211, 33, distance=4)
    pose = Poses(camera.positions(), camera.rotations(), camera.fov, aspect=1.6)
    assert len(pose) == 1
    for ours, theirs in zip(pose.rays(10), camera.rays(10, 16), strict=True):
        assert torch.equal(ours, theirs)
