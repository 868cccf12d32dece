"""Blocks cover a stream exactly once, are enough for the workers, and stay small."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyze.blocks import cut
from capture.store import ChunkGrid


def stream_of(rows: int, size: int, batches: int | None = None) -> Any:
    """What `cut` looks at, without a store: rows of `size` float32 coordinates."""
    grid = ChunkGrid(size, 4)
    return SimpleNamespace(name="s", steps=range(rows), batches=batches, grid=grid)


@given(
    rows=st.integers(0, 200),
    size=st.integers(1, 60_000_000),
    batches=st.sampled_from([None, 1, 10]),
    workers=st.integers(1, 40),
    rows_per_block=st.none() | st.integers(1, 300),
)
def test_every_row_of_every_chunk_is_in_one_block(
    rows: int, size: int, batches: int | None, workers: int, rows_per_block: int | None
) -> None:
    stream = stream_of(rows, size, batches)
    blocks = list(cut(stream, workers, rows_per_block))
    found = [(row, chunk) for block in blocks for row in block.rows for chunk in block.chunks]
    assert sorted(found) == [(r, c) for r in range(rows) for c in range(stream.grid.num_chunks)]
    assert [block.chunks.start for block in blocks] == sorted(b.chunks.start for b in blocks)


@pytest.mark.parametrize(
    ("rows", "size", "batches"),
    [(30, 11_200_000, None), (100, 400_000_000, 10), (10_000, 50_000, None)],
)
def test_there_are_enough_blocks_and_none_reads_more_than_a_gibibyte(
    rows: int, size: int, batches: int | None
) -> None:
    stream = stream_of(rows, size, batches)
    blocks = list(cut(stream, workers=2, rows_per_block=None))
    assert len(blocks) >= 6
    shards = 1 + (batches or 1)
    read = [len(b.rows) * len(b.chunks) * shards * stream.grid.chunk_bytes for b in blocks]
    assert max(read) <= 2**30
