"""Where a command may write a file: never over a run, an input, or anything but a file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from capture.store.errors import UsageError
from capture.store.layout import ATTRIBUTES_KEY, METADATA


def check_target(
    path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """Return `path` if a file may be written or replaced there.

    `UsageError` for a folder, a device or another special file, a missing or unwritable folder,
    a place inside a run, and any of `inputs`. Nothing is touched.
    """
    target = Path(path)
    try:
        _check_file(target)
        _check_folder(target)
        for source in inputs:
            if target.exists() and os.path.exists(source) and os.path.samefile(target, source):
                raise UsageError("this file is an input", where=target, fix="name another file")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"no file can be written here ({reason})", where=target, fix="name another file"
        ) from error
    return target


def check_folder_target(
    path: str | os.PathLike[str],
    inputs: Iterable[str | os.PathLike[str]],
    is_ours: Callable[[Path], bool],
) -> Path:
    """Return `path` if a folder may be made there, or one replaced that is empty or `is_ours`.

    `UsageError` for anything else, a run above all, and where one of `inputs` is this folder or
    inside it. Nothing is touched.
    """
    target = Path(path)
    try:
        if target.is_symlink() or not (target.is_dir() or not target.exists()):
            raise UsageError("a file is in the way", where=target, fix="name another folder")
        _check_folder(target)
        if target.is_dir() and any(target.iterdir()) and (_is_run(target) or not is_ours(target)):
            what = "this is a run" if _is_run(target) else "there is another folder"
            raise UsageError(what, where=target, fix="name another one")
        for source in map(os.path.realpath, inputs):
            if Path(source).is_relative_to(target.resolve()):
                raise UsageError("an input is in there", where=target, fix="name another folder")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"no folder can be made here ({reason})", where=target, fix="name another one"
        ) from error
    return target


def _check_file(target: Path) -> None:
    if not target.name:
        raise UsageError("no file is named", where=target, fix="name a file")
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        # A name is judged by the file system: too long is an OSError of its own.
        return
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise UsageError(f"this is {what}", where=target, fix="name a file")


def _check_folder(target: Path) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise UsageError("there is no such folder", where=folder, fix="create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("no permission to write", where=folder, fix="choose another place")
    require_outside_runs(target)


def require_outside_runs(target: Path) -> None:
    """Raise `UsageError` for a place inside a run."""
    resolved = target.resolve()
    for ancestor in resolved.parents:
        if _is_run(ancestor):
            raise UsageError(
                "this is inside a run, where nothing else may be written",
                where=resolved,
                fix="choose a place outside of it",
            )


def _is_run(folder: Path) -> bool:
    try:
        document = json.loads((folder / METADATA).read_bytes())
        return ATTRIBUTES_KEY in document["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
