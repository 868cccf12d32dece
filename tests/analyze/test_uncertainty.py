"""Intervals: over runs against scipy.stats, within a run by how often they cover a known mean."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from analyze.resampling import block_length, draw_means, effective_size, step_means
from analyze.uncertainty import (
    negative_interval,
    paired_interval,
    path_interval,
    run_interval,
    welch_interval,
    wilson_interval,
)
from capture.store.errors import UsageError

Values = NDArray[np.float64]


def autoregressive(rho: float, count: int, steps: int, seed: int = 0) -> Values:
    """`count` stationary series x_t = ρ x_{t-1} + ε_t of mean 0: ``[count, steps]``."""
    noise = np.random.default_rng(seed).standard_normal((count, steps))
    noise[:, 0] /= math.sqrt(1 - rho**2)
    series = noise.copy()
    for step in range(1, steps):
        series[:, step] += rho * series[:, step - 1]
    return series


def lowest_share(promised: float, count: int) -> float:
    """Below this share of `count` intervals fewer than one in 700 true ones would cover."""
    return promised - 3 * math.sqrt(promised * (1 - promised) / count)


# Over runs


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_intervals_over_runs_are_those_of_scipy(level: float) -> None:
    draw = np.random.default_rng(0).normal
    first, second = draw(1, 2, 5), draw(0, 1, 4)
    over = stats.ttest_1samp(first, 0).confidence_interval(level)
    welch = stats.ttest_ind(first, second, equal_var=False).confidence_interval(level)
    paired = stats.ttest_rel(first[:4], second).confidence_interval(level)
    for found, expected in (
        (run_interval(first, level), over),
        (welch_interval(first, second, level), welch),
        (paired_interval(first[:4], second, level), paired),
    ):
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-10)
        assert found.value == pytest.approx((expected.low + expected.high) / 2, rel=1e-10)
    assert welch_interval(first, second).count == 9
    assert paired_interval(first[:4], second).count == 4


@pytest.mark.parametrize(("found", "draws"), [(0, 10), (10, 10), (3, 17), (1, 400)])
def test_a_share_of_independent_draws_has_wilsons_interval(found: int, draws: int) -> None:
    expected = stats.binomtest(found, draws).proportion_ci(0.95, method="wilson")
    interval = wilson_interval(found / draws, draws)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "no run has a number"),
        ([math.nan, math.nan], "no run has a number"),
        ([0.3, math.nan], "one run says nothing about another seed"),
        ([0.1 + 0.2, 0.3], "no spread between the runs"),
    ],
)
def test_where_there_is_no_interval_over_runs_it_says_why(values: list[float], words: str) -> None:
    interval = run_interval(np.array(values))
    assert interval.method == f"none: {words}"
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert not interval.known


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([1.0, 2.0], [3.0], "a group has one run only"),
        ([1.0, 2.0], [math.nan], "a group has no number"),
        ([1.0, 1.0], [2.0, 2.0], "no spread between the runs of a group"),
    ],
)
def test_a_difference_without_an_interval_says_why(
    first: list[float], second: list[float], words: str
) -> None:
    assert welch_interval(np.array(first), np.array(second)).method == f"none: {words}"
    assert not welch_interval(np.array(first), np.array(second)).known


def test_pairs_where_one_number_is_missing_are_left_out() -> None:
    first, second = np.array([1.0, 5.0, math.nan, 3.0]), np.array([0.0, 3.0, 1.0, math.nan])
    interval = paired_interval(first, second)
    assert (interval.value, interval.count) == (1.5, 2)
    assert paired_interval(first[:1], second[:1]).method == "none: one pair of runs only"


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 95.0, math.nan])
def test_a_level_is_a_share(level: float) -> None:
    for call in (run_interval, path_interval, negative_interval):
        with pytest.raises(UsageError, match="between 0 and 1"):
            call(np.arange(9.0), level)


# Within a run


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_intervals_within_a_run_cover_the_mean_as_often_as_they_promise(rho: float) -> None:
    series = autoregressive(rho, 400, 400)
    found = [path_interval(own, seed=0, replicates=400).interval for own in series]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in found])
    # Neither too narrow nor, by more than the binomial allows, too wide.
    assert lowest_share(0.95, 400) <= covered <= 2 * 0.95 - lowest_share(0.95, 400)


def test_drawing_single_steps_would_not_cover() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_means(own[:, None], 1, rng, 400) for own in autoregressive(0.6, 400, 400)]
    limits = np.quantile(drawn, [0.025, 0.975], axis=1)
    covered = np.mean((limits[0] <= 0) & (limits[1] >= 0))
    # √((1 + ρ)/(1 - ρ)) = 2 standard errors fit into one: 67 % in theory.
    assert covered < 0.75


def test_other_levels_are_kept_too() -> None:
    series = autoregressive(0.5, 300, 300, seed=1)
    found = [path_interval(own, 0.8, replicates=400).interval for own in series]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in found])
    assert lowest_share(0.8, 300) <= covered <= 2 * 0.8 - lowest_share(0.8, 300)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_effective_size_is_the_closed_form(rho: float) -> None:
    sizes = [effective_size(own) for own in autoregressive(rho, 30, 20_000)]
    # Sokal: the relative deviation of τ is √(2 (2 W + 1) / n), with a window W of about 6 τ; the
    # mean of 30 within three of these.
    window = 6 * (1 + rho) / (1 - rho)
    tolerance = 3 * math.sqrt(2 * (2 * window + 1) / 20_000 / 30)
    assert np.mean(sizes) == pytest.approx(20_000 * (1 - rho) / (1 + rho), rel=tolerance)


def test_there_are_never_more_effective_steps_than_steps() -> None:
    assert effective_size(autoregressive(-0.8, 1, 500)[0]) == 500
    assert effective_size(np.linspace(0, 1, 500)) < 5  # a trend alone


@pytest.mark.parametrize("rho", [0.3, 0.7, 0.9])
def test_blocks_are_as_long_as_the_closed_form_wants(rho: float) -> None:
    # For AR(1) Politis and White's (2 G² / D)^⅓ n^⅓ is (3/2 (2 ρ / (1 - ρ²))² n)^⅓.
    best = (1.5 * (2 * rho / (1 - rho**2)) ** 2 * 5000) ** (1 / 3)
    lengths = [block_length(own) for own in autoregressive(rho, 40, 5000)]
    # Rounded up, and estimated: 15 % of the mean is three of its deviations (5 % measured).
    assert np.mean(lengths) - 0.5 == pytest.approx(best, rel=0.15)


@pytest.mark.parametrize(("count", "length"), [(0, 1), (1, 1), (5, 1), (6, 2), (7, 2)])
def test_short_series_have_blocks_of_the_cube_root(count: int, length: int) -> None:
    assert block_length(np.random.default_rng(0).standard_normal(count)) == length
    assert block_length(np.ones(1000)) == 10


def crossed(step: float, batch: float, rest: float, seed: int) -> Values:
    """60 steps × 8 batches, the variance split in three."""
    draw = np.random.default_rng(seed).standard_normal
    return step * draw((60, 1)) + batch * draw((1, 8)) + rest * draw((60, 8))


@pytest.mark.parametrize(
    ("step", "batch", "rest"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (2.0, 1.0, 0.0), (1.0, 1.0, 2.0)]
)
def test_crossed_batches_have_the_variance_of_both(step: float, batch: float, rest: float) -> None:
    rng = np.random.default_rng(0)
    rows = [crossed(step, batch, rest, seed) for seed in range(200)]
    found = np.mean([draw_means(own, 1, rng, 200).var() for own in rows])
    # Steps drawn T of T lose 1/T of their variance; batches, B - 1 of B, lose none.
    least = step**2 / 60 * (1 - 1 / 60) + batch**2 / 8 + rest**2 / (60 * 8)
    most = step**2 / 60 + batch**2 / 8 + 3.2 * rest**2 / (60 * 8)
    # A variance from 7 degrees of freedom has a relative deviation of √(2/7), a mean of 200 of them
    # 0.038: three of these, and as much for the draws of the step and batch parts together.
    assert least * 0.88 <= found <= most * 1.12


def test_intervals_cover_across_batches_and_would_not_without_them() -> None:
    rows = [crossed(1.0, 1.0, 0.5, seed) for seed in range(300)]
    both = [path_interval(own, replicates=300).interval for own in rows]
    alone = [path_interval(step_means(own), replicates=300).interval for own in rows]
    covered, without = (
        np.mean([interval.low <= 0 <= interval.high for interval in found])
        for found in (both, alone)
    )
    assert covered >= lowest_share(0.95, 300)
    assert without < 0.7


def test_few_blocks_and_few_batches_have_wider_intervals() -> None:
    ratios = []
    for series in autoregressive(0.0, 40, 12):
        found = path_interval(series)
        freedom = 12 / found.block - 1
        half = (found.interval.high - found.interval.low) / 2
        error = series.std() / math.sqrt(found.effective - 1)
        ratios.append(half / (stats.t.ppf(0.975, freedom) * error))
    # At least t, of 3 to 11 degrees of freedom, times the error that the effective steps have; the
    # percentiles of so few numbers are a little less wide than those of a normal distribution.
    assert np.mean(ratios) > 0.9
    # t of 3 degrees of freedom is 3.2: with the 1.96 of a normal one 86 % would cover.
    rows = [crossed(0.2, 1.0, 0.2, seed)[:, :4] for seed in range(300)]
    both = [path_interval(own, replicates=300).interval for own in rows]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in both])
    assert covered >= lowest_share(0.95, 300)


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 4))
    holes = rows.copy()
    holes[3], holes[7, 2], holes[9, 1] = np.nan, np.inf, np.nan
    found = path_interval(holes)
    assert found.left_out == 6
    assert (found.steps, found.batches, found.interval.count) == (49, 4, 194)
    assert found.interval.value == pytest.approx(holes[np.isfinite(holes)].mean(), rel=1e-12)
    assert found.interval.low < found.interval.value < found.interval.high
    whole_batch = np.concatenate([rows, np.full((50, 1), np.nan)], axis=1)
    assert path_interval(whole_batch).interval == path_interval(rows).interval
    assert path_interval(whole_batch).left_out == 50


def test_a_seed_gives_the_same_bytes_and_another_one_others() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 3))
    assert path_interval(rows, seed=1) == path_interval(rows, seed=1)
    assert path_interval(rows, seed=1).interval.low != path_interval(rows, seed=2).interval.low


def test_scale_and_shift_do_what_they_should() -> None:
    rows = np.random.default_rng(0).standard_normal((80, 2))
    one, other = path_interval(rows).interval, path_interval(5 + 3 * rows).interval
    expected = [5 + 3 * bound for bound in (one.low, one.value, one.high)]
    assert [other.low, other.value, other.high] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.empty((0, 3)), "fewer than 8 steps"),
        (np.full((20, 2), np.nan), "fewer than 8 steps"),
        (np.arange(7.0), "fewer than 8 steps"),
        (np.full(100, 0.1), "nothing varies"),
        (np.linspace(0.1, 0.2, 30), "fewer than 5 effective steps"),
    ],
)
def test_too_little_within_a_run_is_said_in_words(rows: Values, words: str) -> None:
    found = path_interval(rows)
    assert found.interval.method == f"none: {words}"
    assert not found.interval.known


# Shares


def test_a_share_of_dependent_rows_is_drawn_in_blocks() -> None:
    series = autoregressive(0.8, 300, 300, seed=2)
    found = [negative_interval(own, replicates=300).interval for own in series]
    assert {interval.method for interval in found} == {"block bootstrap within the run"}
    covered = np.mean([interval.low <= 0.5 <= interval.high for interval in found])
    wilson = [wilson_interval(interval.value, 300) for interval in found]
    naive = np.mean([interval.low <= 0.5 <= interval.high for interval in wilson])
    # Correlated like this, 300 steps are 33 (Politis and White's blocks, sample correlations):
    # somewhat less than promised, and far more than without blocks.
    assert covered > 0.9
    assert naive < 0.75


def test_a_share_of_rows_that_are_as_good_as_independent_is_wilsons() -> None:
    series = np.random.default_rng(3).standard_normal(200) + 1
    found = negative_interval(series)
    assert found.interval.method == "Wilson, independent rows"
    expected = stats.binomtest(int((series < 0).sum()), 200).proportion_ci(0.95, method="wilson")
    assert (found.interval.low, found.interval.high) == pytest.approx(expected, abs=1e-12)
    batches = np.random.default_rng(3).standard_normal((200, 2)) + 1
    assert negative_interval(batches).interval.method == "block bootstrap within the run"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_share_of_nothing_or_all_has_the_effective_steps(sign: float) -> None:
    series = sign * (10 + autoregressive(0.8, 1, 300)[0])
    found = negative_interval(series)
    effective = effective_size(series)
    assert effective < 60
    assert found.interval.value == (0.0 if sign > 0 else 1.0)
    assert found.interval.method == "Wilson, effective steps"
    # z² / (n + z²), Wilson's bound where nothing was found.
    bound = 1.959964**2 / (effective + 1.959964**2)
    width = found.interval.high - found.interval.low
    assert width == pytest.approx(bound, rel=1e-6)


def test_shares_stay_between_0_and_1() -> None:
    series = autoregressive(0.9, 1, 200, seed=5)[0] + 2.5
    found = negative_interval(series).interval
    assert 0 < found.value < 0.3
    assert 0 <= found.low < found.value < found.high <= 1


def test_missing_rows_are_no_negative_ones() -> None:
    series = np.random.default_rng(0).standard_normal(100)
    holes = np.insert(series, [10, 50], np.nan)
    assert negative_interval(holes).left_out == 2
    assert negative_interval(holes).interval == negative_interval(series).interval
    assert negative_interval(np.full(20, np.nan)).interval.method == "none: fewer than 8 steps"
