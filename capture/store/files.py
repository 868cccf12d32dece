"""Durable writes and confined reads: what the store asks of a local file system."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from capture.store.errors import RESTORE, DamagedError, InputError, LockedError, WriteError

# From this size on a file is written without the page cache, in blocks aligned to this many bytes.
DIRECT_BYTES = 4 * 2**20
DIRECT_BLOCK = 4096

_SPACE = "free space, then try again"
_REASONS = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EFBIG: ("the file would be larger than is allowed", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "choose another place"),
    errno.EACCES: ("no permission to write", "choose another place or mend the permissions"),
    errno.EPERM: ("no permission to write", "choose another place or mend the permissions"),
    errno.ENOTDIR: ("a part of the path is a file", "choose another place"),
    errno.ENAMETOOLONG: ("the path is too long", "choose a shorter one"),
    errno.ENOLCK: ("this file system has no locks", "choose another place"),
    errno.EIO: ("the disk reported an error", "check the disk"),
}


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the operating system refuses into a `WriteError` that names the file."""
    try:
        yield
    except OSError as error:
        unknown = (error.strerror or str(error), "see the system's message")
        reason, fix = _REASONS.get(error.errno or 0, unknown)
        raise WriteError(f"cannot write, {reason}", where=path, fix=fix) from error


def write_durably(path: Path, data: Any, scratch: Path) -> None:
    """Write a whole file so that after a crash it is there in full or not at all."""
    with written_durably(path, scratch) as file, writing(path):
        view = memoryview(data).cast("B")
        write_all(file.fileno(), view[_write_past_cache(file.fileno(), view) :])


@contextmanager
def written_durably(path: Path, scratch: Path) -> Iterator[FileIO]:
    """Open a file that is there in full when the `with` ends well, and else not at all.

    Without a buffer: write with `write_all`. A temporary file in `scratch` (same file system),
    fsync, rename, fsync of the folder.
    """
    temporary = scratch / f"{path.name}.{os.getpid()}.tmp"
    with writing(path):
        file = open(temporary, "wb", buffering=0)  # noqa: SIM115 - closed below
    try:
        with file:
            yield file
            with writing(path):
                os.fsync(file.fileno())
        with writing(path):
            os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with writing(path):
        sync_folder(path.parent)


def _write_past_cache(descriptor: int, view: memoryview) -> int:
    """Write the whole blocks of something large without the page cache; return how many bytes.

    Copying into the cache takes a processor ten times as long, which a training needs. Where memory
    or file system do not allow it, less is written, or nothing, and the rest goes the usual way.
    """
    written, end = 0, len(view) - len(view) % DIRECT_BLOCK
    if len(view) < DIRECT_BYTES or np.frombuffer(view, np.uint8).ctypes.data % DIRECT_BLOCK:
        return 0
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while written < end and written % DIRECT_BLOCK == 0:
            written += os.write(descriptor, view[written:end])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return written


def write_all(descriptor: int, view: memoryview) -> None:
    """Write every byte, also where the system takes only a part of them at once."""
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path, root: Path) -> None:
    """Create `folder` and what is missing between it and `root`, durably."""
    missing = []
    while folder != root and not folder.exists():
        missing.append(folder)
        folder = folder.parent
    with writing(folder):
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def encode_json(document: Any) -> bytes:
    """Write a JSON document as the bytes of its file."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def open_confined(root: Path, relative: str) -> int:
    """Open a regular file below `root` for reading and return its descriptor.

    No component below `root` may be a symbolic link or lead upwards, so a hostile store cannot
    lead elsewhere. `DamagedError` where the file is missing, a folder, a link, or no regular file;
    `InputError` where the system refuses to open it.
    """
    *folders, name = relative.split("/")
    if "\0" in relative or not {"", ".", ".."}.isdisjoint((*folders, name)):
        raise DamagedError(f"the run names a file {relative!r}", where=root, fix=RESTORE)
    opened: list[int] = []
    try:
        current = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        opened.append(current)
        for folder in folders:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            current = os.open(folder, flags, dir_fd=current)
            opened.append(current)
        # O_NONBLOCK: a named pipe in a shard's place must not hang the reader.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=current)
    except OSError as error:
        raise _not_opened(error, root / relative) from error
    finally:
        for folder_descriptor in opened:
            os.close(folder_descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError("not a regular file", where=root / relative, fix=RESTORE)
    return descriptor


def read_confined(root: Path, relative: str) -> bytes:
    """Read a whole regular file below `root`; see `open_confined`."""
    descriptor = open_confined(root, relative)
    with open(descriptor, "rb") as file:
        try:
            return file.read()
        except OSError as error:
            raise _not_opened(error, root / relative) from error


def _not_opened(error: OSError, path: Path) -> InputError:
    if error.errno == errno.ENOENT:
        return DamagedError("the file is missing", where=path, fix=RESTORE)
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        what = "a symbolic link or a file stands where the store has none"
        return DamagedError(what, where=path, fix=RESTORE)
    if error.errno in (errno.ENXIO, errno.EIO):
        return DamagedError(f"cannot be read ({error.strerror})", where=path, fix=RESTORE)
    # Permissions, too many open files: the run itself may be whole.
    return InputError(f"cannot be opened ({error.strerror})", where=path)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock; a shared one, given back at once, tells."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


class Lock:
    """The one-writer lock of a run: `flock` on a file, given back when the process ends."""

    def __init__(self, path: Path) -> None:
        with writing(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            with writing(path):
                self._take(path)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _take(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                "another process is writing this run",
                where=path,
                fix="wait for it to end, or choose another --out",
            ) from error

    def check(self) -> None:
        """Nobody takes over a lock that the system itself gives back: nothing to check."""

    def release(self) -> None:
        """Give the lock back; releasing twice is harmless."""
        if self._descriptor >= 0:
            # Closing alone would leave it with workers that were forked in the meantime.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1
