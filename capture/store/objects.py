"""Paths on an object store: `s3://bucket/run.zarr`, `gs://…`, `az://…`; to read, also `https://…`.

An object is there whole or not at all, so nothing here needs temporary files or renames. A web
server lists nothing and is never written to: there, what has a `zarr.json` is a folder. Requests
that a server refuses for now (5xx, timeouts, broken connections) are sent again by `obstore`, up
to `RETRIES` times with waits that double and vary at random. `obstore` is the optional extra
`objects`; it is imported when the first such address is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from capture.store.errors import (
    RESTORE,
    DamagedError,
    InputError,
    StraightwayError,
    UsageError,
    WriteError,
)
from capture.store.layout import METADATA

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "memory", "http", "https")
READ_ONLY = ("http", "https")

RETRIES = 8
FIRST_WAIT = timedelta(seconds=0.1)
LONGEST_WAIT = timedelta(seconds=10)
GIVE_UP = timedelta(minutes=3)

# One request sends or fetches at most `PART_BYTES` within this time, else it counts as failed.
REQUEST_SECONDS = 120
# Above this, an object goes up in parts; it is seen only when the last of them is there.
WHOLE_BYTES = 256 * 2**20
PART_BYTES = 64 * 2**20

# An object that is copied comes in parts of about this size.
COPY_BYTES = 8 * 2**20

# What obstore says of a range that begins where the object has ended.
_BEYOND_THE_END = "status code: 416"

_AGAIN = "check address, credentials and network, then try again"


def is_object_address(text: str) -> bool:
    """Whether this is the address of an object store and not a path."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.isalnum()


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A place on an object store, with as much of the interface of `pathlib.Path` as runs need.

    `root` is the address of the run, `key` what lies below it. Folders are what keys have in
    common: they need no making, and are gone with the last object in them.
    """

    root: str
    key: str = ""

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.root, f"{self.key}/{name}".lstrip("/"))

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    def __fspath__(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(str(self)).name

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return PurePosixPath(str(self)).stem

    @property
    def parent(self) -> ObjectPath:
        """The folder; the run itself for what lies directly in it."""
        return ObjectPath(self.root, self.key.rpartition("/")[0])

    def resolve(self) -> ObjectPath:
        """Return the place itself: there are no links."""
        return self

    @property
    def store(self) -> ObjectStore:
        """The store of obstore, whose own root is that of the run."""
        return _store(self.root)

    @property
    def is_read_only(self) -> bool:
        """Whether this lies on a web server, which neither lists nor takes anything."""
        return self.root.partition("://")[0] in READ_ONLY

    def require_writable(self) -> None:
        """`UsageError` where this can only be read."""
        if self.is_read_only:
            raise UsageError(
                "a run on a web server can only be read",
                where=self,
                fix="write to a path, or to an address with s3://, gs:// or az://",
            )

    def exists(self) -> bool:
        """Whether an object or a folder is here."""
        return self._is_object() or self.is_dir()

    def is_dir(self) -> bool:
        """Whether any object lies below."""
        if self.is_read_only:
            return (self / METADATA)._is_object()
        return next(self.below(), None) is not None

    def iterdir(self) -> Iterator[ObjectPath]:
        """Objects and folders directly below; none where this is no folder."""
        self._require_listing()
        with _reading(self):
            found = self.store.list_with_delimiter(self.key or None)
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        yield from (ObjectPath(self.root, key) for key in sorted(keys))

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """What lies directly below and matches; after a slash, only where that object is there."""
        first, _, rest = pattern.partition("/")
        for place in self.iterdir():
            if fnmatchcase(place.name, first) and (not rest or (place / rest)._is_object()):
                yield place / rest if rest else place

    def below(self) -> Iterator[tuple[ObjectPath, int]]:
        """Every object below, with its size in bytes."""
        self._require_listing()
        with _reading(self):
            for portion in self.store.list(self.key or None, chunk_size=1000):
                for entry in portion:
                    yield ObjectPath(self.root, entry["path"]), entry["size"]

    def read_bytes(self) -> bytes:
        """Fetch the object; once again where fewer bytes came than it has.

        `DamagedError` where it is missing or cut off, `InputError` where the store does not answer.
        """
        for _ in range(2):
            with _reading(self):
                found = self.store.get(self.key)
                data, size = found.bytes().to_bytes(), found.meta["size"]
            if len(data) == size:
                return data
        what = f"{len(data)} bytes arrived of {size}, twice"
        raise DamagedError(what, where=self, fix="check the network, then try again")

    def copy_into(self, file: BinaryIO) -> None:
        """Fetch the object part by part into an empty file; once again where fewer bytes came.

        Errors as `read_bytes`.
        """
        for _ in range(2):
            file.seek(0)
            with _reading(self):
                found = self.store.get(self.key)
                for part in found.stream(min_chunk_size=COPY_BYTES):
                    file.write(part)
            if file.tell() == found.meta["size"]:
                return
        what = f"{file.tell()} bytes arrived of {found.meta['size']}, twice"
        raise DamagedError(what, where=self, fix="check the network, then try again")

    def read_range(self, start: int, stop: int) -> tuple[memoryview, int]:
        """Fetch the bytes from `start` to `stop`; give those that came, and the object's size.

        Fewer come where the object ends before `stop`, or the connection is at fault.
        `DamagedError` where it is missing, `InputError` where the store does not answer.
        """
        from obstore.exceptions import GenericError, NotSupportedError

        with _reading(self):
            try:
                found = self.store.get(self.key, options={"range": (start, stop)})
                return memoryview(found.bytes()), found.meta["size"]
            except NotSupportedError as error:
                what, fix = "the server gives no parts of files", "use one that answers ranges"
                raise InputError(what, where=self, fix=f"{fix}, such as nginx") from error
            except GenericError as error:
                if _BEYOND_THE_END not in str(error):
                    raise
                return memoryview(b""), self.store.head(self.key)["size"]

    def write_bytes(
        self, data: Any, mode: Literal["create", "overwrite"] | UpdateVersion = "overwrite"
    ) -> UpdateVersion:
        """Put the whole object and return its version; `WriteError` where the store refuses.

        With `mode` as in obstore, `obstore.exceptions` of a condition that does not hold are
        raised as they are.
        """
        self.require_writable()
        view = memoryview(data).cast("B")
        with _writing(self):
            done = self.store.put(
                self.key,
                # An empty memoryview is not taken.
                view if view else b"",
                mode=mode,
                use_multipart=mode == "overwrite" and len(view) > WHOLE_BYTES,
                chunk_size=PART_BYTES,
            )
        return _version(done["e_tag"], done["version"])

    def remove(self) -> None:
        """Remove the object and all that lies below, if there is any; the run's root first."""
        self.require_writable()
        keys = [place.key for place, _ in self.below()]
        with _writing(self):
            for key in [*([self.key] if self.key else []), *sorted(keys, key=_depth)]:
                try:
                    self.store.delete(key)
                except FileNotFoundError:
                    continue

    def version(self) -> UpdateVersion | None:
        """Which version of the object is here, for a conditional write; `None` without any."""
        with _reading(self):
            try:
                found = self.store.head(self.key)
            except FileNotFoundError:
                return None
        return _version(found["e_tag"], found["version"])

    def _require_listing(self) -> None:
        if self.is_read_only:
            raise InputError(
                "this needs a list of files, which a web server does not give",
                where=self,
                fix="give a run that has ended, or copy it to a disk",
            )

    def _is_object(self) -> bool:
        return bool(self.key) and self.version() is not None


