"""Products between rows beside dense float64 numpy written from the definitions."""

import gc
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from analyze import blas, chain, pair_blocks, row_bytes
from analyze.gram import Gram, compute_gram, regroup
from analyze.pair_blocks import choose_pairs, cut_pairs, cut_stretches, parse_lags
from capture.store import DamagedError, UnknownNameError, UsageError, layout
from tests.analyze.small_runs import flip, random_streams, write_run

Values = NDArray[Any]

SIZES = (60, 1, 0, 200, 39)
# Not contiguous: the first and the fourth tensor are one group.
GROUPS = np.array([0, 1, 1, 0, 2])
STREAMS = random_streams(300, rows=9, batches=3)
# Sums of 300 products of float64; what cancels does so in the dense sums as well.
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Cut small runs into several inner chunks, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "TARGET_CHUNK_BYTES", 256)
        yield


@pytest.fixture(scope="module")
def run(small_chunks: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("gram") / "run.zarr", SIZES, STREAMS)


def dense(
    streams: dict[str, Values], name: str, pairs: Values, sizes: tuple[int, ...], groups: Values
) -> dict[str, Values]:
    """Every sum of every pair, batch and group, one at a time: ``[N, B, K]``."""
    group_of = np.repeat(groups, sizes)
    w = streams["weights"].astype(np.float64)
    g = streams[name].astype(np.float64)
    g = g[:, None] if g.ndim == 2 else g
    found: dict[str, list[list[list[float]]]] = {k: [] for k in ("dd", "gg", "gd", "dg", "hh")}
    for i, j in pairs:
        for sums in found.values():
            sums.append([[] for _ in range(g.shape[1])])
        for b in range(g.shape[1]):
            for k in range(groups.max() + 1):
                at = group_of == k
                d, gi, gj = (w[i] - w[j])[at], g[i, b][at], g[j, b][at]
                h = gi - gj
                for key, value in {
                    "dd": d @ d,
                    "gg": gi @ gj,
                    "gd": gi @ d,
                    "dg": -(gj @ d),
                    "hh": h @ h,
                }.items():
                    found[key][-1][b].append(value)
    return {key: np.array(value) for key, value in found.items()}


def same_bytes(left: Gram, right: Gram) -> bool:
    crossed = [g.batch_sums for g in (left, right) if g.batch_sums is not None]
    return all(
        left.sums[name].tobytes() == right.sums[name].tobytes() for name in left.sums
    ) and len({values.tobytes() for values in crossed}) in (0, 1)


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


# Independence of how the work is cut ----------------------------------------------------------


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
        (chain, "_TILE", 8),
        (chain, "_TILE", 24),
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


# Accuracy -------------------------------------------------------------------------------------


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


# What is not finite ---------------------------------------------------------------------------


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


# Few rows, bad input --------------------------------------------------------------------------


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


# Pairs and blocks -----------------------------------------------------------------------------


@given(
    steps=st.lists(st.integers(0, 60), unique=True, max_size=20).map(sorted),
    lags=st.none() | st.lists(st.integers(1, 30), min_size=1, max_size=4),
    most=st.integers(2, 9),
    batches=st.sampled_from([None, 2]),
)
def test_every_pair_is_in_one_block_and_every_row_owned_once(
    steps: list[int], lags: list[int] | None, most: int, batches: int | None
) -> None:
    at = np.array(steps, np.int64)
    pairs = choose_pairs(at, lags)
    wanted = [
        [i, j]
        for i in range(len(steps))
        for j in range(i + 1, len(steps))
        if lags is None or steps[j] - steps[i] in lags
    ]
    assert pairs.tolist() == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_blocks, "MOST_ROWS", most)
        blocks = list(cut_pairs(pairs, len(steps), batches, [range(3)], dense=lags is None))
    place = np.concatenate([block.place for block in blocks] or [[]]).astype(int)
    assert sorted(place) == list(range(len(pairs)))
    owned = np.concatenate([block.rows[block.own] for block in blocks] or [[]])
    assert sorted(owned) == ([] if batches is None else list(range(len(steps))))
    for block in blocks:
        assert block.rows[block.pairs].tolist() == pairs[block.place].tolist()
        assert (np.diff(block.own) == 1).all()
        band = 1 + max((sum(1 for p in wanted if p[0] == i) for i in range(len(steps))), default=0)
        assert len(block.rows) <= (most if lags is None else max(most, band))


@given(
    chunks=st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=200),
    size=st.integers(1, 2**29),
)
def test_stretches_cover_the_chunks_within_the_memory(chunks: list[set[int]], size: int) -> None:
    stretches = cut_stretches(chunks, size)
    assert [chunk for part in stretches for chunk in part] == list(range(len(chunks)))
    held = sum(len(set().union(*(chunks[c] for c in part))) for part in stretches) * size
    assert len(stretches) == 1 or held <= pair_blocks._PARTIAL_BYTES


def test_lags_as_typed() -> None:
    assert parse_lags("1, 2,50") == [1, 2, 50]
    assert (parse_lags("all"), parse_lags(None)) == ("all", None)
    for text in ("", "1,,2", "0", "-1", "1.5", "every", "²"):
        with pytest.raises(UsageError, match="no lag"):
            parse_lags(text)


# BLAS -----------------------------------------------------------------------------------------


def threads() -> list[int]:
    return [library.num_threads for library in blas._libraries().lib_controllers]


def test_blas_is_on_one_thread_until_the_last_has_left() -> None:
    for library in blas._libraries().lib_controllers:
        library.set_num_threads(2)
    before = threads()
    assert before
    first, second = blas.single_threaded(), blas.single_threaded()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(threads()) == {1}
    second.__exit__(None, None, None)
    assert threads() == before


def test_files_are_closed_after_a_call(run: Path) -> None:
    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count(str(run))

    compute_gram(run, "fixed", GROUPS)
    assert mapped() == 0
