"""Products between rows of runs that have few, damaged or missing ones."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from analyze.gram import compute_gram
from capture.store import DamagedError, UnknownNameError, UsageError
from tests.analyze.grams import CLOSE, GROUPS, SIZES, STREAMS, small_chunks
from tests.analyze.small_runs import flip, random_streams, write_run


@pytest.fixture(scope="module", autouse=True)
def cut_small() -> Iterator[None]:
    with small_chunks():
        yield


@pytest.fixture(scope="module")
def run(cut_small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("gram") / "run.zarr", SIZES, STREAMS)


def test_one_row_has_no_pairs(tmp_path: Path) -> None:
    streams = random_streams(30, rows=2, batches=2)
    path = write_run(tmp_path / "run.zarr", (30,), streams)
    gram = compute_gram(path, "fixed", np.zeros(1, np.int64))
    assert gram.sums["dd"].shape == (0, 2, 1)
    g = streams["fixed"][0].astype(np.float64)
    np.testing.assert_allclose(gram.batch_sums[0, :, :, 0], g @ g.T, **CLOSE)  # type: ignore[index]


def test_an_empty_stream_has_nothing(tmp_path: Path) -> None:
    streams = {"weights": np.ones((2, 30), "f4"), "minibatch": np.empty((0, 30), "f4")}
    path = write_run(tmp_path / "run.zarr", (30,), streams)
    assert compute_gram(path, "minibatch", np.zeros(1, np.int64)).sums["gg"].shape == (0, 1, 1)


@pytest.mark.parametrize("lags", [None, [10]])
@pytest.mark.parametrize(
    ("shard", "position"),
    [
        ("weights/value/c/1/0", 900),
        ("gradients/fixed/value/c/7/2/0", 900),
        ("gradients/fixed/value/c/0/0/0", 12),
        ("gradients/fixed/value/c/0/0/0", -1),
    ],
)
def test_one_flipped_bit_gives_an_error_and_no_number(
    run: Path, tmp_path: Path, shard: str, position: int, lags: list[int] | None
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy.zarr")
    flip(copy / shard, position)
    with pytest.raises(DamagedError, match=shard):
        compute_gram(copy, "fixed", GROUPS, lags=lags)


def test_a_gradient_without_weights_of_its_step_is_refused(tmp_path: Path) -> None:
    streams = {"weights": STREAMS["weights"][:2], "minibatch": STREAMS["minibatch"][:3]}
    path = write_run(tmp_path / "run.zarr", SIZES, streams)
    with pytest.raises(DamagedError, match=r"row 2 \(step 20\) of 'minibatch' has no weights"):
        compute_gram(path, "minibatch", GROUPS)


def test_an_unknown_stream_is_refused_by_name(run: Path) -> None:
    with pytest.raises(UnknownNameError, match="no stream 'heldout'"):
        compute_gram(run, "heldout", GROUPS)


@pytest.mark.parametrize("lags", [[0], [-10], []])
def test_a_lag_is_a_positive_number(run: Path, lags: list[int]) -> None:
    with pytest.raises(UsageError, match="no lag"):
        compute_gram(run, "minibatch", GROUPS, lags=lags)


def test_files_are_closed_after_a_call(run: Path) -> None:
    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count(str(run))

    compute_gram(run, "fixed", GROUPS)
    assert mapped() == 0
