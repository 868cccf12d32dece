"""The commit log of one stream as a file that grows."""

from __future__ import annotations

import os
from pathlib import Path

from capture.store.files import write_all, writing
from capture.store.place import Place, write_durably


class LogFile:
    """Appends lines to one commit log; `scratch` is the folder for temporary files.

    On a disk a line is there when `append` returns. An object store has no append: lines are held
    until `flush` puts the whole log, and until then their shards do not exist.
    """

    def __init__(self, path: Place, scratch: Place) -> None:
        self.path = path
        self._scratch = scratch
        self._held = bytearray()
        self._changed = False

    def load(self, data: bytes) -> None:
        """Go on behind what the log holds already."""
        if not isinstance(self.path, Path):
            self._held = bytearray(data)

    def replace(self, data: bytes) -> None:
        """Write the whole log anew."""
        write_durably(self.path, data, self._scratch)
        self.load(data)
        self._changed = False

    def append(self, line: bytes) -> None:
        """Add one line; `WriteError` where the disk refuses, and then the log is as it was."""
        if isinstance(self.path, Path):
            _append(self.path, line)
        else:
            self._held += line
            self._changed = True

    def flush(self) -> None:
        """Put the log where lines are held; nothing to do on a disk."""
        if self._changed:
            write_durably(self.path, bytes(self._held), self._scratch)
            self._changed = False


def _append(path: Path, line: bytes) -> None:
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        try:
            before = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, memoryview(line))
                os.fsync(descriptor)
            except BaseException:
                # Half a line in the middle of a log would make the rest of it unreadable.
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
