"""Comparisons: every number against plain pandas, and which rows stand beside each other."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats

from analyze.compare import compare_runs
from analyze.comparison import write_comparison
from analyze.comparison_text import comparison_text
from analyze.tables import concatenate, measure_run, write_table
from analyze.uncertainty import path_interval
from analyze.verdict import part_of
from capture.store.errors import InputError
from tests.analyze.comparable import STEPS_PER_EPOCH, config_of, recorded_run, table_of

SEEDS = (0, 1, 2)
LENGTHS = {"adam": 20, "momentum": 30}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two optimizers, three seeds; the runs of adam are shorter."""
    folder = tmp_path_factory.mktemp("compare")
    return [
        str(recorded_run(folder / f"{optimizer}-{seed}.zarr", optimizer, seed, total=total))
        for optimizer, total in LENGTHS.items()
        for seed in SEEDS
    ]


@pytest.fixture(scope="module")
def rows(runs: list[str]) -> pd.DataFrame:
    """The tables of the runs, with their settings and ratios, by pandas."""
    frames = []
    for run in runs:
        frame = measure_run(run, ["final"])["model"].to_pandas()
        name, _, seed = Path(run).stem.partition("-")
        frames.append(frame.assign(optimizer=name, seed=int(seed), final=LENGTHS[name]))
    frame = pd.concat(frames)
    frame["cosine_ratio"] = frame.cosine / frame.cosine_null
    frame["lolr_ratio"] = frame.lolr / frame.lolr_null
    return frame[frame.step < 0.9 * frame.final]


@pytest.fixture(scope="module")
def found(runs: list[str]) -> pd.DataFrame:
    return compare_runs(runs, ["optimizer"]).table().to_pandas()


def written(folder: Path, *tables: pa.Table) -> list[str]:
    """The paths of these tables as files."""
    paths = [str(folder / f"{number}.parquet") for number in range(len(tables))]
    for table, path in zip(tables, paths, strict=True):
        write_table(table, path)
    return paths


