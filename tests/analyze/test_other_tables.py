"""Tables of `pairs`, `pca` and `compare`: known by their kind, drawn, written in other formats."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import xarray as xr
import zarr
from pyarrow import csv

from analyze.compare import compare_runs
from analyze.comparison import read_comparison, write_comparison
from analyze.comparison_figures import comparison_pictures
from analyze.dataset import FACTS
from analyze.drawing import FORMATS, draw_file, draw_inline
from analyze.export import export_inputs
from analyze.inputs import read_inputs
from analyze.kinds import kind_of
from analyze.matrix import MAX_STEPS
from analyze.other_tables import sort_inputs
from analyze.pair_figures import noise_pictures, pair_pictures
from analyze.pairs_of_run import measure_pairs
from analyze.path_figures import path_pictures
from analyze.path_table import measure_path_table
from analyze.report import write_report
from analyze.rows import select_rows
from analyze.tables import measure_run, read_table, write_table
from capture.store.errors import InputError, UsageError
from tests.analyze.comparable import recorded_run

KINDS = ("compute", "pairs", "noise", "pca", "compare")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of each kind, `KIND.parquet`; and of groups, `KIND-layer.parquet`."""
    folder = tmp_path_factory.mktemp("kinds")
    runs = [
        str(recorded_run(folder / f"momentum-{seed}.zarr", "momentum", seed)) for seed in (0, 1)
    ]
    write_table(measure_run(runs[0])["model"], folder / "compute.parquet")
    for name, by in (("", "model"), ("-layer", "layer")):
        found = measure_pairs(runs[0], by=[by])[by]
        write_table(found.pairs, folder / f"pairs{name}.parquet")
        write_table(found.noise, folder / f"noise{name}.parquet")
        write_table(measure_path_table(runs[0], by=by), folder / f"pca{name}.parquet")
    write_comparison(compare_runs(runs, ["optimizer"]), folder / "compare.parquet")
    return folder


