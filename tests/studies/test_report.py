"""Intervals of few seeds are those of Student."""

import math

import numpy as np
import pytest

from studies.report import T_QUANTILES, interval


def test_an_interval_is_that_of_student():
    mean, low, high = interval([1.0, 2.0, 3.0])  # deviation 1, t of two degrees of freedom
    half = 4.303 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half))


@pytest.mark.parametrize("freedom", range(2, 21))
def test_a_quantile_leaves_two_and_a_half_percent(freedom):
    x = np.linspace(0, T_QUANTILES[freedom - 2], 20001)
    factor = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    density = factor * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.475, abs=5e-5)


def test_an_interval_of_very_many_seeds_is_never_too_narrow():
    values = np.arange(1000.0)
    _, low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(1000), rel=0.07)
    assert high - low > 2 * 1.96 * values.std() / math.sqrt(1000)


def test_two_seeds_are_too_few():
    with pytest.raises(ValueError, match=">= 3 seeds, got 2"):
        interval([1.0, 2.0])
