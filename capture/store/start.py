"""The beginning of a run: which place it may take, what an earlier start left there, its groups."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from capture.store.attributes import read_attributes
from capture.store.errors import NotARunError, UsageError
from capture.store.layout import (
    COMMIT_LOG,
    COMPLETE,
    EMA,
    FROZEN,
    GRADIENTS,
    LOCK,
    METADATA,
    PRIVATE_FOLDER,
    SCALARS,
    UPDATES,
    WEIGHTS,
    group_document,
    stream_folder,
)
from capture.store.objects import ObjectPath
from capture.store.place import Place, make_folders, relative_to, remove, write_json


def refuse_taken(path: Place) -> None:
    """Refuse a path that cannot become a new run: `UsageError` where it is already something."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError("a file is in the way", where=path, fix="choose another --out")
    if (path / METADATA).exists():
        try:
            complete = read_attributes(path)["status"] == COMPLETE
        except NotARunError:
            pass
        else:
            go_on = "continue it with --resume (resume=True in a Recorder), or "
            fix = f"{'' if complete else go_on}choose another --out"
            raise UsageError("a run is already recorded here", where=path, fix=fix)
    elif _holds_no_more_than_a_start(path):
        return
    raise UsageError(
        "the folder is neither empty nor a run", where=path, fix="choose another --out"
    )


def clear_start(root: Place, lock: Place) -> None:
    """Remove what an earlier creation left before it had finished, all but the lock's file."""
    if isinstance(root, ObjectPath):
        for path, _ in root.below():
            if path != lock:
                remove(path)
        return
    assert isinstance(lock, Path), "the lock lies in the run"
    kept = {lock, *lock.parents}
    for folder in (root, *(path for path in reversed(lock.parents) if root in path.parents)):
        for leftover in folder.iterdir():
            if leftover not in kept:
                remove(leftover)


def write_groups(root: Place, streams: Iterable[str], temporary: Place) -> None:
    """Write the `zarr.json` of every group that these streams lie in, but not that of the root."""
    folders = {folder for name in streams for folder in _groups(name)}
    for folder in sorted({SCALARS, *folders}):
        make_folders(root / folder, root)
        write_json(root / folder / METADATA, group_document(), temporary)


def _groups(stream: str) -> list[str]:
    folder = stream_folder(stream)
    parts = folder.split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _holds_no_more_than_a_start(root: Place) -> bool:
    """Whether the folder is empty, or holds a run that was stopped before its root was written.

    Strict, since what is found here gives way to the new run: no shards, no other files.
    """
    if not {path.name for path in root.iterdir()} <= {WEIGHTS, EMA, GRADIENTS, UPDATES, SCALARS}:
        return False
    if isinstance(root, ObjectPath):
        return all(_is_of_a_start(relative_to(path, root), size) for path, size in root.below())
    for folder, subfolders, files in os.walk(root):
        paths = [Path(folder, name) for name in (*subfolders, *files)]
        if any(path.is_symlink() for path in paths):
            return False
        for path in paths[len(subfolders) :]:
            if not _is_of_a_start(relative_to(path, root), path.stat().st_size):
                return False
    return True


def _is_of_a_start(relative: str, size: int) -> bool:
    """Whether a creation that did not finish may have left this file of so many bytes."""
    path, private = PurePosixPath(relative), PurePosixPath(WEIGHTS, "value", PRIVATE_FOLDER)
    return (
        path.name == METADATA
        or (path.name == COMMIT_LOG and size == 0)
        or path in (private / LOCK, private / FROZEN)
        or (path.parent == private and path.suffix == ".tmp")
        or path.parts[-3:-1] == ("batch", "c")
    )
