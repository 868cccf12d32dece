"""The table: every column against one line of numpy on rows that zarr-python read, and its file."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr
from numpy.linalg import norm

from analyze.columns import schema
from analyze.groups import GROUPINGS, group_tensors
from analyze.tables import (
    measure_run,
    read_metadata,
)
from capture.store import InputError, UnfinishedError, UnknownNameError, UsageError
from tests.analyze.dense import COLUMNS, GROUPS, PARAMETER_GROUP, dense_gradient, dense_update
from tests.analyze.recorded import OPTIMIZER, TABLE, Values, random_run, read_rows, write_run


def rounding(name: str, expected: float) -> float:
    """What 25 products in another order may cost; a root near 0 halves the digits, as an arccos."""
    edge = "angle" in name and not 1e-3 < expected < 180 - 1e-3
    if name == "dist_tangential":
        return 1e-7
    return 1e-5 if edge else 1e-9 if "angle" in name else 1e-12


def decay_at(path: Path, step: int) -> Values:
    """λ of each coordinate; at w_T that of the last update."""
    by_group = read_rows(path).scalar("group_weight_decay")
    decay: Values = np.append(by_group[min(step, len(by_group) - 1)], 0.0)[PARAMETER_GROUP]
    return decay


def dense_row(path: Path, row: dict[str, Any], place: list[int]) -> dict[str, float]:
    rows, step = read_rows(path), row["step"]
    w = rows["weights"][step][place]
    reference = rows["weights"][-1 if row["reference"] == "final" else 2][place]
    if row["stream"] == "updates":
        return dense_update(rows["updates"][step][place], w, reference)
    if row["stream"] == "fixed":
        g = rows["fixed"][step, row["batch"]]
    else:
        factor = rows.scalar("clip_factor")[step]
        g = rows["minibatch"][step] / (1 if np.isnan(factor) else factor)
    return dense_gradient(g[place], w, reference, decay_at(path, step)[place])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("tables") / "run.zarr")


@pytest.fixture(scope="module")
def tables(recorded: Path) -> dict[str, pa.Table]:
    return measure_run(str(recorded), ["final", "step:2"], by=GROUPINGS)


@pytest.mark.parametrize("by", GROUPINGS)
def test_every_number_is_the_dense_one(
    recorded: Path, tables: dict[str, pa.Table], by: str
) -> None:
    # Warnings off: at w* itself numpy divides by 0 where the table says NaN.
    with np.errstate(invalid="ignore", divide="ignore"):
        for row in tables[by].to_pylist():
            place = GROUPS[by][row["group"]]
            assert row["num_parameters"] == len(place)
            for name, value in dense_row(recorded, row, place).items():
                expected = value if np.isfinite(value) else np.nan
                assert row[name] == pytest.approx(
                    expected, rel=1e-12, abs=rounding(name, expected), nan_ok=True
                )


def test_columns_order_and_types_are_those_of_the_contract(tables: dict[str, pa.Table]) -> None:
    table = tables["layer"]
    assert table.column_names == COLUMNS
    texts, whole = {"run", "stream", "group", "reference"}, {"step", "batch", "num_parameters"}
    for field in table.schema:
        kind = pa.string() if field.name in texts else pa.float64()
        kind = pa.int64() if field.name in {*whole, "nonfinite"} else kind
        assert field.type == kind
        assert field.nullable == (field.name in {"epoch", "batch"})
        assert set(field.metadata) == {b"unit", b"formula"}
    assert schema().equals(table.schema, check_metadata=False)


def test_there_is_one_row_per_stream_step_batch_group_and_reference(
    tables: dict[str, pa.Table],
) -> None:
    keys = ["run", "stream", "step", "batch", "group", "reference"]
    for by, table in tables.items():
        found = [tuple(row[key] for key in keys) for row in table.select(keys).to_pylist()]
        assert len(set(found)) == len(found)
        # 6 minibatches, 6 updates, 7 × 3 fixed batches; two references.
        assert len(found) == (6 + 6 + 21) * len(GROUPS[by]) * 2
    first = tables["layer"].slice(0, 3).to_pylist()
    assert [row["stream"] for row in first] == ["fixed"] * 3
    assert [(row["group"], row["reference"]) for row in first] == [
        ("body.0", "final"),
        ("body.0", "step:2"),
        ("head", "final"),
    ]


def test_streams_fill_the_columns_that_apply_to_them(tables: dict[str, pa.Table]) -> None:
    of_update = {name for name in COLUMNS if name.endswith("_update")}
    of_weights = {"norm_dist", "norm_weight", "cosine_reference", "dist_radial", "dist_tangential"}
    of_weights |= {"path_length", "straightness"}
    of_null = {"cosine_null", "lolr_null", "own_share"}
    of_update |= {"cosine_update_null", "lolr_update_null"}
    of_losses = {"loss_gap", "star_convexity", "aiming"}
    measured = {name for name in COLUMNS[8:-4] if not name.endswith("_adam")}
    for row in tables["model"].to_pylist():
        filled = {name for name in COLUMNS[8:-4] if not np.isnan(row[name])}
        if row["step"] in (2, 6):
            continue
        if row["stream"] == "updates":
            assert filled == of_update | of_weights
        elif row["stream"] == "fixed":
            assert filled == measured - of_update - of_null
        else:
            assert filled == measured - of_update - of_losses


def test_keys_and_scalars_stand_beside_their_step(
    recorded: Path, tables: dict[str, pa.Table]
) -> None:
    rows = read_rows(recorded)
    for row in tables["model"].to_pylist():
        assert row["run"] == str(recorded)
        assert row["epoch"] == 0.5
        assert (row["batch"] is None) == (row["stream"] != "fixed")
        for name in ("loss", "lr", "clip_factor"):
            values = np.append(rows.scalar(name), np.nan)
            if name == "loss" and row["stream"] == "fixed":
                values = zarr.open_group(recorded)["gradients/fixed/loss"][:, row["batch"]]
            assert row[name] == pytest.approx(values[row["step"]], rel=0, nan_ok=True)


@pytest.mark.parametrize("by", GROUPINGS)
def test_the_path_is_as_long_as_its_updates(
    recorded: Path, tables: dict[str, pa.Table], by: str
) -> None:
    norms = read_rows(recorded).scalar("update_norm_by_tensor")
    tensors = [set(place) for place in GROUPS["tensor"].values()]
    for row in tables[by].to_pylist():
        place = set(GROUPS[by][row["group"]])
        own = norms[:, [index for index, tensor in enumerate(tensors) if tensor <= place]]
        end = {"final": 6, "step:2": 2}[row["reference"]]
        between = own[min(row["step"], end) : max(row["step"], end)]
        length = sum(norm(update) for update in between)
        assert row["path_length"] == pytest.approx(length, rel=1e-12, abs=1e-12)
        expected = row["norm_dist"] / length if length else np.nan
        assert row["straightness"] == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_losses_are_compared_with_those_of_the_same_batch_at_the_reference(
    recorded: Path, tables: dict[str, pa.Table]
) -> None:
    losses = zarr.open_group(recorded)["gradients/fixed/loss"][:]
    for row in tables["model"].to_pylist():
        if row["stream"] == "fixed":
            end = {"final": 6, "step:2": 2}[row["reference"]]
            gap = losses[row["step"], row["batch"]] - losses[end, row["batch"]]
            assert row["loss_gap"] == gap
            assert row["star_convexity"] == pytest.approx(row["dot_prod"] - gap, rel=1e-14)
            expected = row["dot_prod"] / gap if gap else np.nan
            assert row["aiming"] == pytest.approx(expected, rel=1e-14, nan_ok=True)
    # A loss is no sum over tensors.
    assert np.isnan(tables["layer"]["loss_gap"].to_numpy()).all()


def test_a_mean_of_iterates_is_no_point_of_the_path(recorded: Path) -> None:
    (table,) = measure_run(str(recorded), ["mean:2"]).values()
    for name in ("path_length", "straightness", "loss_gap", "star_convexity", "aiming"):
        assert np.isnan(table[name].to_numpy()).all()


def test_the_null_is_in_units_of_the_unclipped_gradient(
    tmp_path: Path, tables: dict[str, pa.Table]
) -> None:
    """The same path, told that nothing was clipped: γ⁰ stays, a_t is of the longer gradient."""
    path = random_run(tmp_path / "run.zarr")
    plain = read_rows(path)
    streams = {name: plain[name].astype("f4") for name in ("weights", "minibatch")}
    names = ("grad_norm_by_tensor", "group_lr", "group_momentum", "group_weight_decay")
    write_run(
        tmp_path / "unclipped.zarr",
        streams,
        scalars={name: plain.scalar(name) for name in names},
        initial_norm_by_tensor=[norm(plain["weights"][0][i]) for i in GROUPS["tensor"].values()],
    )
    other = measure_run(str(tmp_path / "unclipped.zarr"))["model"].to_pylist()
    clipped = [
        row
        for row in tables["model"].to_pylist()
        if row["stream"] == "minibatch" and row["reference"] == "final"
    ]
    for row, without in zip(clipped, other, strict=True):
        factor = 1.0 if np.isnan(row["clip_factor"]) else row["clip_factor"]
        assert row["cosine_null"] == pytest.approx(without["cosine_null"], rel=1e-14)
        assert row["lolr_null"] == pytest.approx(without["lolr_null"] * factor, rel=1e-14)


def rows_of(path: Path, **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = measure_run(str(path), **options)["model"].to_pylist()
    return rows


def test_an_optimizer_that_maximizes_turns_the_gradient(tmp_path: Path) -> None:
    turned = random_run(tmp_path / "run.zarr", optimizer={**OPTIMIZER, "maximize": True})
    rows = read_rows(turned)
    for row in rows_of(turned, streams=["fixed"]):
        step = row["step"]
        g, w = -rows["fixed"][step, row["batch"]], rows["weights"][step]
        if step < 6:
            dense = dense_gradient(g, w, rows["weights"][-1], decay_at(turned, step))
            for name in ("cosine", "lolr", "z", "cosine_wd", "dot_prod_wd"):
                assert row[name] == pytest.approx(dense[name], rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "words"), [("decoupled", "_wd equals the plain"), ("unknown", "_wd columns are NaN")]
)
def test_decay_that_is_no_part_of_the_gradient(tmp_path: Path, kind: str, words: str) -> None:
    adam = {**OPTIMIZER, "name": "AdamW", "kind": "other", "weight_decay": kind}
    path = random_run(tmp_path / "run.zarr", optimizer=adam)
    table = measure_run(str(path), streams=["minibatch"])["model"]
    for name in (name for name in COLUMNS if name.endswith("_wd")):
        decayed, plain = table[name].to_numpy(), table[name.removesuffix("_wd")].to_numpy()
        if kind == "decoupled":
            assert decayed.tobytes() == plain.tobytes()
        else:
            assert np.isnan(decayed).all()
    metadata = read_metadata(table)
    assert words in metadata["runs"][0]["weight_decay"]
    assert metadata["null"] == {f"{path}|final": metadata["null"][f"{path}|final"]}
    assert metadata["null"][f"{path}|final"].startswith("no null: AdamW")
    assert np.isnan(table["cosine_null"].to_numpy()).all()


def test_a_run_without_scalars_is_measured_without_them(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).standard_normal
    streams = {"weights": draw((3, 25)).astype("f4"), "minibatch": draw((2, 25)).astype("f4")}
    path = write_run(tmp_path / "run.zarr", streams, epoch=None)
    for row in rows_of(path):
        assert np.isfinite(row["cosine"])
        assert row["epoch"] is None
        missing = ("cosine_wd", "cosine_null", "loss", "lr", "clip_factor")
        assert all(np.isnan(row[name]) for name in missing)
    metadata = read_metadata(measure_run(str(path))["model"])
    assert "no every-step scalars" in metadata["null"][f"{path}|final"]
    assert metadata["runs"][0]["weight_decay"].startswith("not recorded")


def test_undefined_ratios_are_counted_where_they_apply(tables: dict[str, pa.Table]) -> None:
    counts = read_metadata(tables["model"])["nan"]
    # At w*: w_6 in 3 fixed batches; w_2 in 3 fixed batches, the minibatch and the update.
    assert counts["cosine"] == counts["rsi"] == 7
    assert counts["cosine_update"] == 1
    assert counts["norm_dist"] == counts["norm_grad"] == 0
    # w_2 is its own reference once.
    assert counts["cosine_null"] == 1


def test_non_finite_numbers_give_nan_and_a_count(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).standard_normal
    streams = {"weights": draw((4, 25)).astype("f4"), "minibatch": draw((3, 25)).astype("f4")}
    streams["minibatch"][1, [0, 13]] = np.nan, np.inf
    streams["weights"][2, 20] = -np.inf
    path = write_run(tmp_path / "run.zarr", streams)
    first, second, third = rows_of(path)
    assert (first["nonfinite"], second["nonfinite"], third["nonfinite"]) == (0, 2, 1)
    assert np.isfinite(second["norm_dist"])
    assert np.isnan([second[name] for name in ("norm_grad", "cosine", "lolr", "z")]).all()
    assert np.isfinite(third["norm_grad"])
    assert np.isnan([third[name] for name in ("norm_dist", "rsi", "cosine")]).all()
    by_layer = measure_run(str(path), by=["layer"])["layer"].slice(3, 3).to_pylist()
    assert [(row["group"], row["nonfinite"]) for row in by_layer] == [
        ("body.0", 2),
        ("head", 0),
        ("scale", 0),
    ]
    assert np.isfinite(by_layer[1]["cosine"])


def test_weights_alone_have_a_distance_and_nothing_else(tmp_path: Path) -> None:
    weights = np.arange(75).reshape(3, 25).astype("f4")
    path = write_run(tmp_path / "run.zarr", {"weights": weights})
    found = rows_of(path)
    assert [row["norm_dist"] for row in found] == [250.0, 125.0, 0.0]
    assert all(np.isnan(row["cosine"]) and np.isnan(row["norm_grad"]) for row in found)


def test_layers_are_module_paths_and_a_root_tensor_is_its_own() -> None:
    labels, groups = group_tensors(TABLE, "layer")
    assert labels == ["body.0", "head", "scale"]
    assert groups.tolist() == [0, 0, 1, 2]


def test_a_run_without_an_update_has_its_weights(tmp_path: Path) -> None:
    empty = {name: np.empty((0, 25), "f4") for name in ("minibatch", "updates")}
    weights = np.ones((1, 25), "f4")
    path = write_run(tmp_path / "run.zarr", {"weights": weights, **empty})
    table = measure_run(str(path), by=GROUPINGS)["model"].to_pylist()
    assert [(row["stream"], row["step"], row["norm_dist"]) for row in table] == [("weights", 0, 0)]
    with pytest.raises(InputError, match=r"there are no rows to measure in 'minibatch'"):
        measure_run(str(path), streams=["minibatch"])


def test_an_empty_stream_beside_a_full_one_adds_no_rows(tmp_path: Path) -> None:
    streams = {"weights": np.ones((2, 25), "f4"), "fixed": np.empty((0, 3, 25), "f4")}
    path = write_run(tmp_path / "run.zarr", streams, complete=False)
    table = measure_run(str(path), ["step:0"], streams=["weights", "fixed"], by=["layer"])["layer"]
    assert table["stream"].to_pylist() == ["weights"] * 6


def test_unknown_names_and_unfinished_runs_are_refused(tmp_path: Path, recorded: Path) -> None:
    with pytest.raises(UnknownNameError, match="no stream 'heldout'"):
        measure_run(str(recorded), streams=["heldout"])
    with pytest.raises(UnknownNameError):
        measure_run(str(recorded), ["step:99"])
    unfinished = random_run(tmp_path / "run.zarr", complete=False)
    with pytest.raises(UnfinishedError):
        measure_run(str(unfinished))
    table = measure_run(str(unfinished), ["step:5"], streams=["minibatch"])["model"]
    assert read_metadata(table)["runs"][0]["status"] == "recording"
    assert read_metadata(table)["null"].popitem()[1] == "no null: the run has not finished"
    assert np.isnan(table["cosine_null"].to_numpy()).all()


def test_the_name_of_the_run_is_as_typed(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recorded.parent)
    table = measure_run("./run.zarr/", streams=["minibatch"])["model"]
    assert set(table["run"].to_pylist()) == {"./run.zarr/"}


def test_another_weight_decay_is_asked_for(recorded: Path, tables: dict[str, pa.Table]) -> None:
    """λ for every tensor but the one that nothing updates; nothing else changes."""
    table = measure_run(str(recorded), ["final", "step:2"], weight_decay=0.25)["model"]
    rows, decay = read_rows(recorded), np.where(PARAMETER_GROUP < 0, 0.0, 0.25)
    for row in table.to_pylist():
        if row["stream"] == "fixed" and row["step"] not in (2, 6):
            w = rows["weights"][row["step"]]
            reference = rows["weights"][-1 if row["reference"] == "final" else 2]
            g = rows["fixed"][row["step"], row["batch"]]
            dense = dense_gradient(g, w, reference, decay)
            for name in (name for name in dense if name.endswith("_wd")):
                assert row[name] == pytest.approx(dense[name], rel=1e-11)
    others = [name for name in table.column_names if not name.endswith("_wd")]
    assert table.select(others).to_pandas().equals(tables["model"].select(others).to_pandas())
    assert "as asked for" in read_metadata(table)["runs"][0]["weight_decay"]
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(UsageError, match="is no weight decay"):
            measure_run(str(recorded), weight_decay=wrong)
