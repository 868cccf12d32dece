"""Data sets from the net: a file arrives whole and checked, or not at all; archives unpack safely.

Errors are one-line `StraightwayError`s: `UsageError` for an address or archive of an unknown kind,
`InputError` for what came over the net or lies in the archive, `WriteError` for the disk.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from os import PathLike
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from capture.store.errors import InputError, UsageError, WriteError

SCHEMES = ("http", "https", "file")
# Some servers refuse the name that urllib gives itself.
AGENT = "straightway"
# Without a byte for so long, the other side is taken for gone.
TIMEOUT_SECONDS = 60
CHUNK_BYTES = 2**18
BY_HAND = "try again, give another --url, or bring the file there by hand"
FRESH = "delete the archive and fetch it again"


def fetch(
    url: str, target: str | PathLike[str], sha256: str | None = None, md5: str | None = None
) -> Path:
    """Download `url` to the file `target`, which is replaced only by what has the right checksum.

    Shows a progress bar on a terminal. Nothing is resumed: a download that breaks leaves no file.
    Raises `UsageError`, `InputError` or `WriteError`.
    """
    target, digests = Path(target), {"sha256": sha256, "md5": md5}
    expected = {name: digest.lower() for name, digest in digests.items() if digest is not None}
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in expected}
    with _writing(target), _opened(url) as source:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _part_of(target) as part:
            with part.open("wb") as file:
                for chunk in _chunks(url, source):
                    file.write(chunk)
                    for running in hashes.values():
                        running.update(chunk)
            for name, running in hashes.items():
                _require_digest(url, name, running.hexdigest(), expected[name])
            part.replace(target)
    return target


def unpack(archive: str | PathLike[str], folder: str | PathLike[str]) -> None:
    """Unpack a .zip, .tar.gz, .tgz or .tar into `folder`, or a .gz to the file named without it.

    Raises `InputError` for a damaged archive and for one with a member that would land outside.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise InputError("no such archive", where=archive, fix="fetch it first")
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        if archive.name.endswith(".zip"):
            _unpack_zip(archive, folder)
        elif archive.name.endswith((".tar.gz", ".tgz", ".tar")):
            _unpack_tar(archive, folder)
        elif archive.name.endswith(".gz"):
            _unpack_gz(archive, folder / archive.name.removesuffix(".gz"))
        else:
            raise UsageError(
                "an archive of an unknown kind", where=archive, fix="known are .zip, .tar.gz, .gz"
            )
    except (EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise InputError(f"a damaged archive ({error})", where=archive, fix=FRESH) from None
    except OSError as error:
        raise WriteError(
            f"cannot unpack ({error.strerror or error})", where=folder, fix="make room there"
        ) from None


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    """Open an address for reading; only the opening is guarded."""
    try:
        if urlsplit(url).scheme not in SCHEMES:
            raise ValueError("it must begin with http://, https:// or file:///")
        request = Request(url, headers={"User-Agent": AGENT})
    except ValueError as error:
        raise UsageError(f"no address to fetch from ({error})", where=repr(url)) from None
    try:
        source = urlopen(request, timeout=TIMEOUT_SECONDS)
    except HTTPError as error:
        with error:
            answer = f"{error.code} {error.reason}"
        raise InputError(f"the server answers {answer}", where=url, fix=BY_HAND) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"cannot fetch ({reason})", where=url, fix=BY_HAND) from None
    with source:
        yield source


def _chunks(url: str, source: Any) -> Iterator[bytes]:
    """Yield the bytes of an open address, all that it promised, and show how many have come."""
    length = source.headers.get("Content-Length")
    promised = int(length) if length and length.isdecimal() else None
    received = 0
    with _progress() as bar:
        task = bar.add_task(Path(urlsplit(url).path).name, total=promised)
        while chunk := _read(url, source):
            yield chunk
            received += len(chunk)
            bar.update(task, completed=received)
    if promised is not None and received != promised:
        what = f"the connection ended after {received:,} of {promised:,} bytes"
        raise InputError(what, where=url, fix=BY_HAND)


def _read(url: str, source: Any) -> bytes:
    try:
        chunk: bytes = source.read(CHUNK_BYTES)
    except (OSError, HTTPException) as error:
        raise InputError(f"the connection broke ({error})", where=url, fix=BY_HAND) from None
    return chunk


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _require_digest(url: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise InputError(
            f"{name} is {found}, expected {expected}",
            where=url,
            fix="the file there is another one than this was written for; give another --url",
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into `WriteError`."""
    try:
        yield
    except OSError as error:
        fix = "make room, or choose another folder"
        what = f"cannot write ({error.strerror or error})"
        raise WriteError(what, where=path, fix=fix) from None


@contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """Name a file beside `target` to write and rename; what is left of it afterwards goes."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as members:
        for name in members.namelist():
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise _outside(archive, name)
        members.extractall(folder)


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as members:
        try:
            members.extractall(folder, filter="data")
        except tarfile.FilterError as error:
            raise _outside(archive, error.tarinfo.name) from None


def _unpack_gz(archive: Path, target: Path) -> None:
    with _part_of(target) as part:
        with gzip.open(archive) as source, part.open("wb") as file:
            shutil.copyfileobj(source, file)
        part.replace(target)


def _outside(archive: Path, name: str) -> InputError:
    what = f"the archive would write {name!r}, outside of its folder or no plain file"
    return InputError(what, where=archive, fix="do not trust it; fetch it from its official source")
