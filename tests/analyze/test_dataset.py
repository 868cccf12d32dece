"""Tables as xarray Datasets, and back: no number is lost, whatever streams and runs they hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import xarray as xr

import analyze
from analyze.columns import schema
from analyze.dataset import FACTS, to_dataset, to_table, to_tree
from analyze.library import measure_dataset, measure_table, measure_tree
from analyze.tables import METADATA_KEY, concatenate, measure_run, read_metadata
from capture.store import InputError, UnknownNameError, UsageError, open_run
from tests.analyze.recorded import SPARSE, TABLE, random_run, read_rows, sparse_run, write_run
from tests.analyze.simulation import simulate

KEYS = ["run", "stream", "step", "batch", "group", "reference"]


def same(left: pa.Table, right: pa.Table) -> bool:
    """Whether two tables are the same, row by row, with NaN equal to NaN and null to null."""
    if left.schema != right.schema or left.num_rows != right.num_rows:
        return False
    for name in left.column_names:
        if left[name].null_count != right[name].null_count:
            return False
        a, b = (
            table[name].fill_null(-1) if pa.types.is_integer(table[name].type) else table[name]
            for table in (left, right)
        )
        if not np.array_equal(a.to_pandas(), b.to_pandas(), equal_nan=pa.types.is_floating(a.type)):
            return False
    return True


def ordered(table: pa.Table) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in KEYS])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("dataset") / "run.zarr", epoch=lambda step: step / 4)


@pytest.fixture(scope="module")
def table(run: Path) -> pa.Table:
    return measure_table(run, ["final", "step:3"], by="layer")


@pytest.fixture(scope="module")
def two_runs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Two runs with other steps, references and numbers of groups, one below the other."""
    size = TABLE.num_parameters
    draw = np.random.default_rng(5).standard_normal
    dense = {name: draw((9, size)).astype("f4") for name in ("weights", "minibatch", "updates")}
    dense["fixed"] = draw((9, 2, size)).astype("f4")
    other = sparse_run(tmp_path_factory.mktemp("dataset") / "other.zarr", dense)
    return concatenate(
        [
            measure_run(str(run), ["final"], by=["tensor"])["tensor"],
            measure_run(str(other), ["final", "step:2"], by=["layer"])["layer"],
        ]
    )


def test_every_number_of_the_table_stands_at_its_labels(table: pa.Table) -> None:
    tree = to_tree(table)
    for row in table.to_pylist():
        data = tree[row["stream"]].to_dataset()
        labels = {axis: row[axis] for axis in KEYS if axis != "stream" and row[axis] is not None}
        there = data.sel(labels)
        for name in set(table.column_names) - set(KEYS):
            np.testing.assert_equal(there[name].item(), np.nan if row[name] is None else row[name])
        assert there["measured"].item() is True


def test_axes_are_labelled_and_nothing_has_an_axis_it_does_not_depend_on(table: pa.Table) -> None:
    fixed, minibatch = to_dataset(table, "fixed"), to_dataset(table, "minibatch")
    assert dict(fixed.sizes) == {"run": 1, "step": 7, "batch": 3, "group": 3, "reference": 2}
    assert dict(minibatch.sizes) == {"run": 1, "step": 6, "group": 3, "reference": 2}
    assert fixed["cosine"].dims == ("run", "step", "batch", "group", "reference")
    assert fixed["loss"].dims == ("run", "step", "batch")
    assert minibatch["loss"].dims == minibatch["lr"].dims == ("run", "step")
    assert fixed["step"].values.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert fixed["group"].values.tolist() == ["body.0", "head", "scale"]
    assert fixed["epoch"].values.tolist() == [[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]]
    assert fixed["num_parameters"].sel(group="head").values.tolist() == [8]
    assert set(fixed.coords) == {
        "run",
        "step",
        "batch",
        "group",
        "reference",
        "epoch",
        "num_parameters",
    }


