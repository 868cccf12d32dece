"""The table of one measured run, made piece by piece, so that it need never be there whole.

One row per stream, step, batch, group of tensors and reference, in this order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import capture
from analyze.adam import AdamMoments
from analyze.columns import FROM_SCALARS, numbers, schema, texts
from analyze.groups import Grouping, group_tensors, name_of
from analyze.measure import Measure
from analyze.metadata import printable
from analyze.moment_table import MOMENTS, StreamMoments
from analyze.quantities import QUANTITIES, SIGN, Values
from analyze.references import parse_reference, parting
from analyze.sums import sum_groups
from capture.store.layout import ITERATES, WEIGHTS
from capture.store.reader import Run

Integers = NDArray[np.int64]

# Rows of a piece, and moments of each kind that go into one, at most; but never less than a step.
_ROWS = 2**15
_MOMENTS = 2**18

# What of a run's attributes goes with its table.
_FACTS = (
    *("final_step", "optimizer", "config", "seeds", "versions", "git_commit"),
    *("data", "schedules", "parent"),
)


class RunTable:
    """The table of one run; `by` as in `analyze.groups`.

    `references` as typed, in the order of the moments. A `weight_decay` takes the place of the
    run's own λ in the columns `_wd`; `adam` are the sums in Adam's metric against the same
    references, where they were asked for; `name` is what the column `run` says, by default the
    path of the run.
    """

    def __init__(
        self,
        run: Run,
        references: Sequence[str],
        by: Grouping = "model",
        *,
        adam: AdamMoments | None = None,
        name: str | None = None,
        weight_decay: float | None = None,
    ) -> None:
        self.by = by
        self._run = run
        self._name = printable(str(run.path) if name is None else name)
        self._typed = references
        self._references = [printable(text) for text in references]
        self._measure = Measure(run, adam, weight_decay)
        self._adam = adam
        self._labels, self._groups = group_tensors(run.table, by)
        sizes = np.bincount(self._groups, np.diff(run.table.offsets), len(self._labels))
        self._sizes = sizes.astype(np.int64)

    def pieces(self, stream: StreamMoments) -> Iterator[pa.Table]:
        """Make the rows of a stream from its moments, some steps at a time; no metadata."""
        batches, references = stream.batches or 1, len(self._references)
        rows = batches * len(self._labels) * references
        steps = max(1, min(_ROWS // rows, _MOMENTS // (batches * len(self._groups))))
        for first in range(0, len(stream.steps), steps):
            yield self._piece(stream, slice(first, first + steps))

    def metadata(self) -> dict[str, Any]:
        """The facts of the table, as far as its pieces were made."""
        notes = {"weight_decay": self._measure.decay_note}
        if self._adam is not None:
            notes["adam_metric"] = self._adam.note
        nulls = self._measure.nulls
        return {
            "version": capture.__version__,
            "by": name_of(self.by),
            "sign": SIGN,
            "runs": [{**facts_of(self._run, self._name), **notes}],
            "null": {f"{self._name}|{reference}": text for reference, text in nulls.items()},
            "branched": self._branched(),
            "nan": dict(self._measure.undefined),
        }

    def _piece(self, stream: StreamMoments, part: slice) -> pa.Table:
        steps = np.repeat(stream.steps[part], stream.batches or 1)
        columns = self._keys(stream, steps) | self._numbers(stream, steps, part)
        return pa.Table.from_arrays([columns[name] for name in schema().names], schema=schema())

    def _keys(self, stream: StreamMoments, steps: Integers) -> dict[str, pa.Array]:
        """Make the columns that say which row it is; `steps` is ``[N]``, by step and batch."""
        batches = stream.batches or 1
        labels, references = np.arange(len(self._labels)), np.arange(len(self._references))
        batch = self._spread(np.tile(np.arange(batches), len(steps) // batches))
        epochs = self._spread(_epochs(self._run, stream.stream, steps))
        same = np.zeros(len(batch), np.int64)
        return {
            "run": texts([self._name], same),
            "stream": texts([stream.stream], same),
            "step": numbers(self._spread(steps)),
            "epoch": numbers(epochs, missing=np.isnan(epochs)),
            "batch": numbers(batch, missing=np.full(len(batch), stream.batches is None)),
            "group": texts(self._labels, self._spread(labels, 1, len(steps))),
            "reference": texts(self._references, self._spread(references, 2, len(steps))),
            "num_parameters": numbers(self._spread(self._sizes, 1, len(steps))),
        }

    def _numbers(self, stream: StreamMoments, steps: Integers, part: slice) -> dict[str, pa.Array]:
        """Make the columns that say what was measured."""
        by_tensor = (len(steps), len(self._references), len(self._groups))
        moments = stream.array[part].reshape(*by_tensor, len(MOMENTS))
        bad = {"nonfinite": stream.nonfinite[part].reshape(by_tensor).astype(np.float64)}
        found = self._measure.quantities(
            stream.stream, steps, moments, self._references, self._groups
        )
        nonfinite = sum_groups(bad, self._groups, len(self._labels))["nonfinite"].swapaxes(1, 2)
        nothing = np.full(nonfinite.shape, np.nan)
        return {
            **{q.name: numbers(found.get(q.name, nothing).ravel()) for q in QUANTITIES},
            **{n: numbers(self._spread(self._measure.scalar(n, steps))) for n in FROM_SCALARS},
            "loss": numbers(self._spread(self._losses(stream, steps, part))),
            "nonfinite": numbers(nonfinite.astype(np.int64).ravel()),
        }

    def _spread(self, values: NDArray[Any], axis: int = 0, rows: int = 1) -> NDArray[Any]:
        """Repeat what a step and batch ``[N]`` says for each row of a piece.

        Or what a group does (axis 1), or a reference (axis 2), for `rows` steps and batches.
        """
        shape = [rows, len(self._labels), len(self._references)]
        shape[axis] = len(values)
        along = values.reshape([-1 if place == axis else 1 for place in range(3)])
        return np.broadcast_to(along, shape).ravel()

    def _losses(self, stream: StreamMoments, steps: Integers, part: slice) -> Values:
        """Loss of each step and batch: its own batch's where that is kept, else the minibatch's.

        NaN at averages of the weights, where no loss was taken.
        """
        recorded = self._run.stream(stream.stream)
        if stream.stream in ITERATES and stream.stream != WEIGHTS:
            return np.full(len(steps), np.nan)
        if recorded.losses is None:
            return self._measure.scalar("loss", steps)
        rows = np.searchsorted(recorded.steps, stream.steps[part])
        return np.asarray(recorded.losses[rows].reshape(len(steps)))

    def _branched(self) -> dict[str, int]:
        """Where branches that end in a reference left the run, by run and reference."""
        steps = {text: parting(parse_reference(text), self._run) for text in self._typed}
        found = {text: step for text, step in steps.items() if step is not None}
        return {f"{self._name}|{printable(text)}": step for text, step in found.items()}


def facts_of(run: Run, name: str) -> dict[str, Any]:
    """What of a run goes with its tables, under the name that the column `run` has."""
    own = {"run": name, "status": run.status, "num_parameters": run.table.num_parameters}
    return {**own, **{key: run.attributes.get(key) for key in _FACTS}}


def _epochs(run: Run, stream: str, steps: Integers) -> Values:
    """Epoch of each step; NaN where it is not known, or the row came after the run was opened."""
    recorded = run.stream(stream)
    if not len(recorded):
        return np.full(len(steps), np.nan)
    place = np.minimum(np.searchsorted(recorded.steps, steps), len(recorded.steps) - 1)
    return np.where(recorded.steps[place] == steps, recorded.epochs[place], np.nan)
