"""Streams at different steps, none of them a row number: every column against dense numpy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze.tables import measure_run
from tests.analyze.dense import COLUMNS, GROUPS, PARAMETER_GROUP, dense_gradient, dense_update
from tests.analyze.recorded import SPARSE, TABLE, Values, epoch_of, norms, sparse_run

TOTAL, REFERENCES, MOMENTUM = 8, ("final", "step:3", "mean:2"), 0.9


@pytest.fixture(scope="module")
def dense() -> dict[str, Values]:
    draw = np.random.default_rng(11).standard_normal
    size = TABLE.num_parameters
    # Every step has its own length, so that no row can stand in for another.
    lengths = (1 + np.arange(TOTAL + 1) ** 1.5)[:, None]
    return {
        "weights": draw((TOTAL + 1, size)).astype("f4"),
        "minibatch": (draw((TOTAL, size)) * lengths[:-1]).astype("f4"),
        "updates": (draw((TOTAL, size)) / lengths[:-1]).astype("f4"),
        "fixed": draw((TOTAL + 1, 3, size)).astype("f4"),
    }


@pytest.fixture(scope="module")
def run(dense: dict[str, Values], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_run(tmp_path_factory.mktemp("sparse") / "run.zarr", dense)


def decay_of(step: int) -> Values:
    """λ of each coordinate, as `sparse_run` records it; at w_T that of the last update."""
    value = min(step, TOTAL - 1) + 1
    return np.array([value / 100, value / 70, 0.0])[PARAMETER_GROUP]


def reference_of(dense: dict[str, Values], text: str) -> Values:
    w = dense["weights"].astype(np.float64)
    return {"final": w[8], "step:3": w[3], "mean:2": (w[7] + w[8]) / 2}[text]


def orthogonal_path(size: float, lengths: Values, group: int) -> tuple[Values, Values]:
    """One tensor under SGD with gradients along axes of their own: gradients and weights."""
    gradients = np.eye(TOTAL + 1)[1:] * lengths[:, None]
    w, buffer = np.eye(TOTAL + 1)[0] * size, np.zeros(TOTAL + 1)
    path = [w]
    for step, g in enumerate(gradients):
        rate = (step + 1) / (10, 30)[group] if group >= 0 else 0.0
        decay = (step + 1) / (100, 70)[group] if group >= 0 else 0.0
        buffer = MOMENTUM * buffer + g + decay * w
        w = w - rate * buffer
        path.append(w)
    return gradients, np.array(path)


def expected_null(
    dense: dict[str, Values], row: dict[str, Any], tensors: list[int]
) -> tuple[float, float]:
    """γ⁰ and η*⁰ of the unclipped gradient at a step, from the paths of the tensors."""
    lengths, sizes = norms(dense["minibatch"].astype("f8")), norms(dense["weights"].astype("f8"))
    end, step = {"final": 8, "step:3": 3}[row["reference"]], row["step"]
    dot = gg = ee = 0.0
    for tensor in tensors:
        gradients, path = orthogonal_path(
            sizes[0, tensor], lengths[:, tensor], (0, 1, 0, -1)[tensor]
        )
        e = path[step] - path[end]
        dot, gg, ee = dot + gradients[step] @ e, gg + gradients[step] @ gradients[step], ee + e @ e
    with np.errstate(invalid="ignore"):
        return dot / np.sqrt(gg * ee), dot / gg / (step + 1)


def dense_rows(
    dense: dict[str, Values], rows: list[dict[str, Any]], by: str
) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Each row of the table with what its quantities must be."""
    for row in rows:
        place, step = GROUPS[by][row["group"]], row["step"]
        w, reference = dense["weights"][step].astype("f8"), reference_of(dense, row["reference"])
        if row["stream"] == "updates":
            u = dense["updates"][step].astype("f8")[place]
            yield row, dense_update(u, w[place], reference[place])
            continue
        g = dense[row["stream"]][step].astype("f8")
        # The clip factor of step t is 1 / (t + 1).
        g = g[row["batch"]] if row["stream"] == "fixed" else g * (step + 1)
        yield row, dense_gradient(g[place], w[place], reference[place], decay_of(step)[place])


@pytest.mark.parametrize("by", ["model", "tensor"])
def test_every_quantity_is_that_of_its_step(run: Path, dense: dict[str, Values], by: str) -> None:
    table = measure_run(str(run), REFERENCES, by=[by])[by]
    assert table.column_names == COLUMNS
    with np.errstate(invalid="ignore", divide="ignore"):
        for row, wanted in dense_rows(dense, table.to_pylist(), by):
            for name, value in wanted.items():
                expected = value if np.isfinite(value) else np.nan
                # A single coordinate has angles of 0° and 180° and lies along w, where an arccos
                # and a root halve the digits.
                loose = ("angle" in name or name == "dist_tangential") and by == "tensor"
                assert row[name] == pytest.approx(
                    expected, rel=1e-12, abs=1e-5 if loose else 1e-12, nan_ok=True
                )


@pytest.mark.parametrize("by", ["model", "tensor"])
def test_the_null_of_a_subsampled_step_is_that_of_its_step(
    run: Path, dense: dict[str, Values], by: str
) -> None:
    tensors = {"model": {"model": [0, 1, 2, 3]}}.get(
        by, {name: [index] for index, name in enumerate(TABLE.names)}
    )
    table = measure_run(str(run), REFERENCES, by=[by], streams=["minibatch"])[by]
    for row in table.to_pylist():
        found = (row["cosine_null"], row["lolr_null"])
        if row["reference"] == "mean:2" or (row["reference"], row["step"]) == ("step:3", 3):
            assert np.isnan(found).all()
        elif row["reference"] == "step:3" and row["step"] > 3:
            own_path = row["group"] != "scale"  # which nothing updates: ‖e‖₀ is 0
            assert found == pytest.approx((0.0 if own_path else np.nan, 0.0), nan_ok=True)
        else:
            wanted = expected_null(dense, row, tensors[row["group"]])
            # Eight steps in float64, with a decay that mixes them.
            assert found == pytest.approx(wanted, rel=1e-11, nan_ok=True)


def test_keys_scalars_and_epochs_are_those_of_the_step(run: Path) -> None:
    streams = (*SPARSE,)
    table = measure_run(str(run), ["final"], streams=streams)["model"].to_pylist()
    for stream, steps in SPARSE.items():
        own = [row for row in table if row["stream"] == stream]
        wanted = [*steps, *((8,) if stream == "weights" else ())]
        assert [row["step"] for row in own] == list(
            np.repeat(wanted, 3 if stream == "fixed" else 1)
        )
        for row in own:
            assert row["epoch"] == epoch_of(row["step"])
            number = row["step"] + 1 if row["step"] < TOTAL else np.nan
            assert row["loss"] == pytest.approx(number * 7, nan_ok=True)
            assert row["lr"] == pytest.approx(number / 10, nan_ok=True)
            assert row["clip_factor"] == pytest.approx(1 / number, nan_ok=True)
            if stream != "fixed":
                assert row["batch"] is None


def test_weights_are_measured_at_their_own_steps(run: Path, dense: dict[str, Values]) -> None:
    w = dense["weights"].astype("f8")
    table = measure_run(str(run), ["step:3"], streams=["weights"])["model"].to_pylist()
    found = {row["step"]: row["norm_dist"] for row in table}
    assert found == pytest.approx(
        {step: np.linalg.norm(w[step] - w[3]) for step in (0, 2, 3, 5, 7, 8)}, rel=1e-13
    )
