"""Distances between two sets of images by features: Frechet and kernel distance, precision and recall, copies.

Features are (N, D) rows of any kind. Figures can be compared only if they use the same features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet(ours: Tensor, theirs: Tensor) -> float:
    """Return the Frechet distance of two Gaussians with the rows' means and covariances (arXiv 1706.08500, eq. 6).

        |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))

    Args:
        ours, theirs: (N, D) and (M, D), N and M above 1.
    """
    ours, theirs = ours.double(), theirs.double()
    s, s2 = (torch.atleast_2d(x.T.cov()) for x in (ours, theirs))
    values, vectors = torch.linalg.eigh(s)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()  # tr (S S')^(1/2): the spectra are equal
    means = (ours.mean(0) - theirs.mean(0)).square().sum()
    return float(means + s.trace() + s2.trace() - 2 * cross)


def kernel_distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the squared maximum mean discrepancy with the kernel (x . y / D + 1)^3 (KID, arXiv 1801.01401).

    Unlike the Frechet distance, the estimate is unbiased for any number of rows. For two draws from one distribution
    its mean is 0, so that a single estimate may be negative.

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
    """Return precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    Precision is the fraction of ours that lie among the real ones, recall that of the real ones that lie among ours. A
    row lies among a set if it is nearer to some member than this member's ``neighbour``-th nearest neighbour.

    Args:
        ours, real: (N, D) each.
    """
    assert len(ours) == len(real) > neighbour, (len(ours), len(real))
    between = torch.cdist(ours.double(), real.double())

    def reach(x: Tensor) -> Tensor:
        within = torch.cdist(x.double(), x.double())
        return within.kthvalue(neighbour + 1).values  # the nearest row is the row itself

    precision = (between <= reach(real)[None]).any(1).double().mean()
    recall = (between <= reach(ours)[:, None]).any(0).double().mean()
    return float(precision), float(recall)


def copy_rate(ours: Tensor, train: Tensor, held_out: Tensor, quantile: float = 0.01) -> float:
    """Return the fraction of ours (N, D) that are nearer to a training row than this quantile of the held-out rows."""
    limit = _nearest(held_out, train).quantile(quantile)
    return float((_nearest(ours, train) < limit).double().mean())


def _nearest(x: Tensor, among: Tensor) -> Tensor:
    """Distance (N,) of each row to the nearest row of another set."""
    return torch.cat([torch.cdist(part.double(), among.double()).amin(1) for part in x.split(2048)])
