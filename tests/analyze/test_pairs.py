"""Quantities on pairs of steps and the noise of batches, beside dense float64 numpy."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.linalg import norm
from numpy.typing import NDArray

from analyze.pair_summary import pair_summary
from analyze.pairs import PAIR_QUANTITIES
from analyze.pairs_of_run import measure_pairs
from analyze.tables import measure_run
from tests.analyze.dense import GROUPS
from tests.analyze.recorded import OPTIMIZER, TABLE, random_run, read_rows, write_run

Values = NDArray[Any]

KEYS = (
    *("run", "stream", "step", "step_to", "lag", "batch", "group", "reference"),
    "num_parameters",
)
DOUBLE = replace(TABLE, parameters=tuple(replace(t, dtype="F64") for t in TABLE.parameters))
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
        assert [row[name] for name in KEYS] == [other[name] for name in KEYS]
        numbers = {name: other[name] for name in [q.name for q in PAIR_QUANTITIES]}
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


def test_gradient_descent_on_a_quadratic_has_its_closed_form(tmp_path: Path) -> None:
    """On f(w) = Σ hᵢ wᵢ² / 2 every coordinate is (1 - η hᵢ)^t times its start, and g = h w."""
    h, eta = np.geomspace(0.1, 2.0, 25), 0.3
    start = np.random.default_rng(6).standard_normal(25)
    w = start * (1 - eta * h) ** np.arange(12)[:, None]
    streams = {"weights": w, "full": h * w}
    path = write_run(tmp_path / "run.zarr", streams, table=DOUBLE)
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


def test_the_angle_between_close_iterates_keeps_its_digits(tmp_path: Path) -> None:
    """Beside the cosine, which is 1 to the last digit, and where two are far or opposite."""
    draw = np.random.default_rng(11).standard_normal
    start = draw(25)
    aside = draw(25)
    aside -= start * (start @ aside) / (start @ start)
    aside *= norm(start) / norm(aside)
    tangents = [0.0, 1e-9, 1e-5, 1.0, 1e5]
    rows = [start + tangent * aside for tangent in tangents]
    path = write_run(
        tmp_path / "run.zarr", {"weights": np.array([*rows, -2 * start, 0 * start])}, table=DOUBLE
    )
    found = {
        (row["step"], row["step_to"]): row
        for row in measure(path, streams=["weights"], references=["step:0"]).to_pylist()
    }
    for row, tangent in enumerate(tangents[1:], 1):
        expected = math.degrees(math.atan(tangent))
        # The tangent 1e-9 has seven digits in the float64 numbers of the rows.
        assert found[0, row]["angle_weights_deg"] == pytest.approx(expected, rel=1e-6)
    assert found[0, 1]["cosine_weights"] == pytest.approx(1, abs=1e-15)
    # There the sides tell no more than the root of float64's precision, 1e-8 rad.
    assert found[0, 5]["angle_weights_deg"] == pytest.approx(180, abs=1e-5)
    assert found[0, 5]["cosine_weights"] == pytest.approx(-1, abs=1e-15)
    assert found[0, 5]["dot_weights"] == pytest.approx(-2 * start @ start, rel=1e-14)
    for step in range(6):
        assert math.isnan(found[step, 6]["cosine_weights"])
        assert math.isnan(found[step, 6]["angle_weights_deg"])
        # The error is that of the larger square.
        assert found[step, 6]["dot_weights"] == pytest.approx(
            0, abs=1e-15 * found[step, 6]["dist"] ** 2
        )


def test_iterates_are_compared_without_a_reference(run: Path) -> None:
    """What depends on w alone is the same beside every reference, and for every stream."""
    names = ["dot_weights", "cosine_weights", "angle_weights_deg"]
    seen: dict[tuple[int, int], list[float]] = {}
    table = measure(run, references=["final", "step:0"], streams=["fixed", "updates", "weights"])
    for row in table.to_pylist():
        values = [row[name] for name in names]
        assert seen.setdefault((row["step"], row["step_to"]), values) == pytest.approx(
            values, rel=1e-10
        )
    assert len(seen) == 21
