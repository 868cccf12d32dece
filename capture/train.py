"""The training loop: configuration, task, model, optimizer, recorder, loop; in this order."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler

from capture.batches import load_batches
from capture.config import TrainConfig
from capture.factories import user_code
from capture.interruption import Interrupted, StopRequest
from capture.loss_report import LossReport
from capture.progress import TrainingProgress
from capture.provenance import require_same
from capture.recorder import Recorder
from capture.storage import require_space
from capture.store.layout import METADATA
from capture.store.place import Place, target_of
from capture.tasks import loss_elements
from capture.training import Training, deterministic, prepare


@dataclass(frozen=True)
class Summary:
    """How a training ended: `steps` updates in all, means over the held-out samples by name."""

    steps: int
    seconds: float
    loss: float
    heldout: Mapping[str, float]
    bytes_written: int
    already_complete: bool = False


def train(
    config: TrainConfig, out: str | os.PathLike[str], *, resume: bool = False, force: bool = False
) -> Summary:
    """Train and record into the run `out`.

    `resume` continues the run from its newest resume state, bit for bit; `force` starts even
    where the disk seems too small. Raises `Interrupted` after SIGINT or SIGTERM, `MismatchError`
    where a run is resumed with another configuration, and what `Recorder` raises.
    """
    out = target_of(out)
    with deterministic():
        training = prepare(config)
        attributes, total = training.attributes(), training.total_steps
        if resume and (out / METADATA).exists():
            require_same(out, attributes)
        if not force:
            require_space(out, training.storage)

        began = time.monotonic()
        with (
            StopRequest() as stop,
            _recorder(training, out, attributes, resume) as recorder,
            TrainingProgress(total, recorder.step) as progress,
        ):
            already_complete = recorder.complete
            report = LossReport(progress, lambda: recorder.bytes_written)
            recorder.epoch = training.epoch(recorder.step)
            training.model.train()

            for loss in losses(training, training.batches(recorder.step)):
                training.set_learning_rate(recorder.step)
                recorder.log(loss=loss)
                training.optimizer.step()
                recorder.epoch = training.epoch(recorder.step)

                report.add(recorder.step - 1, loss)
                if stop.signum is not None and recorder.step < total:
                    report.flush()
                    recorder.checkpoint()
                    raise Interrupted(
                        f"interrupted after step {recorder.step} of {total}",
                        signum=stop.signum,
                        where=out,
                        fix="continue with the same command and --resume",
                    )

            report.flush()

        # Only now, so that nothing of it can reach the run.
        heldout = {} if already_complete else evaluate(training)
    return Summary(
        steps=total,
        seconds=time.monotonic() - began,
        loss=report.last,
        heldout=heldout,
        bytes_written=recorder.bytes_written,
        already_complete=already_complete,
    )


def _recorder(
    training: Training, out: Place, attributes: Mapping[str, Any], resume: bool
) -> Recorder:
    config, order = training.config, training.order
    return Recorder(
        out,
        training.model,
        training.optimizer,
        every=config.every,
        gradients=config.gradients,
        total_steps=training.total_steps,
        steps_per_epoch=order.steps_per_epoch,
        attributes=attributes,
        checkpoint_every=config.checkpoint_every or order.steps_per_epoch,
        keep_state=config.keep_state,
        resume=resume,
        clipped=False,
        sources=training.probes,
    )


def losses(training: Training, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the loss of each batch, its gradient in place; the caller makes the update.

    What the user's own code raises on the first batch becomes one `UsageError`; later, it is no
    longer a wrong shape or dtype, and a traceback says more.
    """
    iterator, first = iter(batches), True
    while True:
        with user_code("the first step failed") if first else nullcontext():
            try:
                batch = next(iterator)
            except StopIteration:
                return
            training.optimizer.zero_grad()
            loss = training.task.loss(training.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        first = False
        yield loss


@torch.no_grad()
def evaluate(training: Training) -> dict[str, float]:
    """Return the means of the task's metrics over what is held out, in evaluation mode."""
    task, size = training.task, training.order.batch_size
    if task.heldout is None:
        return {}
    count, elements = len(task.heldout), 0
    batches = BatchSampler(SequentialSampler(range(count)), size, drop_last=False)
    totals: dict[str, float] = {}
    training.model.eval()
    for number, batch in enumerate(
        load_batches(task.heldout, batches, workers=0, device=training.device)
    ):
        weight = loss_elements(task, batch, min(size, count - number * size))
        elements += weight
        for name, mean in task.metrics(training.model, batch).items():
            totals[name] = totals.get(name, 0.0) + float(mean) * weight
    training.model.train()
    return {name: total / max(elements, 1) for name, total in totals.items()}
