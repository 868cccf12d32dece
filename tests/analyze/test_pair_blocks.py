"""Which pairs are measured, and how they are cut into tasks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyze import pair_blocks
from analyze.pair_blocks import choose_pairs, cut_pairs, cut_stretches, parse_lags
from capture.store import UsageError


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
