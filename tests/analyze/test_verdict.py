"""The verdict: which rows count where, and what it says in words."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analyze.columns import schema
from analyze.tables import concatenate, measure_run
from analyze.verdict import part_of, summarise
from analyze.verdict_text import verdict
from capture.store import Tensor, TensorTable, open_run
from tests.analyze.recorded import Values, random_run, write_run

TOTAL = 100


def table_of(
    cosine: Values,
    null: float,
    reason: str,
    *,
    stream: str = "minibatch",
    reference: str = "final",
    total: int = TOTAL,
    batches: int | None = None,
) -> pa.Table:
    """A table of the whole model at steps 0, 1, …, each with all batches; all else NaN."""
    count = len(cosine)
    numbers = np.tile(np.arange(batches or 1), count // (batches or 1))
    column = "cosine_update" if stream == "updates" else "cosine"
    filled = {
        "run": ["runs/a.zarr"] * count,
        "stream": [stream] * count,
        "group": ["model"] * count,
        "reference": [reference] * count,
        "step": np.arange(count) // (batches or 1),
        "num_parameters": np.full(count, 1234),
        "nonfinite": np.zeros(count, np.int64),
        column: cosine,
        "cosine_null": np.full(count, null),
        "batch": pa.nulls(count, pa.int64()) if batches is None else numbers,
    }
    arrays = [
        pa.array(filled[field.name] if field.name in filled else np.full(count, np.nan), field.type)
        for field in schema()
    ]
    document = {
        "runs": [{"run": "runs/a.zarr", "final_step": total, "num_parameters": 1234}],
        "null": {f"runs/a.zarr|{reference}": reason},
    }
    table = pa.Table.from_arrays(arrays, schema=schema())
    return table.replace_schema_metadata({"straightway": json.dumps(document)})


def line_of(text: str, part: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if f" {part} " in line)


def test_the_parts_are_thirds_of_what_comes_before_the_end_effect() -> None:
    parts = part_of(np.arange(101), "final", 100)
    assert [
        int(np.flatnonzero(parts == part)[0]) for part in ("early", "middle", "late", "end")
    ] == [
        *(0, 30, 60, 90),
    ]
    assert parts[-1] == "end"


def test_a_reference_on_the_way_has_its_own_end_and_an_after() -> None:
    parts = part_of(np.arange(101), "step:50", 100)
    assert [int((parts == part).sum()) for part in ("early", "middle", "late", "end", "after")] == [
        *(15, 15, 15, 6, 50),
    ]


def test_a_reference_elsewhere_has_no_end_effect() -> None:
    parts = part_of(np.arange(99), "file:other.safetensors", 99)
    assert [int((parts == part).sum()) for part in ("early", "middle", "late")] == [33, 33, 33]


def test_medians_quantiles_ratio_and_fraction_of_each_part() -> None:
    # 0.00 … 0.29 early, all -0.1 in the middle, 0.4 late, and 1 in the tail that may not count.
    early = np.arange(30) / 100
    cosine = np.concatenate([early, np.full(30, -0.1), np.full(30, 0.4), np.ones(10)])
    text = verdict(table_of(cosine, 0.25, "exact for SGD"))
    # A straight line is worth few independent steps: too few for an interval of its mean.
    assert line_of(text, "early")[:9] == [
        *("minibatch", "early", "30", "(3)", "0.145", "0.25", "0.58", "[0.116,", "1.04]"),
    ]
    # Of the share of 30 rows below 0, which is 0, Wilson's at 3 effective steps: up to 57 %.
    assert line_of(text, "early")[9:] == ["–", "0", "%", "[0,", "57.2]"]
    assert line_of(text, "middle")[2] == "30"
    assert "100 %" in next(line for line in text.splitlines() if " middle " in line)
    assert "1.6 [1.6, 1.6]" in next(line for line in text.splitlines() if " late " in line)
    assert "left out: the last 10 % before w*, t = 90 to 100 (10 rows)" in text
    assert "runs/a.zarr   w* = final   T = 100 updates   D = 1,234" in text
    assert "γ⁰: exact for SGD" in text
    assert "γ > 0: a step along -g starts out towards w*." in text
    assert "About other seeds this says nothing" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_interval_is_that_of_independent_rows_where_they_are() -> None:
    """Early noise of known mean: the interval is that of Student's t, within a tenth or so."""
    draw = np.random.default_rng(3).standard_normal
    cosine = 0.2 + 0.1 * draw(1000)
    (found,) = summarise(table_of(cosine, 0.1, "exact", total=1000))
    part = found.parts[0]
    rows = cosine[:300]
    assert part.mean.interval.value == pytest.approx(rows.mean())
    half = 1.96 * rows.std(ddof=1) / np.sqrt(300)
    assert part.mean.interval.high - rows.mean() == pytest.approx(half, rel=0.25)
    assert part.below.interval.value == (rows < 0).mean()
    assert 0 < part.below.interval.low < part.below.interval.value < part.below.interval.high


def test_batches_of_one_step_are_no_independent_steps() -> None:
    """The same series in each of 4 batches: four times the rows, the same interval."""
    series = 0.2 + 0.1 * np.random.default_rng(3).standard_normal(1000)
    one = summarise(table_of(series, 0.1, "exact", total=1000))[0].parts[0]
    four = summarise(table_of(np.repeat(series, 4), 0.1, "exact", total=1000, batches=4))[0].parts[
        0
    ]
    assert (one.n, four.n) == (300, 1200)
    assert one.mean.effective == pytest.approx(four.mean.effective)
    width = one.mean.interval.high - one.mean.interval.low
    assert four.mean.interval.high - four.mean.interval.low == pytest.approx(width, rel=0.1)


