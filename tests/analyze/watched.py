"""The most that a process holds while it works, watched from a thread of its own.

For scripts that tests run in a process of their own: `with watching(open_files) as most: …`, then
`most()`.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SECONDS = 0.0005


def open_files() -> int:
    """Files that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("RssAnon:")[2].split()[0])


@contextmanager
def watching(measure: Callable[[], int]) -> Iterator[Callable[[], int]]:
    """Give what tells the largest value of `measure` so far."""
    seen, done = [measure()], threading.Event()

    def watch() -> None:
        while not done.wait(_SECONDS):
            seen[0] = max(seen[0], measure())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: seen[0]
    finally:
        done.set()
        watcher.join()
