"""Quantiles of Student's t and the normal distribution, against scipy and closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit
from scipy.stats import norm

from analyze.student import normal_quantile, student_quantile

LEVELS = [0.01, 0.5, 0.6827, 0.9, 0.95, 0.99, 0.999]
# Of the tail beyond a level 1 - p, rounding in 1 - p leaves 1e-16 / p.
NEAR = 1e-12


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("degrees", [0.3, 1, 1.5, 2, 3.7, 9, 30, 99.5, 700, 999.9, 1000, 1e5, 1e9])
def test_it_is_the_quantile_of_scipy(level: float, degrees: float) -> None:
    expected = stdtrit(degrees, (1 + level) / 2)
    assert student_quantile(level, degrees) == pytest.approx(expected, rel=NEAR)


@given(level=st.floats(0.001, 0.999), degrees=st.floats(0.5, 3000))
def test_it_is_the_quantile_of_scipy_anywhere(level: float, degrees: float) -> None:
    expected = stdtrit(degrees, (1 + level) / 2)
    # Gammas of large numbers lose digits, here and there.
    assert student_quantile(level, degrees) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("level", LEVELS)
def test_one_and_two_degrees_have_closed_forms(level: float) -> None:
    assert student_quantile(level, 1) == pytest.approx(math.tan(math.pi / 2 * level), rel=NEAR)
    assert student_quantile(level, 2) == pytest.approx(
        level * math.sqrt(2 / (1 - level**2)), rel=NEAR
    )


@pytest.mark.parametrize("level", LEVELS)
def test_endless_degrees_are_the_normal_distribution(level: float) -> None:
    assert normal_quantile(level) == pytest.approx(norm.ppf((1 + level) / 2), rel=NEAR)
    assert student_quantile(level, math.inf) == normal_quantile(level)


@pytest.mark.parametrize("level", [5e-324, 1e-17, 1e-9, 1 - 1e-16])
def test_levels_at_the_edge_have_a_finite_quantile(level: float) -> None:
    assert 0 <= normal_quantile(level) <= student_quantile(level, 3.5) < math.inf
