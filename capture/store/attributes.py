"""The attributes of a run: is there a run at this path, and what does it say of itself?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from capture.store.arrays import read_document
from capture.store.errors import RESTORE, DamagedError, NotARunError, UsageError
from capture.store.layout import (
    ATTRIBUTES_KEY,
    COMMIT_LOG,
    COMPLETE,
    FORMAT_VERSION,
    FROZEN,
    GRADIENTS,
    LOCK,
    METADATA,
    PRIVATE_FOLDER,
    RECORDING,
    SCALARS,
    UPDATES,
    WEIGHTS,
)


def refuse_taken(path: Path) -> None:
    """Refuse a path that cannot become a new run: `UsageError` where it is already something."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError("a file is in the way", where=path, fix="choose another --out")
    if (path / METADATA).exists():
        try:
            read_attributes(path)
        except NotARunError:
            pass
        else:
            fix = "continue it with --resume, or choose another --out"
            raise UsageError("a run is already recorded here", where=path, fix=fix)
    elif _holds_no_more_than_a_start(path):
        return
    raise UsageError(
        "the folder is neither empty nor a run", where=path, fix="choose another --out"
    )


def read_attributes(root: Path) -> dict[str, Any]:
    """Read the `straightway` attributes of a run.

    `NotARunError` where there is no run or one of a newer format, `DamagedError` where its
    metadata cannot be read.
    """
    remedy = "give the folder that `capture train --out` or a Recorder wrote"
    try:
        if not root.is_dir() or not (root / METADATA).exists():
            what = "no run store here" if root.exists() else "no such file or folder"
            raise NotARunError(what, where=root, fix=remedy)
    except OSError as error:
        what = f"no run can be opened here ({error.strerror})"
        raise NotARunError(what, where=root, fix=remedy) from error
    document = read_document(root, METADATA)
    attributes = document.get("attributes")
    entries = attributes.get(ATTRIBUTES_KEY) if isinstance(attributes, dict) else None
    if not isinstance(entries, dict) or not isinstance(entries.get("format"), int):
        raise NotARunError("a zarr.json, but not that of a run", where=root, fix=remedy)
    if entries["format"] > FORMAT_VERSION:
        raise NotARunError(
            f"the run has format {entries['format']}, this version reads up to {FORMAT_VERSION}",
            where=root,
            fix="upgrade straightway",
        )
    unsound = [name for name, check in _CHECKS.items() if not check(entries.get(name), entries)]
    if unsound:
        raise DamagedError(
            f"the run's attributes are damaged or missing, {', '.join(unsound)}",
            where=root / METADATA,
            fix=RESTORE,
        )
    return entries


def streams_are_sound(streams: Any) -> bool:
    """Whether this maps stream names to B or `None`; a name becomes a folder, so it is plain."""
    return isinstance(streams, Mapping) and all(
        isinstance(name, str)
        and name.replace("-", "").replace("_", "").isalnum()
        and (batches is None or (_is_count(batches) and batches > 0))
        for name, batches in streams.items()
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _digests_are_sound(digests: Any, entries: dict[str, Any]) -> bool:
    if entries.get("status") != COMPLETE:
        return True
    if not isinstance(digests, dict):
        return False
    return isinstance(digests.get("rows"), dict) and isinstance(digests.get("scalars"), dict)


# What this format says of each attribute; a later check may rely on those before it.
_CHECKS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "status": lambda value, _: value in (RECORDING, COMPLETE),
    "final_step": lambda value, entries: (
        _is_count(value) if entries.get("status") == COMPLETE else value is None
    ),
    "tensors": lambda value, _: isinstance(value, dict),
    "streams": lambda value, _: streams_are_sound(value) and value.get(WEIGHTS, 0) is None,
    "digests": _digests_are_sound,
}


def _holds_no_more_than_a_start(root: Path) -> bool:
    """Whether the folder is empty, or holds a run that was stopped before its root was written.

    Strict, since what is found here gives way to the new run: no shards, no other files.
    """
    private = Path(WEIGHTS, "value", PRIVATE_FOLDER)
    if not {path.name for path in root.iterdir()} <= {WEIGHTS, GRADIENTS, UPDATES, SCALARS}:
        return False
    for folder, subfolders, files in os.walk(root):
        paths = [Path(folder, name) for name in (*subfolders, *files)]
        if any(path.is_symlink() for path in paths):
            return False
        for path in paths[len(subfolders) :]:
            relative = path.relative_to(root)
            ours = (
                path.name == METADATA
                or (path.name == COMMIT_LOG and path.stat().st_size == 0)
                or relative in (private / LOCK, private / FROZEN)
                or (relative.parent == private and path.suffix == ".tmp")
                or path.parts[-3:-1] == ("batch", "c")
            )
            if not ours:
                return False
    return True
