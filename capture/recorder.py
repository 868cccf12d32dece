"""The recorder: attaches to an optimizer and saves what each update starts from and does.

    with Recorder("runs/mine.zarr", model, optimizer, every=10) as recorder:
        for x, y in loader:
            optimizer.zero_grad(); loss = criterion(model(x), y); loss.backward(); optimizer.step()

A hook before the optimizer's step sees w_t and the gradient that the update will use: after
accumulation, unscaling and reduction over ranks. A hook after it sees w_{t+1}. The training thread
computes the norm of every gradient and of every update, and at steps that are saved it copies;
checksums and files are the work of a writer thread.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn, optim

from capture.arguments import (
    require_attributes,
    require_state,
    require_unclipped,
    require_whole,
    with_config,
)
from capture.average import with_averages
from capture.clipping import GradientWatch
from capture.describe import describe
from capture.factories import require_not_importing
from capture.hooks import StepHooks
from capture.interruption import Interrupted
from capture.opening import RunPlan, finished_step
from capture.optimizer_facts import optimizer_facts
from capture.ranks import require_rank
from capture.recording import Recording
from capture.resume import Moment, Stateful
from capture.schedule import Schedule, parse_schedule
from capture.snapshots import Snapshots
from capture.sources import Source, require_sources
from capture.store.layout import WEIGHTS
from capture.store.place import target_of
from capture.streams import MINIBATCH, stream_schedules
from capture.update import Told, Update

logger = logging.getLogger("capture")


class Recorder:
    """Records the updates of one optimizer into a run store; use it in a `with` statement.

    Args:
        path: The run, a folder NAME.zarr, or an address such as ``s3://bucket/NAME.zarr``.
        model: The model; wrappers of `torch.compile` and DDP are looked through.
        optimizer: The optimizer whose steps are recorded.
        every: Which weights are saved: every k steps, or a schedule such as ``"log:50"``.
        gradients: Streams beside the weights, ``"minibatch,updates"`` or a sequence of these;
            each with its own schedule after ``@`` if wanted. ``"none"``, `None` or empty: weights
            only.
        total_steps: Length of the run in updates, for the schedule ``log:N``.
        steps_per_epoch: Lets `epoch` follow the steps, where the loop does not set it.
        config: The settings of your loop, such as ``{"lr": 0.1, "width": 64}`` or ``vars(args)``:
            a dict of JSON values. They stay with the run; `capture info` shows them, and
            ``analyze compare --group-by lr,width`` groups runs by them.
        attributes: Further entries for the run's attributes, such as ``{"seeds": {"seed": 0}}``;
            JSON values, under names that the run does not use itself.
        checkpoint_every: Save a resume state after every so many updates.
        keep_state: After which updates a resume state is kept for good, for branches and for the
            quantities in Adam's metric, and the weights are saved; as `every`.
        state: Objects with ``state_dict()`` and ``load_state_dict()`` that a resumed loop needs as
            they were, as in ``{"scheduler": scheduler, "scaler": scaler}``: saved in every resume
            state, and loaded by `resume`. Step schedulers after the optimizer, as torch asks: an
            automatic state of update t with such objects is written when update t + 1 begins.
        resume: Continue the run at `path` from its newest resume state: model, optimizer, random
            numbers and `state` are put back. The position in the data is the loop's: go on with
            batch number `step`. Not under `torch.distributed` with several ranks.
        clipped: False says that the loop never clips gradients, so that every clip factor is 1;
            by default it is unknown (NaN) where `clip_grad_norm_` was not called. A loop that
            changes gradients after the backward pass is warned once, and its factors are NaN.
        sources: Where streams of `gradients` come from that are not the loop's own, by name; see
            `capture.sources.Source`. Each is measured at every saved w_t and at w_T. As in
            ``gradients="minibatch,ema", sources={"ema": Average(averaged, model)}``.

    Attributes:
        step: Updates applied so far.
        complete: Whether the run has come to its end; if it had so before, nothing is recorded.
        restored: What `checkpoint` was given, after a resume; `None` where the run starts at 0.

    Leaving the `with` block saves w_T and marks the run complete; after an exception it stays
    incomplete, or is removed again if it holds nothing yet. Under `torch.distributed` only rank 0
    writes. On a GPU only steps that save a row wait for the device, for its copy; and, under a
    `GradScaler`, those of a fused optimizer, which must know whether the step counts.

    Memory: on the host two buffers of the size of a saved row for each stream; and, unless
    `torch.optim.SGD` itself tells what each update did, one copy of the trainable weights beside
    the model, on its device.

    With a `GradScaler` whose skipped steps never reach the optimizer, what was logged for a skipped
    step, and its clip factor, hold until they are given anew: log the same names and clip in each
    iteration or in none.

    Raises:
        UnsupportedModelError: Before the first step, for what cannot be recorded; at a step, for a
            model that changed.
        UsageError: The path is taken, or an argument is wrong.
        MismatchError: Resuming with another model, optimizer, schedule or names in `state`.
        WriteError: The disk refused; raised at the next step after the writer thread met it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        every: int | str | Schedule = 10,
        gradients: str | Sequence[str] | None = (MINIBATCH,),
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        config: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
        checkpoint_every: int | None = None,
        keep_state: int | str | None = None,
        state: Mapping[str, Stateful] | None = None,
        resume: bool = False,
        clipped: bool | None = None,
        sources: Mapping[str, Source] | None = None,
    ) -> None:
        self.path = target_of(path)
        self.step = 0
        self.complete = False
        self.restored: dict[str, Any] | None = None
        self._steps_per_epoch = steps_per_epoch
        self._checkpoint_every = checkpoint_every
        self._unclipped = 1.0 if clipped is False else math.nan
        self._epoch: float | None = None
        self._told = Told()
        self._update = Update(0, None, math.nan)
        self._skipped = False

        require_not_importing()
        is_writing_rank = require_rank(resume)
        require_whole("total_steps", total_steps, 0, optional=True)
        require_whole("steps_per_epoch", steps_per_epoch, 1, optional=True)
        require_whole("checkpoint_every", checkpoint_every, 1, optional=True)
        require_unclipped(clipped)
        attributes = with_config(attributes or {}, config)
        require_attributes(attributes)
        require_state(state or {})
        facts = optimizer_facts(optimizer)
        self._seen = describe(model, optimizer)
        schedules = stream_schedules(
            every, gradients, total_steps, steps_per_epoch, tuple(sources or ())
        )
        sources = require_sources(sources or {}, schedules)
        self._keep: Schedule | None = None
        if keep_state is not None:
            lengths = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
            self._keep = parse_schedule(keep_state, **lengths)
            schedules[WEIGHTS] = schedules[WEIGHTS].union(self._keep)
        plan = RunPlan(self.path, self._seen, facts, schedules, total_steps, attributes, sources)
        kept = with_averages(state or {}, sources)
        self._run = self._open(plan, kept, resume) if is_writing_rank else None
        self._attach()

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
            self._told.log(name, value)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip like `torch.nn.utils.clip_grad_norm_` over all trainable tensors; keep the factor.

        Returns the norm of all gradients before clipping.
        """
        total = nn.utils.clip_grad_norm_(self._seen.parameters, max_norm, norm_type)
        self._told.clipped(max_norm, norm_type, total)
        if self._watch is not None:
            self._watch.note()
        return total

    def checkpoint(self, **extra: Any) -> None:
        """Save a resume state, with `state` and `extra`; call it between two updates.

        `extra` is what the loop itself must know again; it comes back as `restored`. Every row so
        far is on disk before the state is.
        """
        if self._run is not None and self._recording:
            self._run.states.save(Moment(self.step, self._epoch, self._is_kept()), extra)

    @property
    def bytes_written(self) -> int:
        """Bytes of the shards that this recorder has committed so far."""
        return 0 if self._snapshots is None else self._snapshots.queue.bytes_written

    @property
    def held_seconds(self) -> float:
        """Seconds for which the training thread was held to copy snapshots, norms not included."""
        return 0.0 if self._snapshots is None else self._snapshots.held_seconds

    # Opening.

    def _open(self, plan: RunPlan, state: Mapping[str, Stateful], resume: bool) -> Recording | None:
        """Open the run, and take over where it stands; `None` for one that is complete."""
        finished = finished_step(plan) if resume else None
        if finished is not None:
            self.complete, self.step = True, finished
            return None
        run = Recording(plan, state, resume)
        self.step, self._epoch, self.restored = run.step, run.epoch, run.restored
        return run

    def _attach(self) -> None:
        """Hook into the optimizer, and watch the gradients where their clip factors are kept."""
        self._recording = not self.complete
        self._hooks: StepHooks | None = None
        self._watch: GradientWatch | None = None
        if self._recording:
            self._hooks = StepHooks(self._seen.optimizer, self._before_step, self._after_step)
        if self._run is not None:
            self._watch = GradientWatch(self._seen.parameters)

    @property
    def _snapshots(self) -> Snapshots | None:
        return None if self._run is None else self._run.snapshots

    # Around each step of the optimizer.

    @torch.no_grad()
    def _before_step(self, loss: Any) -> None:
        if self._run is not None:
            self._run.states.finish()
        told = self._told
        if "loss" not in told.logged and isinstance(loss, float | Tensor):
            self.log(loss=loss)
        clip_factor = self._unclipped if told.clip_factor is None else told.clip_factor
        # A fused optimizer under a GradScaler unscales within its kernel, so here that is undone.
        # Whether its step counts is known on the device alone: this one wait cannot be avoided.
        self._skipped = self._is_skipped()
        scale = getattr(self._seen.optimizer, "grad_scale", None)
        scale = None if scale is None else float(scale)
        changed = self._watch is not None and not self._skipped and self._watch.changed()
        clip_factor = math.nan if changed else clip_factor
        self._update = Update(self.step, self.epoch, clip_factor, scale, changed)
        if self._run is not None and not self._skipped:
            self._run.snapshots.begin(self._update)

    @torch.no_grad()
    def _after_step(self) -> None:
        told, self._told = self._told, Told()
        if self._skipped:
            return
        if self._run is not None:
            self._run.snapshots.end(self._update, told.logged)
            self._run.states.clipping.count(self.step, told.limit, self._update.changed)
        self.step += 1
        due = self._checkpoint_every and self.step % self._checkpoint_every == 0
        if (due or self._is_kept()) and self._run is not None:
            self._run.states.begin(self.step, self._epoch, self._is_kept())

    def _is_kept(self) -> bool:
        return self._keep is not None and self._keep.due(self.step)

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
        run = self._detach()
        if run is None:
            return
        concerns = run.finish(self.step, self.epoch)
        self.complete = True
        for concern in concerns:
            warnings.warn(concern, stacklevel=2)

    def _abandon(self, error: BaseException) -> None:
        """Leave after an exception: what was queued is written, the run stays incomplete."""
        run = self._detach()
        if run is None:
            return
        run.abandon(error)
        # An interruption says itself how to go on.
        if self.path.exists() and not isinstance(error, Interrupted):
            logger.warning(
                "the run stays incomplete after %d updates: %s; continue it with --resume "
                "(resume=True in a Recorder)",
                self.step,
                self.path,
            )

    def _detach(self) -> Recording | None:
        """Remove the hooks; return the run if it is still open."""
        if self._hooks is not None:
            self._hooks.remove()
        if self._watch is not None:
            self._watch.remove()
        recording, self._recording = self._recording, False
        return self._run if recording else None
