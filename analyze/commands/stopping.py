"""Ctrl-C and SIGTERM: they end a command until its output is in place; then it succeeds."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from functools import cache
from types import FrameType

import click

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS = 0.01

Identity = tuple[int, int, int] | None


class Stopping:
    """While entered, signals stop the command: Ctrl-C as `KeyboardInterrupt`, SIGTERM as exit 143.

    Outputs come into place by a rename, so at any moment each is the old one or the new one. Once
    one that is watched is new, a signal no longer counts: "interrupted" would not be true. A signal
    may come while a library calls back into Python, and become another error there: that error is
    the signal's all the same.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._told = False
        self._unraisable = sys.unraisablehook
        self._before: dict[str, Identity] = {}
        self._handlers: dict[int, object] = {}

    def watch(self, path: str) -> None:
        """Look out for this file or folder, which the command will write."""
        self._before.setdefault(path, _identity(path))

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {signum: signal.signal(signum, self._stop) for signum in _SIGNALS}
            sys.unraisablehook = self._look_again
            _ignore_at_exit()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        sys.unraisablehook = self._unraisable
        if self._signal == signal.SIGINT and isinstance(error, Exception):
            raise click.Abort from error
        if self._signal is not None and isinstance(error, Exception):
            raise SystemExit(128 + self._signal) from error

    def _stop(self, signum: int, _: FrameType | None) -> None:
        if any(_identity(path) != before for path, before in self._before.items()):
            return
        if self._signal is not None:
            return  # it is ending already
        self._signal = signum
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._told:
            os.write(2, b"error: terminated\n")
            self._told = True
        raise SystemExit(128 + signum)

    def _look_again(self, lost: sys.UnraisableHookArgs) -> None:
        """Send the signal again where Python dropped what it raised, as in a weakref's callback."""
        if self._signal is None or not isinstance(lost.exc_value, KeyboardInterrupt | SystemExit):
            self._unraisable(lost)
            return
        signum, self._signal = self._signal, None
        # From another thread and a little later: here it would be dropped again.
        again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), signum))
        again.daemon = True
        again.start()


def _identity(path: str) -> Identity:
    """What tells a file or folder from the one that takes its place; `None` where there is none."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


@cache
def _ignore_at_exit() -> None:
    """Let no signal spoil an end that was reached: Python would write tracebacks about it."""

    def ignore() -> None:
        for signum in _SIGNALS:
            signal.signal(signum, signal.SIG_IGN)

    atexit.register(ignore)
