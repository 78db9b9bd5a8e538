"""Ramps against numpy's piecewise-linear interpolation."""

import numpy as np
import pytest

from sds3d.runtime.ramp import Ramp


def test_linear_between_and_constant_outside():
    ramp = Ramp(10, 0.98, 0.5, 50)
    for step in range(-5, 80):
        assert ramp(step) == pytest.approx(np.interp(step, [10, 50], [0.98, 0.5]), abs=1e-14)


def test_equal_ends_jump():
    ramp = Ramp(5, 1.0, 2.0, 5)
    assert [ramp(s) for s in (4, 5, 6)] == [1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, Ramp.constant(3)),
        ([0, 1, 2, 10], Ramp(0, 1, 2, 10)),
        ((7.5,), Ramp.constant(7.5)),
        (Ramp(1, 2, 3, 4), Ramp(1, 2, 3, 4)),
    ],
)
def test_parse(given, expected):
    assert Ramp.parse(given) == expected


REFUSED = [[1, 2], "fast", "0.5", "1_000", [0, 1, True, 3], 10**400, None, [0, 1, "x", 3], [9, 0, 1, 3], {"v": 1}]


@pytest.mark.parametrize(
    "given", [*REFUSED, float("nan"), float("inf"), 10**9000], ids=lambda given: type(given).__name__
)
def test_parse_refuses(given):
    with pytest.raises(ValueError, match="ramp"):
        Ramp.parse(given)
