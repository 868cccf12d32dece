"""The attributes of a run: is there a run at this path, and what does it say of itself?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capture.store.arrays import read_document
from capture.store.errors import DamagedError, NotARunError, UsageError
from capture.store.layout import (
    ATTRIBUTES_KEY,
    FORMAT_VERSION,
    LOCK,
    METADATA,
    PRIVATE_FOLDER,
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
    elif not any(path.iterdir()) or (path / WEIGHTS / "value" / PRIVATE_FOLDER / LOCK).exists():
        # Empty, or the start of a run that was stopped before it became one.
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
    if not root.is_dir() or not (root / METADATA).exists():
        what = "no run store here" if root.exists() else "no such file or folder"
        raise NotARunError(what, where=root, fix=remedy)
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
    missing = {"status", "final_step", "tensors", "streams"} - entries.keys()
    if missing:
        raise DamagedError(
            f"the run's attributes lack {', '.join(sorted(missing))}",
            where=root / METADATA,
            fix="restore the file from a copy of the run",
        )
    return entries
