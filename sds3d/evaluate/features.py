"""How far one set of images is from another, by features: Frechet and kernel distance, precision and recall, copies.

Features are (N, D) rows of any kind; the figures are comparable only where the features are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet(ours: Tensor, theirs: Tensor) -> float:
    """Frechet distance of two Gaussians with the rows' means and covariances (Heusel et al., arXiv 1706.08500, eq. 6).

        |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))

    Args:
        ours, theirs: (N, D) and (M, D), N and M above 1.
    """
    ours, theirs = ours.double(), theirs.double()
    here, there = (torch.atleast_2d(x.T.cov()) for x in (ours, theirs))
    values, vectors = torch.linalg.eigh(here)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ there @ root).clamp_min(0).sqrt().sum()  # of one spectrum with (S S')^(1/2)
    apart = (ours.mean(0) - theirs.mean(0)).square().sum()
    return float(apart + here.trace() + there.trace() - 2 * cross)


def kernel_distance(ours: Tensor, theirs: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x . y / D + 1)^3 (KID: Binkowski et al., arXiv 1801.01401).

    The estimate is unbiased for any numbers of rows, as the Frechet distance is not: its mean over draws is 0 where
    both come from one distribution, so that a single one may be below 0.

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Args:
        ours, theirs: (N, D) and (M, D), N and M above 1.
    """
    ours, theirs = ours.double(), theirs.double()

    def total(x: Tensor, y: Tensor) -> float:
        return sum(float(_kernel(part @ y.T / y.shape[1]).sum()) for part in x.split(2048))

    def own(x: Tensor) -> float:
        same = float(_kernel(x.square().sum(1) / x.shape[1]).sum())
        return (total(x, x) - same) / (len(x) * (len(x) - 1))

    return own(ours) + own(theirs) - 2 * total(ours, theirs) / (len(ours) * len(theirs))


def _kernel(product: Tensor) -> Tensor:
    return (product + 1) ** 3


def precision_recall(ours: Tensor, real: Tensor, neighbour: int = 5) -> tuple[float, float]:
    """Shares of ours that lie among the real ones, and of the real ones that lie among ours (Kynkaanniemi et al., arXiv
    1904.06991): within some member's distance to its ``neighbour``-th neighbour. Both sets (N, D) of one size."""
    assert len(ours) == len(real) > neighbour, (len(ours), len(real))
    between = torch.cdist(ours.double(), real.double())

    def reach(x: Tensor) -> Tensor:
        within = torch.cdist(x.double(), x.double())
        return within.kthvalue(neighbour + 1).values  # the first is itself

    precision = (between <= reach(real)[None]).any(1).double().mean()
    recall = (between <= reach(ours)[:, None]).any(0).double().mean()
    return float(precision), float(recall)


def copy_rate(ours: Tensor, train: Tensor, held_out: Tensor, share: float = 0.01) -> float:
    """Share of ours (N, D) that are nearer to a training row than all but ``share`` of the held-out rows are."""
    limit = _nearest(held_out, train).quantile(share)
    return float((_nearest(ours, train) < limit).double().mean())


def _nearest(x: Tensor, among: Tensor) -> Tensor:
    """Distance to the nearest row, (N,)."""
    return torch.cat([torch.cdist(part.double(), among.double()).amin(1) for part in x.split(2048)])
