"""Where a run lies: a folder on a disk, or an address on an object store; the same verbs for both.

On a disk these are the functions of `files`. An object store has no folders, no temporary files
and no links, and puts each object whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from capture.store import files
from capture.store.errors import UsageError
from capture.store.object_lock import ObjectLock, is_held
from capture.store.objects import SCHEMES, ObjectPath, is_object_address

Place = Path | ObjectPath
Lock = files.Lock | ObjectLock


def place_of(address: str | os.PathLike[str]) -> Place:
    """Return the place that an address or path names; `UsageError` for an unknown kind."""
    text = os.fspath(address)
    if not is_object_address(text):
        return Path(address)
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES:
        raise UsageError(
            f"no run can lie at an address that begins with {scheme}://",
            where=text,
            fix="give a path, or an address with s3://, gs:// or az://; to read also https://",
        )
    if not {"?", "#", "%"}.isdisjoint(rest):
        raise UsageError("no name with ?, # or %", where=text, fix="choose another name")
    name = rest.strip("/")
    if "/" not in name and scheme != "memory":
        fix = f"add a name, as in {scheme}://{name or 'bucket'}/run.zarr"
        raise UsageError("no run is named", where=text, fix=fix)
    return ObjectPath(f"{scheme}://{name}")


def target_of(address: str | os.PathLike[str]) -> Place:
    """Return the place of a run that is to be written; `UsageError` where none can be."""
    place = place_of(address)
    if isinstance(place, ObjectPath):
        place.require_writable()
    return place


def absolute(place: Place) -> Place:
    """Return the place by a name that does not depend on the working directory."""
    return place if isinstance(place, ObjectPath) else place.absolute()


def absolute_address(address: str | os.PathLike[str]) -> str:
    """Return an address or path by a name that does not depend on the working directory."""
    text = os.fspath(address)
    return text if is_object_address(text) else os.path.abspath(text)


def relative_to(place: Place, folder: Place) -> str:
    """Return the path from `folder` to what lies below it, with slashes."""
    if isinstance(place, ObjectPath):
        return place.key.removeprefix(f"{folder.key}/" if isinstance(folder, ObjectPath) else "")
    assert isinstance(folder, Path), "a place and its folder are of one kind"
    return place.relative_to(folder).as_posix()


def list_folder(folder: Place) -> list[Place]:
    """Return what lies directly in a folder, by name."""
    if isinstance(folder, ObjectPath):
        return sorted(folder.iterdir())
    return sorted(folder.iterdir())


def read_confined(root: Place, relative: str) -> bytes:
    """Read a whole file below `root`; see `files.open_confined`."""
    if isinstance(root, ObjectPath):
        return (root / relative).read_bytes()
    return files.read_confined(root, relative)


def write_durably(path: Place, data: Any, scratch: Place) -> None:
    """Write a whole file so that it is there in full or not at all; see `files.write_durably`."""
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
    else:
        assert isinstance(scratch, Path), "temporary files lie beside what they become"
        files.write_durably(path, data, scratch)


def write_json(path: Place, document: Any, scratch: Place) -> None:
    """Write a JSON document durably."""
    write_durably(path, files.encode_json(document), scratch)


def make_folders(folder: Place, root: Place) -> None:
    """Create `folder` and what is missing between it and `root`; objects need none."""
    if isinstance(folder, Path) and isinstance(root, Path):
        files.make_folders(folder, root)


def remove(path: Place) -> None:
    """Remove a file or a whole folder, if it is there."""
    if isinstance(path, ObjectPath):
        path.remove()
    else:
        files.remove(path)


def take_lock(path: Place) -> Lock:
    """Take the one-writer lock of a run; `LockedError` where another process has it."""
    return ObjectLock(path) if isinstance(path, ObjectPath) else files.Lock(path)


def is_locked(path: Place) -> bool:
    """Whether a process has the one-writer lock; behind a web server nobody can tell."""
    if isinstance(path, ObjectPath):
        return not path.is_read_only and is_held(path)
    return files.is_locked(path)
