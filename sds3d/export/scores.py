"""How well a mesh agrees with the scene that it was made from, over views that did not choose its surface.

    iou      of silhouettes (opacity above 1/2), mean over the views
    psnr     of the pictures on white, dB, mean over the views; ``psnr_covered`` over only the pixels that either covers
    depth    mean of |e| inside both silhouettes, scene units
    dent     largest |mean of e| over a square patch inside both silhouettes, whose side is 1 / ``PATCHES`` of the
             view's, scene units
    normals  mean cosine between the mesh's and the scene's normals, where the opacity is above ``CLEAR``
    behind   fraction of the mesh's pixels that show a face from behind

where e = d - m, with d the difference between the distance of the mesh and the scene's mean distance (render.py), and m
the median of d over all views: light passes the surface of a soft scene, so that the scene's mean distance lies
behind its surface, everywhere by about the same length. That is no wrong shape.

Silhouettes and colours alone cannot see a dent, a lid, or a hole through which the inside shows. Measured at 96 pixels
and 5,000 faces on 11 clear scenes (mug, house, robot and boat, analytic with edges of 0.01, or trained with normals)
and on 7 foamy ones, which were trained on colours only:

    mesh                            depth          dent           normals          behind       warnings
    good, of a clear scene          0.006-0.013    0.018-0.075    0.954-0.986      0            0 of 11
    good, of a foamy scene          0.013-0.023    0.028-0.090    0.752-0.877      0            0 of 7
    5 % of the faces removed        0.021-0.056    0.089-0.452    0.708-0.935      0.040-0.071  18 of 18
    a patch of 5 % removed          0.014-0.095    0.106-1.499    0.700-0.972      0.006-0.084  18 of 18
    a lid over a clear mug          0.062-0.067    0.803-0.872    0.845-0.852      0            4 of 4
    inside out                      0.006-0.023    0.018-0.090    -0.986 - -0.752  1            18 of 18
    crater 0.4 wide, 0.15 deep,
        in a clear scene            0.008-0.015    0.101-0.247    0.944-0.979      0            8 of 11
        in a foamy scene            0.015-0.025    0.058-0.190    0.749-0.868      0-0.001      3 of 7

Depth alone separates only lids: removed faces need ``behind``, and craters ``dent``, whose bound lets shallow ones pass
rather than warn of a good mesh: at 64 voxels a side a good cup of soft edges was measured to have 0.102.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.export.raster import Surface
from sds3d.export.source import Seen

LEAST = {"iou": 0.97, "psnr": 22.0, "normals": 0.7}  # a mesh with a lower score gets a warning
MOST = {"depth": 0.03, "dent": 0.12, "behind": 0.002}  # and so does one with a higher score
CLEAR = 0.9  # opacity; below it, a pixel's normals are those of several surfaces
PATCHES = 9  # 11 of 96 pixels: wider than the rim of a soft edge, smaller than a crater
BEST_PSNR = 60.0  # dB, the largest value; equal pictures have an infinite PSNR
WORDS = {  # scores in a sentence
    "iou": "IoU {:.3f}",
    "psnr": "PSNR {:.1f} dB",
    "depth": "depth error {:.3f}",
    "dent": "dent {:.3f}",
    "normals": "normals {:.3f}",
    "behind": "faces from behind {:.3f}",
}


def picture_scores(rgb: Tensor | None, coverage: Tensor, seen: Seen) -> dict[str, float | None]:
    """Return iou, psnr and psnr_covered of pictures (B, 3, H, W), None without colours, with coverage (B, 1, H, W)."""
    a, b = coverage >= 0.5, seen.opacity >= 0.5
    both, either = (a & b).flatten(1).sum(1), (a | b).flatten(1).sum(1)
    scores = {"iou": float((both / either.clamp(min=1)).mean()), "psnr": None, "psnr_covered": None}
    if rgb is not None:
        scores["psnr"] = psnr(rgb, seen.rgb, torch.ones_like(a))
        scores["psnr_covered"] = psnr(rgb, seen.rgb, a | b)
    return scores


def psnr(ours: Tensor, true: Tensor, where: Tensor) -> float:
    """Return the mean PSNR in dB of images (B, 3, H, W) in [0, 1] over the pixels of a mask (B, 1, H, W)."""
    squared = ((ours.clamp(0, 1) - true).double() ** 2 * where).flatten(1).sum(1)
    error = squared / (3 * where.flatten(1).sum(1)).clamp(min=1)
    return float((-10 * torch.log10(error.clamp(min=10 ** (-BEST_PSNR / 10)))).mean())


def shape_scores(ours: Surface, seen: Seen) -> dict[str, float | None]:
    """Return depth, dent, normals and behind; None for what the scene does not give, or where nothing is seen."""
    scores: dict[str, float | None] = dict.fromkeys(("depth", "dent", "normals", "behind"))
    covered = ours.distance > 0
    if covered.any():
        scores["behind"] = float(ours.behind[covered].double().mean())
    inside = covered & (seen.opacity >= 0.5)
    if seen.depth is not None and inside.any():
        error = ours.distance - seen.depth
        error = torch.where(inside, error - error[inside].median(), 0.0).double()
        scores["depth"] = float(error[inside].abs().mean())
        side = max(error.shape[-1] // PATCHES, 1) | 1
        whole = F.avg_pool2d(inside.double(), side, 1) > 1 - 0.5 / side**2
        scores["dent"] = float((F.avg_pool2d(error, side, 1).abs() * whole).max())
    clear = inside & (seen.opacity > CLEAR)
    if seen.normal is not None and clear.any():
        cosine = torch.cosine_similarity(ours.normal, seen.normal, dim=1)[:, None]
        scores["normals"] = float(cosine[clear].double().mean())
    return scores


def in_words(scores: dict[str, Any]) -> str:
    """Return the scores that are known, in one line."""
    return ", ".join(text.format(scores[key]) for key, text in WORDS.items() if scores[key] is not None)


def beyond_bounds(scores: dict[str, Any]) -> list[str]:
    """Return each score that is known and beyond its bound, with the bound."""
    known = {key: value for key, value in scores.items() if value is not None}
    low = [(key, "at least", bound) for key, bound in LEAST.items() if known.get(key, bound) < bound]
    high = [(key, "at most", bound) for key, bound in MOST.items() if known.get(key, bound) > bound]
    return [f"{WORDS[key].format(known[key])} ({limit} {bound:g} is usual)" for key, limit, bound in low + high]
