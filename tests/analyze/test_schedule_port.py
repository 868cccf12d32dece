"""A schedule goes from one training to a fresh one; how that ends is reported, not demanded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from analyze.cli import main as analyze
from capture.cli import main as capture
from capture.optimizers import read_lr_file
from tests.analyze.recorded import Rows

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