def test_no_null_is_said_with_its_reason() -> None:
    text = verdict(table_of(np.full(100, 0.1), np.nan, "no null: Adam has no closed form"))
    line = line_of(text, "early")
    assert line[:3] == ["minibatch", "early", "30"]
    assert line.count("–") == 3
    assert "γ⁰: no null: Adam has no closed form" in text


def test_undefined_rows_are_left_out_and_counted() -> None:
    cosine = np.full(100, 0.1)
    cosine[[3, 40]] = np.nan
    text = verdict(table_of(cosine, 0.1, "exact"))
    assert line_of(text, "early")[2] == "29"
    assert line_of(text, "middle")[2] == "29"
    assert "undefined: 2 rows" in text


def test_an_update_towards_the_reference_counts_as_positive() -> None:
    text = verdict(table_of(np.full(100, -0.7), np.nan, "exact", stream="updates"))
    (found,) = summarise(table_of(np.full(100, -0.7), np.nan, "exact", stream="updates"))
    assert found.parts[0].mean.interval.value == pytest.approx(0.7)
    assert found.parts[0].negative == 0
    assert "updates: -cos(u, e)" in text


@pytest.mark.parametrize("count", [1, 5])
def test_a_short_run_shows_empty_parts_as_such(count: int) -> None:
    text = verdict(table_of(np.full(count, 0.5), 0.1, "exact"))
    assert line_of(text, "late") == ["minibatch", "late", "0", *("–",) * 5]


def test_a_run_that_has_not_finished_says_so(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", complete=False)
    text = verdict(measure_run(str(path), ["step:5"])["model"])
    assert "T = 6 updates so far, the run has not finished" in text


def test_a_run_of_weights_alone_has_no_verdict(tmp_path: Path) -> None:
    weights = np.arange(75).reshape(3, 25).astype("f4")
    path = write_run(tmp_path / "run.zarr", {"weights": weights})
    text = verdict(measure_run(str(path))["model"])
    assert "no gradients or updates" in text
    assert "γ" not in text


def test_one_row_is_one_row() -> None:
    cosine = np.full(91, 0.1)
    cosine[3] = np.nan
    text = verdict(table_of(cosine, 0.1, "exact"))
    assert "t = 90 to 100 (1 row);" in text
    assert "undefined: 1 row, left out" in text


def test_a_long_reason_goes_on_in_the_next_line() -> None:
    reason = "no null: " + "a word and then another " * 10 + "end"
    text = verdict(table_of(np.full(100, 0.1), np.nan, reason))
    first = next(n for n, line in enumerate(text.splitlines()) if line.startswith("γ⁰: no null"))
    assert text.splitlines()[first + 1].startswith("  ")
    assert max(map(len, text.splitlines())) <= 100
    assert f"γ⁰: {reason}" in " ".join(text.split())


def test_a_layer_called_model_is_not_the_whole(tmp_path: Path) -> None:
    """Its rows stand in the same table, under the same name."""
    table = TensorTable(
        (Tensor("model.weight", (3,), "F32", 0), Tensor("head.weight", (22,), "F32", 0))
    )
    draw = np.random.default_rng(0).standard_normal
    streams = {"weights": draw((9, 25)).astype("f4"), "minibatch": draw((8, 25)).astype("f4")}
    path = str(write_run(tmp_path / "run.zarr", streams, table=table))
    whole, layers = measure_run(path, by=["model", "layer"]).values()
    (alone,) = summarise(whole)
    (mixed,) = summarise(concatenate([whole, layers]))
    assert "model" in layers["group"].to_pylist()
    assert repr(mixed.parts) == repr(alone.parts)
    assert summarise(layers) == []


@pytest.mark.parametrize("same", [True, False])
def test_what_lies_before_a_branch_is_no_control(tmp_path: Path, same: bool) -> None:
    """A branch that left at step 4, and a run that only says so."""
    draw = np.random.default_rng(0).standard_normal
    weights = draw((13, 25)).astype("f4")
    main = write_run(
        tmp_path / "main.zarr", {"weights": weights, "minibatch": draw((12, 25)).astype("f4")}
    )
    commits = open_run(main).stream("weights").commits
    parent = {"run": "main", "step": 4, "weights_crc32c": list(commits[4 if same else 5].chunks)}
    branch = draw((5, 25)).astype("f4")
    write_run(tmp_path / "branch.zarr", {"weights": branch}, parent=parent)
    (table,) = measure_run(str(main), [f"run:{tmp_path / 'branch.zarr'}"]).values()
    (found,) = summarise(table)
    parts = {part.name: part.n for part in found.parts}
    text = verdict(table)
    if same:
        # Steps 0 to 3; then 4 to 11 in thirds of the 8 updates from 4 to T = 12.
        assert parts == {"before": 4, "early": 3, "middle": 3, "late": 2}
        assert "before: t < 4, where the branch had not left this run yet" in text
    else:
        assert parts == {"early": 4, "middle": 4, "late": 4}
        assert "before:" not in text
