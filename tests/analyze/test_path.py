"""PCA of a path beside closed forms and a dense singular value decomposition; lengths of paths."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.linalg import norm
from numpy.typing import NDArray

from analyze.path import (
    PathShape,
    measure_path,
    path_shape,
    walk_shares,
    walk_squares,
)
from analyze.path_summary import path_summary
from analyze.path_table import measure_path_table, path_schema
from capture.store import InputError
from tests.analyze.dense import GROUPS
from tests.analyze.recorded import TABLE, norms, random_run, read_rows, write_run

Values = NDArray[Any]

MODEL = np.zeros(4, np.int64)


def squares(rows: Values) -> Values:
    """Squared distances of all rows, from their differences."""
    return ((rows[:, None] - rows) ** 2).sum(axis=-1)


def shape_of(rows: Values, **options: Any) -> PathShape:
    return path_shape(squares(rows), np.full(len(rows), np.nan), **options)


def svd(rows: Values) -> tuple[Values, Values]:
    """Explained shares and coordinates of centred rows."""
    centred = rows - rows.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    return values**2 / (values**2).sum(), left * values


# Closed forms ---------------------------------------------------------------------------------


def test_a_straight_path_is_one_component() -> None:
    along = np.array([0.0, 1.0, 3.0, 3.5, 7.0])
    direction = np.random.default_rng(0).standard_normal(20)
    direction /= norm(direction)
    shape = shape_of(along[:, None] * direction)
    assert shape.explained == pytest.approx([1, 0, 0, 0], abs=1e-14)
    centred = along - along.mean()
    assert shape.coordinates[:, 0] == pytest.approx(centred, abs=1e-12)
    assert shape.walked == pytest.approx(along, abs=1e-12)
    assert shape.displaced == pytest.approx(along, abs=1e-12)


@pytest.mark.parametrize("lengths", [np.ones(30), np.geomspace(0.1, 5, 40)], ids=["equal", "not"])
def test_orthogonal_steps_are_their_own_null(lengths: Values) -> None:
    walk = np.cumsum(np.pad(np.diag(lengths), ((1, 0), (0, 0))), axis=0)
    shape = shape_of(walk)
    np.testing.assert_allclose(shape.explained, shape.null_steps, rtol=1e-10)


def test_a_long_walk_of_equal_steps_has_the_shares_of_the_paper() -> None:
    assert [round(100 * share) for share in walk_shares(4)] == [61, 15, 7, 4]
    distances = walk_squares(np.ones(1000))
    shape = path_shape(distances, np.full(1001, np.nan))
    # The limit is reached as 1/n².
    np.testing.assert_allclose(shape.null_steps[:4], walk_shares(4), rtol=1e-4)
    np.testing.assert_allclose(shape.explained[:4], walk_shares(4), rtol=1e-4)
    # Cosines over the index of the step.
    cosine = np.cos(np.pi * (np.arange(1001) + 0.5) / 1001)
    assert abs(np.corrcoef(cosine, shape.coordinates[:, 0])[0, 1]) == pytest.approx(1, abs=1e-6)


def test_equal_steps_have_the_eigenvalues_of_the_path_graph() -> None:
    """The inverse of the Laplacian of a path: 1 / (4 sin²(πk / 2T)), with T rows."""
    total, k = 12, np.arange(1, 12)
    expected = 1 / (4 * np.sin(np.pi * k / (2 * total)) ** 2)
    shape = path_shape(walk_squares(np.ones(total - 1)), np.full(total, np.nan), components=11)
    np.testing.assert_allclose(shape.variance * total, expected, rtol=1e-12)


def test_a_random_walk_in_many_dimensions_is_near_its_null() -> None:
    steps = np.random.default_rng(1).standard_normal((60, 100_000)).astype("f4")
    rows = np.cumsum(steps, axis=0, dtype=np.float64)
    gram = rows @ rows.T
    distances = np.diag(gram)[:, None] + np.diag(gram) - 2 * gram
    shape = path_shape(distances, np.full(60, np.nan))
    np.testing.assert_allclose(shape.explained[:4], shape.null_steps[:4], rtol=0.02)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    rows = np.cumsum(np.random.default_rng(2).standard_normal((9, 40)), axis=0)
    explained, coordinates = svd(rows)
    shape = shape_of(rows)
    np.testing.assert_allclose(shape.explained, explained[:8], rtol=1e-10)
    for k in range(8):
        sign = np.sign(shape.coordinates[:, k] @ coordinates[:, k])
        np.testing.assert_allclose(shape.coordinates[:, k], sign * coordinates[:, k], atol=1e-10)
        assert shape.coordinates[np.abs(shape.coordinates[:, k]).argmax(), k] > 0
    np.testing.assert_allclose(shape.variance, (shape.coordinates**2).mean(axis=0), rtol=1e-10)


def test_a_rotation_and_a_shift_change_nothing_and_a_scale_only_lengths() -> None:
    rng = np.random.default_rng(3)
    rows = np.cumsum(rng.standard_normal((7, 6)), axis=0)
    turned = 3 * rows @ np.linalg.qr(rng.standard_normal((6, 6)))[0] + rng.standard_normal(6)
    one, other = shape_of(rows), shape_of(turned)
    np.testing.assert_allclose(other.explained, one.explained, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(other.null_steps, one.null_steps, rtol=1e-9)
    np.testing.assert_allclose(np.abs(other.coordinates), 3 * np.abs(one.coordinates), atol=1e-9)


def test_a_path_that_never_moved_has_no_components() -> None:
    shape = shape_of(np.ones((4, 3)))
    assert np.isnan(shape.explained).all()
    assert np.isnan(shape.null_steps).all()
    assert math.isnan(shape.straightness)


def test_two_rows_are_a_line() -> None:
    shape = shape_of(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert (shape.explained.tolist(), shape.walked.tolist()) == ([1.0], [0.0, 5.0])


def test_rows_that_are_not_finite_are_left_out() -> None:
    rows = np.cumsum(np.random.default_rng(4).standard_normal((8, 12)), axis=0)
    spoiled = rows.copy()
    spoiled[[0, 5], 3] = np.nan
    shape, clean = shape_of(spoiled), shape_of(rows[[1, 2, 3, 4, 6, 7]])
    kept = np.isfinite(shape.coordinates[:, 0])
    assert kept.tolist() == [False, True, True, True, True, False, True, True]
    np.testing.assert_allclose(shape.explained[:5], clean.explained, rtol=1e-12)
    np.testing.assert_allclose(shape.walked[kept], clean.walked, rtol=1e-12)
    assert np.isnan(shape_of(np.full((4, 3), np.nan)).explained).all()


# Recorded runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random walk of 8 updates with all their norms, of which 5 rows are saved."""
    path = tmp_path_factory.mktemp("path") / "run.zarr"
    w = np.cumsum(np.random.default_rng(5).standard_normal((9, 25)), axis=0).astype("f4")
    updates = norms(np.diff(w.astype(np.float64), axis=0))
    scalars = {"update_norm_by_tensor": updates, "update_norm": norm(updates, axis=1)}
    kept = [0, 2, 3, 5, 8]
    return write_run(path, {"weights": w[kept]}, scalars=scalars, steps={"weights": kept})


