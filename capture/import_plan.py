"""What an import will do, found out before anything is written."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from capture.arguments import require_whole
from capture.checkpoints.contents import Contents
from capture.checkpoints.find import Checkpoint, find_checkpoints, reading
from capture.checkpoints.names import (
    Selection,
    bare,
    check_same,
    table_of_model,
    table_of_names,
)
from capture.checkpoints.numbering import Numbered, Numbering, number
from capture.checkpoints.rows import fill, row_digest
from capture.checkpoints.steps import FIX, compile_pattern
from capture.progress import format_bytes
from capture.store import InputError, ShardLayout, Staging, TensorTable, UsageError
from capture.store.layout import WEIGHTS

logger = logging.getLogger("capture")


class Choices(TypedDict, total=False):
    r"""How checkpoints are to be understood; all may be left out.

    steps             the step of each checkpoint, in the natural order of their names
    step_pattern      regular expression whose first group, or group `step`, is the step in a name;
                      names that it does not fit are left out
    steps_per_epoch   for names that tell an epoch, and for the epochs of the run
    key               where the weights lie in a file of torch: `model_ema` or `app/model`
    prefix            names must begin with it and lose it, others are left out: `model.`
    trainable         regular expression: tensors that do not fit are frozen
    buffers           regular expression: tensors that fit are buffers
    settings          entries of `TrainConfig`, `task` or `model` among them: the model tells names,
                      order, ties, and which tensors are trained, and the run can be probed

    A regular expression is searched for anywhere in a name.
    """

    steps: Sequence[int] | None
    step_pattern: str | None
    steps_per_epoch: int | None
    key: str | None
    prefix: str | None
    trainable: str | None
    buffers: str | None
    settings: Mapping[str, Any] | None


@dataclass(frozen=True)
class ImportPlan:
    """The checkpoints to import by ascending step, the tensor table of the run, its settings.

    `from_model` is whether a model told which tensors are trained. `stamps` tells whether a file
    is still the one that was looked at.
    """

    rows: tuple[Numbered, ...]
    table: TensorTable
    settings: Mapping[str, Any]
    from_model: bool
    reader: _Reader
    stamps: Mapping[Checkpoint, Any]

    @property
    def bytes(self) -> int:
        """Bytes of the rows and of the frozen tensors; what is beside them is small."""
        frozen = sum(tensor.nbytes for tensor in self.table.frozen)
        return len(self.rows) * ShardLayout(WEIGHTS, self.table).size + frozen

    def open(self, checkpoint: Checkpoint) -> Contents:
        """Read a checkpoint; its tensors have their bare names."""
        return self.reader.open(checkpoint)

    def to_text(self) -> str:
        """The plan as a table for people."""
        lines = [f"{'step':>10}{'epoch':>10}{'size':>12}  {'format':<18}checkpoint"]
        for row in self.rows:
            epoch = "–" if row.epoch is None else f"{row.epoch:.4g}"
            size = format_bytes(sum(size for size, _ in self.stamps[row.checkpoint]))
            kind = f"{row.checkpoint.format:<18}"
            lines.append(f"{row.step:>10}{epoch:>10}{size:>12}  {kind}{row.checkpoint.where}")
        counts = [
            f"{len(part)} {noun}"
            for noun, part in (("buffers", self.table.buffers), ("frozen", self.table.frozen))
            if part
        ]
        tensors = f"{len(self.table.parameters)} tensors"
        words = ", ".join([f"{self.table.num_parameters:,} parameters in {tensors}", *counts])
        checkpoints = f"{len(self.rows)} checkpoint{'s' if len(self.rows) > 1 else ''}"
        return "\n".join([*lines, "", f"{checkpoints}, {words}: {format_bytes(self.bytes)}"])


@dataclass(frozen=True)
class _Reader:
    """How a checkpoint is read; `known` are the names that the model has, if there is one."""

    key: str | None
    prefix: str | None
    known: frozenset[str] = frozenset()

    def open(self, checkpoint: Checkpoint) -> Contents:
        contents = checkpoint.read(self.key)
        return bare(contents, self.prefix, self.known, checkpoint.where)


@dataclass
class _Headers:
    """What each checkpoint holds, read once; the tensors themselves are let go."""

    reader: _Reader
    stamps: dict[Checkpoint, Any] = field(default_factory=dict)
    _known: dict[Checkpoint, Contents] = field(default_factory=dict)

    def of(self, checkpoint: Checkpoint) -> Contents:
        if checkpoint not in self._known:
            with reading(checkpoint.where):
                self.stamps[checkpoint] = checkpoint.stamp()
            self._known[checkpoint] = replace(self.reader.open(checkpoint), read=_let_go)
        return self._known[checkpoint]


def plan_import(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], **choices: Unpack[Choices]
) -> ImportPlan:
    """Find checkpoints, their steps and their tensors, and compare them; nothing is written.

    Raises `UsageError` for choices that make no sense, `InputError` for a checkpoint that cannot be
    read or whose step is not clear, `MismatchError` for the first one that has other tensors, and
    `UnsupportedModelError` for tensors that no run can hold.
    """
    numbering, selection = _checked(choices)
    settings = dict(choices.get("settings") or {})
    model: TensorTable | None = None
    if settings:
        # Imported here because it brings torch along, which safetensors files do without.
        from capture.imported_model import table_of_settings

        model, settings = table_of_settings(settings)
    known = frozenset() if model is None else frozenset(_names(model))
    reader = _Reader(choices.get("key"), selection.prefix, known)
    headers = _Headers(reader)
    found = find_checkpoints([sources] if isinstance(sources, str | os.PathLike) else sources)
    rows = number(found, numbering, lambda checkpoint: headers.of(checkpoint).step)

    first = rows[0].checkpoint
    contents = headers.of(first)
    table = (
        table_of_names(contents, selection, first.where)
        if model is None
        else table_of_model(model, contents, first.where)
    )
    for row in rows:
        check_same(table, headers.of(row.checkpoint), row.checkpoint.where, first.where)
    _tell_other_steps(rows, headers)
    rows = _one_of_each_step(rows, reader, table)
    return ImportPlan(tuple(rows), table, settings, model is not None, reader, headers.stamps)


def _checked(choices: Choices) -> tuple[Numbering, Selection]:
    if unknown := sorted(choices.keys() - Choices.__annotations__.keys()):
        fix = f"known are {', '.join(Choices.__annotations__)}"
        raise UsageError(f"unknown choice {unknown[0]!r}", fix=fix)
    steps, text = choices.get("steps"), choices.get("step_pattern")
    if steps is not None and text is not None:
        raise UsageError("--steps and --step-pattern exclude each other", fix="give one of them")
    for step in steps or ():
        require_whole("a step", step, 0)
    per_epoch = choices.get("steps_per_epoch")
    require_whole("steps_per_epoch", per_epoch, 1, optional=True)
    trainable, buffers = choices.get("trainable"), choices.get("buffers")
    if choices.get("settings") and (trainable is not None or buffers is not None):
        raise UsageError(
            "the model tells which tensors are trained",
            where="--trainable, --buffers",
            fix="leave these out, or --task and --model",
        )
    return (
        Numbering(
            steps, None if text is None else compile_pattern(text, "--step-pattern"), per_epoch
        ),
        Selection(
            choices.get("prefix"),
            None if trainable is None else compile_pattern(trainable, "--trainable"),
            None if buffers is None else compile_pattern(buffers, "--buffers"),
        ),
    )


def _names(table: TensorTable) -> list[str]:
    tensors = (*table.parameters, *table.buffers, *table.frozen)
    return [*(tensor.name for tensor in tensors), *table.aliases]


def _let_go(name: str) -> NDArray[np.uint8]:
    raise ValueError(f"{name}: only the names and shapes of this checkpoint are kept")


def _tell_other_steps(rows: Sequence[Numbered], headers: _Headers) -> None:
    """Warn where a file says another step than the one that it is taken for."""
    other = [(row, headers.of(row.checkpoint).step) for row in rows]
    other = [(row, step) for row, step in other if step not in (None, row.step)]
    if other:
        row, step = other[0]
        logger.warning(
            "%s is taken for step %d and says step %s inside, as %d in all do otherwise: "
            "mislabelled, or counted in another way",
            row.checkpoint.where,
            row.step,
            step,
            len(other),
        )


def _one_of_each_step(
    rows: Sequence[Numbered], reader: _Reader, table: TensorTable
) -> list[Numbered]:
    """Drop copies of the same step; `InputError` where two of one step differ."""
    kept: list[Numbered] = []
    for row in rows:
        if not kept or kept[-1].step != row.step:
            kept.append(row)
            continue
        pair = [kept[-1], row]
        digests = {_digest(one.checkpoint, reader, table) for one in pair}
        if len(digests) > 1:
            raise InputError(
                f"two checkpoints of step {row.step} with other weights",
                where=" and ".join(one.checkpoint.where for one in pair),
                fix=FIX,
            )
        logger.warning(
            "%s is a copy of %s (step %d) and is left out",
            *(one.checkpoint.where for one in reversed(pair)),
            row.step,
        )
    return kept


def _digest(checkpoint: Checkpoint, reader: _Reader, table: TensorTable) -> str:
    staging = Staging(ShardLayout(WEIGHTS, table))
    fill(staging, reader.open(checkpoint), table, checkpoint.where)
    return row_digest(staging)
