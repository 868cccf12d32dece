"""`analyze pairs` and `analyze pca` as commands: output, exit codes, nothing left behind."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from analyze.cli import main
from tests.analyze.recorded import random_run, write_run

COMMANDS = ["pairs", "pca"]


def analyze(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("cli") / "run.zarr")


@pytest.fixture
def folder(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the run that the examples of the help are about."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded, tmp_path / "runs" / "first.zarr")
    return tmp_path


def test_pairs_prints_a_summary_and_writes_both_tables(folder: Path) -> None:
    done = analyze(
        *("pairs", "runs/first.zarr", "--by", "layer", "--lags", "1,2", "--out", "p.parquet"),
        *("--noise", "n.parquet"),
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("runs/first.zarr   w* = final   D = 25\n")
    assert "gradient noise scale" in done.stdout
    assert "153 rows in p.parquet" in done.stderr
    table = pq.read_table("p.parquet")
    assert table.num_rows == 3 * ((5 + 4) * 2 + 3 * (6 + 5))
    assert set(table["group"].to_pylist()) == {"body.0", "head", "scale"}
    assert pq.read_table("n.parquet").num_rows == 7 * 3


def test_pairs_of_several_runs_are_one_table(folder: Path) -> None:
    random_run(folder / "runs" / "second.zarr", seed=1)
    runs = ("runs/first.zarr", "runs/second.zarr")
    done = analyze("pairs", *runs, "--stream", "weights", "--lags", "all", "--out", "p.parquet")
    assert done.exit_code == 0, done.stderr
    assert pq.read_table("p.parquet")["run"].unique().to_pylist() == list(runs)
    assert done.stdout.count("w* = final") == 2


def test_groups_may_be_regular_expressions(folder: Path) -> None:
    for command, groups in (("pairs", ["body", "rest"]), ("pca", ["body", "rest"])):
        done = analyze(command, "runs/first.zarr", "--group", "body=^body", "--out", "p.parquet")
        assert done.exit_code == 0, done.stderr
        assert pq.read_table("p.parquet")["group"].unique().to_pylist() == groups
    by_kind = ("--by", "kind", "--no-cache", "--out", "p.parquet")
    assert analyze("pairs", "runs/first.zarr", *by_kind).exit_code == 0
    assert "bias" in pq.read_table("p.parquet")["group"].to_pylist()


def test_pca_prints_both_nulls_and_writes_the_table(folder: Path) -> None:
    done = analyze("pca", "runs/first.zarr", "--components", "2", "--out", "p.parquet")
    assert done.exit_code == 0, done.stderr
    assert "60.8 %" in done.stdout
    assert pq.read_table("p.parquet").num_rows == 2 * 7


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pairs", "runs/first.zarr", "--lags", "1,x"], 2, "'x' is no lag"),
        (["pairs", "runs/first.zarr", "--lags", "99"], 3, "99 updates apart"),
        (["pairs", "runs/first.zarr", "--reference", "step:99"], 3, "99"),
        (["pairs", "runs/first.zarr", "--stream", "heldout"], 3, "no stream 'heldout'"),
        (["pairs", "runs/first.zarr", "--by", "part"], 2, "'part' is not one of"),
        (["pairs", "runs/first.zarr", "--noise", "runs"], 2, "this is a folder"),
        (["pairs", "runs/none.zarr"], 3, "runs/none.zarr"),
        (["pairs"], 2, "RUN"),
        (["pca", "runs/none.zarr"], 3, "runs/none.zarr"),
        (["pca", "runs/first.zarr", "--components", "0"], 2, "components"),
        (["pca", "runs/first.zarr", "--workers", "0"], 2, "workers"),
        (["pca", "runs/first.zarr", "--scheduler", "slurm"], 2, "'slurm' is no scheduler"),
        (["pca", "runs/one.zarr"], 3, "needs two saved rows"),
        (["pairs", "runs/one.zarr"], 3, "no two rows"),
        (["pairs", "runs/unfinished.zarr"], 3, "has not finished"),
    ],
)
def test_what_a_user_can_do_wrong(
    folder: Path, arguments: list[str], code: int, words: str
) -> None:
    write_run(folder / "runs/one.zarr", {"weights": np.ones((1, 25), "f4")})
    random_run(folder / "runs/unfinished.zarr", complete=False)
    done = analyze(*arguments, "--out", "t.parquet")
    assert done.exit_code == code
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert sorted(path.name for path in folder.iterdir()) == ["runs"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flipped_bit_is_exit_3_and_leaves_the_old_table(folder: Path, command: str) -> None:
    assert analyze(command, "runs/first.zarr", "--out", "t.parquet").exit_code == 0
    before = Path("t.parquet").read_bytes()
    shard = Path("runs/first.zarr/weights/value/c/1/0")
    content = bytearray(shard.read_bytes())
    # One bit among the coordinates, which begin where the header ends.
    content[8 + int.from_bytes(content[:8], "little") + 5] ^= 1
    shard.write_bytes(content)
    done = analyze(command, "runs/first.zarr", "--out", "t.parquet")
    assert done.exit_code == 3
    assert "c/1/0" in done.stderr
    assert Path("t.parquet").read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_inside_a_run_is_refused(folder: Path, command: str) -> None:
    done = analyze(command, "runs/first.zarr", "--out", "runs/first.zarr/t.parquet")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "inside a run" in done.stderr


def test_two_tables_need_two_files(folder: Path) -> None:
    done = analyze("pairs", "runs/first.zarr", "--noise", "./p.parquet", "--out", "p.parquet")
    assert (done.exit_code, Path("p.parquet").exists()) == (2, False)
    assert "--noise and --out are two files" in done.stderr


def test_a_lag_beyond_every_step_is_no_lag(folder: Path) -> None:
    done = analyze("pairs", "runs/first.zarr", "--lags", "9" * 22, "--out", "p.parquet")
    assert done.exit_code == 2
    assert "is no lag between two steps" in done.stderr
