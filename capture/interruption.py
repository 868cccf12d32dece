"""SIGINT and SIGTERM, taken at the end of a step instead of in its middle."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from capture.store.errors import StraightwayError


class Interrupted(StraightwayError):
    """A training that was stopped by a signal and can be resumed; exits with 128 + the signal."""

    def __init__(self, what: str, *, signum: int, **parts: Any) -> None:
        super().__init__(what, **parts)
        self.exit_code = 128 + signum


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `signum`; a second one acts as ever."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread handle signals; elsewhere they act as ever.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()
