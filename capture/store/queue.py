"""The writer thread: training copies into a buffer and goes on, the thread does the rest."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from capture.store.errors import WriteError
from capture.store.shard import Staging
from capture.store.writer import FLUSH_SECONDS, RunWriter


class SnapshotQueue:
    """Hands snapshots to a `RunWriter` on a thread of its own, in the order they were submitted.

    Each stream has `depth` staging buffers, made when first needed; when all are under way,
    `acquire` waits, so that a slow disk slows training down rather than filling memory. When the
    thread fails, it writes nothing more, and every later call raises its error.
    """

    def __init__(self, writer: RunWriter, depth: int = 2) -> None:
        self.bytes_written = 0
        self.waited_seconds = 0.0
        self._writer = writer
        self._depth = depth
        self._made: dict[str, int] = {}
        self._free: dict[str, queue.SimpleQueue[Staging | None]] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        # Only while it has something to do does the thread use the writer, of which one thread at a
        # time may make use.
        self._at_rest = True
        self._thread = threading.Thread(target=self._run, name="straightway-writer", daemon=True)
        self._thread.start()

    def acquire(self, stream: str) -> Staging:
        """Take a free staging buffer of this stream; wait while all of them are under way."""
        self.check()
        free = self._free.setdefault(stream, queue.SimpleQueue())
        if free.empty() and self._made.get(stream, 0) < self._depth:
            self._made[stream] = self._made.get(stream, 0) + 1
            return self._writer.staging(stream)
        started = time.perf_counter()
        staging = free.get()
        self.waited_seconds += time.perf_counter() - started
        self.check()
        assert staging is not None, "only a failed thread hands out nothing"
        return staging

    def submit(
        self,
        stream: str,
        staging: Staging,
        *,
        step: int,
        epoch: float | None = None,
        batch: int | None = None,
        loss: float | None = None,
    ) -> None:
        """Queue a filled buffer; it must not be touched until `acquire` hands it out again."""
        self.check()

        def job() -> None:
            try:
                size = self._writer.commit(
                    stream, staging, step=step, epoch=epoch, batch=batch, loss=loss
                )
                self.bytes_written += size
            finally:
                self._free[stream].put(staging)

        self._jobs.put(job)

    def scalars(self, step: int, values: Mapping[str, float | NDArray[Any]]) -> None:
        """Queue the scalars of one update."""
        self.check()
        self._jobs.put(lambda: self._writer.append_scalars(step, values))

    def call(self, function: Callable[[], None]) -> None:
        """Queue anything else that must happen between two commits."""
        self.check()
        self._jobs.put(function)

    def drain(self) -> None:
        """Wait until all that was queued is on disk and flushed; raise the thread's failure.

        From then on the thread leaves the writer alone until something is queued again, so whoever
        called this may use it meanwhile.
        """
        done = threading.Event()

        def rest() -> None:
            self._writer.flush()
            self._at_rest = True
            done.set()

        self._jobs.put(rest)
        while not done.wait(0.05):
            if self._failure is not None or not self._thread.is_alive():
                break
        self.check()

    def check(self) -> None:
        """Raise the failure of the thread, if it failed; `ValueError` once the queue is closed."""
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise ValueError("the queue is closed: nothing more can be written")

    def close(self) -> None:
        """End the thread after what is queued; does not raise. Closing twice is harmless."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if self._failure is not None:
                continue
            try:
                job()
            except BaseException as error:  # carried to the training thread by `check`
                self._failure = _with_way_on(error)
                # Wake a training thread that waits for a buffer.
                for free in list(self._free.values()):
                    free.put(None)

    def _next(self) -> Callable[[], None] | None:
        """Wait for a job; where none comes for a while, what was committed is flushed."""
        try:
            job = self._jobs.get(timeout=None if self._at_rest else FLUSH_SECONDS)
        except queue.Empty:
            return self._writer.flush
        self._at_rest = False
        return job


def _with_way_on(error: BaseException) -> BaseException:
    """Say of what the disk refused that the training is not lost."""
    if not isinstance(error, WriteError) or "--resume" in str(error):
        return error
    parts = [part for part in (error.fix, "a stopped training goes on with --resume") if part]
    told = WriteError(error.what, where=error.where, fix="; ".join(parts))
    told.__cause__ = error
    return told
