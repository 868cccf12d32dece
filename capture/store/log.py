"""The commit log: one JSON line per shard. A shard without its line does not exist.

    {"crc32c":"1c2f…","row":3,"batch":null,"step":30,"epoch":1.5,"size":4194880,"rest":"…","chunks":["…"]}

The leading crc32c covers the rest of its own line, so a damaged line is told from a damaged shard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from typing import Any, overload

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store.errors import RESTORE, DamagedError

_OPENING = b'{"crc32c":"'
_PREFIX_LENGTH = len(_OPENING) + 8 + len(b'",')

# Lines that are taken apart at once.
_PORTION = 512


@dataclass(frozen=True, slots=True)
class Commit:
    """What the log says of one shard; checksums are crc32c as 8 hexadecimal digits.

    `chunks` holds one checksum per inner chunk, `rest` that of everything else in the file. `loss`
    is that of the batch whose gradient this is, where it is kept: the shortest text that reads back
    as the same float64, since JSON has neither NaN nor infinity.
    """

    row: int
    batch: int | None
    step: int
    epoch: float | None
    size: int
    rest: str
    chunks: tuple[str, ...]
    loss: str | None = None


_FIELDS = {"crc32c", *(field.name for field in fields(Commit))}


def encode(commit: Commit) -> bytes:
    """Build one line, newline included."""
    line = asdict(commit)
    if commit.loss is None:
        del line["loss"]
    body = json.dumps(line, separators=(",", ":")).encode()[1:]
    return _prefix(body) + body + b"\n"


class CommitLog(Sequence[Commit]):
    """The commits of one log, N lines: their numbers as columns, each commit decoded when asked.

    A log may have very many lines, and each of them very many checksums: the text is a tenth of
    what they are as objects. `rows`, `batches` (-1 for none), `steps`, `sizes` and `num_chunks` are
    int64 ``[N]``, `epochs` and `losses` float64 ``[N]``, NaN where there is none.
    """

    def __init__(self, lines: Sequence[bytes]) -> None:
        self._lines = lines
        parts = [_columns(lines[i : i + _PORTION]) for i in range(0, len(lines), _PORTION)]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        self.rows, self.batches, self.steps, self.sizes, self.num_chunks = (
            columns[:5] or [np.empty(0, np.int64)] * 5
        )
        self.epochs, self.losses = columns[5:] or [np.empty(0)] * 2
        # Whether losses are kept is said by the first line.
        self.has_losses = bool(lines) and b'"loss":' in lines[0]

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def nbytes(self) -> int:
        """Bytes of all lines."""
        return sum(map(len, self._lines)) + len(self._lines)

    def text(self, count: int) -> bytes:
        """Give the first `count` lines as they are in the file; fewer where there are fewer."""
        return b"".join(line + b"\n" for line in self._lines[:count])

    @overload
    def __getitem__(self, index: int) -> Commit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Commit]: ...
    def __getitem__(self, index: int | slice) -> Commit | list[Commit]:
        if isinstance(index, slice):
            return [_commit(line) for line in self._lines[index]]
        return _commit(self._lines[index])


def decode(data: bytes, path: str | PathLike[str]) -> tuple[CommitLog, int]:
    """Read a whole log; return its commits and how many bytes of it are sound.

    A last line without its newline is an append that a crash cut short: it is left out, and the
    second value points before it. Any other line that does not read is a `DamagedError`.
    """
    lines = data.split(b"\n")
    torn = lines.pop()
    for number, line in enumerate(lines, start=1):
        if line[:_PREFIX_LENGTH] != _prefix(line[_PREFIX_LENGTH:]):
            raise DamagedError(
                f"line {number} of the commit log is damaged", where=path, fix=RESTORE
            )
    try:
        return CommitLog(lines), len(data) - len(torn)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError("the commit log cannot be read", where=path, fix=RESTORE) from error


def losses(commits: Sequence[Commit]) -> list[float]:
    """The loss of each commit, NaN where none is kept."""
    return [math.nan if commit.loss is None else float(commit.loss) for commit in commits]


def check(
    commits: CommitLog,
    path: str | PathLike[str],
    *,
    batches: int | None,
    num_chunks: int,
    finished: int | None,
) -> None:
    """Check that rows count up without a hole; `DamagedError` where they do not.

    `batches` is the stream's B, `finished` the number of lines that the log of a complete run has.
    """
    number = np.arange(len(commits))
    row, batch = np.divmod(number, batches or 1)
    sound = (commits.rows == row) & (commits.num_chunks == num_chunks)
    sound &= commits.batches == (-1 if batches is None else batch)
    growth = np.diff(commits.steps, prepend=-1)
    sound &= np.where(batch > 0, growth == 0, (growth > 0) | (number == 0))
    if not sound.all():
        raise DamagedError(
            f"line {np.argmin(sound) + 1} of the commit log does not follow from those before it",
            where=path,
            fix=RESTORE,
        )
    if finished is not None and len(commits) != finished:
        raise DamagedError(
            f"the commit log lists {len(commits)} shards, the finished run has {finished}",
            where=path,
            fix=RESTORE,
        )


def _commit(text: bytes) -> Commit:
    line = json.loads(text)
    del line["crc32c"]
    line["chunks"] = tuple(line["chunks"])
    return Commit(**line)


def _columns(lines: Sequence[bytes]) -> list[NDArray[Any]]:
    """Read the numbers of some lines; `ValueError` or the like where one is of another kind."""
    found = json.loads(b"[" + b",".join(lines) + b"]")
    if len(found) != len(lines) or any(line.keys() | {"loss"} != _FIELDS for line in found):
        raise ValueError("other fields")
    if not all(isinstance(line["chunks"], list) for line in found):
        raise TypeError("no list of checksums")
    batches = [line["batch"] for line in found]
    if any(batch is not None and batch < 0 for batch in batches):
        raise ValueError("a negative batch")
    whole = [
        [line["row"] for line in found],
        [-1 if batch is None else batch for batch in batches],
        [line["step"] for line in found],
        [line["size"] for line in found],
        [len(line["chunks"]) for line in found],
    ]
    epochs = [math.nan if line["epoch"] is None else line["epoch"] for line in found]
    kept = [line.get("loss") for line in found]
    return [
        *map(_integers, whole),
        np.array(epochs, np.float64),
        np.array([math.nan if loss is None else float(loss) for loss in kept], np.float64),
    ]


def _integers(values: list[Any]) -> NDArray[np.int64]:
    array = np.array(values)
    if array.dtype != np.int64 or array.ndim != 1:
        raise ValueError("no integers of 64 bits")
    return array


def _prefix(body: bytes) -> bytes:
    return _OPENING + b'%08x",' % crc32c(body)
