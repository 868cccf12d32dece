"""Recording with the Trainer of Hugging Face transformers.

    trainer = Trainer(model, args, …, callbacks=[RecorderCallback("runs/mine.zarr", every=10)])
    trainer.train()

The Trainer clips by itself, by a factor that it keeps; so that it is known, let the callback clip:
``TrainingArguments(max_grad_norm=0)`` and ``RecorderCallback(path, max_grad_norm=1.0)``.
"""

from __future__ import annotations

import math
import os
from typing import Any

from transformers import TrainerCallback

from capture.recorder import Recorder
from capture.store.errors import UsageError


class RecorderCallback(TrainerCallback):
    """Records what `Trainer.train` does; `options` are those of `Recorder`.

    `max_grad_norm` clips through the recorder, just before each update; not with ``fp16=True``,
    where only the Trainer knows the scale of the gradients: `UsageError`. `recorder` is the
    Recorder of the last training. A Trainer says nothing to its callbacks when it fails: the run
    is then left incomplete, and stays open until the next training or the end of the process.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_grad_norm: float | None = None, **options: Any
    ) -> None:
        self.recorder: Recorder | None = None
        self._path = path
        self._max_grad_norm = max_grad_norm
        self._options = options

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **rest: Any
    ) -> None:
        """Attach to the bare optimizer."""
        if self._max_grad_norm is not None and (args.fp16 or args.max_grad_norm):
            raise UsageError(
                "the recorder cannot clip beside the Trainer, nor with fp16",
                where="RecorderCallback(max_grad_norm=…)",
                fix="use bf16 or float32, and TrainingArguments(max_grad_norm=0)",
            )
        self._leave_failed()
        bare = getattr(optimizer, "optimizer", optimizer)
        self.recorder = Recorder(self._path, model, bare, **self._options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Tell the epoch of the coming update."""
        if self.recorder is not None:
            self.recorder.epoch = state.epoch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Clip, where that was asked for; where nobody clips, tell the recorder so."""
        if self.recorder is None:
            return
        if self._max_grad_norm is not None:
            self.recorder.clip_grad_norm_(self._max_grad_norm)
        elif not args.max_grad_norm:
            # To know the norm, the Trainer has clipped to infinity all the same: by a factor of 1.
            self.recorder.clip_grad_norm_(math.inf)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Save the last weights and mark the run complete."""
        if self.recorder is not None:
            self.recorder.close()

    def _leave_failed(self) -> None:
        """Let go of a training that never ended; its run stays incomplete."""
        if self.recorder is not None:
            error = RuntimeError("the last training did not end")
            self.recorder.__exit__(RuntimeError, error, None)
