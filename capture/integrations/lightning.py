"""Recording with the Trainer of Lightning.

    trainer = Trainer(max_epochs=3, callbacks=[RecorderCallback("runs/mine.zarr", every=10)])
    trainer.fit(module, loader)

Lightning clips by itself, by a factor that it keeps; so that it is known, let the callback clip:
``RecorderCallback(path, max_grad_norm=1.0)`` in place of ``Trainer(gradient_clip_val=1.0)``.
"""

from __future__ import annotations

import math
import os
from typing import Any

from lightning.pytorch.callbacks import Callback

from capture.recorder import Recorder
from capture.store.errors import UsageError


class RecorderCallback(Callback):
    """Records what `Trainer.fit` does with its one optimizer; `options` are those of `Recorder`.

    `max_grad_norm` clips through the recorder, once gradients are unscaled. `recorder` is the
    Recorder of the last training. After an exception the run stays incomplete. Raises `UsageError`
    for several optimizers, and where Lightning would clip too.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_grad_norm: float | None = None, **options: Any
    ) -> None:
        self.recorder: Recorder | None = None
        self._path = path
        self._max_grad_norm = max_grad_norm
        self._options = options

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizer, once a checkpoint was loaded."""
        if len(trainer.optimizers) != 1:
            raise UsageError(
                f"{len(trainer.optimizers)} optimizers, and a run records one",
                where=type(pl_module).__name__,
                fix="attach a Recorder to each of them in your module",
            )
        if self._max_grad_norm is not None and trainer.gradient_clip_val:
            raise UsageError(
                "the recorder and Lightning would both clip",
                where="RecorderCallback(max_grad_norm=…)",
                fix="leave gradient_clip_val away",
            )
        self.recorder = Recorder(self._path, pl_module, trainer.optimizers[0], **self._options)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the epoch of the coming update, with its fraction where the length is known.

        That of the first of the batches whose gradients are accumulated.
        """
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if self.recorder is not None and first:
            batches = trainer.num_training_batches
            part = batch_idx / batches if math.isfinite(batches) else 0.0
            self.recorder.epoch = trainer.current_epoch + part

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clip, where that was asked for."""
        if self.recorder is not None and self._max_grad_norm is not None:
            self.recorder.clip_grad_norm_(self._max_grad_norm)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last weights and mark the run complete."""
        if self.recorder is not None:
            self.recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what was queued; the run stays incomplete."""
        if self.recorder is not None:
            self.recorder.__exit__(type(exception), exception, exception.__traceback__)