def test_variables_are_the_columns_with_unit_and_formula(table: pa.Table) -> None:
    data = to_dataset(table, "minibatch")
    assert set(data.variables) == set(table.column_names) - {"stream", "batch"} | {"measured"}
    for field in schema():
        if field.name in data and field.metadata[b"unit"]:
            assert data[field.name].attrs["units"] == field.metadata[b"unit"].decode()
            assert data[field.name].attrs["formula"] == field.metadata[b"formula"].decode()
    assert data.attrs["stream"] == "minibatch"
    assert json.loads(data.attrs[FACTS]) == read_metadata(table)


def test_each_stream_has_its_own_steps(tmp_path: Path) -> None:
    draw = np.random.default_rng(5).standard_normal
    dense = {
        name: draw((9, TABLE.num_parameters)).astype("f4")
        for name in ("weights", "minibatch", "updates")
    }
    dense["fixed"] = draw((9, 2, TABLE.num_parameters)).astype("f4")
    tree = measure_tree(sparse_run(tmp_path / "run.zarr", dense))
    steps = {name: tuple(tree[name]["step"].values.tolist()) for name in tree.children}
    assert steps == {name: SPARSE[name] for name in ("fixed", "minibatch", "updates")}
    only = measure_tree(tmp_path / "run.zarr", stream="weights")
    assert tuple(only["weights"]["step"].values.tolist()) == (*SPARSE["weights"], 8)


def test_a_table_comes_back_as_it_was(table: pa.Table, run: Path) -> None:
    back = to_table(to_tree(table))
    assert same(back, table)
    assert back.schema.metadata[METADATA_KEY] == table.schema.metadata[METADATA_KEY]
    assert all(back.schema.field(f.name).metadata == f.metadata for f in table.schema)
    tree = measure_tree(run, ["final", "step:3"], by="layer")
    assert tree["fixed"].dataset["cosine"].dims == ("step", "batch", "group", "reference")
    assert same(to_table(tree), table)
    one = measure_table(run, stream="weights")
    assert same(to_table(to_dataset(one)), one)


def test_runs_with_other_steps_groups_and_references_keep_their_holes(two_runs: pa.Table) -> None:
    tree = to_tree(two_runs)
    data = tree["fixed"].to_dataset()
    assert dict(data.sizes) == {"run": 2, "step": 7, "batch": 3, "group": 6, "reference": 2}
    own = two_runs.filter(pc.equal(two_runs["stream"], "fixed"))
    assert int(data["measured"].sum()) == own.num_rows < data["measured"].size
    empty = data.where(~data["measured"])
    assert np.isnan(empty["norm_dist"]).all()
    assert not data["nonfinite"].where(~data["measured"], 0).any()
    assert same(ordered(to_table(tree)), ordered(two_runs))


def test_groups_of_several_kinds_go_together(run: Path) -> None:
    measured = measure_run(str(run), by=["model", "layer"])
    mixed = concatenate(list(measured.values()))
    data = to_dataset(mixed, "updates")
    assert data["group"].values.tolist() == ["model", "body.0", "head", "scale"]
    total = data["num_parameters"].sel(group=["body.0", "head", "scale"]).sum()
    assert total == data["num_parameters"].sel(group="model") == 25
    assert same(ordered(to_table(to_tree(mixed))), ordered(mixed))


def test_a_selection_comes_back_as_its_rows(table: pa.Table) -> None:
    data = to_dataset(table, "fixed")
    chosen = data.sel(group="head", reference="final").isel(step=slice(2, 5), batch=[0, 2])
    found = to_table(chosen)
    wanted = [
        row
        for row in table.to_pylist()
        if row["stream"] == "fixed"
        and row["group"] == "head"
        and row["batch"] != 1
        and row["reference"] == "final"
        and row["step"] in (2, 3, 4)
    ]
    assert found.num_rows == len(wanted) == 6
    assert found["dot_prod"].to_pylist() == [row["dot_prod"] for row in wanted]
    assert found["run"].unique().to_pylist() == table["run"].unique().to_pylist()


