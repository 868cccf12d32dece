"""The recorder: attaches to an optimizer and saves what each update starts from and does.

    with Recorder("runs/mine.zarr", model, optimizer, every=10) as recorder:
        for x, y in loader:
            optimizer.zero_grad(); loss = criterion(model(x), y); loss.backward(); optimizer.step()

A hook before the optimizer's step sees w_t and the gradient that the update will use: after
accumulation, unscaling and reduction over ranks. A hook after it sees w_{t+1}. All that the
training thread does is copy; a writer thread does the rest.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn, optim

from capture.describe import describe, optimizer_facts
from capture.hooks import StepHooks
from capture.interruption import Interrupted
from capture.opening import RunPlan, finished_step, frozen_digests, open_writer, start_over
from capture.rng import restore_rng_state, rng_state
from capture.schedule import Schedule
from capture.snapshots import MINIBATCH, OWN_SCALARS, Snapshots, Update, stream_schedules
from capture.state import load_newest, save
from capture.store import SnapshotQueue, StraightwayError, UsageError

logger = logging.getLogger("capture")


class Recorder:
    """Records the updates of one optimizer into a run store; use it in a `with` statement.

    Args:
        path: The run, a folder NAME.zarr.
        model: The model; wrappers of `torch.compile` and DDP are looked through.
        optimizer: The optimizer whose steps are recorded.
        every: Which weights are saved: every k steps, or a schedule such as ``"log:50"``.
        gradients: Streams beside the weights, ``"minibatch,updates"`` or a sequence of these;
            each with its own schedule after ``@`` if wanted. ``"none"`` or empty: weights only.
        total_steps: Length of the run in updates, for the schedule ``log:N``.
        steps_per_epoch: Lets `epoch` follow the steps, where the loop does not set it.
        attributes: Entries for the run's attributes (config, seeds, …); JSON values.
        checkpoint_every: Save a resume state after every so many updates.
        resume: Continue the run at `path` from its newest resume state; see `restored`.
        clipped: False says that the loop never clips gradients, so that every clip factor is 1;
            by default it is unknown (NaN) where `clip_grad_norm_` was not called.

    Attributes:
        step: Updates applied so far.
        complete: Whether the run has come to its end; if it had so before, nothing is recorded.
        restored: What `checkpoint` was given, after a resume; `None` where the run starts at 0.

    Leaving the `with` block saves w_T and marks the run complete; after an exception it stays
    incomplete. Under `torch.distributed` only rank 0 writes.

    Raises:
        UnsupportedModelError: Before the first step, for what cannot be recorded; at a step, for a
            model that changed.
        UsageError: The path is taken, or an argument is wrong.
        MismatchError: Resuming with another model, optimizer or schedule.
        WriteError: The disk refused; raised at the next step after the writer thread met it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        every: int | str | Schedule = 10,
        gradients: str | Sequence[str] = (MINIBATCH,),
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        attributes: Mapping[str, Any] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        clipped: bool | None = None,
    ) -> None:
        self.path = Path(path)
        self.step = 0
        self.complete = False
        self.restored: dict[str, Any] | None = None
        self._steps_per_epoch = steps_per_epoch
        self._checkpoint_every = checkpoint_every
        self._unclipped = 1.0 if clipped is False else math.nan
        self._epoch: float | None = None
        self._logged: dict[str, float | Tensor] = {}
        self._clip_factor: float | Tensor | None = None
        self._update = Update(0, None, math.nan)
        self._hooks: StepHooks | None = None
        self._snapshots: Snapshots | None = None

        facts = optimizer_facts(optimizer)
        self._seen = describe(model, optimizer)
        self._schedules = stream_schedules(every, gradients, total_steps, steps_per_epoch)
        texts = {name: schedule.text for name, schedule in self._schedules.items()}
        if _is_writing_rank():
            self._open(RunPlan(self.path, self._seen, facts, texts, attributes or {}), resume)
        self._recording = not self.complete
        if self._recording:
            self._hooks = StepHooks(optimizer, self._before_step, self._after_step)

    # What a loop may tell and ask.

    @property
    def epoch(self) -> float | None:
        """The epoch of the coming update; set by the loop, else ``step / steps_per_epoch``."""
        if self._epoch is None and self._steps_per_epoch is not None:
            return self.step / self._steps_per_epoch
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: float | None) -> None:
        self._epoch = None if epoch is None else float(epoch)

    def log(self, **values: float | Tensor) -> None:
        """Keep scalars of the coming update, the loss above all: call it before the step."""
        for name, value in values.items():
            if name in OWN_SCALARS or (isinstance(value, Tensor) and value.numel() != 1):
                raise UsageError(
                    "not a scalar that a loop can log", where=name, fix="log numbers, as loss=…"
                )
            # A tensor may be reused before the step, and is brought to the host only then.
            self._logged[name] = value.detach().clone() if isinstance(value, Tensor) else value

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip like `torch.nn.utils.clip_grad_norm_` over all trainable tensors; keep the factor.

        Returns the norm of all gradients before clipping.
        """
        total = nn.utils.clip_grad_norm_(self._seen.parameters, max_norm, norm_type)
        self._clip_factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        return total

    def checkpoint(self, **extra: Any) -> None:
        """Save a resume state: model, optimizer, random numbers, and `extra`; between two steps.

        `extra` is what the loop itself must know again, such as ``scheduler=….state_dict()``; it
        comes back as `restored`. Every row so far is on disk before the state is.
        """
        if self._snapshots is None or not self._recording:
            return
        self._snapshots.queue.drain()
        self._writer.flush()
        tree = {
            "model": self._seen.model.state_dict(),
            "optimizer": self._seen.optimizer.state_dict(),
            "rng": rng_state(),
            "epoch": self._epoch,
            "epoch_begun": self._snapshots.epoch_begun,
            "gradient_missing": self._snapshots.gradient_missing,
            "extra": extra,
        }
        save(self._writer.state_folder, self.step, tree)

    @property
    def bytes_written(self) -> int:
        """Bytes of the shards that this recorder has committed so far."""
        return 0 if self._snapshots is None else self._snapshots.queue.bytes_written

    @property
    def held_seconds(self) -> float:
        """Seconds for which the training thread was held to copy snapshots, norms not included."""
        return 0.0 if self._snapshots is None else self._snapshots.held_seconds

    # Opening.

    def _open(self, plan: RunPlan, resume: bool) -> None:
        finished = finished_step(plan) if resume else None
        if finished is not None:
            self.complete, self.step = True, finished
            return
        self._writer = open_writer(plan, resume)
        try:
            found = load_newest(self._writer.state_folder) if resume else None
            if resume and found is None:
                start_over(plan, self._writer)
            queue = SnapshotQueue(self._writer)
            self._snapshots = Snapshots(self._seen, self._schedules, queue)
            if found is not None:
                self._restore(self._snapshots, *found)
        except BaseException:
            self._writer.close()
            raise

    def _restore(
        self, snapshots: Snapshots, step: int, state: dict[str, Any], notices: list[str]
    ) -> None:
        for notice in notices:
            logger.warning("%s", notice)
        self._writer.truncate(step)
        self.step = step
        self._seen.model.load_state_dict(state["model"])
        self._seen.optimizer.load_state_dict(state["optimizer"])
        restore_rng_state(state["rng"])
        self._epoch = state["epoch"]
        snapshots.epoch_begun = state["epoch_begun"]
        snapshots.gradient_missing = Counter(state["gradient_missing"])
        self.restored = state["extra"]

    # Around each step of the optimizer.

    @torch.no_grad()
    def _before_step(self, loss: Any) -> None:
        if "loss" not in self._logged and isinstance(loss, float | Tensor):
            self.log(loss=loss)
        clip_factor = self._unclipped if self._clip_factor is None else float(self._clip_factor)
        # A fused optimizer under a GradScaler unscales within its kernel, so here that is undone.
        scale = getattr(self._seen.optimizer, "grad_scale", None)
        scale = None if scale is None else float(scale)
        self._update = Update(self.step, self.epoch, clip_factor, scale)
        if self._snapshots is not None and not self._is_skipped():
            self._snapshots.begin(self._update)

    @torch.no_grad()
    def _after_step(self) -> None:
        logged = {name: float(value) for name, value in self._logged.items()}
        self._logged, self._clip_factor = {}, None
        if self._is_skipped():
            return
        if self._snapshots is not None:
            self._snapshots.end(self._update, logged)
        self.step += 1
        if self._checkpoint_every and self.step % self._checkpoint_every == 0:
            self.checkpoint()

    def _is_skipped(self) -> bool:
        """Whether a fused optimizer leaves the weights alone: its GradScaler found Inf or NaN."""
        found_inf = getattr(self._seen.optimizer, "found_inf", None)
        return found_inf is not None and float(found_inf) != 0.0

    # Leaving.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandon(error)

    def close(self) -> None:
        """Save w_T and mark the run complete; closing twice is harmless."""
        snapshots = self._detach()
        if snapshots is None:
            return
        try:
            with torch.no_grad():
                snapshots.final(self.step, self.epoch)
            concerns = self._note(snapshots)
            self._writer.finish(self.step)
            self.complete = True
        finally:
            self._end(snapshots)
        for concern in concerns:
            warnings.warn(concern, stacklevel=2)

    def _note(self, snapshots: Snapshots) -> list[str]:
        """Keep in the attributes what a reader must know and cannot see in the arrays.

        Returns what the user should be warned of.
        """
        concerns = []
        if snapshots.gradient_missing:
            missing = dict(sorted(snapshots.gradient_missing.items()))
            self._writer.update_attributes(gradient_missing=missing)
        before, after = self._writer.attributes["frozen_digests"], frozen_digests(self._seen)
        if changed := [name for name in before if before[name] != after[name]]:
            self._writer.update_attributes(frozen_changed=changed)
            concerns.append(f"frozen tensors changed during the run: {', '.join(changed)}")
        if self.step == 0:
            concerns.append("the optimizer made no step: the run holds the initial weights alone")
        return concerns

    def _abandon(self, error: BaseException) -> None:
        """Leave after an exception: what was queued is written, the run stays incomplete."""
        snapshots = self._detach()
        if snapshots is None:
            return
        try:
            snapshots.queue.drain()
            self._writer.flush()
        except StraightwayError as failure:
            if failure is not error:
                logger.warning("%s", failure)
        finally:
            self._end(snapshots)
        # An interruption says itself how to go on.
        if not isinstance(error, Interrupted):
            logger.warning(
                "the run stays incomplete after %d updates: %s; go on with resume=True",
                self.step,
                self.path,
            )

    def _detach(self) -> Snapshots | None:
        """Remove the hooks; return the snapshots of a run that is still open."""
        if self._hooks is not None:
            self._hooks.remove()
        recording, self._recording = self._recording, False
        return self._snapshots if recording else None

    def _end(self, snapshots: Snapshots) -> None:
        snapshots.queue.close()
        self._writer.close()


def _is_writing_rank() -> bool:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0
