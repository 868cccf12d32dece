"""The commit log: one JSON line per shard. A shard without its line does not exist.

    {"crc32c":"1c2f…","row":3,"batch":null,"step":30,"epoch":1.5,"size":4194880,"rest":"…","chunks":["…"]}

The leading crc32c covers the rest of its own line, so a damaged line is told from a damaged shard.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from crc32c import crc32c

from capture.store.errors import DamagedError

_OPENING = b'{"crc32c":"'
_PREFIX_LENGTH = len(_OPENING) + 8 + len(b'",')


@dataclass(frozen=True)
class Commit:
    """What the log says of one shard; checksums are crc32c as 8 hexadecimal digits.

    `chunks` holds one checksum per inner chunk, `rest` that of everything else in the file.
    """

    row: int
    batch: int | None
    step: int
    epoch: float | None
    size: int
    rest: str
    chunks: tuple[str, ...]


def encode(commit: Commit) -> bytes:
    """Build one line, newline included."""
    body = json.dumps(asdict(commit), separators=(",", ":")).encode()[1:]
    return _OPENING + f"{crc32c(body):08x}".encode() + b'",' + body + b"\n"


def decode(data: bytes, path: Path) -> tuple[list[Commit], int]:
    """Read a whole log; return its commits and how many bytes of it are sound.

    A last line without its newline is an append that a crash cut short: it is left out, and the
    second value points before it. Any other line that does not read is a `DamagedError`.
    """
    lines = data.split(b"\n")
    torn = lines.pop()
    commits = [_decode_line(line, number, path) for number, line in enumerate(lines, start=1)]
    return commits, len(data) - len(torn)


def _decode_line(line: bytes, number: int, path: Path) -> Commit:
    body = line[_PREFIX_LENGTH:]
    if line[: len(_OPENING)] != _OPENING or _stated_checksum(line) != crc32c(body):
        raise DamagedError(
            f"line {number} of the commit log is damaged",
            where=path,
            fix="restore the file from a copy; the rows after it cannot be trusted without it",
        )
    fields = json.loads(b"{" + body)
    return Commit(**{**fields, "chunks": tuple(fields["chunks"])})


def _stated_checksum(line: bytes) -> int:
    try:
        return int(line[len(_OPENING) : len(_OPENING) + 8], 16)
    except ValueError:
        return -1