def _version(e_tag: str | None, version: str | None) -> UpdateVersion:
    """Say which version of an object a conditional write replaces; obstore takes no `None`."""
    found: UpdateVersion = {}
    if e_tag is not None:
        found["e_tag"] = e_tag
    if version is not None:
        found["version"] = version
    return found


def _depth(key: str) -> tuple[int, str]:
    return key.count("/"), key


@lru_cache(maxsize=64)
def _store(root: str) -> ObjectStore:
    try:
        from obstore.store import MemoryStore, from_url
    except ImportError as error:
        raise UsageError(
            "runs on object stores need the package obstore",
            where=root,
            fix="pip install 'straightway[objects]'",
        ) from error
    if root.partition("://")[0] == "memory":
        return MemoryStore()
    retries: RetryConfig = {
        "max_retries": RETRIES,
        "retry_timeout": GIVE_UP,
        "backoff": {"init_backoff": FIRST_WAIT, "max_backoff": LONGEST_WAIT, "base": 2},
    }
    options: ClientConfig = {
        "allow_http": root.startswith("http://") or _allows_http(),
        "connect_timeout": "10s",
        "timeout": f"{REQUEST_SECONDS}s",
    }
    try:
        return from_url(root, retry_config=retries, client_options=options)
    except Exception as error:  # what obstore says of an address has no common class
        raise UsageError(
            f"no object store can be opened here ({_reason(error)})", where=root, fix=_AGAIN
        ) from error


def _allows_http() -> bool:
    """Whether the user names an endpoint without TLS, a server of their own."""
    endpoints = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
    plain = any(os.environ.get(name, "").startswith("http://") for name in endpoints)
    return plain or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")


@contextmanager
def _reading(place: ObjectPath) -> Iterator[None]:
    """Turn what the store says while it is read into an `InputError` that names the object."""
    try:
        yield
    except (StraightwayError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise DamagedError("the file is missing", where=place, fix=RESTORE) from error
    except Exception as error:
        what = f"the object store does not give this ({_reason(error)})"
        raise InputError(what, where=place, fix=_AGAIN) from error


@contextmanager
def _writing(place: ObjectPath) -> Iterator[None]:
    """Turn what the store refuses into a `WriteError`, but for conditions that do not hold."""
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    try:
        yield
    except (StraightwayError, AlreadyExistsError, PreconditionError):
        raise
    except Exception as error:
        what = f"cannot write, the object store refuses ({_reason(error)})"
        raise WriteError(what, where=place, fix=_AGAIN) from error


def _reason(error: Exception) -> str:
    """The first line of what a library says: the rest repeats it for programmers."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
