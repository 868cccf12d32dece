"""The folder of a task's files, and the one line that says what is missing in it."""

from __future__ import annotations

from pathlib import Path

from capture.store.errors import InputError, UsageError


def require_folder(task: str, data_root: str | None) -> Path:
    """Return the folder of the files of `task`. Raises `UsageError` where none is given."""
    if data_root is None:
        raise UsageError(
            f"the task {task} needs the folder of its files",
            fix=f"give --data-root DIR; data/{task}/prepare.py fills one",
        )
    if not Path(data_root).is_dir():
        raise InputError("no such folder", where=data_root, fix=advice(task))
    return Path(data_root)


def missing(task: str, expected: str, folder: Path) -> InputError:
    """Make the error for files of `task` that are not there."""
    return InputError(f"expected {expected}, which are not there", where=folder, fix=advice(task))


def unreadable(task: str, reason: str, path: Path) -> InputError:
    """Make the error for a file of `task` that is not what it should be."""
    fix = f"delete it, and fetch it again by data/{task}/prepare.py --root DIR"
    return InputError(reason, where=path, fix=fix)


def advice(task: str) -> str:
    """Say what to do about files that are not there."""
    return f"run data/{task}/prepare.py --root DIR, which fetches them or says how to get them"
