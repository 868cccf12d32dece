"""The command: what it writes and refuses, and a schedule that goes to a fresh training.

How that training ends is reported, not demanded.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from analyze.cli import main as analyze
from capture.cli import main as capture
from capture.optimizers import read_lr_file
from tests.analyze.descents import line
from tests.analyze.recorded import Rows, random_run

EPOCH = 22


def call(main: object, *arguments: str) -> str:
    done = CliRunner().invoke(main, arguments)  # type: ignore[arg-type]
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_schedule_is_followed_by_a_fresh_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    optimizer: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ("train", "--task", "digits", "--optimizer", optimizer, "--epochs", "4")
    train = (*train, "--device", "cpu", "--threads", "1")
    call(capture, *train, "--every", "4", "--gradients", "minibatch,updates", "--out", "one.zarr")
    said = call(analyze, "schedule", "one.zarr", "--out", "rate.csv")
    assert "smoothed over 5 rows" in said
    call(
        capture,
        *(*train, "--lr-schedule", "rate.csv", "--seed", "1", "--gradients", "none"),
        *("--out", "two.zarr"),
    )
    steps, rates = read_lr_file("rate.csv")
    assert steps == list(range(0, 4 * EPOCH, 4))
    followed = Rows(tmp_path / "two.zarr").scalar("lr")
    assert followed.tolist() == np.interp(np.arange(4 * EPOCH), steps, rates).tolist()
    before, after = (Rows(tmp_path / name).scalar("loss") for name in ("one.zarr", "two.zarr"))
    assert len(before) == len(after) == 4 * EPOCH
    # Both begin at chance, ln 10 of ten classes, give or take what a first batch does.
    assert (before[0], after[0]) == pytest.approx((np.log(10), np.log(10)), abs=0.3)
    ends = [float(loss[-EPOCH:].mean()) for loss in (before, after)]
    what = "diverged" if not np.isfinite(ends[1]) else "better" if ends[1] < ends[0] else "worse"
    report = (
        f"{optimizer}: loss of the last epoch {ends[0]:.3g} with a constant rate, {ends[1]:.3g} "
        f"with the ported schedule of {min(rates):.3g} to {max(rates):.3g}: {what}"
    )
    record_property("ported", report)
    print(report)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    random_run(tmp_path / "run.zarr")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run.zarr", "--reference", "finale"], 2, "'finale' is no reference"),
        (["run.zarr", "--reference", "step:99"], 3, "99"),
        (["run.zarr", "--reference", "file:none"], 3, "none"),
        (["run.zarr", "--smooth", "2"], 2, "a window of 2 rows has no middle"),
        (["run.zarr", "--smooth", "2.5"], 2, "2.5"),
        (["run.zarr", "--factor", "-1"], 2, "rates cannot be multiplied with -1"),
        (["run.zarr", "--factor", "1e308"], 2, "which no training can follow: run.zarr; use a sm"),
        (["run.zarr", "--factor", "1e45"], 2, "the rate at step"),
        (["run.zarr", "--from", "fixed"], 2, "'fixed' is not one of"),
        (["run.zarr", "--from", "minibatch"], 3, "this SGD has momentum"),
        (["run.zarr", "--by", "sort"], 2, "'sort' is not one of"),
        (["none.zarr"], 3, "none.zarr"),
        (["run.zarr", "run.zarr"], 2, "unexpected extra argument"),
        ([], 2, "RUN"),
    ],
)
def test_what_a_user_can_do_wrong(
    folder: Path, arguments: list[str], code: int, words: str
) -> None:
    done = CliRunner().invoke(analyze, ["schedule", *arguments, "--out", "rate.csv"])
    assert done.exit_code == code
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert [path.name for path in folder.glob("*.csv")] == []


def test_the_file_explains_itself_and_the_command_says_what_it_did(folder: Path) -> None:
    line(folder / "line.zarr", [4, 3, 2, 1, 0], [0.5] * 4)
    done = CliRunner().invoke(
        analyze,
        ["schedule", "line.zarr", "--smooth", "1", "--factor", "0.5", "--out", "rate.csv"],
    )
    assert done.exit_code == 0, done.stderr
    assert Path("rate.csv").read_text() == (
        "step,lr,status,raw,window,run_lr,source,smooth,factor,reference\n"
        "0,1.0,fit,2.0,1,0.5,updates,1,0.5,final\n"
        "1,0.75,fit,1.5,1,0.5,updates,1,0.5,final\n"
        "2,0.5,fit,1.0,1,0.5,updates,1,0.5,final\n"
        "3,0.25,fit,0.5,1,0.5,updates,1,0.5,final\n"
    )
    assert done.stdout.startswith("line.zarr   w* = final   T = 4 updates   D = 25\n")
    assert "rate 0.25 to 1 at 4 steps, that of the run itself 0.5\n" in done.stdout
    assert "4 rates in rate.csv; next:\n  capture train … --lr-schedule rate.csv" in done.stderr


def test_an_old_file_stays_where_nothing_follows(folder: Path) -> None:
    line(folder / "line.zarr", [1, 2, 4], [0.1] * 2)
    line(folder / "behind.zarr", [0, 0], [0.1])
    Path("rate.csv").write_text("old")
    done = CliRunner().invoke(
        analyze, ["schedule", "line.zarr", "--reference", "run:behind.zarr", "--out", "rate.csv"]
    )
    assert done.exit_code == 3
    assert "no rate follows" in done.stderr
    assert Path("rate.csv").read_text() == "old"