def test_a_dataset_of_one_stream_holds_what_numpy_computes(run: Path) -> None:
    data = measure_dataset(open_run(run), "final")
    rows = read_rows(run)
    w, g = rows["weights"], rows["minibatch"]
    clip = np.nan_to_num(rows.scalar("clip_factor"), nan=1.0)
    e = w[:-1] - w[-1]
    dense = np.sum(g / clip[:, None] * e, axis=1) / np.sum(e * e, axis=1)
    assert data["rsi"].dims == ("step", "group", "reference")
    # Other orders of summation: some units in the last place of sums over 25 coordinates.
    np.testing.assert_allclose(data["rsi"].sel(group="model", reference="final"), dense, rtol=1e-12)
    assert data["run"].item() == str(run)


def test_one_name_or_several_may_be_given(run: Path) -> None:
    one = measure_table(str(run), "step:2", stream="fixed", by="tensor")
    several = measure_table(run, ["step:2"], stream=["fixed"], by="tensor")
    assert one.equals(several) or same(one, several)
    assert one["stream"].unique().to_pylist() == ["fixed"]
    assert one["group"].unique().to_pylist() == list(TABLE.names)
    custom = measure_table(run, by={"matrices": "weight$"}, cache=False)
    assert custom["group"].unique().to_pylist() == ["matrices", "rest"]
    assert measure_table(run)["stream"].unique().to_pylist() == ["fixed", "minibatch", "updates"]


def test_what_cannot_be_a_dataset_is_refused(table: pa.Table, run: Path) -> None:
    with pytest.raises(UsageError, match="several streams, fixed, minibatch, updates; choose one"):
        to_dataset(table)
    with pytest.raises(UnknownNameError, match="no stream 'fxed'; it has fixed, minibatch"):
        to_dataset(table, "fxed")
    with pytest.raises(InputError, match="no rows"):
        to_tree(table.slice(0, 0))
    with pytest.raises(InputError, match=r"the same labels: run .*, step 0, .*give each run once"):
        to_tree(concatenate([table, table]))
    with pytest.raises(UnknownNameError, match="no stream 'heldout'"):
        measure_dataset(run, stream="heldout")


def test_batches_in_some_runs_only_are_refused(run: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(1).standard_normal
    plain = {name: draw((3, TABLE.num_parameters)).astype("f4") for name in ("weights", "fixed")}
    other = write_run(tmp_path / "other.zarr", plain)
    both = concatenate([measure_table(path, stream="fixed") for path in (run, other)])
    with pytest.raises(InputError, match="'fixed' has batches in some runs and none in others"):
        to_dataset(both)


@pytest.mark.parametrize("change", ["measured", "cosine", "facts", "empty", "tree"])
def test_what_is_no_dataset_of_ours_is_refused(table: pa.Table, change: str) -> None:
    data: Any = to_dataset(table, "minibatch")
    if change == "facts":
        data.attrs.clear()
    elif change == "tree":
        data = xr.DataTree()
    else:
        data = xr.Dataset() if change == "empty" else data.drop_vars(change)
    with pytest.raises(InputError):
        to_table(data)


def test_a_column_that_depends_on_more_than_it_should_is_kept_whole() -> None:
    table = simulate(by_tensor=True)
    rates = np.arange(table.num_rows, dtype=np.float64)
    table = table.set_column(
        table.column_names.index("lr"), table.schema.field("lr"), pa.array(rates)
    )
    data = to_dataset(table)
    assert data["lr"].dims == ("run", "step", "group", "reference")
    assert same(ordered(to_table(data)), ordered(table))


def test_columns_and_whole_numbers_of_any_kind_come_through(table: pa.Table) -> None:
    more = table.append_column("note", pa.array(["x", None] * (table.num_rows // 2)))
    more = more.append_column("count", pa.array([3, None] * (table.num_rows // 2), pa.int64()))
    data = to_dataset(more, "minibatch")
    own = more.filter(pc.equal(more["stream"], "minibatch"))
    flat = data[["note", "count"]].to_dataframe().reset_index(drop=True)
    assert flat["note"].tolist() == [text or "" for text in own["note"].to_pylist()]
    np.testing.assert_array_equal(flat["count"], own["count"].to_pandas())


def test_public_names_are_there_and_say_what_they_do() -> None:
    assert set(analyze.__all__) == set(analyze._HOMES)
    for name in analyze.__all__:
        assert getattr(analyze, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        analyze.nothing  # noqa: B018
