"""Which checkpoint is of which step: as the user says, by name, or by what is inside."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from capture.checkpoints.find import Checkpoint
from capture.checkpoints.steps import FIX, MAX_STEP, Told, match_step, read_name
from capture.store.errors import InputError, UsageError

logger = logging.getLogger("capture")

Inside = Callable[[Checkpoint], int | None]


@dataclass(frozen=True)
class Numbering:
    """What the user says of the steps; at most one of `steps` and `pattern` is given."""

    steps: Sequence[int] | None = None
    pattern: re.Pattern[str] | None = None
    steps_per_epoch: int | None = None


@dataclass(frozen=True)
class Numbered:
    """A checkpoint, the number of updates before it was saved, and its epoch where known."""

    checkpoint: Checkpoint
    step: int
    epoch: float | None


def number(
    checkpoints: Sequence[Checkpoint], numbering: Numbering, inside: Inside
) -> list[Numbered]:
    """Give each checkpoint its step, and sort them by it.

    `inside` opens a checkpoint and gives the step that it tells itself. `UsageError` for a list of
    another length; `InputError` where a step is missing or not clear, naming the checkpoint.
    """
    if numbering.steps is not None:
        steps: list[int | None] = _listed(checkpoints, numbering.steps)
    elif numbering.pattern is not None:
        pattern = numbering.pattern
        steps = [match_step(pattern, one.name, one.where) for one in checkpoints]
        _tell_left_out([one for one, step in zip(checkpoints, steps, strict=True) if step is None])
    else:
        steps = [_step(one, numbering.steps_per_epoch, inside) for one in checkpoints]
    found = [
        Numbered(one, step, _epoch(one, step, numbering.steps_per_epoch))
        for one, step in zip(checkpoints, steps, strict=True)
        if step is not None
    ]
    if not found:
        what = "no checkpoint fits --step-pattern"
        raise UsageError(what, where=checkpoints[0].where, fix="correct the expression")
    for one in found:
        if one.step > MAX_STEP:
            raise InputError(f"no run has a step {one.step}", where=one.checkpoint.where, fix=FIX)
    return sorted(found, key=lambda one: one.step)


def _listed(checkpoints: Sequence[Checkpoint], steps: Sequence[int]) -> list[int | None]:
    if len(steps) != len(checkpoints):
        raise UsageError(
            f"{len(steps)} steps for {len(checkpoints)} checkpoints",
            where=f"--steps {','.join(map(str, steps[:5]))}{',…' if len(steps) > 5 else ''}",
            fix="give one for each, in the natural order of their names",
        )
    return list(steps)


def _step(checkpoint: Checkpoint, steps_per_epoch: int | None, inside: Inside) -> int:
    told = _by_name(checkpoint)
    if told.step is not None:
        return told.step
    if checkpoint.step is not None:
        return checkpoint.step
    if told.epoch is not None and steps_per_epoch is not None:
        return told.epoch * steps_per_epoch
    step = inside(checkpoint)
    if step is not None:
        return step
    if told.epoch is not None:
        fix = f"give --steps-per-epoch N, or {FIX.removeprefix('give ')}"
        raise InputError("the name tells an epoch, and no step", where=checkpoint.where, fix=fix)
    raise InputError("the name tells no step", where=checkpoint.where, fix=FIX)


def _by_name(checkpoint: Checkpoint) -> Told:
    """What the name tells; a name with several numbers is no matter where the trainer tells."""
    try:
        told = read_name(checkpoint.name, checkpoint.where)
    except InputError:
        if checkpoint.step is None:
            raise
        return Told()
    if told.step is not None and checkpoint.step not in (None, told.step):
        raise InputError(
            f"its name says step {told.step}, its trainer_state.json {checkpoint.step}: "
            "it is mislabelled",
            where=checkpoint.where,
            fix=FIX,
        )
    return told


def _epoch(checkpoint: Checkpoint, step: int | None, steps_per_epoch: int | None) -> float | None:
    if checkpoint.epoch is not None or steps_per_epoch is None or step is None:
        return checkpoint.epoch
    return step / steps_per_epoch


def _tell_left_out(checkpoints: Sequence[Checkpoint]) -> None:
    if checkpoints:
        logger.warning(
            "%d checkpoints do not fit --step-pattern and are left out, the first is %s",
            len(checkpoints),
            checkpoints[0].where,
        )
