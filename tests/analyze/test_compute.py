"""Measuring whole runs: right in every entry, and the same bytes however the work is cut."""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analyze import checksums, reference_rows, spill
from analyze.compute import Moments, compute_moments
from analyze.moments import GEOMETRY, MOMENTS, WITHOUT_GRADIENT
from analyze.references import parse_reference
from capture.store import DamagedError, UnknownNameError, UsageError, layout
from tests.analyze.small_runs import (
    GRADIENTS,
    dense_moments,
    flip,
    random_streams,
    same_bytes,
    write_run,
)

SIZES = (60, 1, 0, 200, 39)
STREAMS = random_streams(sum(SIZES), rows=5)
REFERENCES = ("final", "step:10", "mean:3")

# Sums of a few hundred float64 products of size one, added in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def small_chunks() -> Iterator[None]:
    """Cut small runs into several inner chunks, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "TARGET_CHUNK_BYTES", 256)
        yield


@pytest.fixture(scope="module")
def run(small_chunks: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("compute") / "run.zarr", SIZES, STREAMS)


def measure(run: Path, references: tuple[str, ...] = REFERENCES, **options: Any) -> Moments:
    streams = options.pop("streams", ("weights", *GRADIENTS))
    return compute_moments(run, streams, [parse_reference(text) for text in references], **options)


def dense(streams: dict[str, Any], name: str, sizes: tuple[int, ...], w_star: Any) -> Any:
    """The moments of a stream by dense numpy: ``[T, P, 7]`` or ``[T, B, P, 7]``."""
    cuts = np.cumsum(sizes)[:-1]

    def by_tensor(g: Any, w: Any) -> Any:
        parts = [np.split(vector, cuts) for vector in (g, w, w_star)]
        return np.array([dense_moments(*part) for part in zip(*parts, strict=True)])

    pairs = zip(streams[name], streams["weights"], strict=False)
    return np.array(
        [by_tensor(g, w) if g.ndim == 1 else [by_tensor(batch, w) for batch in g] for g, w in pairs]
    )


def reference_values(streams: dict[str, Any]) -> list[Any]:
    """What `REFERENCES` stand for."""
    w = streams["weights"].astype(np.float64)
    return [w[-1], w[1], w[-3:].mean(axis=0)]


def test_every_entry_is_that_of_dense_numpy(run: Path) -> None:
    found = measure(run)
    assert found.references == REFERENCES
    for name in GRADIENTS:
        stream = found.streams[name]
        assert stream.steps.tolist() == [0, 10, 20, 30]
        assert stream.batches == (2 if name == "fixed" else None)
        for place, w_star in enumerate(reference_values(STREAMS)):
            expected = dense(STREAMS, name, SIZES, w_star)
            np.testing.assert_allclose(stream.array[..., place, :, :], expected, **CLOSE)
        assert stream.nonfinite.shape == stream.array.shape[:-1]
        assert not stream.nonfinite.any()


def test_weights_have_the_moments_that_need_no_gradient(run: Path) -> None:
    stream = measure(run).streams["weights"]
    assert stream.steps.tolist() == [0, 10, 20, 30, 40]
    asked = [name in WITHOUT_GRADIENT for name in MOMENTS]
    for place, w_star in enumerate(reference_values(STREAMS)):
        expected = dense(STREAMS, "weights", SIZES, w_star)[..., asked]
        np.testing.assert_allclose(stream.array[:, place][..., asked], expected, **CLOSE)
    assert np.isnan(stream.array[..., np.logical_not(asked)]).all()


def test_fewer_moments_on_demand(run: Path) -> None:
    everything = measure(run).streams["fixed"].array
    some = measure(run, streams=["fixed"], moments=["gg", "ee"]).streams["fixed"].array
    asked = [name in GEOMETRY for name in MOMENTS]
    np.testing.assert_allclose(some[..., asked], everything[..., asked], **CLOSE)
    assert np.isnan(some[..., np.logical_not(asked)]).all()


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(any),
    rows=st.integers(1, 4),
    dtype=st.sampled_from(["F32", "F64"]),
    chunk_bytes=st.sampled_from([64, 256, 4096]),
    seed=st.integers(0, 1000),
)
def test_any_shape_split_and_dtype(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    rows: int,
    dtype: str,
    chunk_bytes: int,
    seed: int,
) -> None:
    kind = {"F32": "f4", "F64": "f8"}[dtype]
    streams = random_streams(sum(sizes), rows=rows, dtype=kind, seed=seed)
    del streams["updates"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "TARGET_CHUNK_BYTES", chunk_bytes)
        path = write_run(tmp_path_factory.mktemp("any") / "r", sizes, streams, dtype=dtype)
        found = measure(path, ("step:0",), streams=["minibatch", "fixed"])
    w_star = streams["weights"][0]
    for name in ("minibatch", "fixed"):
        got = found.streams[name].array[..., 0, :, :]
        if rows > 1:
            np.testing.assert_allclose(got, dense(streams, name, tuple(sizes), w_star), **CLOSE)
        assert got.shape[0] == rows - 1


# The same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rows_per_block": 1},
        {"rows_per_block": 3, "workers": 7},
        {"rows_per_block": 1000, "workers": 1},
        {"workers": 64},
        {"scheduler": "synchronous"},
        {"references": REFERENCES[:1]},
    ],
)
def test_blocks_and_workers_change_no_byte(run: Path, options: dict[str, Any]) -> None:
    alone = measure(run, options.get("references", REFERENCES))
    assert same_bytes(measure(run, **options), alone)


def test_several_references_are_each_what_they_are_alone(run: Path) -> None:
    together = measure(run)
    for place, text in enumerate(REFERENCES):
        alone = measure(run, (text,))
        for name, stream in together.streams.items():
            axis = 2 if stream.batches else 1
            part = np.take(stream.array, [place], axis)
            assert part.tobytes() == alone.streams[name].array.tobytes()


def test_the_portable_checksum_gives_the_same_bytes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(run)
    monkeypatch.setattr(checksums, "AVAILABLE", False)
    assert same_bytes(measure(run), expected)


def test_no_reference_is_a_usage_error(run: Path) -> None:
    with pytest.raises(UsageError, match="no reference"):
        measure(run, ())


# Bad input ------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


WEIGHTS_ROW, FINAL_ROW = "weights/value/c/1/0", "weights/value/c/4/0"
GRADIENT_ROW, BATCH_ROW = "gradients/minibatch/value/c/2/0", "gradients/fixed/value/c/1/1/0"
PADDING = -(16 * 5 + 4) - 1  # just before the index of five chunks


@pytest.mark.parametrize("shard", [WEIGHTS_ROW, FINAL_ROW, GRADIENT_ROW, BATCH_ROW])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, path.stat().st_size // 2),
        lambda path: flip(path, 12),
        lambda path: flip(path, PADDING),
        lambda path: flip(path, -1),
        truncate,
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        Path.unlink,
        link,
    ],
    ids=["data", "header", "padding", "index", "cut", "trailing", "missing", "link"],
)
def test_damage_anywhere_gives_an_error_and_no_number(
    run: Path, tmp_path: Path, shard: str, damage: Callable[[Path], object]
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy.zarr")
    damage(copy / shard)
    with pytest.raises(DamagedError) as caught:
        measure(copy, ("final",))
    assert shard in str(caught.value)
    assert "\n" not in str(caught.value)


def test_padding_is_where_the_damage_test_thinks_it_is(run: Path) -> None:
    grid = layout.ChunkGrid(sum(SIZES), 4)
    assert (grid.num_chunks, grid.padding * 4 > 0) == (5, True)


def test_a_row_that_was_sound_a_moment_ago_is_checked_again(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy.zarr")
    measure(copy)
    flip(copy / FINAL_ROW, 1500)
    with pytest.raises(DamagedError):
        measure(copy)


def test_a_gradient_without_weights_of_its_step_is_refused(tmp_path: Path) -> None:
    streams = {"weights": STREAMS["weights"][:2], "minibatch": STREAMS["minibatch"][:3]}
    path = write_run(tmp_path / "run.zarr", SIZES, streams)
    with pytest.raises(DamagedError, match=r"row 2 \(step 20\) of 'minibatch' has no weights"):
        measure(path, ("step:0",), streams=["minibatch"])


def test_an_unknown_stream_is_refused_by_name(run: Path) -> None:
    with pytest.raises(UnknownNameError, match="no stream 'heldout'"):
        measure(run, streams=["heldout"])


def test_non_finite_coordinates_are_counted_by_tensor(small_chunks: None, tmp_path: Path) -> None:
    streams = {name: STREAMS[name].copy() for name in ("weights", "minibatch")}
    streams["minibatch"][1, [0, 59, 299]] = np.nan, np.inf, -np.inf
    streams["weights"][2, 60] = np.nan
    path = write_run(tmp_path / "run.zarr", SIZES, streams)
    found = measure(path, ("final", "step:20"), streams=["minibatch"]).streams["minibatch"]
    assert found.nonfinite[:, 0].tolist() == [
        [0, 0, 0, 0, 0],
        [2, 0, 0, 0, 1],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert found.nonfinite[:, 1, 1].tolist() == [1, 1, 1, 1]  # the reference itself
    clean = np.isfinite(found.array).all(axis=-1)
    assert (clean == (found.nonfinite == 0)).all()


def test_references_are_closed_after_each_call(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # what earlier tests left open
    closed: list[object] = []
    for kind in (reference_rows._Row, spill.SpilledChunks):
        monkeypatch.setattr(kind, "close", lambda bound: closed.append(bound))
    for calls in (1, 2):
        measure(run, workers=2)
        assert len(closed) == len(REFERENCES) * calls
