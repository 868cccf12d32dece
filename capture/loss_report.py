"""The losses of a training on their way to whoever looks: on a GPU they come a little later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from capture.progress import TrainingProgress
from capture.scalars import PendingScalars


class LossReport:
    """Shows the loss of each step as soon as it is on the host, and notes the first that is none.

    `last` is the newest loss that was shown; `written` tells how many bytes the run has by now.
    """

    def __init__(self, progress: TrainingProgress, written: Callable[[], int]) -> None:
        self.last = math.nan
        self._progress = progress
        self._written = written
        self._warned = False
        self._pending = PendingScalars(self._show)

    def add(self, step: int, loss: Tensor) -> None:
        """Take the loss of update `step`, without waiting for a GPU."""
        self._pending.add(step, {"loss": loss.detach()})

    def flush(self) -> None:
        """Wait for every loss."""
        self._pending.flush()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        self.last = float(values["loss"])
        if not math.isfinite(self.last) and not self._warned:
            self._warned = True
            self._progress.note(
                f"warning: the loss is {self.last} at step {step}; it is recorded as it is and "
                "the training goes on"
            )
        self._progress.update(step + 1, self.last, self._written())
