"""Coordinates that a run never touched, against whole arrays in numpy."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import analyze.coverage
from analyze.cli import main
from analyze.coverage import Coverage, measure_coverage, project_coverage
from analyze.coverage_table import coverage_summary, measure_coverage_table
from analyze.kinds import kind_of
from capture import Recorder
from capture.store import DamagedError, InputError, Stream, UnknownNameError, open_run
from tests.analyze.small_runs import flip, random_streams, write_run

SIZES = (300, 5, 0, 795)


@pytest.fixture
def streams() -> dict[str, np.ndarray]:
    """Gradients with zeros here and there, coordinates without any, weights that partly rest."""
    draw = np.random.default_rng(3)
    streams = random_streams(sum(SIZES), rows=6, batches=3)
    for name in ("minibatch", "updates", "fixed"):
        streams[name] *= draw.random(streams[name].shape) < 0.5
    streams["minibatch"][:, 280:310] = 0.0
    streams["fixed"][:, :2, 7] = 0.0  # one of the batches reaches it
    streams["fixed"][2, 2, 7] = 1.0
    streams["minibatch"][1, 299] = np.nan
    streams["minibatch"][3, 301] = -0.0
    streams["weights"][:, 500:600] = streams["weights"][0, 500:600]
    streams["weights"][4, 520] += 1.0  # moved, and came back
    return streams


@pytest.fixture
def run(tmp_path: Path, streams: dict[str, np.ndarray]) -> Path:
    return write_run(tmp_path / "run.zarr", SIZES, streams)


def by_tensor(found: np.ndarray) -> list[int]:
    return [int(part.sum()) for part in np.split(found, np.cumsum(SIZES)[:-1])]


def check(coverage: Coverage, vectors: np.ndarray) -> None:
    """Compare with whole vectors ``[N, D]``."""
    assert coverage.vectors == len(vectors)
    assert coverage.sizes.tolist() == list(SIZES)
    assert coverage.never.tolist() == by_tensor((vectors == 0).all(axis=0))
    assert coverage.zeros.tolist() == by_tensor((vectors == 0).sum(axis=0))


def test_counts_equal_those_of_whole_arrays(run: Path, streams: dict[str, np.ndarray]) -> None:
    fixed, minibatch, updates, weights = measure_coverage(run)
    check(fixed, streams["fixed"].reshape(-1, sum(SIZES)))
    check(minibatch, streams["minibatch"])
    check(updates, streams["updates"])
    check(weights, streams["weights"][1:] - streams["weights"][0])
    assert minibatch.never.sum() >= 29  # one of the thirty is NaN once
    assert weights.never.sum() == 99


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
@pytest.mark.parametrize("chunks", [1, 16])
def test_blocks_and_schedulers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, chunks: int
) -> None:
    """Three inner chunks, borders of tensors within them, and rows opened a few at a time."""
    size = 3 * 2**20 - 11
    streams = random_streams(size, rows=3, batches=3)
    streams["fixed"][:, :, ::3] = 0.0
    sizes = (5, 2**20, size - 2**20 - 5)
    path = write_run(tmp_path / "large.zarr", sizes, streams)
    monkeypatch.setattr(analyze.coverage, "_MOST_CHUNKS", chunks)
    monkeypatch.setattr(analyze.coverage, "most_open", lambda threads: 3)
    fixed, weights = measure_coverage(path, ["fixed", "weights"], scheduler=scheduler)
    zero = streams["fixed"].reshape(-1, size) == 0
    borders = np.cumsum(sizes)[:-1]
    assert fixed.never.tolist() == [p.sum() for p in np.split(zero.all(axis=0), borders)]
    assert fixed.zeros.tolist() == [p.sum() for p in np.split(zero.sum(axis=0), borders)]
    assert weights.never.tolist() == [0, 0, 0]


@pytest.mark.parametrize("place", [-200, 5_000])
def test_damage_gives_no_counts(run: Path, place: int) -> None:
    """Within a chunk, and in what is beside the chunks."""
    flip(run / "gradients" / "fixed" / "value" / "c" / "2" / "1" / "0", place)
    with pytest.raises(DamagedError, match=r"row 2, batch 1 \(step 20\) of 'fixed'"):
        measure_coverage(run)
    assert len(measure_coverage(run, ["minibatch"])) == 1


def test_a_stream_without_rows_is_told_by_name(tmp_path: Path) -> None:
    streams = random_streams(40, rows=2)
    path = write_run(tmp_path / "one.zarr", (40,), {"weights": streams["weights"][:1]})
    with pytest.raises(InputError, match="too few rows in 'weights'"):
        measure_coverage(path)
    with pytest.raises(UnknownNameError, match="no stream 'heldout'"):
        measure_coverage(path, ["heldout"])


def test_the_table_adds_tensors_up(run: Path, streams: dict[str, np.ndarray]) -> None:
    table = measure_coverage_table(str(run), ["minibatch"], by={"small": "t[12]"})
    rest, small = table.sort_by("group").to_pylist()
    zero = streams["minibatch"] == 0
    assert (small["group"], small["num_parameters"], small["vectors"]) == ("small", 5, 5)
    assert small["never"] == zero.all(axis=0)[300:305].sum()
    outside = np.delete(zero, np.s_[300:305], axis=1)
    assert rest["never_share"] == outside.all(axis=0).mean()
    assert rest["zero_share"] == pytest.approx(outside.mean(), rel=1e-14)


def test_a_group_of_no_coordinates_has_no_share(run: Path) -> None:
    table = measure_coverage_table(str(run), ["updates"], by="tensor")
    assert table["never"].to_pylist()[2] == 0
    assert np.isnan(table["never_share"].to_pylist()[2])
    assert "–" in coverage_summary(table)


def test_the_summary_says_what_was_counted(run: Path) -> None:
    table = measure_coverage_table(str(run))
    text = coverage_summary(table)
    share = table.filter(pa.compute.equal(table["stream"], "minibatch"))["never_share"][0].as_py()
    assert f"{100 * share:.3g} %" in text
    assert "weights - first" in text
    assert f"D = {sum(SIZES):,}" in text


def test_the_plan_counts_every_byte_of_the_shards_once(run: Path) -> None:
    files = list((run / "gradients").glob("*/value/c/**/0")) + list(run.glob("*/value/c/*/0"))
    plan = project_coverage(run)
    assert plan.bytes_to_read == sum(path.stat().st_size for path in files if path.is_file())
    assert plan.shards == 5 + 5 + 15 + 6
    with pytest.raises(UnknownNameError, match="no stream 'heldout'"):
        project_coverage(run, ["heldout"])


def test_the_first_iterate_is_read_again_for_every_piece_of_the_rows(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards may be open: one row at a time, beside the first."""
    opened = []
    monkeypatch.setattr(analyze.coverage, "most_open", lambda threads: 2)
    monkeypatch.setattr(Stream, "open", counting(Stream.open, opened))
    measure_coverage(run, ["weights"], scheduler="synchronous", workers=1)
    assert opened == [0, 1, 0, 2, 0, 3, 0, 4, 0, 5]
    sizes = open_run(run).stream("weights").commits.sizes
    read = project_coverage(run, ["weights"], workers=1).bytes_to_read
    assert read == sizes.sum() + 4 * sizes[0]


