"""Every moment against one line of dense float64 numpy."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from analyze.moments import (
    GEOMETRY,
    MOMENTS,
    WITHOUT_GRADIENT,
    moment_kind,
    segment_moments,
)
from capture.store import UsageError
from tests.analyze.small_runs import dense_moments

Values = NDArray[Any]

# Both ways add N float64 products in their own order, each off by at most N roundings of the sum
# of absolute values; N is below 2·10^5 here, and roundings of random sign nearly cancel.
ROUNDING = 1e-13

# Coordinates in many whole blocks.
LONG = 32_768

dtypes = st.sampled_from(["f4", "f8"])


@st.composite
def cut_runs(draw: st.DrawFn) -> tuple[int, Values]:
    """A length that is small or has many blocks, and where tensors cut it; some may be empty."""
    size = draw(st.one_of(st.integers(1, 80), st.integers(LONG - 3, 2 * LONG + 100)))
    inner = draw(st.lists(st.integers(0, size), max_size=6))
    return size, np.array([0, *sorted(inner), size])


def vectors(size: int, value: str, reference: str, seed: int) -> tuple[Values, Values, Values]:
    draw = np.random.default_rng(seed).standard_normal((3, size))
    return draw[0].astype(value), draw[1].astype(value), draw[2].astype(reference)


@given(run=cut_runs(), value=dtypes, reference=dtypes, seed=st.integers(0, 1000))
def test_moments_of_every_segment_are_those_of_dense_numpy(
    run: tuple[int, Values], value: str, reference: str, seed: int
) -> None:
    size, cuts = run
    g, w, w_star = vectors(size, value, reference, seed)
    sums = segment_moments(g, w, w_star, cuts).sums
    for segment, (start, stop) in enumerate(pairwise(cuts)):
        part = slice(start, stop)
        expected = dense_moments(g[part], w[part], w_star[part])
        scale = dense_moments(abs(g[part]), abs(w[part]), -abs(w_star[part]))
        assert (abs(sums[segment] - expected) <= ROUNDING * scale).all()


@given(run=cut_runs(), value=dtypes, kind=st.sampled_from([GEOMETRY, WITHOUT_GRADIENT]))
def test_fewer_moments_are_the_same_moments(
    run: tuple[int, Values], value: str, kind: tuple[str, ...]
) -> None:
    size, cuts = run
    g, w, w_star = vectors(size, value, value, 0)
    everything = segment_moments(g, w, w_star, cuts).sums
    given_g = None if kind == WITHOUT_GRADIENT else g
    some = segment_moments(given_g, w, w_star, cuts, moments=kind).sums
    asked = [name in kind for name in MOMENTS]
    # Another kernel may add in another order: equal to rounding.
    close = dict(rtol=1e-11, atol=ROUNDING * size)
    np.testing.assert_allclose(some[:, asked], everything[:, asked], **close)
    assert np.isnan(some[:, np.logical_not(asked)]).all()


def test_float32_products_are_not_rounded_to_float32() -> None:
    g, w = np.full(100_000, 1 / 3, "f4"), np.full(100_000, 1 + 2**-23, "f4")
    sums = segment_moments(g, w, np.ones(100_000, "f4"), np.array([0, 100_000])).sums[0]
    # In float32 a sum of so many equal terms is off by 1e-3; here by less than 1e-12.
    third = float(np.float32(1 / 3))
    assert sums[MOMENTS.index("gg")] == pytest.approx(1e5 * third**2, rel=1e-12)
    assert sums[MOMENTS.index("ge")] == pytest.approx(1e5 * third * 2.0**-23, rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_non_finite_coordinates_are_counted_in_their_segment_only(value: float, where: int) -> None:
    triple = [values.copy() for values in vectors(LONG + 20, "f4", "f4", 3)]
    cuts = np.array([0, 100, LONG + 20])
    clean = segment_moments(*triple, cuts)
    triple[where][[150, LONG + 5]] = value
    triple[(where + 1) % 3][150] = np.nan  # one coordinate counts once
    found = segment_moments(*triple, cuts)
    assert found.nonfinite.tolist() == [0, 2]
    assert (found.sums[0] == clean.sums[0]).all()
    assert not np.isfinite(found.sums[1]).all()
    assert clean.nonfinite.tolist() == [0, 0]


def test_the_largest_float32_values_do_not_overflow() -> None:
    huge = np.full(1000, np.finfo("f4").max)
    found = segment_moments(huge, huge, -huge, np.array([0, 1000]))
    assert np.isfinite(found.sums).all()


def test_finite_float64_values_that_overflow_are_no_non_finite_coordinates() -> None:
    found = segment_moments(
        np.full(3, 1e200), np.full(3, 1.0), np.zeros(3), np.array([0, 3]), moments=GEOMETRY
    )
    assert found.sums[0, MOMENTS.index("gg")] == np.inf
    assert found.nonfinite.tolist() == [0]


def test_strided_and_writeable_arrays_give_the_same_bytes() -> None:
    g, w, w_star = vectors(500, "f4", "f8", 1)
    cuts = np.array([0, 77, 500])
    strided = [np.repeat(values, 2)[::2] for values in (g, w, w_star)]
    expected = segment_moments(g, w, w_star, cuts).sums
    assert segment_moments(*strided, cuts).sums.tobytes() == expected.tobytes()


def test_the_smallest_kind_that_holds_the_names_is_chosen() -> None:
    assert moment_kind(["ee"]) == WITHOUT_GRADIENT
    assert moment_kind(["ge", "ee"]) == GEOMETRY
    assert moment_kind(["ge", "ww"]) == MOMENTS
    with pytest.raises(UsageError, match="no moment 'eg'; choose from ge, gg, ee"):
        moment_kind(["ge", "eg"])
