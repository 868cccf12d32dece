"""Reference points w*: what `--reference` accepts, and how each gives its coordinates.

    final             the final iterate w_T of the run itself
    step:N            w_N of the run
    mean:K            the mean of the last K weight rows, w_T included
    run:PATH[@STEP]   the final iterate, or that of a step, of another run of the same model
    file:PATH         a safetensors file that holds the run's tensors, in any floating-point dtype

A `Reference` is a small value that travels to the workers; `bind` opens it for one run there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from analyze.reference_rows import BoundReference, bind_rows
from analyze.tensor_file import TensorFile
from capture.store import (
    MismatchError,
    Run,
    UnknownNameError,
    UsageError,
    open_run,
)
from capture.store.layout import WEIGHTS
from capture.store.place import absolute_address

_FORMS = "final, step:N, mean:K, run:PATH[@STEP], file:PATH"


class Reference(Protocol):
    """A parsed reference; `text` is the string as it was typed."""

    @property
    def text(self) -> str:
        """The string as it was typed."""

    def bind(self, run: Run) -> BoundReference:
        """Open for `run`; an `InputError` where it is not there or does not fit the run."""

    def identity(self, run: Run) -> str:
        """Say what w* is made of: equal for equal bytes, however it was typed; errors as `bind`."""


@dataclass(frozen=True)
class FinalReference:
    """`final`: w_T of the run itself; `UnfinishedError` where it has not come to its end."""

    text: str

    def bind(self, run: Run) -> BoundReference:
        """Open for `run`."""
        return bind_rows(run, run, [run.final_row()])

    def identity(self, run: Run) -> str:
        """Tell by the checksums of the row."""
        return _identity(run, [run.final_row()])


@dataclass(frozen=True)
class StepReference:
    """`step:N`: w_N of the run; `UnknownNameError` names the nearest recorded steps."""

    text: str
    step: int

    def bind(self, run: Run) -> BoundReference:
        """Open for `run`."""
        return bind_rows(run, run, [run.stream(WEIGHTS).row_of(self.step)])

    def identity(self, run: Run) -> str:
        """Tell by the checksums of the row."""
        return _identity(run, [run.stream(WEIGHTS).row_of(self.step)])


@dataclass(frozen=True)
class MeanReference:
    """`mean:K`: the float64 mean of the last K weight rows of a finished run, w_T included."""

    text: str
    count: int

    def bind(self, run: Run) -> BoundReference:
        """Open for `run`."""
        return bind_rows(run, run, self._rows(run))

    def identity(self, run: Run) -> str:
        """Tell by the checksums of the rows."""
        return _identity(run, self._rows(run))

    def _rows(self, run: Run) -> range:
        last = run.final_row()
        if self.count > last + 1:
            raise UnknownNameError(
                f"{self.text} needs {self.count} weight rows, the run has {last + 1}",
                where=run.path,
                fix=f"use mean:{last + 1} or less",
            )
        return range(last + 1 - self.count, last + 1)


@dataclass(frozen=True)
class RunReference:
    """`run:PATH[@STEP]`: the final iterate, or that of a step, of another run."""

    text: str
    path: str
    step: int | None

    def bind(self, run: Run) -> BoundReference:
        """Open for `run`; `MismatchError` where the two runs' tensors differ."""
        other, row = self._row(run)
        return bind_rows(run, other, [row])

    def identity(self, run: Run) -> str:
        """Tell by the checksums of the row."""
        other, row = self._row(run)
        return _identity(other, [row])

    def _row(self, run: Run) -> tuple[Run, int]:
        other = open_run(self.path)
        difference = run.table.difference(other.table)
        if difference is not None:
            raise MismatchError(
                f"reference {self.text!r} is of another model, {difference}",
                where=other.path,
                fix="choose a run of the same model",
            )
        step = self.step
        row = other.final_row() if step is None else other.stream(WEIGHTS).row_of(step)
        return other, row


