"""The commit log: lines there and back, torn ends, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from capture.store import DamagedError, log
from capture.store.log import Commit, decode, encode

LOG = Path("commits.jsonl")
CHECKSUM = st.integers(0, 2**32 - 1).map("{:08x}".format)
COMMITS = st.builds(
    Commit,
    row=st.integers(0, 10**9),
    batch=st.none() | st.integers(0, 99),
    step=st.integers(0, 2**63 - 1),
    epoch=st.none() | st.floats(0, 1e6),
    size=st.integers(0, 2**40),
    rest=CHECKSUM,
    chunks=st.lists(CHECKSUM, max_size=3).map(tuple),
)


def rows(count: int, batches: int | None = None) -> list[Commit]:
    """A sound log of `count` lines."""
    per_row = batches or 1
    return [
        Commit(
            row=number // per_row,
            batch=None if batches is None else number % per_row,
            step=10 * (number // per_row),
            epoch=None,
            size=1,
            rest="00000000",
            chunks=("00000000",),
        )
        for number in range(count)
    ]


def check(commits: list[Commit], path: Path, **options: Any) -> None:
    """Check commits as they come out of a log."""
    log.check(decode(b"".join(map(encode, commits)), path)[0], path, **options)


def test_a_line_byte_by_byte():
    body = (
        b'"row":3,"batch":null,"step":30,"epoch":1.5,"size":600,"rest":"0000abcd",'
        b'"chunks":["00000001","ffffffff"]}'
    )
    commit = Commit(3, None, 30, 1.5, 600, "0000abcd", ("00000001", "ffffffff"))
    assert encode(commit) == b'{"crc32c":"%08x",' % crc32c(body) + body + b"\n"


@given(st.lists(COMMITS, max_size=4), st.data())
def test_a_log_cut_anywhere_keeps_the_whole_lines(commits, data):
    lines = [encode(commit) for commit in commits]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    ends = [len(b"".join(lines[:count])) for count in range(len(lines) + 1)]
    kept = max(count for count, end in enumerate(ends) if end <= cut)
    found, sound = decode(whole[:cut], LOG)
    assert (list(found), sound) == (commits[:kept], ends[kept])


@given(st.lists(COMMITS, min_size=1, max_size=3), st.data())
def test_no_changed_bit_goes_unnoticed(commits, data):
    whole = bytearray(b"".join(map(encode, commits)))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found, _ = decode(bytes(whole), LOG)
    except DamagedError as error:
        assert "of the commit log is damaged" in str(error)  # noqa: PT017 (not always raised)
    else:
        # Only where the last newline is gone: what is left is a torn line.
        assert list(found) == commits[:-1]


@pytest.mark.parametrize("batches", [None, 3])
def test_rows_that_count_up_are_sound(batches):
    for count in range(8):
        check(rows(count, batches), LOG, batches=batches, num_chunks=1, finished=count)
        check(rows(count, batches), LOG, batches=batches, num_chunks=1, finished=None)


@pytest.mark.parametrize("batches", [None, 3])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines[1:],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: [*lines[:4], *lines[5:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:3], *reversed(lines[3:])],
    ],
    ids=["first missing", "duplicate", "middle missing", "swapped", "reversed"],
)
def test_lines_in_the_wrong_order_are_damage(batches, spoil):
    with pytest.raises(DamagedError, match="does not follow from those before it"):
        check(spoil(rows(6, batches)), LOG, batches=batches, num_chunks=1, finished=None)


def test_steps_must_grow_and_chunks_be_as_many_as_the_grid_has():
    stuck = [rows(1)[0], Commit(1, None, 0, None, 1, "0", ("0",))]
    with pytest.raises(DamagedError, match="line 2 "):
        check(stuck, LOG, batches=None, num_chunks=1, finished=None)
    with pytest.raises(DamagedError, match="line 1 "):
        check(rows(1), LOG, batches=None, num_chunks=2, finished=None)


def test_a_finished_log_that_is_too_short_is_damage():
    with pytest.raises(DamagedError, match="lists 4 shards, the finished run has 6"):
        check(rows(4), LOG, batches=None, num_chunks=1, finished=6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("row", "0"),
        ("row", 0.5),
        ("row", 2**64),
        ("batch", -1),
        ("step", None),
        ("size", [1]),
        ("epoch", "soon"),
        ("loss", "much"),
        ("chunks", "00000000"),
        ("more", 1),
        ("rest", ...),
    ],
)
def test_a_line_of_another_kind_is_damage(field: str, value: object) -> None:
    """Nobody writes such lines, with a right checksum: no number may come of them."""
    line = json.loads(encode(rows(1)[0]))
    del line["crc32c"]
    if value is ...:
        del line[field]
    else:
        line[field] = value
    body = json.dumps(line, separators=(",", ":")).encode()[1:]
    forged = b'{"crc32c":"%08x",' % crc32c(body) + body + b"\n"
    with pytest.raises(DamagedError, match="the commit log cannot be read"):
        decode(forged, LOG)


@given(st.lists(COMMITS, min_size=1, max_size=4))
def test_columns_are_those_of_the_commits(commits: list[Commit]) -> None:
    found, _ = decode(b"".join(map(encode, commits)), LOG)
    assert found.rows.tolist() == [commit.row for commit in commits]
    assert found.batches.tolist() == [
        -1 if commit.batch is None else commit.batch for commit in commits
    ]
    assert found.steps.tolist() == [commit.step for commit in commits]
    assert found.sizes.tolist() == [commit.size for commit in commits]
    assert found.num_chunks.tolist() == [len(commit.chunks) for commit in commits]
    for epoch, commit in zip(found.epochs, commits, strict=True):
        assert epoch == commit.epoch or (np.isnan(epoch) and commit.epoch is None)
    assert found[-1] == commits[-1]
    assert found[1:] == commits[1:]
    assert found.text(1) == encode(commits[0])
    assert found.nbytes == len(found.text(len(commits)))
