"""How different two images look: 0 where they are one, a slope everywhere else, and clear words where it is missing."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sds3d.data import digits
from sds3d.distill.perceptual import DISTANCES, distance
from sds3d.teachers import small

NO_DOWNLOAD = ("teacher", "pixels")


@pytest.fixture(scope="module")
def teacher() -> small.SmallTeacher:
    return small.load(small.packaged("digits"), dtype=torch.float32)


@pytest.fixture(scope="module")
def x(teacher):
    """Six digits, 0 to 5, in the teacher's space."""
    return teacher.encode(digits.pictures("held-out").rgb()[:6])


@pytest.mark.parametrize("name", NO_DOWNLOAD)
def test_equal_images_are_0_apart_and_others_are_not(teacher, x, name):
    apart = distance(name, teacher)
    assert torch.equal(apart(x, x), torch.zeros(6))
    away = apart(x, x.flip(0))
    assert away.shape == (6,) and float(away.min()) > 0.05
    assert torch.allclose(away, away.flip(0), atol=1e-5)  # x from y and y from x


@pytest.mark.parametrize("name", NO_DOWNLOAD)
def test_the_further_the_more(teacher, x, name):
    apart, noise = distance(name, teacher), torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = torch.stack([apart(x + amount * noise, x) for amount in (0.01, 0.05, 0.2, 0.5)])
    assert bool((found.diff(dim=0) > 0).all())


def test_pixels_is_the_mean_square(teacher, x):
    assert torch.allclose(distance("pixels", teacher)(x + 0.1, x), torch.full((6,), 0.01), atol=1e-6)


def test_the_teacher_adds_to_the_pixels_the_angle_at_every_place_of_every_map(teacher, x):
    """Vectors of length 1 are 2 - 2 cos apart, squared; it looks at alpha x, at t = 0.1, without noise."""
    y, t = x.flip(0), torch.full((6,), 0.1)
    alpha, _ = teacher.schedule.alpha_sigma(t[:1])
    ours, theirs = (teacher.features(teacher.network, alpha * z, t, [""] * 6) for z in (x, y))
    angles = [(2 - 2 * torch.cosine_similarity(a, b, dim=1)).mean((1, 2)) for a, b in zip(ours, theirs, strict=True)]
    assert len(angles) > 1
    wanted = sum(angles) + (x - y).square().mean((1, 2, 3))
    assert torch.allclose(distance("teacher", teacher)(x, y), wanted, atol=1e-5)  # float32


def test_answers_do_not_depend_on_the_company(teacher, x):
    apart = distance("teacher", teacher)
    assert torch.allclose(apart(x[2:3], x[4:5]), apart(x, x[[0, 1, 4, 3, 2, 5]])[2:3], atol=1e-5)


@pytest.mark.parametrize("name", NO_DOWNLOAD)
def test_the_slope_in_x_is_that_of_the_differences(teacher, x, name):
    apart = distance(name, teacher)
    y, ours = x.flip(0).requires_grad_(), x.clone().requires_grad_()
    apart(ours, y.detach()).sum().backward()
    way, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), 1e-2
    with torch.no_grad():
        rise = (apart(x + step * way, y) - apart(x - step * way, y)).sum() / (2 * step)
    # float32 leaves 1e-7 / 1e-2 of a value of 10, the curve's third derivative step^2 of the slope
    assert float((ours.grad * way).sum()) == pytest.approx(float(rise), rel=0.01)
    assert all(p.grad is None for p in teacher.network.parameters())


def test_where_images_are_equal_the_slope_is_0(teacher, x):
    ours = x.clone().requires_grad_()
    distance("teacher", teacher)(ours, x).sum().backward()
    assert torch.equal(ours.grad, torch.zeros_like(x))


def test_a_name_nobody_knows_lists_those_there_are(teacher):
    with pytest.raises(ValueError, match=f"the distance is 'ssim'; give {', '.join(DISTANCES)}"):
        distance("ssim", teacher)


def test_lpips_that_is_not_installed_names_its_extra(teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"lpips is not installed; pip install sds3d\[lpips\], or give teacher"):
        distance("lpips", teacher)


def test_lpips_is_shown_images_of_64_pixels_in_colour(teacher, x, monkeypatch):
    """By a stand-in for the package: its networks would be downloaded."""
    shown = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            assert net == "vgg"

        def forward(self, a, b):
            shown.extend([a, b])
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    found = distance("lpips", teacher)(x, x.flip(0))
    assert found.shape == (6,) and float(found.min()) > 0
    for images in shown:
        assert images.shape == (6, 3, 64, 64) and -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