def place(folder: Path, kind: str) -> str:
    return str(folder / f"{kind}.parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_tells_its_kind(folder: Path, kind: str) -> None:
    assert kind_of(pq.read_schema(place(folder, kind))) == kind
    measured, others = sort_inputs([place(folder, kind)])
    assert (len(measured), len(others)) == ((1, 0) if kind == "compute" else (0, 1))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_where_a_measurement_is_wanted_the_kind_is_named(folder: Path, kind: str) -> None:
    for read in (read_table, lambda path: read_inputs([path])):
        with pytest.raises(InputError, match="another kind of table: that of `analyze "):
            read(place(folder, kind))


def test_the_map_has_the_cosines_of_the_table(folder: Path) -> None:
    table = select_rows(pq.read_table(place(folder, "pairs")), stream="minibatch")
    matrix, *charts = pair_pictures(table, "minibatch")
    frame = table.to_pandas()
    drawn = matrix.values  # type: ignore[attr-defined]
    assert drawn.shape == (30, 30)
    for row in frame.itertuples():
        assert drawn[row.step, row.step_to] == drawn[row.step_to, row.step] == row.cosine_grad
    assert np.isnan(np.diagonal(drawn)).all()
    names = [chart.name for chart in charts]
    assert names[0] == "lag-gamma-minibatch"
    # At each lag the median over pairs, with the null beside it.
    gamma = charts[0].lines[0]  # type: ignore[attr-defined]
    null = next(x for x in charts[0].lines if x.label == "γ⁰")  # type: ignore[attr-defined]
    first = frame[frame.lag == 1]
    assert (gamma.x[0], gamma.y[0]) == (1, first.gamma.median())
    assert null.y[0] == first.gamma_null.median()
    assert gamma.low[0] == pytest.approx(first.gamma.quantile(0.1))


def test_a_map_of_many_steps_shows_some(folder: Path) -> None:
    first, second = np.triu_indices(200, 1)
    table = pq.read_table(place(folder, "pairs")).filter(pc.field("stream") == "minibatch")
    many = table.take(np.zeros(len(first), np.int64))
    columns = {"step": first, "step_to": second, "lag": second - first}
    for name, values in {**columns, "cosine_grad": 1.0 / (second - first)}.items():
        place_of = many.schema.get_field_index(name)
        many = many.set_column(place_of, many.schema.field(name), pa.array(values))
    matrix, *_ = pair_pictures(many, "minibatch")
    assert matrix.values.shape[0] <= MAX_STEPS  # type: ignore[attr-defined]
    assert matrix.values[0, 1] == pytest.approx(1 / 3)  # type: ignore[attr-defined]
    assert "67 of 200 saved steps" in matrix.caption


def test_few_lags_make_no_map(folder: Path) -> None:
    table = select_rows(pq.read_table(place(folder, "pairs")), stream="minibatch")
    near = table.filter(np.asarray(table["lag"].to_numpy() <= 3))
    assert all(picture.name.startswith("lag-") for picture in pair_pictures(near, "minibatch"))


def test_components_are_drawn_beside_both_nulls(folder: Path) -> None:
    table = pq.read_table(place(folder, "pca"))
    plane, explained, coordinates = path_pictures(table, "", "")
    frame = table.to_pandas()
    own = frame[frame.step == 0].sort_values("component")
    for line, column in zip(
        explained.lines,  # type: ignore[attr-defined]
        ("explained", "null_walk", "null_steps"),
        strict=True,
    ):
        assert line.y.tolist() == own[column].tolist()
    first = frame[frame.component == 1].coordinate.tolist()
    assert plane.first.tolist() == first  # type: ignore[attr-defined]
    assert coordinates.lines[0].y.tolist() == first  # type: ignore[attr-defined]
    assert f"({100 * own.explained.iloc[0]:.3g} %)" in plane.labels[0]  # type: ignore[attr-defined]


def test_noise_is_drawn_with_and_without(folder: Path) -> None:
    table = pq.read_table(place(folder, "noise"))
    pictures = {picture.name: picture for picture in noise_pictures(table, "fixed")}
    assert list(pictures) == ["noise-scale-fixed", "noise-norm-fixed"]
    lines = {line.label: line for line in pictures["noise-norm-fixed"].lines}  # type: ignore[attr-defined]
    assert lines["‖∇f‖² without noise"].y.tolist() == table["noise_corrected"].to_pylist()


def test_no_comparison_is_drawn_without_its_nulls(folder: Path) -> None:
    """Of each stream γ, γ/γ⁰ and η*/a_t in one figure, at equal steps and at equal epochs."""
    (other,) = sort_inputs([place(folder, "compare")])[1]
    comparison = read_comparison(other.table)
    pictures = {picture.name: picture for picture in comparison_pictures(comparison)}
    minibatch = pictures["comparison-minibatch"]
    assert [q.symbol for q in minibatch.quantities] == ["γ", "γ/γ⁰", "η*/aₜ"]  # type: ignore[attr-defined]
    assert minibatch.alignments == ("at equal steps", "at equal epochs")  # type: ignore[attr-defined]
    fixed = pictures["comparison-fixed"]
    assert "No γ/γ⁰ and η*/aₜ: there is no null here" in fixed.caption
    frame = other.table.to_pandas()
    row = frame[
        (frame.stream == "minibatch")
        & (frame["align"] == "steps")
        & (frame.part == "late")
        & (frame.quantity == "cosine_ratio")
        & frame.against.isna()
    ].iloc[0]
    drawn = minibatch.quantities[1].estimates["at equal steps"][0]  # type: ignore[attr-defined]
    found = [getattr(drawn, name)[2] for name in ("value", "low", "high", "q10", "q90")]
    assert found == pytest.approx([row.value, row.low, row.high, row.q10, row.q90])
    points = draw_inline(minibatch, "here").points["panels"]
    assert len(points) == 6
    assert points[0]["lines"][0]["x"] == ["early", "middle", "late"]


def test_every_picture_can_be_printed(folder: Path) -> None:
    table = pq.read_table(place(folder, "pairs"))
    pictures = [
        *pair_pictures(select_rows(table, stream="fixed"), "fixed"),
        *path_pictures(pq.read_table(place(folder, "pca")), "", ""),
    ]
    for picture in pictures:
        for kind in FORMATS:
            assert draw_file(picture, kind) == draw_file(picture, kind)


def test_one_page_draws_tables_of_every_kind(folder: Path, tmp_path: Path) -> None:
    inputs = [
        *(place(folder, kind) for kind in KINDS),
        *(place(folder, f"{kind}-layer") for kind in ("pairs", "pca", "noise")),
    ]
    written = write_report(
        inputs, tmp_path / "page.html", figures_dir=tmp_path / "figures", formats=["svg"]
    )
    text = written[0].read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert len(headings) == len(inputs)
    for words in (
        "2 runs compared by optimizer",
        "momentum-0: saved steps beside each other (w* = final)",
        "momentum-0: noise of the gradients",
        "momentum-0: principal components of the path",
        "momentum-0: principal components of the path, by layer",
        "momentum-0, measured against final",
        "Interpolation, with its evidence",
        "γ⁰ of minibatch: exact for SGD",
    ):
        assert words in text, words
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    names = [path.name for path in written[1:]]
    assert len(names) == len(set(names)) == text.count("<figure ")
    again = write_report(inputs, tmp_path / "again.html")[0]
    assert again.read_text() == text


def test_a_damaged_table_is_one_line(folder: Path, tmp_path: Path) -> None:
    table = pq.read_table(place(folder, "pairs"))
    for number, (damaged, words) in enumerate(
        (
            (table.drop_columns(["gamma"]), "its columns are others"),
            (table.slice(0, 0), "no rows"),
            (
                table.set_column(2, "step", table["step"].cast("float64")),
                "'step' is of another kind",
            ),
            (
                table.set_column(0, "run", table["stream"]),
                "its facts of the runs are damaged",
            ),
        )
    ):
        path = str(tmp_path / f"{number}.parquet")
        write_table(damaged, path)
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            write_report([path], tmp_path / "page.html")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_kind_is_written_in_every_format(folder: Path, tmp_path: Path, kind: str) -> None:
    table = pq.read_table(place(folder, kind))
    for suffix in (".csv", ".parquet", ".nc", ".zarr"):
        export_inputs([place(folder, kind)], tmp_path / f"out{suffix}")
    assert (tmp_path / "out.parquet").read_bytes() == Path(place(folder, kind)).read_bytes()
    read = csv.read_csv(tmp_path / "out.csv")
    assert read.column_names == table.column_names
    number = next(f.name for f in table.schema if str(f.type) == "double" and f.name != "start")
    expected = table[number].to_numpy()
    np.testing.assert_array_equal(read[number].cast("float64").to_numpy(), expected)
    streams = list(xr.open_datatree(tmp_path / "out.nc", engine="h5netcdf").children)
    parts = []
    for stream in streams:
        with xr.open_dataset(tmp_path / "out.nc", group=stream, engine="h5netcdf") as data:
            told = data[number].attrs if number in data else {}
            count = data.sizes["row"]
            parts.append(data[number].values if number in data else np.full(count, np.nan))
        assert "formula" in told or "meaning" in told or not told
    own = [table] if kind in ("pca", "compare") else [select_rows(table, stream=s) for s in streams]
    wanted = np.concatenate([rows[number].to_numpy() for rows in own])
    np.testing.assert_array_equal(np.concatenate(parts), wanted)
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert group.attrs["kind"] == kind
    assert FACTS in group.attrs
    # It is an export of ours, and may be replaced.
    export_inputs([place(folder, kind)], tmp_path / "out.zarr")


def test_kinds_are_not_mixed_and_latex_is_of_measurements(folder: Path, tmp_path: Path) -> None:
    for kinds, words in (
        (("pairs", "pca"), "do not go into one"),
        (("compute", "pairs"), "do not go into one"),
        (("compare", "compare-again"), "do not go into one"),
    ):
        paths = [place(folder, kind) for kind in kinds]
        if kinds[1] == "compare-again":
            Path(paths[1]).write_bytes(Path(paths[0]).read_bytes())
        with pytest.raises(UsageError, match=words):
            export_inputs(paths, tmp_path / "out.csv")
    with pytest.raises(UsageError, match="`analyze pairs` has no verdict"):
        export_inputs([place(folder, "pairs")], tmp_path / "out.tex")
    assert not list(tmp_path.iterdir())


def test_several_tables_of_pairs_become_one(folder: Path, tmp_path: Path) -> None:
    export_inputs([place(folder, "pairs"), place(folder, "pairs-layer")], tmp_path / "both.parquet")
    rows = [pq.read_table(place(folder, name)).num_rows for name in ("pairs", "pairs-layer")]
    assert pq.read_table(tmp_path / "both.parquet").num_rows == sum(rows)