@dataclass(frozen=True)
class FileReference:
    """`file:PATH`: a safetensors file; tensors that the run does not train are ignored."""

    text: str
    path: str

    def bind(self, run: Run) -> BoundReference:
        """Open for `run`; `MismatchError` names the first missing or differing tensor."""
        return TensorFile(Path(self.path), run)

    def identity(self, run: Run) -> str:
        """Tell by the checksum of the whole file."""
        with closing(TensorFile(Path(self.path), run)) as file:
            return file.identity()


@dataclass(frozen=True)
class Form:
    """What a reference says: its kind, the N, K or STEP in it, and its path, as typed."""

    kind: str
    number: int | None = None
    path: str | None = None


def read_form(text: str) -> Form | None:
    """Read a reference as typed, or as a table has it; `None` where it has none of the five forms.

    This is the only place that knows how references are written.
    """
    kind, colon, value = text.partition(":")
    if kind == "final" and not colon:
        return Form(kind)
    if kind == "step" and _is_count(value):
        return Form(kind, int(value))
    if kind == "mean" and _is_count(value) and int(value) > 0:
        return Form(kind, int(value))
    if kind == "run" and value:
        path, at, step = value.rpartition("@")
        return (
            Form(kind, int(step), path)
            if at and path and _is_count(step)
            else Form(kind, None, value)
        )
    return Form(kind, None, value) if kind == "file" and value else None


def parse_reference(text: str) -> Reference:
    """Read a reference as typed; `UsageError` where it has none of the five forms.

    Paths become absolute, so that workers elsewhere find the same file.
    """
    match read_form(text):
        case Form("final"):
            return FinalReference(text)
        case Form("step", int(step)):
            return StepReference(text, step)
        case Form("mean", int(count)):
            return MeanReference(text, count)
        case Form("run", step, str(path)):
            return RunReference(text, absolute_address(path), step)
        case Form("file", None, str(path)):
            return FileReference(text, os.path.abspath(path))
    raise UsageError(f"{text!r} is no reference", fix=f"use one of {_FORMS}")


def files_of(references: Iterable[str]) -> list[str]:
    """Files that some references name, as typed: what a command may not write over."""
    forms = map(read_form, references)
    return [form.path for form in forms if form and form.kind == "file" and form.path]


def parting(reference: Reference, run: Run) -> int | None:
    """Step of `run` at which a branch that ends in w* left it; `None` for any other w*.

    Before that step the path to w* is the run's own, and its gradients took part in it. A branch is
    known by the checksums of the weights that it began with.
    """
    if not isinstance(reference, RunReference):
        return None
    parent = open_run(reference.path).attributes.get("parent")
    if not isinstance(parent, dict) or not isinstance(step := parent.get("step"), int):
        return None
    weights = run.stream(WEIGHTS)
    if step not in weights.steps:
        return None
    own = list(weights.commits[weights.row_of(step)].chunks)
    return step if own == parent.get("weights_crc32c") else None


def end_of_path(reference: str, final_step: int | None) -> int | None:
    """Step at which w* lies on the run's own path or ends the mean over it; `None` elsewhere."""
    form = read_form(reference)
    if form is None or form.kind not in ("final", "mean", "step"):
        return None
    return form.number if form.kind == "step" else final_step


def iterate_of(reference: str, final_step: int | None) -> int | None:
    """Step of a w* that is an iterate of the run's own path; `None` for a mean and elsewhere."""
    return None if is_mean(reference) else end_of_path(reference, final_step)


def is_mean(reference: str) -> bool:
    """Whether w* is a mean of iterates."""
    form = read_form(reference)
    return form is not None and form.kind == "mean"


def _identity(source: Run, rows: Sequence[int]) -> str:
    """Name rows of the weights by their checksums and by how their chunks are cut."""
    weights = source.stream(WEIGHTS)
    kept = [(commit.rest, commit.chunks) for commit in (weights.commits[row] for row in rows)]
    return f"rows {kept!r}"


def _is_count(text: str) -> bool:
    # With more digits it is no number that a run could have, nor one that int() reads.
    return text.isascii() and text.isdigit() and len(text) < 19