@pytest.mark.parametrize("by", ["model", "layer", "tensor"])
def test_a_recorded_path_is_that_of_dense_numpy(run: Path, by: str) -> None:
    table = measure_path_table(str(run), by=by)
    w, updates = read_rows(run)["weights"], read_rows(run).scalar("update_norm_by_tensor")
    kept = [0, 2, 3, 5, 8]
    tensors = list(GROUPS["tensor"].values())
    assert table.num_rows == 5 * 4 * len(GROUPS[by])
    for row in table.to_pylist():
        at = GROUPS[by][row["group"]]
        rows = w[:, at]
        place, k = kept.index(row["step"]), row["component"] - 1
        explained, coordinates = svd(rows)
        null = svd(
            np.cumsum(
                np.pad(np.diag(norm(np.diff(rows, axis=0), axis=1)), ((1, 0), (0, 0))), axis=0
            )
        )[0]
        expected = [*explained, 0, 0, 0, 0][k]
        assert row["explained"] == pytest.approx(expected, abs=1e-12)
        assert row["null_steps"] == pytest.approx(null[k], rel=1e-10)
        assert row["null_walk"] == pytest.approx(6 / np.pi**2 / (k + 1) ** 2)
        if k < len(explained) and explained[k] > 1e-9:
            assert abs(row["coordinate"]) == pytest.approx(abs(coordinates[place, k]), abs=1e-9)
        walked = norm(np.diff(rows[: place + 1], axis=0), axis=1).sum()
        assert row["walked"] == pytest.approx(walked, abs=1e-12)
        assert row["displaced"] == pytest.approx(norm(rows[place] - rows[0]), abs=1e-12)
        own = [n for n, tensor in enumerate(tensors) if set(tensor) <= set(at)]
        way = norm(updates[: row["step"]][:, own], axis=1).sum()
        assert row["updated"] == pytest.approx(way, abs=1e-12)


