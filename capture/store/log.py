"""The commit log: one JSON line per shard. A shard without its line does not exist.

    {"crc32c":"1c2f…","row":3,"batch":null,"step":30,"epoch":1.5,"size":4194880,"rest":"…","chunks":["…"]}

The leading crc32c covers the rest of its own line, so a damaged line is told from a damaged shard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike

from crc32c import crc32c

from capture.store.errors import RESTORE, DamagedError

_OPENING = b'{"crc32c":"'
_PREFIX_LENGTH = len(_OPENING) + 8 + len(b'",')


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


def encode(commit: Commit) -> bytes:
    """Build one line, newline included."""
    fields = asdict(commit)
    if commit.loss is None:
        del fields["loss"]
    body = json.dumps(fields, separators=(",", ":")).encode()[1:]
    return _prefix(body) + body + b"\n"


def decode(data: bytes, path: str | PathLike[str]) -> tuple[list[Commit], int]:
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
    # All lines in one go: a log may have very many.
    commits = []
    for fields in json.loads(b"[" + b",".join(lines) + b"]"):
        del fields["crc32c"]
        fields["chunks"] = tuple(fields["chunks"])
        commits.append(Commit(**fields))
    return commits, len(data) - len(torn)


def losses(commits: Sequence[Commit]) -> list[float]:
    """The loss of each commit, NaN where none is kept."""
    return [math.nan if commit.loss is None else float(commit.loss) for commit in commits]


def check(
    commits: Sequence[Commit],
    path: str | PathLike[str],
    *,
    batches: int | None,
    num_chunks: int,
    finished: int | None,
) -> None:
    """Check that rows count up without a hole; `DamagedError` where they do not.

    `batches` is the stream's B, `finished` the number of lines that the log of a complete run has.
    """
    per_row = batches or 1
    for number, commit in enumerate(commits):
        batch = None if batches is None else number % per_row
        sound = (commit.row, commit.batch) == (number // per_row, batch)
        if batch:
            sound = sound and commit.step == commits[number - 1].step
        elif number:
            sound = sound and commit.step > commits[number - 1].step
        if not sound or len(commit.chunks) != num_chunks:
            raise DamagedError(
                f"line {number + 1} of the commit log does not follow from those before it",
                where=path,
                fix=RESTORE,
            )
    if finished is not None and len(commits) != finished:
        raise DamagedError(
            f"the commit log lists {len(commits)} shards, the finished run has {finished}",
            where=path,
            fix=RESTORE,
        )


def _prefix(body: bytes) -> bytes:
    return _OPENING + b'%08x",' % crc32c(body)
