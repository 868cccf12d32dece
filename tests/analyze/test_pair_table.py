"""The tables of pairs: columns, facts, what is not a number, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from analyze.pair_summary import pair_summary
from analyze.pair_table import concatenate_pairs, noise_schema, pair_schema
from analyze.pairs import PAIR_QUANTITIES, SUMS
from analyze.pairs_of_run import MOST_ROWS_BY_DEFAULT, measure_pairs
from capture.store import InputError, UnfinishedError, UnknownNameError, UsageError
from tests.analyze.recorded import random_run, write_run

COLUMNS = [
    *("run", "stream", "step", "step_to", "lag", "batch", "group", "reference", "num_parameters"),
    *("dist", "cosine_dist", "dot_weights", "cosine_weights", "angle_weights_deg"),
    *("dot_grad", "cosine_grad", "sim", "gamma", "gamma_null", "gamma_back", "smoothness"),
    *("dot_step", "cosine_step"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("pairs") / "run.zarr")


def measure(path: Path, **options: Any) -> pa.Table:
    options.setdefault("by", ["model"])
    return measure_pairs(str(path), **options)[options["by"][-1]].pairs


def test_columns_have_units_and_formulas(run: Path) -> None:
    tables = measure_pairs(str(run))["model"]
    assert tables.pairs.column_names == COLUMNS
    assert tables.pairs.schema.equals(pair_schema(), check_metadata=False)
    assert tables.noise.schema.equals(noise_schema(), check_metadata=False)
    for field in (*pair_schema(), *noise_schema()):
        assert set(field.metadata) == {b"unit", b"formula"}
        assert field.metadata[b"formula"]
    facts = json.loads(tables.pairs.schema.metadata[b"straightway"])
    assert facts["runs"][0]["pairs"] == {"fixed": 21, "minibatch": 15, "updates": 15}
    assert (facts["kind"], facts["table"]) == ("pairs", 1)
    of_noise = json.loads(tables.noise.schema.metadata[b"straightway"])
    assert (of_noise["kind"], of_noise["table"]) == ("noise", 1)
    assert facts["nan"]["dist"] == 0
    # At w_T e is 0: the last row of `fixed`, in pairs with six others, three batches each.
    assert facts["nan"]["sim"] == facts["nan"]["cosine_dist"] == 18


def test_every_quantity_needs_sums_that_are_explained() -> None:
    assert {name for quantity in PAIR_QUANTITIES for name in quantity.needs} <= set(SUMS)
    assert len({quantity.name for quantity in PAIR_QUANTITIES}) == len(PAIR_QUANTITIES)


def test_groupings_at_once_are_what_they_are_alone(run: Path) -> None:
    together = measure_pairs(str(run), by=["model", "tensor"])
    for by, tables in together.items():
        alone = measure_pairs(str(run), by=[by])[by].pairs
        for name in COLUMNS[9:]:
            np.testing.assert_allclose(tables.pairs[name], alone[name], rtol=1e-10, atol=1e-12)


def test_nan_spoils_its_own_pairs_and_no_others(tmp_path: Path) -> None:
    draw = np.random.default_rng(8).standard_normal
    streams = {"weights": draw((6, 25)).astype("f4"), "fixed": draw((5, 2, 25)).astype("f4")}
    streams["weights"][1, 2] = np.nan
    streams["fixed"][3, 1, 7] = np.nan
    path = write_run(tmp_path / "run.zarr", streams)
    for row in measure(path, by=["tensor"], references=["step:4"]).to_pylist():
        pair, first = (row["step"], row["step_to"]), row["group"] == "body.0.weight"
        weights, gradient = first and 1 in pair, first and 3 in pair and row["batch"] == 1
        assert math.isnan(row["dist"]) == weights
        assert math.isnan(row["cosine_grad"]) == gradient
        assert math.isnan(row["gamma"]) == (
            weights or (first and row["step"] == 3 and row["batch"] == 1)
        )
        assert math.isnan(row["smoothness"]) == (weights or gradient)


def test_an_unfinished_run_has_no_final_iterate(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", complete=False)
    with pytest.raises(UnfinishedError, match="has not finished"):
        measure(path)
    assert measure(path, references=["step:0"]).num_rows == 15 + 15 + 63


def test_many_rows_are_asked_for(tmp_path: Path) -> None:
    rows = MOST_ROWS_BY_DEFAULT + 1
    path = write_run(tmp_path / "run.zarr", {"weights": np.zeros((rows, 25), "f4")})
    with pytest.raises(UsageError, match=r"201 rows of 'weights' make 20,100 pairs") as caught:
        measure(path)
    assert "--lags 1,2,4,8,16,32" in str(caught.value)
    assert measure(path, lags=[200]).num_rows == 1
    assert measure(path, lags="all").num_rows == 20_100


def test_a_table_beyond_memory_is_refused_before_anything_is_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analyze.pairs_of_run._MOST_TABLE_ROWS", 90)
    with pytest.raises(UsageError, match="the table would have 93 rows, more than 90"):
        measure(run)
    assert measure(run, lags=[1]).num_rows == 28


def test_lags_that_no_rows_have_are_refused(run: Path) -> None:
    with pytest.raises(InputError, match="are 50 or 70 updates apart") as caught:
        measure(run, lags=[70, 50])
    assert "1,2,4 updates apart are some" in str(caught.value)


def test_one_row_makes_no_pair(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.zarr", {"weights": np.ones((1, 25), "f4")})
    with pytest.raises(InputError, match="no two rows to compare in 'weights'"):
        measure(path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"references": ["finale"]}, UsageError),
        ({"references": ["step:99"]}, UnknownNameError),
        ({"streams": ["heldout"]}, UnknownNameError),
        ({"lags": [0]}, UsageError),
        ({"workers": 0}, UsageError),
    ],
)
def test_nonsense_is_refused(run: Path, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        measure(run, **options)


def test_the_summary_tells_medians_by_lag(run: Path) -> None:
    tables = measure_pairs(str(run), lags=[1, 6])["model"]
    text = pair_summary(tables)
    dist = np.median([r["dist"] for r in tables.pairs.to_pylist() if r["lag"] == 6])
    (line,) = [line.split() for line in text.splitlines() if line.split()[:2] == ["6", "3"]]
    assert line[2] == f"{dist:.3g}"
    assert "minibatch, updates" not in text
    assert "γ⁰: exact for SGD with momentum" in text
    assert max(map(len, text.splitlines())) <= 110


def test_the_kind_of_table_is_told_of_several_runs_too(run: Path) -> None:
    both = concatenate_pairs([measure_pairs(str(run), streams=["fixed"])["model"]] * 2)
    for table, kind in ((both.pairs, "pairs"), (both.noise, "noise")):
        assert json.loads(table.schema.metadata[b"straightway"])["kind"] == kind