def test_straightness_is_the_distance_over_all_updates(run: Path) -> None:
    steps, (shape,) = measure_path(run, MODEL)
    w, updates = read_rows(run)["weights"], read_rows(run).scalar("update_norm")
    assert steps.tolist() == [0, 2, 3, 5, 8]
    assert shape.straightness == pytest.approx(norm(w[-1] - w[0]) / updates.sum(), rel=1e-12)


def test_without_norms_of_the_updates_there_is_no_straightness(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.zarr", {"weights": np.eye(3, 25, dtype="f4")})
    _, (shape,) = measure_path(path, MODEL)
    assert math.isnan(shape.straightness)
    assert "were not recorded" in path_summary(measure_path_table(str(path)))


def test_norms_of_the_whole_model_alone_tell_nothing_of_layers(tmp_path: Path) -> None:
    w = np.arange(75.0).reshape(3, 25).astype("f4")
    path = write_run(tmp_path / "run.zarr", {"weights": w}, scalars={"update_norm": np.ones(2)})
    _, (shape,) = measure_path(path, MODEL)
    assert shape.updated.tolist() == [0, 1, 2]
    _, shapes = measure_path(path, np.array([0, 0, 1, 2]))
    assert np.isnan([shape.updated for shape in shapes]).all()


def test_a_path_so_far_is_measured_too(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", complete=False)
    assert measure_path_table(str(path)).num_rows == 7 * 6


def test_one_row_is_no_path(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.zarr", {"weights": np.ones((1, 25), "f4")})
    with pytest.raises(InputError, match="needs two saved rows of weights, the run has 1"):
        measure_path(path, MODEL)


def test_bytes_do_not_depend_on_workers(run: Path) -> None:
    one, other = (measure_path_table(str(run), workers=workers) for workers in (1, 4))
    assert one.equals(other, check_metadata=True)


def test_columns_have_units_and_formulas(run: Path) -> None:
    table = measure_path_table(str(run), components=2)
    assert table.schema.equals(path_schema(), check_metadata=False)
    assert all(field.metadata[b"formula"] for field in path_schema())
    assert set(table["component"].to_pylist()) == {1, 2}
    facts = json.loads(table.schema.metadata[b"straightway"])
    assert facts["runs"][0]["num_parameters"] == TABLE.num_parameters
    assert (facts["kind"], facts["table"]) == ("pca", 1)


def test_the_summary_shows_both_nulls(run: Path) -> None:
    text = path_summary(measure_path_table(str(run), by="layer"))
    (first,) = [line for line in text.splitlines() if line.startswith("body.0  ")]
    assert first.split()[4:6] == ["60.8", "%"]
    assert "own steps" in text
    assert text.count("straightness") == 6
