"""What a training says on stderr: a progress bar on a terminal, and notes that matter anywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

REDRAW_SECONDS = 0.1


class TrainingProgress:
    """A bar over the steps with loss, steps/s and bytes written; nothing where nobody looks."""

    def __init__(self, total_steps: int, start: int = 0) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} steps/s"),
            TextColumn("{task.fields[written]} written"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=total_steps, completed=start, loss="–", rate="–", written="–"
        )
        self._start, self._began, self._drawn = start, time.monotonic(), 0.0

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, bytes_written: int) -> None:
        """Show that `step` updates are done; cheap, since most calls draw nothing."""
        now = time.monotonic()
        if self._bar.disable or now - self._drawn < REDRAW_SECONDS:
            return
        self._drawn = now
        rate = (step - self._start) / max(now - self._began, 1e-9)
        self._bar.update(
            self._task,
            completed=step,
            loss=f"{loss:.4g}",
            rate=f"{rate:.1f}",
            written=format_bytes(bytes_written),
        )

    def note(self, text: str) -> None:
        """Write one line to stderr, also where there is no bar."""
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self._console.print(text, markup=False)


@contextmanager
def counting(noun: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of so many things on stderr; nothing where nobody looks.

    The function that is yielded tells that one more is done.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn(noun), MofNCompleteColumn(), BarColumn(bar_width=None))
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def format_bytes(count: float) -> str:
    """Write a number of bytes for people, in powers of 1000: ``45.1 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"