def counting(method: Any, opened: list[int]) -> Any:
    def call(self: Stream, row: int, *batch: Any) -> Any:
        opened.append(row)
        return method(self, row, *batch)

    return call


def test_the_command_writes_shows_and_plans(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    call = CliRunner().invoke
    planned = call(main, ["coverage", "run.zarr", "--plan"])
    assert planned.output.startswith("run.zarr: reads ")
    assert planned.exit_code == 0
    arguments = ["coverage", "run.zarr", "--by", "tensor", "--out", "t.parquet"]
    done = call(main, arguments)
    assert done.exit_code == 0, done.output
    table = pq.read_table("t.parquet")
    assert kind_of(table.schema) == "coverage"
    assert done.stdout.rstrip("\n") == coverage_summary(table)
    assert call(main, ["report", "t.parquet", "--out", "t.html"]).exit_code == 0
    assert "without a gradient in any saved row" in Path("t.html").read_text()
    assert call(main, ["export", "t.parquet", "--out", "t.csv"]).exit_code == 0
    assert len(Path("t.csv").read_text().splitlines()) == 1 + table.num_rows


def test_words_that_never_occur_get_no_gradient(tmp_path: Path) -> None:
    """A real training: the rows of an embedding whose words are not in the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "words.zarr", model, optimizer, every=1):
        for _ in range(8):
            words, label = torch.randint(0, 20, (16, 3)), torch.randint(0, 3, (16,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(words), label).backward()
            optimizer.step()
    minibatch, weights = measure_coverage(tmp_path / "words.zarr")
    assert minibatch.never.tolist() == weights.never.tolist() == [30 * 4, 0, 0]
