"""The snapshots of one run: what is due at a step is copied, and handed to the writer thread."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capture.describe import Description
from capture.norms import Norms, WeightsCopy
from capture.scalars import PendingScalars, on_device
from capture.schedule import Schedule
from capture.sources import Source, gradient_of, loss_of
from capture.staging import HostCopies
from capture.store import SnapshotQueue, Staging
from capture.store.layout import UPDATES, WEIGHTS
from capture.streams import MINIBATCH
from capture.update import Update
from capture.update_norms import SgdUpdateNorms

logger = logging.getLogger("capture")


class Snapshots:
    """Takes w_t and its gradient before update t, and what the update did after it.

    A row is queued only once its update is done, so a step that fails and is tried again leaves
    one row; where other sources are due, w_t and their rows are queued before the update, once.
    `held_seconds` is how long the training thread was held for the copies of due steps,
    `gradient_missing` counts by tensor the updates in which ``grad is None`` stood for zeros.
    """

    def __init__(
        self,
        seen: Description,
        schedules: Mapping[str, Schedule],
        queue: SnapshotQueue,
        sources: Mapping[str, Source],
    ) -> None:
        self.queue = queue
        self.scalars = PendingScalars(self._write_scalars)
        self.held_seconds = 0.0
        self.epoch_begun: int | None = None
        self.gradient_missing: Counter[str] = Counter()
        self._seen = seen
        self._schedules = schedules
        self._sources = sources
        # What was queued of the coming update already: (its step, names of streams).
        self._queued: tuple[int, set[str]] = (-1, set())
        wide = seen.table.value_dtype.itemsize == 8
        dtype = torch.float64 if wide else torch.float32
        self._norms = Norms(dtype)
        self._weights = WeightsCopy(dtype)
        self._sgd = SgdUpdateNorms(seen.optimizer, seen.parameters, self._norms)
        if not self._sgd.applies():
            self._weights.allocate(seen.parameters)
        self._copies = HostCopies(seen.table)
        self._staged: dict[str, Staging] = {}
        self._kept_weights: Staging
        self._on_host = all(p.device.type == "cpu" for p in seen.parameters)

    def begin(self, update: Update) -> None:
        """Take w_t, the gradient at w_t, and the optimizer's settings; called before update t."""
        self.queue.check()
        self._seen.check_unchanged()
        gradients = [parameter.grad for parameter in self._seen.parameters]
        named = zip(self._seen.table.names, gradients, strict=True)
        update.missing = [name for name, gradient in named if gradient is None]
        grad_norms = self._norms.of(gradients)
        if update.scale:
            grad_norms = grad_norms / update.scale
        update.scalars = {**self._settings(update), "grad_norm_by_tensor": grad_norms}
        update.streams = self._due(update)
        with self._holding():
            for stream in self._staged_here(update):
                staging = self._acquire(stream)
                if stream == WEIGHTS:
                    self._kept_weights = staging
                    self._copy_weights(staging)
                elif stream == MINIBATCH:
                    self._copies.copy_parameters(staging, gradients, update.scale)
        self._measure_sources(update.step, update.epoch, update.streams)
        update.told = self._sgd.begin(gradients, grad_norms, update.scale)
        if update.streams and self._on_host:
            self._weights.borrow(self._copies.views_of(self._kept_weights))
        elif not update.told or UPDATES in update.streams:
            self._weights.keep(self._seen.parameters)

    def end(self, update: Update, logged: Mapping[str, float | Tensor]) -> None:
        """Take what the update did, and hand everything to the writer thread."""
        changes = None
        if UPDATES in update.streams:
            with self._holding():
                changes = self._copy_updates(self._staged[UPDATES])
        update_norms = self._update_norms(update, changes)
        for stream in self._staged_here(update):
            staging = self._staged.pop(stream)
            self.queue.submit(stream, staging, step=update.step, epoch=update.epoch)
        scalars = {**update.scalars, "update_norm_by_tensor": update_norms, **logged}
        self.scalars.add(update.step, scalars)
        self.gradient_missing.update(update.missing)
        self.epoch_begun = _whole(update.epoch)

    def final(self, step: int, epoch: float | None) -> None:
        """Save w_T, the last row of the weights, and wait until everything is on disk."""
        self.scalars.flush()
        self._seen.check_unchanged()
        self._copy_weights(self._acquire(WEIGHTS))
        self.queue.submit(WEIGHTS, self._staged.pop(WEIGHTS), step=step, epoch=epoch)
        self._measure(step, epoch, list(self._sources))
        self.drain()

    def drain(self) -> None:
        """Wait until all that was recorded so far is on disk."""
        self.scalars.flush()
        self.queue.drain()

    def rescue(self) -> None:
        """Bring to disk what can still be had, after an error of the loop."""
        try:
            self.scalars.flush()
        except RuntimeError as error:  # of the device: what was still there is lost
            lost = len(self.scalars)
            logger.warning("the scalars of the last %d updates are lost: %s", lost, error)
        self.queue.drain()

    def concerns(self, step: int) -> list[str]:
        """What the user should be warned of at the end, after `step` updates."""
        if step == 0:
            return ["the optimizer made no step: the run holds the initial weights alone"]
        plans = self._schedules.values()
        by_loop = any(plan.every_epoch and plan.steps_per_epoch is None for plan in plans)
        if by_loop and self.epoch_begun is None:
            return [
                "the schedule epoch saw no epoch begin; set recorder.epoch in the loop, or give "
                "Recorder(…, steps_per_epoch=N)"
            ]
        return []

    def close(self) -> None:
        """End the writer thread after what is queued, and give the staging buffers back."""
        self.queue.close()
        self._copies.close()

    def _staged_here(self, update: Update) -> list[str]:
        """Streams of the training itself that are due and not queued before the update."""
        step, queued = self._queued
        done = queued if step == update.step else set()
        return [name for name in update.streams if name not in self._sources and name not in done]

    def _measure_sources(self, step: int, epoch: float | None, streams: Sequence[str]) -> None:
        """Queue w_t and the rows of every source that is due, unless a failed try did so."""
        due = [name for name in streams if name in self._sources]
        if not due or self._queued[0] == step:
            return
        self.queue.submit(WEIGHTS, self._staged.pop(WEIGHTS), step=step, epoch=epoch)
        self._measure(step, epoch, due)
        self._queued = (step, {WEIGHTS, *due})

    def _measure(self, step: int, epoch: float | None, sources: Sequence[str]) -> None:
        for name in sources:
            source = self._sources[name]
            batches = [None] if source.batches is None else range(source.batches)
            for batch in batches:
                found = source.measure(batch)
                gradient, loss = gradient_of(found, name, self._seen.table), loss_of(found, name)
                staging = self.queue.acquire(name)
                self._copies.copy_parameters(staging, gradient)
                self.queue.submit(name, staging, step=step, epoch=epoch, batch=batch, loss=loss)

    def _due(self, update: Update) -> list[str]:
        """Streams that are saved at this step; a gradient never without its weights."""
        begins = _whole(update.epoch) != self.epoch_begun
        due = [name for name, plan in self._schedules.items() if plan.due(update.step, begins)]
        return due if WEIGHTS in due or not due else [WEIGHTS, *due]

    def _settings(self, update: Update) -> dict[str, Any]:
        """The scalars known before the update, NaN where unknown."""
        groups = self._seen.optimizer.param_groups
        return {
            "loss": math.nan,
            "epoch": math.nan if update.epoch is None else update.epoch,
            "clip_factor": update.clip_factor,
            "group_lr": _row([group.get("lr", math.nan) for group in groups]),
            # Momentum of SGD and its like; 0 for optimizers without it, such as Adam.
            "group_momentum": _row([group.get("momentum", 0.0) for group in groups]),
            "group_weight_decay": _row([group.get("weight_decay", 0.0) for group in groups]),
        }

    def _write_scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Queue the scalars of an update, now on the host, with those that follow from them."""
        own = {
            "lr": float(values["group_lr"][0]),
            "grad_norm": float(np.linalg.norm(values["grad_norm_by_tensor"])),
            "update_norm": float(np.linalg.norm(values["update_norm_by_tensor"])),
        }
        self.queue.scalars(step, {**own, **values})

    @contextmanager
    def _holding(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.held_seconds += time.perf_counter() - started

    def _acquire(self, stream: str) -> Staging:
        """Take a staging buffer; again the same one where a step was tried and failed."""
        if stream not in self._staged:
            self._staged[stream] = self.queue.acquire(stream)
        return self._staged[stream]

    def _update_norms(self, update: Update, changes: Sequence[Tensor] | None) -> Tensor:
        """Norm of the update by tensor, in the cheapest way there is."""
        if update.told:
            return self._sgd.end()
        if changes is not None:
            return self._norms.of(changes)
        return self._weights.update_norms(self._seen.parameters)

    def _copy_updates(self, staging: Staging) -> Sequence[Tensor]:
        """Stage ``w_{t+1} - w_t``; return it by tensor."""
        if self._on_host:
            views = self._copies.views_of(staging)
            self._weights.updates(self._seen.parameters, views)
            return views
        changes = self._weights.take_updates(self._seen.parameters)
        self._copies.copy_parameters(staging, changes)
        return changes

    def _copy_weights(self, staging: Staging) -> None:
        self._copies.copy_weights(staging, self._seen.parameters, self._seen.buffers)


def _row(values: Sequence[Any]) -> list[float] | Tensor:
    """One setting of every parameter group, ``[K]``; a tensor if any of them is on a GPU."""
    home = next((value.device for value in values if on_device(value)), None)
    if home is None:
        return [float(value) for value in values]
    numbers = [torch.as_tensor(value, dtype=torch.float64).reshape(()) for value in values]
    return torch.stack([number.to(home, non_blocking=True) for number in numbers])


def _whole(epoch: float | None) -> int | None:
    return None if epoch is None or not math.isfinite(epoch) else math.floor(epoch)
