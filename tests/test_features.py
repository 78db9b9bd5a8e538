"""Distances between sets of features, where the answer is known."""

import pytest
import torch
from torch import Tensor

from sds3d.evaluate.features import copy_rate, frechet, kernel_distance, precision_recall


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: Tensor, root: Tensor, seed: int = 0, rows: int = 200) -> Tensor:
    """Rows whose mean is ``mean`` (D,) and whose covariance is root root^T, to the last bits and not only about."""
    x = normal(rows, len(mean), seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.atleast_2d(x.T.cov())), x.T, upper=False)
    return (root @ white).T + mean


def two_by_two(ours: Tensor, theirs: Tensor) -> float:
    """tr (S S')^(1/2) of two covariances of size 2: the root of M has trace sqrt(tr M + 2 sqrt det M)."""
    product = ours @ theirs
    return float((product.trace() + 2 * product.det().sqrt()).sqrt())


def test_the_kernel_distance_is_its_double_sum():
    ours, theirs = normal(7, 5, 0), normal(4, 5, 1) + 0.5

    def k(x, y):
        return float((sum(a * b for a, b in zip(x.tolist(), y.tolist())) / 5 + 1) ** 3)

    def pairs(rows):
        return [k(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]

    between = [k(x, y) for x in ours for y in theirs]
    known = sum(pairs(ours)) / (7 * 6) + sum(pairs(theirs)) / (4 * 3) - 2 * sum(between) / (7 * 4)
    assert kernel_distance(ours, theirs) == pytest.approx(known, rel=1e-12)
    assert kernel_distance(theirs, ours) == pytest.approx(known, rel=1e-12)
    assert kernel_distance(ours.float(), theirs.float()) == pytest.approx(known, rel=1e-5)
    many = normal(5000, 3, 2)  # more than a block of rows
    assert kernel_distance(many, many[:2500]) == pytest.approx(kernel_distance(many.flip(0), many[:2500].flip(0)))


def test_the_kernel_distance_is_unbiased_and_the_frechet_distance_is_not():
    """Of 10 rows from one distribution in 8 columns; and the mean over draws does not depend on the number of rows."""
    few = [(normal(10, 8, 2 * i), normal(10, 8, 2 * i + 1)) for i in range(400)]
    found = torch.tensor([kernel_distance(*pair) for pair in few])
    assert float(found.min()) < 0 and abs(float(found.mean())) < 3 * float(found.std()) / 400**0.5
    assert min(frechet(*pair) for pair in few[:50]) > 1
    moved = [[kernel_distance(x[:n], y[:n] + 0.5) for x, y in few] for n in (5, 10)]
    means, errors = zip(*((float(m.mean()), float(m.std()) / 400**0.5) for m in map(torch.tensor, moved)))
    assert means[0] > 10 * errors[0] and abs(means[0] - means[1]) < 3 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5


@pytest.mark.parametrize(
    ("ours", "theirs"), [((0.3, 2.0), (-1.0, 0.5)), ((5.0, 1.0), (5.0, 1.5)), ((1.0, 0.7), (2.0, 0.7))]
)
def test_frechet_in_one_dimension_is_the_means_and_the_deviations_apart(ours, theirs):
    rows = []
    for seed, numbers in enumerate((ours, theirs)):
        mean, deviation = torch.tensor(numbers, dtype=torch.float64)
        rows.append(exactly(mean[None], deviation[None, None], seed))
    assert frechet(*rows) == pytest.approx((ours[0] - theirs[0]) ** 2 + (ours[1] - theirs[1]) ** 2, abs=1e-10)


def test_frechet_of_covariances_that_do_not_commute():
    roots = torch.tensor([[[2.0, 0.0], [1.5, 0.4]], [[0.6, 0.0], [-0.9, 1.1]]]).double()
    means = torch.tensor([[0.5, -1.0], [0.0, 0.25]]).double()
    a, b = (exactly(means[i], roots[i], i) for i in (0, 1))
    ours, theirs = roots @ roots.mT
    assert float((ours @ theirs - theirs @ ours).abs().max()) > 1
    known = float((means[0] - means[1]).square().sum() + ours.trace() + theirs.trace()) - 2 * two_by_two(ours, theirs)
    assert frechet(a, b) == pytest.approx(known, abs=1e-10)
    assert frechet(b, a) == pytest.approx(known, abs=1e-10)
    assert frechet(a.float(), b.float()) == pytest.approx(known, rel=1e-5)  # rows given in float32


def test_frechet_in_many_dimensions_and_with_fewer_rows_than_columns():
    """Diagonal covariances commute: the distance is the deviations' squared distance, and turning both changes nothing.
    Of 40 rows in 60 columns the covariance has no inverse; each root of a 0 is then 1e-8, as rounding is 1e-16."""
    turn = torch.linalg.qr(normal(30, 30, 5)).Q
    deviations = torch.linspace(0.1, 3, 30).double(), torch.linspace(2, 0.5, 30).double()
    a, b = (exactly(torch.zeros(30).double(), turn @ s.diag(), i) for i, s in enumerate(deviations))
    assert frechet(a, b + 1) == pytest.approx(30 + float((deviations[0] - deviations[1]).square().sum()), abs=1e-8)
    few = normal(40, 60, 7)
    assert frechet(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet(few, few + 0.5) == pytest.approx(60 * 0.25, abs=1e-5)


def test_frechet_of_a_set_with_itself_is_0():
    a = normal(300, 8, 0)
    assert frechet(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet(a, a[torch.randperm(300, generator=torch.Generator().manual_seed(1))]) == pytest.approx(0, abs=1e-10)


def modes(share: float, seed: int, rows: int = 600) -> Tensor:
    """Rows around two places far apart; ``share`` of them around the first."""
    return normal(rows, 2, seed) + 50 * (torch.arange(rows) >= share * rows)[:, None]


def test_precision_and_recall_of_one_distribution_are_near_1():
    """The reach of a fifth neighbour leaves out the outermost of 600: about 2 %."""
    a, b = modes(0.5, 0), modes(0.5, 1)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert min(precision_recall(a, b)) > 0.95


def test_precision_and_recall_of_sets_apart_are_0():
    assert precision_recall(normal(100, 4, 0), normal(100, 4, 1) + 100) == (0.0, 0.0)


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision():
    both, first = modes(0.5, 0), modes(1.0, 1)
    precision, recall = precision_recall(first, both)
    assert precision > 0.95 and recall == pytest.approx(0.5, abs=0.03)  # half of the real ones are out of reach
    assert precision_recall(both, first) == (recall, precision)


def test_one_image_over_and_over_is_precise_and_recalls_nothing():
    real = modes(0.5, 0)
    precision, recall = precision_recall(real[:1].expand(600, 2), real)
    assert precision == 1 and recall <= 1 / 600


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_fresh_draws_are_copies_as_rarely_as_held_out_ones(share):
    """Of 4,000, four standard errors of the difference of two shares."""
    fresh, train, held_out = (normal(4000, 6, seed) for seed in range(3))
    apart = 4 * (2 * share * (1 - share) / 4000) ** 0.5
    assert copy_rate(fresh, train, held_out, share) == pytest.approx(share, abs=apart)


def test_copies_are_counted():
    fresh, train, held_out = (normal(1000, 6, seed) for seed in range(3))
    assert copy_rate(train, train, held_out) == 1
    assert copy_rate(train + 1e-3 * fresh, train, held_out) == 1  # what is nearly one counts
    rate = copy_rate(fresh, train, held_out)
    mixed = torch.cat([train[:300], fresh[300:]])
    assert copy_rate(mixed, train, held_out) == pytest.approx(0.3 + 0.7 * rate, abs=0.01)


def test_precision_and_recall_counted_by_hand():
    """With one neighbour real rows reach 1, 1, 2 and 4, and ours 3, 3, 8.5 and 9; 20 is in nobody's reach."""
    real, ours = (torch.tensor(x, dtype=torch.float64)[:, None] for x in ([0, 1, 3, 7], [-0.5, 2.5, 11, 20]))
    assert precision_recall(ours, real, neighbour=1) == (0.75, 1.0)
    assert precision_recall(real, ours, neighbour=1) == (1.0, 0.75)
