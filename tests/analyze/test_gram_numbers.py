"""Products between rows where numbers are hard: rows that are close, and what is not finite."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze import chain
from analyze.gram import compute_gram
from tests.analyze.grams import (
    CLOSE,
    GROUPS,
    SIZES,
    STREAMS,
    Values,
    dense,
    small_chunks,
)
from tests.analyze.small_runs import write_run


@pytest.fixture(scope="module", autouse=True)
def cut_small() -> Iterator[None]:
    with small_chunks():
        yield


@pytest.fixture(scope="module")
def run(cut_small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("gram") / "run.zarr", SIZES, STREAMS)


def late_streams(dtype: str, apart: float) -> dict[str, Values]:
    """A long way, then iterates and gradients that differ by `apart` of their size."""
    draw = np.random.default_rng(3).standard_normal
    far, near = draw((3, 300)), draw(300)
    close = near * (1 + apart * draw((4, 300)))
    # At the end back to where it was before the last excursion, and to the very start.
    path = np.concatenate([far, close, 5 * far[:1], close[:1] * (1 + apart), far[:1]])
    return {"weights": path.astype(dtype), "fixed": path[:, None].astype(dtype)}


@pytest.mark.parametrize("lags", [None, list(range(10, 100, 10))], ids=["all", "lags"])
@pytest.mark.parametrize(("dtype", "apart"), [("F32", 1e-6), ("F64", 1e-6)])
def test_late_iterates_that_are_close_keep_their_digits(
    tmp_path: Path, dtype: str, apart: float, lags: list[int] | None
) -> None:
    streams = late_streams("f4" if dtype == "F32" else "f8", apart)
    path = write_run(tmp_path / "run.zarr", (150, 150), streams, dtype=dtype)
    gram = compute_gram(path, "fixed", np.zeros(2, np.int64), lags=lags)
    expected = dense(streams, "fixed", gram.pairs, (150, 150), np.zeros(2, np.int64))
    for name in ("dd", "hh"):
        # Of the squares; the distances are twice as good.
        np.testing.assert_allclose(gram.sums[name], expected[name], rtol=2e-9, atol=0)
    # A product with a difference is as good as the two lengths allow.
    scale = np.sqrt(expected["dd"] * (np.float64(streams["fixed"]) ** 2).sum(axis=2).max())
    for name in ("gd", "dg"):
        assert (np.abs(gram.sums[name] - expected[name]) <= 1e-9 * scale).all()
    # The last row is the first one: no distance, not nearly none.
    again = [pair == [0, 9] for pair in gram.pairs.tolist()]
    assert gram.sums["dd"][again].tolist() == [[[0.0]]]


@pytest.mark.parametrize("lags", [None, [10, 30]])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_spoils_its_own_pairs_and_no_others(
    tmp_path: Path, lags: list[int] | None, value: float
) -> None:
    streams = {name: STREAMS[name].copy() for name in ("weights", "fixed")}
    streams["weights"][[3, 8], [10, 250]] = value
    streams["fixed"][5, 1, 280] = value
    path = write_run(tmp_path / "run.zarr", SIZES, streams)
    gram = compute_gram(path, "fixed", np.arange(5), lags=lags)
    clean = dense(STREAMS, "fixed", gram.pairs, SIZES, np.arange(5))
    spoiled = {name: np.zeros(values.shape, bool) for name, values in clean.items()}
    for n, (i, j) in enumerate(gram.pairs):
        if 3 in (i, j):
            for name in ("dd", "gd", "dg"):
                spoiled[name][n, :, 0] = True
        for name, rows in {"gg": (i, j), "hh": (i, j), "gd": (i,), "dg": (j,)}.items():
            spoiled[name][n, 1, 4] |= 5 in rows
    for name, values in gram.sums.items():
        assert (np.isfinite(values) == ~spoiled[name]).all(), name
        np.testing.assert_allclose(values[~spoiled[name]], clean[name][~spoiled[name]], **CLOSE)


def test_a_row_that_is_not_finite_sends_no_pair_the_slow_way(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    weights = STREAMS["weights"].copy()
    weights[4, 70] = np.nan
    path = write_run(tmp_path / "run.zarr", SIZES, {"weights": weights})
    monkeypatch.setattr(chain, "direct_sums", never)
    found = compute_gram(path, "weights", GROUPS).sums["dd"]
    assert np.isnan(found).sum() == 8
    clean = compute_gram(run, "weights", GROUPS).sums["dd"]
    np.testing.assert_allclose(found[~np.isnan(found)], clean[~np.isnan(found)], **CLOSE)


def test_rows_that_are_all_nan_give_no_number_and_no_warning(tmp_path: Path) -> None:
    streams = {"weights": np.full((4, 30), np.nan, "f4")}
    path = write_run(tmp_path / "run.zarr", (30,), streams)
    assert np.isnan(compute_gram(path, "weights", np.zeros(1, np.int64)).sums["dd"]).all()


def test_squares_beyond_float64_are_infinite_and_spoil_no_others(tmp_path: Path) -> None:
    weights = np.ones((4, 30))
    weights[1, 3] = 1e200
    path = write_run(tmp_path / "run.zarr", (30,), {"weights": weights}, dtype="F64")
    gram = compute_gram(path, "weights", np.zeros(1, np.int64))
    found = dict(zip(map(tuple, gram.pairs.tolist()), gram.sums["dd"].ravel(), strict=True))
    assert not any(np.isfinite(found[pair]) for pair in [(0, 1), (1, 2), (1, 3)])
    assert [found[pair] for pair in [(0, 2), (0, 3), (2, 3)]] == [0, 0, 0]
