"""Products between rows beside dense float64 numpy written from the definitions."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from analyze import chain, pair_blocks, row_bytes
from analyze.gram import compute_gram, regroup
from capture.store import layout
from tests.analyze.grams import (
    CLOSE,
    GROUPS,
    SIZES,
    STREAMS,
    dense,
    same_bytes,
    small_chunks,
)
from tests.analyze.small_runs import random_streams, write_run


@pytest.fixture(scope="module", autouse=True)
def cut_small() -> Iterator[None]:
    with small_chunks():
        yield


@pytest.fixture(scope="module")
def run(cut_small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("gram") / "run.zarr", SIZES, STREAMS)


@pytest.mark.parametrize("lags", [None, [10, 30]], ids=["all", "lags"])
@pytest.mark.parametrize("stream", ["minibatch", "fixed", "updates", "weights"])
def test_every_sum_is_that_of_dense_numpy(run: Path, stream: str, lags: list[int] | None) -> None:
    gram = compute_gram(run, stream, GROUPS, lags=lags)
    rows = 9 if stream == "weights" else 8
    expected_pairs = [
        (i, j)
        for i in range(rows)
        for j in range(i + 1, rows)
        if lags is None or 10 * (j - i) in lags
    ]
    assert gram.pairs.tolist() == [list(pair) for pair in expected_pairs]
    expected = dense(STREAMS, stream, gram.pairs, SIZES, GROUPS)
    assert set(gram.sums) == ({"dd"} if stream == "weights" else set(expected))
    for name, values in gram.sums.items():
        np.testing.assert_allclose(values, expected[name], **CLOSE)


def test_batches_of_a_step_are_multiplied_with_each_other(run: Path) -> None:
    g = STREAMS["fixed"].astype(np.float64)
    at = np.repeat(GROUPS, SIZES) == 0
    for lags in (None, [10]):
        sums = compute_gram(run, "fixed", GROUPS, lags=lags).batch_sums
        assert sums is not None
        assert sums.shape == (8, 3, 3, 3)
        for t, b, c in np.ndindex(8, 3, 3):
            assert sums[t, b, c, 0] == pytest.approx(
                g[t, b][at] @ g[t, c][at], rel=1e-12, abs=1e-12
            )
    assert compute_gram(run, "minibatch", GROUPS).batch_sums is None


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any),
    rows=st.integers(2, 6),
    dtype=st.sampled_from(["F32", "F64"]),
    batches=st.integers(1, 3),
)
def test_any_tensors_rows_and_dtype(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    rows: int,
    dtype: str,
    batches: int,
) -> None:
    streams = random_streams(
        sum(sizes), rows=rows, batches=batches, dtype="f4" if dtype == "F32" else "f8"
    )
    path = write_run(tmp_path_factory.mktemp("any") / "run.zarr", sizes, streams, dtype=dtype)
    groups = np.arange(len(sizes))
    gram = compute_gram(path, "fixed", groups)
    if rows > 2:
        expected = dense(streams, "fixed", gram.pairs, tuple(sizes), groups)
        for name, values in gram.sums.items():
            np.testing.assert_allclose(values, expected[name], **CLOSE)
    assert len(gram.pairs) == (rows - 1) * (rows - 2) // 2


@pytest.mark.parametrize("lags", [None, [10, 30]])
def test_bytes_do_not_depend_on_workers_or_scheduler(run: Path, lags: list[int] | None) -> None:
    first = compute_gram(run, "fixed", GROUPS, lags=lags, workers=1)
    for options in ({"workers": 3}, {"scheduler": "synchronous"}, {"workers": 8}):
        assert same_bytes(first, compute_gram(run, "fixed", GROUPS, lags=lags, **options))


def test_a_cluster_gives_the_same_bytes(tmp_path: Path) -> None:
    # Its workers have the chunks of the format: the run is made with those.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "TARGET_CHUNK_BYTES", 4 * 2**20)
        path = write_run(tmp_path / "run.zarr", SIZES, STREAMS)
        here = compute_gram(path, "fixed", GROUPS)
        with LocalCluster(
            n_workers=1, threads_per_worker=2, processes=True, dashboard_address="127.0.0.1:0"
        ) as cluster:
            there = compute_gram(path, "fixed", GROUPS, scheduler=cluster.scheduler_address)
    assert same_bytes(here, there)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (pair_blocks, "MOST_ROWS", 4),
        (pair_blocks, "MOST_ROWS", 5),
        (pair_blocks, "_MOST_SHARDS", 8),
        (pair_blocks, "_MOST_STRETCHES", 1),
        (pair_blocks, "_MOST_STRETCHES", 2),
        (pair_blocks, "_PARTIAL_BYTES", 1),
        (chain, "TILE", 8),
        (chain, "TILE", 24),
        (row_bytes, "WINDOW_BYTES", 1),
    ],
)
@pytest.mark.parametrize("lags", [None, [10, 20]])
def test_the_cut_into_blocks_and_tiles_changes_no_number(
    run: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: int, lags: Any
) -> None:
    expected = compute_gram(run, "fixed", GROUPS, lags=lags)
    monkeypatch.setattr(row_bytes, "_MULTIPLE", 7)
    monkeypatch.setattr(module, name, value)
    found = compute_gram(run, "fixed", GROUPS, lags=lags)
    for key, values in expected.sums.items():
        np.testing.assert_allclose(found.sums[key], values, **CLOSE)
    assert found.batch_sums is not None
    assert expected.batch_sums is not None
    np.testing.assert_allclose(found.batch_sums, expected.batch_sums, **CLOSE)


def test_another_chunk_size_changes_no_number(run: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "TARGET_CHUNK_BYTES", 4 * 2**20)
        whole = write_run(tmp_path / "run.zarr", SIZES, STREAMS)
        other = compute_gram(whole, "minibatch", GROUPS)
    for name, values in compute_gram(run, "minibatch", GROUPS).sums.items():
        np.testing.assert_allclose(values, other.sums[name], **CLOSE)


def test_all_pairs_and_lags_agree(run: Path) -> None:
    everything = compute_gram(run, "minibatch", GROUPS)
    lags = compute_gram(run, "minibatch", GROUPS, lags=[20])
    place = {tuple(pair): n for n, pair in enumerate(everything.pairs.tolist())}
    at = [place[tuple(pair)] for pair in lags.pairs.tolist()]
    for name, values in lags.sums.items():
        np.testing.assert_allclose(values, everything.sums[name][at], **CLOSE)


def test_coordinates_may_be_permuted_within_a_tensor(run: Path, tmp_path: Path) -> None:
    rng, starts = np.random.default_rng(1), np.cumsum([0, *SIZES])
    order = np.concatenate([a + rng.permutation(b - a) for a, b in pairwise(starts)])
    permuted = {name: values[..., order] for name, values in STREAMS.items()}
    other = compute_gram(write_run(tmp_path / "run.zarr", SIZES, permuted), "fixed", np.arange(5))
    for name, values in compute_gram(run, "fixed", np.arange(5)).sums.items():
        np.testing.assert_allclose(values, other.sums[name], **CLOSE)


def test_splitting_a_tensor_changes_no_byte_of_the_model(run: Path, tmp_path: Path) -> None:
    split = write_run(tmp_path / "run.zarr", (30, 30, 1, 150, 50, 39), STREAMS)
    one = compute_gram(run, "fixed", np.zeros(5, np.int64))
    assert same_bytes(one, compute_gram(split, "fixed", np.zeros(6, np.int64)))


def test_groups_add_up(run: Path) -> None:
    fine = compute_gram(run, "fixed", np.arange(5))
    coarse = compute_gram(run, "fixed", GROUPS)
    added = regroup(fine, GROUPS)
    for name, values in coarse.sums.items():
        np.testing.assert_allclose(added.sums[name], values, **CLOSE)
    assert added.batch_sums is not None
    assert coarse.batch_sums is not None
    np.testing.assert_allclose(added.batch_sums, coarse.batch_sums, **CLOSE)
