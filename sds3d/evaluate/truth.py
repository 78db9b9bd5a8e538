"""Scores of an asset against the true object: silhouettes and colours of unseen views, and the shape of its mesh.

Per view, with masks S (ours) and T (true), where coverage is at least 1/2:

    IoU  = |S and T| / |S or T|
    PSNR = -10 log10 mean over (S or T) and RGB of (ours - true)^2, both on one background; at most ``BEST_PSNR`` dB

The true views are lit. A scene whose colours hold the light is compared as it is. A scene whose colours are albedo is
lit as the truth is, with its own normals; ``psnr_albedo`` then compares it without light with the true albedo.

The mesh's figures are defined in shape.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.evaluate import clay, shape

if TYPE_CHECKING:
    import trimesh

VIEWS = 24
MEANS = (  # figures of which a table gives the mean
    "iou",
    "psnr",
    "psnr_albedo",
    "chamfer",
    "fscore",
    "fscore_fine",
    "normals",
    "depth_error",
    "missed",
    "topology",
)
BEST_PSNR = 60.0  # dB; the PSNR of equal images would be infinite

Render = Callable[[Cameras], tuple[Tensor, Tensor]]  # -> images (B, 3, H, W) and coverage (B, 1, H, W)


class Truth(shape.TrueShape, Protocol):
    """The true object, for example a toy of the toybox."""

    def render(self, cameras: Cameras, resolution: int) -> tuple[Tensor, Tensor]:
        """Render images (B, 3, H, W) and coverage (B, 1, H, W), both in [0, 1]."""
        ...

    def albedo(self, cameras: Cameras, resolution: int) -> Tensor:
        """Render the same images without light."""
        ...


@dataclass(frozen=True)
class Scores(shape.Shape):
    """The scores of an asset: means over the views, and the figures of its mesh."""

    iou: float
    psnr: float
    psnr_albedo: float | None  # None if the asset's colours hold the light
    view_iou: list[float]
    view_psnr: list[float]
    truth: Tensor = field(repr=False, compare=False)  # (B, 3, H, W), views of the true object
    ours: Tensor = field(repr=False, compare=False)  # (B, 3, H, W), views of the asset
    albedo: tuple[Tensor, Tensor] | None = field(repr=False, compare=False)  # as truth and ours, without light
    true_clay: Tensor = field(repr=False, compare=False)  # (8, 3, H, W), the true surface from clay.clay_views()
    clay: Tensor = field(repr=False, compare=False)  # (8, 3, H, W), the same of the mesh
    lit: Tensor = field(repr=False, compare=False)  # (8, 3, H, W), the mesh in its colours, from the same cameras

    def numbers(self) -> dict[str, bool | float | list[float] | None]:
        """Return all scores without the images, for JSON."""
        views = ("view_iou", "view_psnr")
        names = ("iou", "psnr", "psnr_albedo", *(f.name for f in fields(shape.Shape)), "topology", *views)
        return {name: getattr(self, name) for name in names}


def unseen_views() -> Cameras:
    """Return the 24 fixed cameras of all scores: every 15 degrees of azimuth from 7.5, elevations 0, 20, 40 in turn."""
    index = torch.arange(VIEWS)
    elevation = torch.tensor([0.0, 20.0, 40.0])[index % 3]
    return Cameras(index * 15.0 + 7.5, elevation, torch.full((VIEWS,), 3.0), torch.full((VIEWS,), 40.0))


@torch.no_grad()
def evaluate(
    render: Render,
    mesh: trimesh.Trimesh | None,
    truth: Truth,
    cameras: Cameras | None = None,
    seed: int = 0,
    albedo: Render | None = None,
) -> Scores:
    """Score an asset against the true object.

    Args:
        render: cameras -> the asset's images on the truth's background, under the truth's light, and coverage. The
            truth is rendered at the same resolution.
        mesh: the asset's surface in world coordinates, with vertex colours; None if it has none.
        truth: the true object, such as ``toybox.parse(prompt)``.
        cameras: ``unseen_views()`` by default.
        seed: seed of the points on the surfaces.
        albedo: the same without light; None if the asset's colours hold the light.
    """
    cameras = unseen_views() if cameras is None else cameras
    ours, coverage = (x.detach().float().cpu() for x in render(cameras))
    true, true_coverage = (x.detach().float().cpu() for x in truth.render(cameras, resolution=ours.shape[-1]))
    ious = silhouette_iou(coverage, true_coverage)
    either = torch.maximum(coverage, true_coverage)
    psnrs = masked_psnr(ours, true, either)
    unlit = None
    if albedo is not None:
        unlit = truth.albedo(cameras, resolution=ours.shape[-1]), albedo(cameras)[0].detach().float().cpu()
    true_mesh = truth.mesh()
    around = clay.clay_views()
    return Scores(
        **vars(shape.compare(mesh, truth, true_mesh, seed)),
        iou=ious.mean().item(),
        psnr=psnrs.mean().item(),
        psnr_albedo=None if unlit is None else masked_psnr(*unlit, either).mean().item(),
        view_iou=ious.tolist(),
        view_psnr=psnrs.tolist(),
        truth=true,
        ours=ours,
        albedo=unlit,
        true_clay=clay.lit(true_mesh, around),
        clay=clay.lit(mesh, around),
        lit=clay.lit(mesh, around, coloured=True),
    )


def silhouette_iou(ours: Tensor, true: Tensor) -> Tensor:
    """Return the intersection over union (B,) of two coverages (B, 1, H, W) in [0, 1]; 1 if both are empty."""
    assert ours.shape == true.shape, (ours.shape, true.shape)
    a, b = ours.flatten(1) >= 0.5, true.flatten(1) >= 0.5
    both, either = (a & b).sum(1), (a | b).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def masked_psnr(ours: Tensor, true: Tensor, coverage: Tensor) -> Tensor:
    """Return the PSNR (B,) in dB of images (B, 3, H, W) in [0, 1] over pixels of coverage (B, 1, H, W) >= 1/2.

    If no pixel is covered, it is ``BEST_PSNR``.
    """
    assert ours.shape == true.shape, (ours.shape, true.shape)
    mask = (coverage >= 0.5).double()
    squared = ((ours.clamp(0, 1) - true).double() ** 2 * mask).flatten(1).sum(1)
    error = squared / (3 * mask.flatten(1).sum(1)).clamp(min=1)
    return -10 * torch.log10(error.clamp(min=10 ** (-BEST_PSNR / 10)))
