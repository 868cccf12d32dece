"""Chunk grids and paths, up to sizes that nobody can allocate."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capture.store import ChunkGrid, ShardLayout, Tensor, TensorTable
from capture.store.layout import shard_key, small_chunk_rows, stream_folder

ITEMSIZES = st.sampled_from([4, 8])
# n·C coordinates fill n chunks of 4 MiB exactly, here for float32.
FULL = 2**20


@given(st.integers(1, 10**12), ITEMSIZES)
@example(FULL - 1, 4)
@example(FULL, 4)
@example(FULL + 1, 4)
@example(7 * FULL, 4)
@example(7 * FULL + 1, 4)
def test_chunks_cover_every_coordinate_once_with_little_padding(numel, itemsize):
    grid = ChunkGrid(numel, itemsize)
    chunks, size = grid.num_chunks, grid.chunk_elements
    assert chunks * size - numel == grid.padding >= 0
    # Each chunk is rounded up by less than 16, and ceil(D / n) adds less than 1 per chunk.
    assert grid.padding < 16 * chunks
    assert size % 16 == 0
    assert size * itemsize <= 4 * 2**20
    assert grid.bounds(0)[0] == 0
    assert grid.bounds(chunks - 1)[1] == numel
    middle = chunks // 2
    assert grid.bounds(middle)[0] == (grid.bounds(middle - 1)[1] if middle else 0)


@given(st.integers(1, 10**10), ITEMSIZES)
def test_no_chunk_is_empty_up_to_ten_thousand_million_coordinates(numel, itemsize):
    grid = ChunkGrid(numel, itemsize)
    start, stop = grid.bounds(grid.num_chunks - 1)
    assert stop > start


@pytest.mark.parametrize(
    ("numel", "itemsize", "chunks", "size"),
    [
        (1, 4, 1, 16),
        (5, 8, 1, 16),
        (FULL, 4, 1, FULL),
        (FULL + 1, 4, 2, FULL // 2 + 16),
        (FULL, 8, 2, FULL // 2),
        (11_173_962, 4, 11, 1_015_824),
    ],
)
def test_grids_worked_out_by_hand(numel, itemsize, chunks, size):
    grid = ChunkGrid(numel, itemsize)
    assert (grid.num_chunks, grid.chunk_elements) == (chunks, size)


def test_the_layout_of_300_million_parameters_allocates_nothing():
    layers = [Tensor(f"layer.{index}", (1000, 1000), "F32", 0) for index in range(300)]
    layout = ShardLayout("weights", TensorTable(tuple(layers)))
    # 1.2e9 bytes are 286.1 chunks of 4 MiB; ceil(3e8 / 287) = 1,045,297 is rounded up to 1,045,312.
    assert layout.grid.num_chunks == 287
    assert layout.grid.chunk_elements == 1_045_312
    assert layout.value_bytes == 4 * 287 * 1_045_312
    assert layout.size == layout.value_end + 16 * 287 + 4
    assert layout.size - 4 * 300_000_000 < 100_000


def test_where_streams_and_shards_lie():
    assert stream_folder("weights") == "weights"
    assert stream_folder("updates") == "updates"
    assert stream_folder("minibatch") == "gradients/minibatch"
    assert shard_key(7, None) == "c/7/0"
    assert shard_key(7, 2) == "c/7/2/0"


@pytest.mark.parametrize(("columns", "rows"), [((), 1024), ((62,), 528), ((10_000,), 16)])
def test_small_arrays_have_small_chunks(columns, rows):
    assert small_chunk_rows(columns) == rows
