"""Runs and tables that are given more than once, perhaps by other names of the same place."""

from __future__ import annotations

import os
from collections.abc import Iterable

from capture.store.objects import is_object_address


def without_repeats(inputs: Iterable[str]) -> list[str]:
    """Each place once, by the first name it was given: ``a.zarr``, ``./a.zarr`` and links are one.

    Slashes at the end of an address make no difference either.
    """
    first: dict[str, str] = {}
    for text in inputs:
        first.setdefault(place_name(text), text)
    return list(first.values())


def place_name(text: str) -> str:
    """Name a place: equal for all names of one folder, file or address."""
    if is_object_address(text):
        return text.rstrip("/")
    try:
        return os.path.realpath(text)
    except ValueError:  # a name that no file can have, which is for others to refuse
        return text