def cell(frame: pd.DataFrame, **wanted: Any) -> Any:
    """The one row of a comparison that has these values, of a group by default."""
    for name, value in {"against": None, **wanted}.items():
        frame = frame[frame[name].isna() if value is None else frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.mark.parametrize("align", ["steps", "epochs"])
@pytest.mark.parametrize("stream", ["minibatch", "fixed"])
@pytest.mark.parametrize("part", ["early", "middle", "late"])
def test_every_number_of_a_group_is_that_of_pandas(
    rows: pd.DataFrame, found: pd.DataFrame, align: str, stream: str, part: str
) -> None:
    # Both optimizers have 4 steps in an epoch: what both have is t < 18, that is epoch < 4.5.
    edges = np.linspace(0, 0.9 * min(LENGTHS.values()), 4)
    number = ["early", "middle", "late"].index(part)
    here = rows[(rows.step >= edges[number]) & (rows.step < edges[number + 1])]
    here = here[here.stream == stream]
    assert set(here.groupby(["optimizer", "seed"]).size()) == {6 if stream == "minibatch" else 12}
    for optimizer, own in here.groupby("optimizer"):
        for name in ("cosine", "lolr", "rsi", "eb", "z", "cosine_ratio", "lolr_ratio"):
            row = cell(
                found,
                **{"align": align, "stream": stream, "part": part, "quantity": name},
                by_optimizer=optimizer,
            )
            numbers = own[name].dropna()
            if not len(numbers):
                assert (row.runs, row.left_out) == (0, len(own))
                assert row.method == "none: no run has a number"
                continue
            means = own.groupby("seed")[name].mean()
            expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
            assert row.value == pytest.approx(means.mean(), rel=1e-10)
            assert (row.low, row.high) == pytest.approx((expected.low, expected.high), rel=1e-8)
            quantiles = numbers.quantile([0.1, 0.9])
            assert (row.q10, row.q90) == pytest.approx(tuple(quantiles), rel=1e-10)
            assert (row.runs, row.rows, row.left_out) == (3, len(own), 0)
            assert row.batches == (1 if stream == "minibatch" else 2)
        share = cell(
            found,
            align=align,
            stream=stream,
            part=part,
            quantity="negative",
            by_optimizer=optimizer,
        )
        expected_share = own.assign(below=own.cosine < 0).groupby("seed").below.mean().mean()
        assert share.value == pytest.approx(expected_share, abs=1e-12)
    scale = 1 if align == "steps" else STEPS_PER_EPOCH
    bounds = cell(
        found, align=align, stream=stream, part=part, quantity="cosine", by_optimizer="adam"
    )
    assert (bounds.start, bounds.stop) == pytest.approx(
        (edges[number] / scale, edges[number + 1] / scale)
    )


def test_groups_of_equal_seeds_are_compared_in_pairs(
    rows: pd.DataFrame, found: pd.DataFrame
) -> None:
    here = rows[(rows.stream == "minibatch") & (rows.step < 6)]
    means = here.groupby(["optimizer", "seed"]).cosine.mean().unstack(0)
    expected = stats.ttest_rel(means.momentum, means.adam).confidence_interval(0.95)
    row = cell(
        found,
        **{"align": "steps", "stream": "minibatch", "part": "early", "quantity": "cosine"},
        against="optimizer=adam",
    )
    assert row.group == "optimizer=momentum"
    assert row.method == "paired t over seeds"
    assert row.runs == 3
    assert row.value == pytest.approx((means.momentum - means.adam).mean(), rel=1e-10)
    assert (row.low, row.high) == pytest.approx((expected.low, expected.high), rel=1e-8)


def test_groups_of_other_seeds_are_compared_by_welch(runs: list[str], rows: pd.DataFrame) -> None:
    comparison = compare_runs(runs[:3] + runs[3:5], ["optimizer"], align="steps", level=0.9)
    row = cell(
        comparison.table().to_pandas(),
        **{"stream": "fixed", "part": "middle", "quantity": "eb"},
        against="optimizer=adam",
    )
    here = rows[(rows.stream == "fixed") & (rows.step >= 6) & (rows.step < 12)]
    means = here.groupby(["optimizer", "seed"]).eb.mean()
    expected = stats.ttest_ind(means["momentum"][:2], means["adam"], equal_var=False)
    bounds = expected.confidence_interval(0.9)
    assert row.method == "Welch's t over runs"
    assert (row.low, row.high) == pytest.approx((bounds.low, bounds.high), rel=1e-8)


def test_no_null_is_said_beside_the_numbers_with_its_reason(runs: list[str]) -> None:
    text = comparison_text(compare_runs(runs, ["optimizer"]))
    assert re.search(r"^early +adam +3 .* no null +no null$", text, re.MULTILINE)
    assert "γ⁰ of optimizer=adam: no null: Adam has no closed form" in text
    assert "γ⁰ of optimizer=momentum: exact for SGD with momentum" in text
    assert "fixed: no null, only the minibatch gradients made the path" in text
    assert "warning: the groups also differ in momentum (–, 0.9): confounded" in text
    assert "at equal epochs, 0 ≤ epoch < 4.5: the same rows" in text
    assert "at equal steps, 0 ≤ t < 18   6 runs" in text
    assert "3 pairs" in text
    assert "T = 20 to 30 updates: compared is what all of the runs have" in text


def test_a_number_that_only_some_runs_have_says_how_many(tmp_path: Path) -> None:
    tables = [
        table_of(
            **{"run": str(seed), "cosine": np.full(100, 0.1 + seed), "null": "exact"},
            cosine_null=np.full(100, np.nan if seed == 2 else 0.1),
            config=config_of("sgd", seed),
        )
        for seed in SEEDS
    ]
    text = comparison_text(compare_runs(written(tmp_path, *tables), ["optimizer"]))
    # Ratios 1 and 11: t of one degree of freedom, 12.706, times 10 / 2.
    assert re.search(r"^early +sgd +3 +1\.1 \[.*\] +6 \[-57\.5, 69\.5\] n=2", text, re.MULTILINE)


def test_the_table_is_the_same_from_runs_and_from_their_tables(
    runs: list[str], tmp_path: Path
) -> None:
    table = concatenate([measure_run(run, ["final"])["model"] for run in runs])
    paths = written(tmp_path, table)
    one, other = compare_runs(runs, ["optimizer"]), compare_runs(paths, ["optimizer"])
    for name in ("one", "other"):
        write_comparison({"one": one, "other": other}[name], tmp_path / f"{name}.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "other.parquet").read_bytes()


# One run in a group


def test_a_group_of_one_run_has_an_interval_within_it_and_says_so(tmp_path: Path) -> None:
    values = 0.3 + 0.1 * np.random.default_rng(0).standard_normal(300)
    tables = [
        table_of("a", values, total=300, config=config_of("adam", 0)),
        table_of("b", values[::-1].copy(), total=300, config=config_of("momentum", 0)),
    ]
    comparison = compare_runs(written(tmp_path, *tables), ["optimizer"], align="steps", seed=3)
    row = cell(comparison.table().to_pandas(), part="early", quantity="cosine", by_optimizer="adam")
    expected = path_interval(values[:90], seed=3)
    assert (row.low, row.value, row.high) == (
        expected.interval.low,
        pytest.approx(values[:90].mean(), rel=1e-12),
        expected.interval.high,
    )
    assert row.method == "block bootstrap within the run"
    assert (row.effective_steps, row.block) == (expected.effective, expected.block)
    text = comparison_text(comparison)
    assert f"({expected.interval.low:.3g}, {expected.interval.high:.3g})" in text
    assert "one run says nothing about another seed" in text
    difference = cell(
        comparison.table().to_pandas(),
        **{"part": "early", "quantity": "cosine", "against": "optimizer=adam"},
    )
    assert math.isnan(difference.low)
    assert difference.method == "none: a group has one run only"


def test_a_share_that_no_row_has_is_no_certainty(tmp_path: Path) -> None:
    tables = [
        table_of(
            f"{optimizer}{seed}",
            np.random.default_rng([seed, shift]).uniform(0.1, 0.2, 90),
            config=config_of(optimizer, seed),
        )
        for shift, optimizer in enumerate(("adam", "sgd"))
        for seed in (0, 1)
    ]
    frame = compare_runs(written(tmp_path, *tables), ["optimizer"]).table().to_pandas()
    row = cell(frame, align="steps", part="early", quantity="negative", by_optimizer="sgd")
    assert (row.value, row.low, row.method) == (0, 0, "Wilson, effective steps")
    # Wilson's z² / (n + z²), n no more than the 60 steps of both runs.
    assert 1.96**2 / (60 + 1.96**2) * 0.999 <= row.high < 0.2


# What stands beside each other


def steps_compared(folder: Path, *tables: pa.Table, **options: Any) -> pd.DataFrame:
    """Compare by `run`; the mean of a quantity that is the step itself tells which rows count."""
    return compare_runs(written(folder, *tables), ["run"], **options).table().to_pandas()


def the_step(steps: Any) -> Any:
    return steps.astype(np.float64)


def test_runs_of_one_length_are_cut_as_the_verdict_cuts_them(tmp_path: Path) -> None:
    tables = [table_of(run, the_step, total=97) for run in ("a", "b-other")]
    tables[1] = table_of("b", lambda steps: steps + 1.0, total=97)
    frame = steps_compared(tmp_path, *tables)
    parts = part_of(np.arange(97), "final", 97)
    for align in ("steps", "epochs"):
        for part in ("early", "middle", "late"):
            row = cell(frame, align=align, part=part, quantity="cosine", by_run="a")
            assert row.rows == (parts == part).sum()
            assert row.value == pytest.approx(np.flatnonzero(parts == part).mean(), rel=1e-12)


def test_runs_of_other_lengths_share_steps_or_epochs(tmp_path: Path) -> None:
    tables = [
        table_of("short", the_step, total=100, steps_per_epoch=5),
        table_of("long", the_step, total=1000, steps_per_epoch=40),
    ]
    frame = steps_compared(tmp_path, *tables)
    for run in ("short", "long"):
        # Before the end effect of the short one: t < 90.
        row = cell(frame, align="steps", part="late", quantity="cosine", by_run=run)
        assert (row.start, row.stop) == (60, 90)
        assert row.value == pytest.approx(np.arange(60, 90).mean())
    # By epochs the short one has 18 before its end effect, the long one 22.5.
    row = cell(frame, align="epochs", part="late", quantity="cosine", by_run="long")
    assert (row.start, row.stop) == pytest.approx((12, 18))
    assert row.value == pytest.approx(np.arange(480, 720).mean())
    row = cell(frame, align="epochs", part="late", quantity="cosine", by_run="short")
    assert row.value == pytest.approx(np.arange(60, 90).mean())


def test_the_end_effect_of_each_run_is_left_out_on_both_axes(tmp_path: Path) -> None:
    # By epochs the short run goes on longer: its own end effect, t ≥ 90, is at epoch 90.
    tables = [
        table_of("short", the_step, total=100, steps_per_epoch=1),
        table_of("long", the_step, total=1000, steps_per_epoch=100),
    ]
    frame = steps_compared(tmp_path, *tables, parts=["all"])
    own = frame[(frame.quantity == "cosine") & frame.against.isna()]
    found = {(row.align, row.by_run): row.rows for row in own.itertuples()}
    assert found == {
        ("steps", "short"): 90,
        ("steps", "long"): 90,
        ("epochs", "short"): 9,
        ("epochs", "long"): 900,
    }


def test_a_reference_elsewhere_has_no_end_effect(tmp_path: Path) -> None:
    reference = "run:other.zarr"
    tables = [
        table_of(run, the_step, total=90, reference=reference, config={"x": run})
        for run in ("a", "b")
    ]
    tables[1] = table_of("b", lambda s: s + 1.0, total=60, reference=reference)
    frame = steps_compared(tmp_path, *tables, align="steps", parts=["late", "all"])
    assert cell(frame, part="all", quantity="cosine", by_run="a").rows == 61  # w_T's step too
    assert cell(frame, part="late", quantity="cosine", by_run="a").rows == 21


def test_what_follows_a_reference_on_the_way_can_be_compared(tmp_path: Path) -> None:
    tables = [table_of("a", the_step, total=100, reference="step:50")]
    tables.append(table_of("b", lambda s: s + 1.0, total=80, reference="step:50"))
    frame = steps_compared(tmp_path, *tables, align="steps", parts=["after", "late"])
    row = cell(frame, part="after", quantity="cosine", by_run="a")
    assert (row.start, row.stop) == (50, 79)
    assert row.value == np.arange(51, 80).mean()
    words = {"cosine_null": np.zeros(100), "lolr_null": np.zeros(100)}
    paths = written(tmp_path, table_of("a", the_step, reference="step:50", **words))
    text = comparison_text(compare_runs(paths, ["run"], align="steps", parts=["after"]))
    assert "null is 0" in text
    assert "no null" not in text
    assert cell(frame, part="late", quantity="cosine", by_run="a").value == np.arange(30, 45).mean()


def test_against_w_0_everything_comes_after(tmp_path: Path) -> None:
    tables = [table_of("a", the_step, reference="step:0"), table_of("b", -np.arange(100.0))]
    frame = steps_compared(tmp_path, *tables[:1], align="steps", parts=["early", "after"])
    assert set(frame.part) == {"after"}
    assert cell(frame, quantity="cosine").rows == 99


def test_a_branch_is_compared_from_where_it_begins(tmp_path: Path) -> None:
    # A branch counts its steps from 0 and goes on in the epochs of its parent.
    tables = [
        table_of("parent", the_step, total=100, steps_per_epoch=10),
        table_of("branch", the_step, total=60, epoch=4 + np.arange(60) / 10),
    ]
    frame = steps_compared(tmp_path, *tables, parts=["all"])
    row = cell(frame, align="epochs", quantity="cosine", by_run="parent")
    assert (row.start, row.stop) == pytest.approx((4, 9))
    assert row.value == np.arange(40, 90).mean()


def test_without_epochs_only_steps_are_compared(tmp_path: Path) -> None:
    tables = [table_of("a", the_step), table_of("b", -np.arange(100.0), steps_per_epoch=None)]
    paths = written(tmp_path, *tables)
    comparison = compare_runs(paths, ["run"])
    assert set(comparison.table().to_pandas()["align"]) == {"steps"}
    assert "at equal epochs: nothing to compare" in comparison_text(comparison)
    with pytest.raises(InputError, match="no rows in common"):
        compare_runs(paths, ["run"], align="epochs")


def test_updates_are_compared_by_the_step_taken(tmp_path: Path) -> None:
    values = -np.linspace(0.1, 0.9, 100)
    tables = [
        table_of(
            run,
            np.full(100, np.nan),
            stream="updates",
            cosine_update=values - shift,
            lolr_update=-values,
        )
        for run, shift in (("a", 0.0), ("b", 0.01))
    ]
    comparison = compare_runs(written(tmp_path, *tables), ["run"], align="steps")
    frame = comparison.table().to_pandas()
    row = cell(frame, part="early", quantity="descent_update", by_run="a")
    assert row.value == pytest.approx(-values[:30].mean())
    assert cell(frame, part="early", quantity="negative", by_run="a").value == 0
    of_null = {
        f"{name}_{what}" for name in ("descent_update", "lolr_update") for what in ("null", "ratio")
    }
    assert set(frame.quantity) == {"descent_update", "lolr_update", "negative"} | of_null
    assert "-cos(u, e)" in comparison_text(comparison)
