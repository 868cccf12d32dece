"""What a process opens for one call of `compute_moments`: the run, its references, its cuts."""

from __future__ import annotations

import socket
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from analyze.reference_rows import BoundReference
from analyze.references import Reference
from capture.store import (
    DamagedError,
    InputError,
    MismatchError,
    Run,
    Stream,
    UnknownNameError,
    open_run,
)
from capture.store.layout import WEIGHTS

_SAME_PATHS = "put runs and references where every worker finds them under the same path"


@dataclass(frozen=True)
class Plan:
    """What a worker has to know.

    `token` keeps one call's open files from serving the next, `threads` is the most tasks that one
    process works on at a time, and `seen` what the caller read of the logs: per stream the number
    of commits and their checksum. A worker that finds others looks at another run.
    """

    token: str
    path: str
    streams: tuple[str, ...]
    references: tuple[Reference, ...]
    moments: tuple[str, ...]
    threads: int
    seen: tuple[tuple[str, int, int], ...] = ()


class Session:
    """A run with its references, open in one process for one call of `compute_moments`.

    `run` is that of the plan where somebody has it open.
    """

    def __init__(self, plan: Plan, run: Run | None = None) -> None:
        self.run: Run = run or open_run(plan.path)
        # Set where nobody waits for the numbers any more: blocks end at their next chunk.
        self.stopped = False
        # The streams first: in a run that is still recording, their weights are there by now.
        for name in plan.streams:
            self.run.stream(name)
        self.weights: Stream = self.run.stream(WEIGHTS)
        for name, count, checksum in plan.seen:
            if self._checksum(name, count) != checksum:
                raise MismatchError("another run, or an older state of it", where=self.run.path)
        self.references: list[BoundReference] = [
            reference.bind(self.run) for reference in plan.references
        ]
        # When the session is dropped and the last block is done with it.
        weakref.finalize(self, _close, self.references)

    def seen(self, names: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
        """What `Plan.seen` holds, for these streams and the weights."""
        counts = {name: len(self.run.stream(name).commits) for name in (WEIGHTS, *names)}
        return tuple((name, count, self._checksum(name, count)) for name, count in counts.items())

    @cached_property
    def segments(self) -> list[tuple[int, NDArray[np.int64]]]:
        """Per inner chunk: its first tensor, and where tensors cut it, from 0 to its length."""
        grid, offsets = self.weights.grid, self.run.table.offsets
        found = []
        for chunk in range(grid.num_chunks):
            start, stop = grid.bounds(chunk)
            first = int(np.searchsorted(offsets, start, "right")) - 1
            last = int(np.searchsorted(offsets, stop, "left"))
            found.append((first, np.clip(offsets[first : last + 1], start, stop) - start))
        return found

    def _checksum(self, name: str, count: int) -> int:
        return crc32c(self.run.stream(name).commits.text(count))


def weights_row(run: Run, stream: Stream, row: int) -> int:
    """Row of the weights at which a row of `stream` was taken; `DamagedError` without one."""
    step = int(stream.steps[row])
    try:
        return run.stream(WEIGHTS).row_of(step)
    except UnknownNameError as error:
        raise DamagedError(
            f"row {row} (step {step}) of {stream.name!r} has no weights of the same step",
            where=run.path,
            fix="restore the run from a copy, or record it again",
        ) from error


_lock = threading.Lock()
_sessions: dict[str, Session] = {}
# At most two stay open on a worker that waits for the next call.
_MOST_SESSIONS = 2


def session_of(plan: Plan) -> Session:
    """Give this process's session for a plan, opened where it is not.

    What cannot be opened here was opened by the caller: an `InputError` then names the machine.
    """
    with _lock:
        if plan.token not in _sessions:
            try:
                found = Session(plan)
            except InputError as error:
                raise _unseen(error) from error
            while len(_sessions) >= _MOST_SESSIONS:
                del _sessions[next(iter(_sessions))]
            _sessions[plan.token] = found
        return _sessions[plan.token]


def keep(plan: Plan, session: Session) -> None:
    """Let a session that is open serve a plan in this process."""
    with _lock:
        _sessions[plan.token] = session


def drop(plan: Plan) -> None:
    """Stop a plan's work in this process, and close what is open for it."""
    with _lock:
        session = _sessions.pop(plan.token, None)
    if session is not None:
        session.stopped = True


def _unseen(error: InputError) -> InputError:
    return type(error)(
        f"the worker on {socket.gethostname()} does not see what is seen here, {error.what}",
        where=error.where,
        fix=_SAME_PATHS,
    )


def _close(references: Sequence[BoundReference]) -> None:
    for reference in references:
        reference.close()
