"""BLAS on one thread, for as long as blocks are multiplied in threads of our own.

Two layers of threads wait for each other, and a sum that BLAS shares out among threads depends on
how many there are: with one, equal matrices give equal bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

# The limit is one for the whole process: the first to come sets it, the last to go takes it away.
_lock = threading.Lock()
_inside = 0
_limits: list[tuple[str, int]] = []


@contextmanager
def single_threaded() -> Iterator[None]:
    """Keep BLAS on one thread inside the `with`; may be entered by many threads at once."""
    global _inside
    with _lock:
        if _inside == 0:
            _limits[:] = _set({})
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set(dict(_limits))


@cache
def _libraries() -> ThreadpoolController:
    # Looking through everything that is loaded takes milliseconds; numpy's BLAS stays where it is.
    return ThreadpoolController().select(user_api="blas")


def _set(threads: dict[str, int]) -> list[tuple[str, int]]:
    """Give each BLAS its number of threads, by default 1; return what they had."""
    before = []
    for library in _libraries().lib_controllers:
        before.append((library.filepath, library.num_threads))
        library.set_num_threads(threads.get(library.filepath, 1))
    return before
