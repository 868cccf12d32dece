"""The one-writer lock of a run on an object store: an object that only its owner renews.

It is created only if absent, and names its owner and a time, which the owner renews every
`RENEW_SECONDS`. A process that was killed leaves it behind: after `STALE_SECONDS` without renewal
another may take it over, on condition that nobody else did in between. Times are those of the
machines' clocks, which must agree to within seconds. An owner that finds its lock taken, as one
does that was suspended, writes nothing more.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from capture.store.errors import DamagedError, InputError, LockedError, WriteError
from capture.store.objects import ObjectPath

if TYPE_CHECKING:
    from obstore import UpdateVersion

RENEW_SECONDS = 15.0
STALE_SECONDS = 60.0

# Conditional requests are not sent again by obstore, which cannot know whether one arrived.
TRIES = 4
FIRST_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Holder:
    """What a lock says of who holds it; `time` is in seconds since 1970."""

    owner: str
    host: str
    process: int
    time: float

    @property
    def age(self) -> float:
        """Seconds since the lock was renewed."""
        return time.time() - self.time


def holder(path: ObjectPath) -> Holder | None:
    """Who holds the lock at `path`, `None` if nobody; `LockedError` where it cannot be read."""
    try:
        fields = json.loads(path.read_bytes())
        return Holder(
            str(fields["owner"]),
            str(fields["host"]),
            int(fields["process"]),
            float(fields["time"]),
        )
    except DamagedError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LockedError(
            "the lock of the run cannot be read",
            where=path,
            fix="remove this object if no process writes the run",
        ) from error


def is_held(path: ObjectPath) -> bool:
    """Whether a process has the lock and has renewed it lately."""
    try:
        held = holder(path)
    except LockedError:
        return True
    return held is not None and held.age < STALE_SECONDS


class ObjectLock:
    """The lock, taken when this is made and renewed by a thread until `release`.

    `LockedError` where another process has it, and says until when.
    """

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._owner = uuid.uuid4().hex
        self._lost = False
        self._renewed = time.time()
        self._renewing = threading.Lock()
        self._version = self._take()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="straightway-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `WriteError` where another process has taken the lock over, or may have by now."""
        if time.time() - self._renewed >= STALE_SECONDS:
            self._renew()
        if self._lost:
            raise WriteError(
                "another process has taken this run over, for the lock was not renewed in time",
                where=self._path,
                fix="let the other one go on, or stop it and continue with --resume",
            )

    def release(self) -> None:
        """Give the lock back, if it is still ours; releasing twice is harmless."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        # Where the store does not answer, the lock becomes stale by itself.
        with suppress(WriteError, InputError):
            held = holder(self._path)
            if held is not None and held.owner == self._owner:
                self._path.remove()

    def _take(self) -> UpdateVersion:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            return self._put("create")
        except (AlreadyExistsError, PreconditionError):
            version = self._path.version()
            held = holder(self._path)
        # Ours: the first request arrived, and only its answer was lost.
        if held is not None and held.owner != self._owner and held.age < STALE_SECONDS:
            raise LockedError(
                f"another process is writing this run ({held.host}, process {held.process}, "
                f"{max(held.age, 0):.0f} s ago)",
                where=self._path,
                fix="wait for it to end, or choose another --out; if it was killed, the lock is "
                f"free in {STALE_SECONDS - held.age:.0f} s: then --resume",
            )
        try:
            return self._put(version or "create")
        except (AlreadyExistsError, PreconditionError) as error:
            raise LockedError(
                "another process has just begun to write this run",
                where=self._path,
                fix="wait for it to end, or choose another --out",
            ) from error

    def _keep(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                self._renew()
            except (WriteError, InputError):
                continue  # the network: the lock stays ours until somebody else takes it
            if self._lost:
                return

    def _renew(self) -> None:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._renewing:
            now = time.time()
            try:
                self._version = self._put(self._version)
            except (AlreadyExistsError, PreconditionError):
                # Also where an earlier renewal arrived and only its answer was lost.
                version, held = self._path.version(), holder(self._path)
                if version is None or held is None or held.owner != self._owner:
                    self._lost = True
                    return
                self._version = version
            self._renewed = now

    def _put(self, mode: Literal["create"] | UpdateVersion) -> UpdateVersion:
        """Put the lock on a condition; again where the store does not answer."""
        for number in range(TRIES - 1):
            try:
                return self._path.write_bytes(self._content(), mode)
            except WriteError:
                time.sleep(FIRST_WAIT_SECONDS * 2**number * (1 + random.random()))
        return self._path.write_bytes(self._content(), mode)

    def _content(self) -> bytes:
        held = {"owner": self._owner, "host": socket.gethostname(), "process": os.getpid()}
        return json.dumps({**held, "time": time.time()}).encode() + b"\n"
