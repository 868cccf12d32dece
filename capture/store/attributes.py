"""The attributes of a run: is there a run at this path, and what does it say of itself?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from crc32c import crc32c

from capture.store.arrays import read_document
from capture.store.errors import RESTORE, DamagedError, NotARunError, UsageError
from capture.store.layout import (
    ATTRIBUTES_CHECKSUM,
    ATTRIBUTES_KEY,
    COMPLETE,
    FORMAT_VERSION,
    METADATA,
    RECORDING,
    WEIGHTS,
)
from capture.store.place import Place

# Attributes that the store writes itself.
OWN_ATTRIBUTES = frozenset(
    ("format", "status", "final_step", "streams", "tensors", "digests", "frozen_crc32c")
) | {ATTRIBUTES_CHECKSUM}


def check_given(attributes: Mapping[str, Any]) -> None:
    """`UsageError` for attributes that the store keeps for itself or that JSON cannot hold."""
    if taken := sorted(OWN_ATTRIBUTES & attributes.keys()):
        raise UsageError(
            "the store writes this attribute itself", where=taken[0], fix="choose another name"
        )
    for name, value in attributes.items():
        try:
            attributes_checksum({name: value})
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"an attribute that JSON cannot hold ({error})",
                where=name,
                fix="keep text, finite numbers, lists and dicts of these",
            ) from error


def attributes_checksum(entries: Mapping[str, Any]) -> str:
    """Crc32c of the attributes without their own checksum, as 8 hexadecimal digits.

    Of their JSON with sorted keys, no spaces and ASCII only, so that it does not matter how a
    `zarr.json` is laid out.
    """
    rest = {name: value for name, value in entries.items() if name != ATTRIBUTES_CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{crc32c(text.encode()):08x}"


def read_attributes(root: Place) -> dict[str, Any]:
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
    if not isinstance(entries, dict) or not _is_count(entries.get("format")):
        raise NotARunError("a zarr.json, but not that of a run", where=root, fix=remedy)
    if entries["format"] > FORMAT_VERSION:
        raise NotARunError(
            f"the run has format {entries['format']}, this version reads up to {FORMAT_VERSION}",
            where=root,
            fix="upgrade straightway",
        )
    if _checksum_of(entries) != entries.get(ATTRIBUTES_CHECKSUM):
        raise DamagedError(
            "the run's attributes do not match their checksum", where=root / METADATA, fix=RESTORE
        )
    unsound = [name for name, check in _CHECKS.items() if not check(entries.get(name), entries)]
    if unsound:
        raise DamagedError(
            f"the run's attributes are damaged or missing, {', '.join(unsound)}",
            where=root / METADATA,
            fix=RESTORE,
        )
    return entries


def _checksum_of(entries: Mapping[str, Any]) -> str | None:
    try:
        return attributes_checksum(entries)
    except ValueError:  # NaN, which Python reads from JSON and we never write
        return None


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
