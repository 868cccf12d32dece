"""Add gradient streams to a recorded run, from its stored weights, without training again."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capture.config import TrainConfig, is_of_train
from capture.describe import describe
from capture.gradients import Probe
from capture.importing import IMPORTED
from capture.progress import TrainingProgress, format_bytes
from capture.provenance import data_difference, data_facts
from capture.schedule import parse_schedule
from capture.staging import HostCopies
from capture.storage import free_bytes
from capture.store import (
    MismatchError,
    Run,
    RunWriter,
    Staging,
    UnfinishedError,
    UnknownNameError,
    UsageError,
    WriteError,
    open_run,
)
from capture.store.layout import WEIGHTS
from capture.stored_weights import load_weights
from capture.streams import PROBES, StreamRequest, parse_streams
from capture.training import Training, deterministic, prepare

logger = logging.getLogger("capture")

# Settings that mean the same in the `config` of a run that a loop of one's own recorded.
OF_ANY_LOOP = ("task", "model", "task_args", "model_args", "batch_size", "data_seed")


@dataclass(frozen=True)
class Probed:
    """What a call of `probe_run` added: rows of each stream, those that were there not counted."""

    rows: Mapping[str, int]


def probe_run(
    path: str | os.PathLike[str],
    gradients: str,
    *,
    steps: Sequence[int] | None = None,
    replace_streams: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Probed:
    """Measure `gradients` at the saved weights of a complete run, w_T included.

    A stream follows its own schedule where it has one, else every saved step; `steps` limits all of
    them. What a call that was interrupted has added stays, and the same call goes on behind it.
    `replace_streams` drops what there is first. `changes` are entries of `TrainConfig` that differ
    here, such as `data_root`.

    A run of a loop of one's own needs `task` and `model`, each ``module:factory``: functions of a
    module in the working directory. ``model_factory()`` returns the `torch.nn.Module` that was
    trained; its weights come from the run. ``task_factory(data_root)`` returns the data and the
    mean loss of a batch, `capture.tasks.Task`, where an example stands. Recorded with
    ``Recorder(…, config={"task": "mine:task", "model": "mine:model", "batch_size": 32})`` the run
    itself says so.

    Raises `UnfinishedError`, `UnknownNameError` for a step that is not saved, `MismatchError` where
    model or batches are not those of the run, `UsageError` for streams that cannot be probed.
    """
    run = open_run(path)
    if not run.complete:
        raise UnfinishedError(
            "the run has not finished", where=path, fix="finish it with --resume, then probe it"
        )
    requests = _requests(gradients)
    config = _config(run, gradients, changes or {})
    with deterministic():
        training = prepare(config)
        table = describe(training.model, training.optimizer).table
        difference = run.table.difference(table)
        if difference is not None:
            raise MismatchError(
                f"the model is not that of the run, {difference}",
                where=path,
                fix="give the --model and --task that the run was trained with",
            )
        other = data_difference(run.attributes.get("data"), data_facts(training.task))
        if other is not None:
            raise MismatchError(
                f"the data are not those of the run, {other}",
                where=training.config.data_root,
                fix="give the --data-root that the run was trained with",
            )
        wanted = {r.name: _steps(run, r, training, steps) for r in requests}
        with closing(RunWriter.reopen(path)) as writer:
            if replace_streams:
                for name in wanted:
                    writer.remove_stream(name)
            return _probe(run, writer, training, wanted)


def _probe(
    run: Run, writer: RunWriter, training: Training, wanted: Mapping[str, list[int]]
) -> Probed:
    todo = {n: _missing(writer, training.probes[n], n, steps) for n, steps in wanted.items()}
    steps = sorted({step for missing in todo.values() for step in missing})
    _require_space(writer, training, todo)
    stagings = {name: writer.staging(name) for name in todo}
    copies = HostCopies(run.table)
    try:
        with TrainingProgress(len(steps)) as progress:
            for number, step in enumerate(steps, start=1):
                load_weights(training.model, run, step)
                for name, missing in todo.items():
                    if step in missing:
                        _add_row(run, writer, training.probes[name], step, stagings[name], copies)
                progress.update(number, float("nan"), 0)
    finally:
        copies.close()
    assert run.final_step is not None
    writer.finish(run.final_step)
    return Probed({name: len(missing) for name, missing in todo.items()})


def _require_space(
    writer: RunWriter, training: Training, todo: Mapping[str, Sequence[int]]
) -> None:
    sizes = writer.shard_bytes
    needed = sum(
        len(steps) * (training.probes[name].batches or 1) * sizes[name]
        for name, steps in todo.items()
    )
    if not isinstance(writer.path, Path):
        return  # nobody knows how much an object store can take
    free = free_bytes(writer.path)
    if needed > free:
        raise WriteError(
            f"the gradients need {format_bytes(needed)} and the disk has {format_bytes(free)} free",
            where=writer.path,
            fix="measure fewer batches or --steps, or free space",
        )


def _add_row(
    run: Run, writer: RunWriter, probe: Probe, step: int, staging: Staging, copies: HostCopies
) -> None:
    """Measure and commit what is missing of one row: all batches, or those after a crash."""
    weights = run.stream(WEIGHTS)
    epoch = float(weights.epochs[weights.row_of(step)])
    done = writer.committed_steps(probe.name).count(step)
    batches: Sequence[int | None] = [None] if probe.batches is None else range(probe.batches)
    for batch in batches[done:]:
        found = probe.measure(batch)
        copies.copy_parameters(staging, found.gradient)
        writer.commit(
            probe.name,
            staging,
            step=step,
            epoch=None if epoch != epoch else epoch,
            batch=batch,
            loss=found.loss,
        )


def _missing(writer: RunWriter, probe: Probe, name: str, steps: Sequence[int]) -> list[int]:
    """Steps that the stream does not hold yet; the stream is made where there is none.

    Rows are in the order of their steps, so what is missing must lie behind what is there.
    """
    known = writer.attributes.get("probes", {})
    if name in writer.attributes["streams"]:
        if known.get(name) != probe.describe():
            raise MismatchError(
                f"the run has a stream {name!r} of other batches",
                where=writer.path,
                fix="give the same count, batch size and data seed, or --replace to drop it",
            )
    else:
        writer.update_attributes(probes={**known, name: probe.describe()})
    writer.add_stream(name, probe.batches)
    held = writer.committed_steps(name)
    whole = {step for step in held if held.count(step) == (probe.batches or 1)}
    missing = [step for step in steps if step not in whole]
    if missing and held and missing[0] < max(held):
        raise UsageError(
            f"the stream {name!r} goes up to step {max(held)}, and step {missing[0]} is missing",
            where=writer.path,
            fix="give later steps, or --replace to drop the stream and measure all anew",
        )
    return missing


def _requests(gradients: str) -> tuple[StreamRequest, ...]:
    requests = parse_streams(gradients)
    others = [request.name for request in requests if request.name not in PROBES]
    if others or not requests:
        raise UsageError(
            "only gradients of other batches can be added to a run that is recorded",
            where=others[0] if others else gradients,
            fix=f"choose among {', '.join(PROBES)}",
        )
    return requests


def _config(run: Run, gradients: str, changes: Mapping[str, Any]) -> TrainConfig:
    stored = dict(run.attributes.get("config") or {})
    if not is_of_train(run.attributes) and IMPORTED not in run.attributes:
        # In a loop of one's own all other settings may mean anything.
        stored = {key: stored[key] for key in OF_ANY_LOOP if key in stored}
    if "task" not in {**stored, **changes}:
        raise UsageError(
            "the run was recorded by a loop of your own or imported, so its task is not known",
            where=run.path,
            fix="give --task module:factory and --model module:factory",
        )
    config = TrainConfig.from_dict({**stored, **changes}, where=str(run.path))
    # Only a training of `capture train` tells its end.
    ends = config.max_steps or config.epochs
    limit = config.max_steps if ends else run.final_step or 1
    return replace(
        config,
        gradients=gradients,
        max_steps=limit,
        branch=None,
        exclude_batch=None,
    )


def _steps(
    run: Run, request: StreamRequest, training: Training, chosen: Sequence[int] | None
) -> list[int]:
    """Saved steps at which a stream is measured, ascending."""
    saved = [int(step) for step in run.stream(WEIGHTS).steps]
    if chosen is not None:
        if unknown := sorted(set(chosen) - set(saved)):
            nearest = min(saved, key=lambda step: abs(step - unknown[0]))
            raise UnknownNameError(
                f"no weights are saved at step {unknown[0]}",
                where=run.path,
                fix=f"the nearest is {nearest}; capture info --json lists all",
            )
        saved = sorted(set(chosen))
    if request.schedule is None:
        return saved
    schedule = parse_schedule(
        request.schedule,
        total_steps=run.final_step,
        steps_per_epoch=training.order.steps_per_epoch,
    )
    assert run.final_step is not None
    unsaved = sorted(set(schedule.steps(run.final_step)) - set(saved))
    if unsaved and chosen is None:
        logger.warning(
            "%s: no weights are saved at %d of the steps that are due, the first is %d",
            request.name,
            len(unsaved),
            unsaved[0],
        )
    return [step for step in saved if schedule.due(step) or step == run.final_step]
