"""`--plan` of every command says what the command then reads, and measures nothing."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze import pair_blocks
from analyze.export import export_inputs
from analyze.gram import compute_gram
from analyze.gram_projection import project_gram
from analyze.pairs_of_run import measure_pairs
from analyze.path_table import measure_path_table
from analyze.plans import plan_inputs, plan_schedule, project_pairs, project_path, project_run
from analyze.schedule import schedule_run
from analyze.tables import measure_run, write_table
from capture.store import UnknownNameError, UsageError, layout
from tests.analyze.recorded import random_run
from tests.analyze.small_runs import random_streams, write_run
from tests.analyze.test_cli import analyze
from tests.analyze.test_projection import counted

__all__ = ["counted"]  # a fixture

SIZES = (300, 1, 0, 811, 39)
GROUPS = np.array([0, 0, 1, 1, 2])


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several inner chunks even in small runs."""
    monkeypatch.setattr(layout, "TARGET_CHUNK_BYTES", 1024)


@pytest.fixture
def run(tmp_path: Path, chunks: None) -> Path:
    return write_run(tmp_path / "run.zarr", SIZES, random_streams(sum(SIZES), rows=7, batches=3))


@pytest.fixture(params=[256, 4])
def most_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of all rows, and of a few, so that rows are read again for each other's sake."""
    monkeypatch.setattr(pair_blocks, "MOST_ROWS", request.param)


# What is read is counted where shards are taken up.


@pytest.mark.parametrize("stream", ["weights", "minibatch", "fixed"])
@pytest.mark.parametrize("lags", [None, [10], [20, 50], [7]])
def test_bytes_of_products_are_those_that_are_read(
    run: Path, counted: Counter[str], most_rows: None, stream: str, lags: list[int] | None
) -> None:
    projection = project_gram(run, stream, GROUPS, lags=lags)
    counted.clear()
    compute_gram(run, stream, GROUPS, lags=lags)
    assert projection.bytes_to_read == counted["bytes"]
    # Steps are ten apart: of a lag of 7 there are no pairs, but batches are multiplied.
    assert (counted["bytes"] > 0) is (lags != [7] or stream == "fixed")


@pytest.mark.parametrize("references", [["final"], ["mean:2", "step:10"]])
@pytest.mark.parametrize("cache", [False, True])
def test_bytes_of_pairs_are_those_that_are_read(
    run: Path, counted: Counter[str], references: list[str], cache: bool
) -> None:
    for _ in range(2):  # the second time moments are there, if they were kept
        passes = project_pairs(str(run), references, lags=[10], by=["layer"], cache=cache)
        counted.clear()
        measure_pairs(str(run), references, lags=[10], by=["layer"], cache=cache)
        assert sum(one.bytes_to_read for one in passes) == counted["bytes"] > 0
    assert len(passes) == (3 if cache else 4)  # three streams, and the moments of all


def test_bytes_of_a_path_are_those_that_are_read(run: Path, counted: Counter[str]) -> None:
    projection = project_path(str(run), by="tensor")
    counted.clear()
    measure_path_table(str(run), by="tensor")
    assert projection.bytes_to_read == counted["bytes"] > 0


def test_a_schedule_and_inputs_read_what_their_plans_say(
    tmp_path: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch, chunks: None
) -> None:
    monkeypatch.chdir(tmp_path)
    random_run(Path("run.zarr"))
    write_table(measure_run("run.zarr", cache=False)["model"], "t.parquet")
    planned = plan_schedule("run.zarr", cache=False)
    (one,) = project_run("run.zarr", streams=["updates", "minibatch"], cache=False)
    assert re.sub(r", about .*", "", str(one)) in planned
    counted.clear()
    schedule_run("run.zarr", cache=False)
    assert one.bytes_to_read == counted["bytes"] > 0
    planned = plan_inputs(["t.parquet", "run.zarr", "./run.zarr"], cache=False)
    (one,) = project_run("run.zarr", cache=False)
    assert planned.count("\n") == 0
    assert re.sub(r", about .*", "", str(one)) in planned
    counted.clear()
    export_inputs(["t.parquet", "run.zarr", "./run.zarr"], "t.csv", cache=False)
    assert one.bytes_to_read == counted["bytes"] > 0
    assert plan_inputs(["t.parquet"]).startswith("no run among them")


# The commands.


@pytest.mark.parametrize(
    "arguments",
    [
        ("compute", "run.zarr"),
        ("pairs", "run.zarr", "--lags", "1"),
        ("pca", "run.zarr"),
        ("schedule", "run.zarr"),
        ("compare", "run.zarr", "other.zarr", "--group-by", "run"),
        ("report", "run.zarr"),
        ("export", "run.zarr"),
    ],
)
def test_a_plan_needs_no_place_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run.zarr", "other.zarr"):
        random_run(Path(name), seed=len(name))
    done = analyze(*arguments, "--plan")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    runs = [word for word in arguments if word.endswith(".zarr")]
    assert [line.partition(": reads ")[0] for line in lines] == runs
    assert all("of memory with" in line and "about" in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.zarr", "run.zarr"]
    if arguments[0] != "compare":  # which may do without
        done = analyze(*arguments)
        assert (done.exit_code, "missing option '--out'" in done.stderr) == (2, True), done.stderr


def test_errors_are_those_of_the_measurement(run: Path) -> None:
    with pytest.raises(UnknownNameError, match="no stream 'heldout'"):
        project_pairs(str(run), streams=["heldout"])
    with pytest.raises(UsageError, match="is no reference"):
        project_pairs(str(run), ["finale"])
    assert analyze("pairs", str(run), "--lags", "7", "--plan").exit_code == 3
    assert analyze("pca", str(run), "--plan", "--scheduler", "tcp://::::").exit_code == 2


MEASURE = """
import sys
from analyze.plans import project_pairs
from analyze.pairs_of_run import measure_pairs
from tests.analyze.watched import anonymous_bytes, watching
run, stream, by, *lags = sys.argv[1:]
question = {"streams": [stream], "by": [by], "lags": list(map(int, lags)) or "all", "workers": 2}
with watching(anonymous_bytes) as most:
    projected = max(one.memory for one in project_pairs(run, cache=False, **question))
    measure_pairs(run, cache=False, **question)
print(projected, most())
"""


@pytest.mark.parametrize(
    ("rows", "size", "question"),
    [
        (400, 20_000, ["minibatch", "model"]),  # products of many rows, a table of many pairs
        (60, 20_000, ["fixed", "tensor", "10", "20"]),
        (12, 1_500_000, ["fixed", "model"]),  # large tiles
    ],
)
def test_projected_memory_of_pairs_is_an_upper_bound(
    tmp_path: Path, rows: int, size: int, question: list[str]
) -> None:
    streams: Any = random_streams(size, rows=rows, batches=4)
    streams = {name: streams[name] for name in ("weights", question[0])}
    run = write_run(tmp_path / "run.zarr", (size // 2, size // 2), streams)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(run), *question],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    projected, measured = map(int, done.stdout.split())
    print(rows, size, question, projected / 2**20, measured / 2**20)
    assert 50 * 2**20 < measured <= projected < 4 * measured
