"""Quantities on pairs of steps and the noise of batches, beside dense float64 numpy."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.linalg import norm
from numpy.typing import NDArray

from analyze.noise import batch_noise
from analyze.pair_summary import pair_summary
from analyze.pair_table import noise_schema, pair_schema
from analyze.pairs import PAIR_QUANTITIES, SUMS
from analyze.pairs_of_run import MOST_ROWS_BY_DEFAULT, measure_pairs
from analyze.tables import measure_run
from capture.store import InputError, UnfinishedError, UnknownNameError, UsageError
from tests.analyze.dense import GROUPS
from tests.analyze.recorded import OPTIMIZER, TABLE, random_run, read_rows, write_run

Values = NDArray[Any]

COLUMNS = [
    *("run", "stream", "step", "step_to", "lag", "batch", "group", "reference", "num_parameters"),
    *("dist", "cosine_dist", "dot_weights", "cosine_weights", "angle_weights_deg"),
    *("dot_grad", "cosine_grad", "sim", "gamma", "gamma_null", "gamma_back", "smoothness"),
    *("dot_step", "cosine_step"),
]
# Of cosines: sums of 25 products of numbers near 1, put together from a few terms.
CLOSE: dict[str, Any] = {"rel": 1e-10, "abs": 1e-12}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("pairs") / "run.zarr")


def measure(path: Path, **options: Any) -> pa.Table:
    options.setdefault("by", ["model"])
    return measure_pairs(str(path), **options)[options["by"][-1]].pairs


def cosine(a: Values, b: Values) -> float:
    """NaN where one of them is 0."""
    lengths = norm(a) * norm(b)
    return float(a @ b / lengths) if lengths else math.nan


def orthogonal(g: Values, e: Values) -> Values:
    return g - e * (g @ e) / (e @ e) if e.any() else np.full_like(g, np.nan)


def point_pair(wi: Values, wj: Values, ref: Values) -> dict[str, float]:
    """Every quantity of two iterates, one line each, by its definition."""
    return {
        "dist": float(norm(wi - wj)),
        "cosine_dist": cosine(wi - ref, wj - ref),
        "dot_weights": float(wi @ wj),
        "cosine_weights": cosine(wi, wj),
        "angle_weights_deg": math.degrees(math.acos(np.clip(cosine(wi, wj), -1, 1))),
    }


def gradient_pair(gi: Values, gj: Values, wi: Values, wj: Values, ref: Values) -> dict[str, float]:
    """Every quantity of two gradients, one line each, by its definition."""
    ei, ej = wi - ref, wj - ref
    return {
        **point_pair(wi, wj, ref),
        "dot_grad": float(gi @ gj),
        "cosine_grad": cosine(gi, gj),
        "sim": cosine(orthogonal(gi, ei), orthogonal(gj, ej)),
        "gamma": cosine(gi, wi - wj),
        "gamma_back": cosine(gj, wj - wi),
    }


def check(row: dict[str, Any], expected: dict[str, float], **tolerance: float) -> None:
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, nan_ok=True, **(tolerance or CLOSE)), (name, row)
    absent = {q.name for q in PAIR_QUANTITIES} - set(expected) - {"gamma_null"}
    assert all(math.isnan(row[name]) for name in absent)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("by", ["model", "layer", "tensor"])
def test_every_quantity_is_that_of_dense_numpy(tmp_path: Path, by: str, maximize: bool) -> None:
    optimizer = {**OPTIMIZER, "maximize": maximize}
    path = random_run(tmp_path / "run.zarr", optimizer=optimizer)
    rows = read_rows(path)
    references = {"final": rows["weights"][-1], "mean:2": rows["weights"][-2:].mean(axis=0)}
    clip, sign = rows.scalar("clip_factor"), -1 if maximize else 1
    table = measure(path, references=list(references), by=["model", by])
    seen = set()
    for row in table.to_pylist():
        at = GROUPS[by][row["group"]]
        i, j, b = row["step"], row["step_to"], row["batch"]
        seen.add((row["stream"], i, j, b, row["group"], row["reference"]))
        assert (row["lag"], row["num_parameters"]) == (j - i, len(at))
        wi, wj = rows["weights"][i][at], rows["weights"][j][at]
        ref, stored = references[row["reference"]][at], rows[row["stream"]]
        if row["stream"] == "updates":
            ui, uj = stored[i][at], stored[j][at]
            check(
                row, {**point_pair(wi, wj, ref), "dot_step": ui @ uj, "cosine_step": cosine(ui, uj)}
            )
            continue
        if row["stream"] == "minibatch":
            gi, gj = (sign * stored[t][at] / (1 if np.isnan(clip[t]) else clip[t]) for t in (i, j))
            expected = gradient_pair(gi, gj, wi, wj, ref)
        else:
            gi, gj = sign * stored[i, b][at], sign * stored[j, b][at]
            expected = gradient_pair(gi, gj, wi, wj, ref)
            expected["smoothness"] = norm(gi - gj) / norm(wi - wj)
        if len(at) == 1:  # nothing is orthogonal there, but for what rounding leaves of it
            expected["sim"] = math.nan
        check(row, expected)
    pairs = {"minibatch": 15, "updates": 15, "fixed": 21 * 3}
    assert len(seen) == sum(pairs.values()) * len(GROUPS[by]) * 2 == table.num_rows
    assert {stream for stream, *_ in seen} == set(pairs)


def test_where_nothing_is_orthogonal_to_the_way_there_is_no_sim(run: Path) -> None:
    # One coordinate: every gradient is parallel to every distance.
    table = measure(run, by=["tensor"]).to_pylist()
    scale = [row for row in table if row["group"] == "scale" and row["stream"] == "fixed"]
    assert all(math.isnan(row["sim"]) for row in scale)
    assert all(abs(row["gamma"]) == pytest.approx(1) for row in scale)


def test_weights_alone_have_distances(run: Path) -> None:
    table = measure(run, streams=["weights"], references=["step:0"])
    w = read_rows(run)["weights"]
    assert table.num_rows == 21
    for row in table.to_pylist():
        i, j = row["step"], row["step_to"]
        check(row, point_pair(w[i], w[j], w[0]))
        assert row["batch"] is None


def test_lags_choose_rows_of_the_same_table(run: Path) -> None:
    everything = measure(run, references=["final", "step:1"]).to_pylist()
    chosen = measure(run, references=["final", "step:1"], lags=[1, 4, 99]).to_pylist()
    expected = [row for row in everything if row["lag"] in (1, 4)]
    assert len(chosen) == len(expected) == (5 + 2 + 5 + 2 + 3 * (6 + 3)) * 2
    for row, other in zip(chosen, expected, strict=True):
        assert [row[name] for name in COLUMNS[:9]] == [other[name] for name in COLUMNS[:9]]
        numbers = {name: other[name] for name in COLUMNS[9:]}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, nan_ok=True, **CLOSE)


def test_scaling_a_gradient_scales_products_and_no_cosine(tmp_path: Path) -> None:
    draw = np.random.default_rng(5).standard_normal
    weights, gradients = draw((5, 25)).astype("f4"), draw((5, 2, 25)).astype("f4")
    one = write_run(tmp_path / "one.zarr", {"weights": weights, "fixed": gradients})
    four = write_run(tmp_path / "four.zarr", {"weights": weights, "fixed": 4 * gradients})
    left, right = (measure(path).drop_columns("run").to_pydict() for path in (one, four))
    factors = {"dot_grad": 16, "smoothness": 4}
    for name, values in left.items():
        if name in ("stream", "group", "reference", "batch"):
            assert values == right[name]
        else:
            scaled = np.array(values) * factors.get(name, 1)
            np.testing.assert_allclose(right[name], scaled, rtol=1e-12, atol=1e-12)


# Closed forms ---------------------------------------------------------------------------------


def test_gradient_descent_on_a_quadratic_has_its_closed_form(tmp_path: Path) -> None:
    """On f(w) = Σ hᵢ wᵢ² / 2 every coordinate is (1 - η hᵢ)^t times its start, and g = h w."""
    h, eta = np.geomspace(0.1, 2.0, 25), 0.3
    start = np.random.default_rng(6).standard_normal(25)
    w = start * (1 - eta * h) ** np.arange(12)[:, None]
    table = TABLE.__class__(
        tuple(t.__class__(t.name, t.shape, "F64", t.group) for t in TABLE.parameters)
    )
    streams = {"weights": w, "full": h * w}
    path = write_run(tmp_path / "run.zarr", streams, table=table)
    for row in measure(path).to_pylist():
        t, lag = row["step"], row["lag"]
        shrink = (1 - eta * h) ** lag
        ahead = start * (1 - eta * h) ** t
        expected = cosine(h * ahead, ahead * (1 - shrink))
        assert row["gamma"] == pytest.approx(expected, abs=1e-9)
        later = ahead * shrink
        assert row["gamma_back"] == pytest.approx(-cosine(h * later, ahead - later), abs=1e-9)
        lipschitz = norm(h * ahead * (1 - shrink)) / norm(ahead * (1 - shrink))
        assert row["smoothness"] == pytest.approx(lipschitz, rel=1e-9)
        assert 0.1 <= row["smoothness"] <= 2.0
        if lag == 1:  # u = -η g exactly
            assert row["gamma"] == pytest.approx(1, abs=1e-12)


def test_the_null_of_orthogonal_gradients_is_what_they_have(tmp_path: Path) -> None:
    """SGD with momentum on gradients along different axes: γ is its null at every pair."""
    total, lr, momentum = 12, 0.1, 0.9
    gradients = np.zeros((total, 25))
    gradients[np.arange(total), np.arange(total)] = np.linspace(1, 3, total)
    w, buffer = [np.zeros(25)], np.zeros(25)
    for g in gradients:
        buffer = momentum * buffer + g
        w.append(w[-1] - lr * buffer)
    scalars = {
        "lr": np.full(total, lr),
        "clip_factor": np.full(total, 0.5),
        "grad_norm_by_tensor": np.stack(
            [norm(part, axis=1) for part in np.split(gradients, TABLE.offsets[1:-1], axis=1)], 1
        ),
        "group_lr": np.full((total, 2), lr),
        "group_momentum": np.full((total, 2), momentum),
        "group_weight_decay": np.zeros((total, 2)),
    }
    streams = {"weights": np.float32(w), "minibatch": np.float32(gradients)}
    path = write_run(tmp_path / "run.zarr", streams, scalars=scalars)
    for row in measure(path).to_pylist():
        # Stored in float32: 1e-7 of each number.
        assert row["gamma"] == pytest.approx(row["gamma_null"], abs=1e-6)
        assert row["gamma_back"] == pytest.approx(0, abs=1e-6)
        assert row["gamma_null"] > 0.1


def test_there_is_no_null_where_there_is_none(tmp_path: Path) -> None:
    optimizer = {**OPTIMIZER, "name": "Adam", "kind": "other"}
    tables = measure_pairs(str(random_run(tmp_path / "run.zarr", optimizer=optimizer)))["model"]
    assert np.isnan(tables.pairs["gamma_null"].to_numpy()).all()
    assert "no null: Adam has no closed form" in " ".join(pair_summary(tables).split())


def test_against_a_later_row_they_are_what_compute_finds_with_that_reference(run: Path) -> None:
    """γ(t, s), its null and the distance are the columns of `compute` with w* = w_s."""
    later = measure_run(str(run), ["step:5"], streams=["minibatch", "fixed"])["model"]
    expected = {(r["stream"], r["step"], r["batch"]): r for r in later.to_pylist()}
    columns = {"dist": "norm_dist", "gamma": "cosine", "gamma_null": "cosine_null"}
    found = [r for r in measure(run).to_pylist() if r["step_to"] == 5 and r["stream"] != "updates"]
    assert len(found) == 5 + 15
    for row in found:
        other = expected[row["stream"], row["step"], row["batch"]]
        for name, column in columns.items():
            assert row[name] == pytest.approx(other[column], nan_ok=True, **CLOSE)
        assert math.isnan(row["gamma_null"]) == (row["stream"] == "fixed")


def test_a_stream_without_rows_stands_beside_others(tmp_path: Path) -> None:
    streams = {"weights": np.eye(3, 25, dtype="f4"), "minibatch": np.empty((0, 25), "f4")}
    path = write_run(tmp_path / "run.zarr", streams)
    tables = measure_pairs(str(path), streams=["minibatch", "weights"])["model"]
    assert tables.pairs["stream"].unique().to_pylist() == ["weights"]
    assert "minibatch: no two rows" in pair_summary(tables)


# Noise ----------------------------------------------------------------------------------------


def test_noise_of_batches_is_that_of_the_definitions(run: Path) -> None:
    noise = measure_pairs(str(run), by=["model", "layer"])["layer"].noise
    g = read_rows(run)["fixed"]
    assert noise.num_rows == 7 * 3
    for row in noise.to_pylist():
        own = g[row["step"]][:, GROUPS["layer"][row["group"]]]
        different = [own[a] @ own[b] for a in range(3) for b in range(3) if a != b]
        squares = [batch @ batch for batch in own]
        variance = np.mean(squares) - np.mean(different)
        expected = {
            "noise_corrected": np.mean(different),
            "square_of_mean": norm(own.mean(axis=0)) ** 2,
            "mean_of_squares": np.mean(squares),
            "norm_grad_min": norm(own, axis=1).min(),
            "norm_grad_max": norm(own, axis=1).max(),
            # The unbiased variance of the batches, summed over the coordinates.
            "noise_variance": own.var(axis=0, ddof=1).sum(),
            "noise_scale": variance / np.mean(different) if np.mean(different) > 0 else math.nan,
        }
        assert {name: row[name] for name in expected} == pytest.approx(
            expected, nan_ok=True, **CLOSE
        )
        assert (row["stream"], row["batches"]) == ("fixed", 3)


def test_the_corrected_norm_is_unbiased_and_the_plain_one_is_not() -> None:
    """1,000 steps of 5 batches around a gradient of norm 1, with noise of variance 40."""
    rng = np.random.default_rng(7)
    true = np.full(10, np.sqrt(0.1))
    g = true + 2 * rng.standard_normal((1000, 5, 10))
    found = batch_noise((g @ g.swapaxes(1, 2))[..., None])
    corrected = found["noise_corrected"][:, 0]
    error = corrected.std() / np.sqrt(1000)
    assert abs(corrected.mean() - 1) < 4 * error < 1
    assert (corrected < 0).any()
    assert found["square_of_mean"].mean() == pytest.approx(1 + 40 / 5, rel=0.1)
    assert found["noise_variance"].mean() == pytest.approx(40, rel=0.05)


def test_one_batch_has_no_products_of_different_ones() -> None:
    found = batch_noise(np.full((2, 1, 1, 1), 4.0))
    assert np.isnan([found["noise_corrected"], found["noise_scale"]]).all()
    assert found["norm_grad_min"].tolist() == [[2.0], [2.0]]


def test_one_nan_batch_leaves_no_noise_of_its_step_alone(tmp_path: Path) -> None:
    streams = {"weights": np.ones((3, 25), "f4"), "fixed": np.ones((3, 2, 25), "f4")}
    streams["fixed"][1, 0, 3] = np.nan
    path = write_run(tmp_path / "run.zarr", streams)
    corrected = measure_pairs(str(path))["model"].noise["noise_corrected"].to_pylist()
    assert [math.isnan(value) for value in corrected] == [False, True, False]


# Tables ---------------------------------------------------------------------------------------


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


# What a user can do wrong ---------------------------------------------------------------------


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
