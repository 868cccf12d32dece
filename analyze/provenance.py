"""What a run, or a table of it, holds of how it was trained, recorded and measured.

Nothing is guessed: what neither holds is `None` or empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analyze import tables
from analyze.metadata import printable
from analyze.optimizer import own_path
from analyze.repeats import without_repeats
from capture.store.errors import InputError, UsageError
from capture.store.objects import ObjectPath
from capture.store.place import place_of
from capture.store.reader import Run, open_run
from capture.store.tensors import TensorTable

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_SCALARS = ("clip_factor", "group_lr", "group_momentum", "group_weight_decay")


@dataclass(frozen=True)
class StreamFacts:
    """One stream: `batches` is B or `None`, `steps` are those that have rows, int64 ``[T]``."""

    name: str
    batches: int | None
    steps: Integers


@dataclass(frozen=True)
class Provenance:
    """What is known of one run.

    `facts` are the run's attributes, or their part in a table. `references` are those measured, as
    typed, `nulls` says of each what its null rests on or why there is none. `scalars` has the clip
    factor ``[S]`` and, by parameter group ``[S, G]``, learning rate, momentum and weight decay of
    every update; of a table only what its rows have, and `every_update` is false. `tensors` is
    `None` for a table.
    """

    name: str
    facts: Mapping[str, Any]
    references: tuple[str, ...]
    nulls: Mapping[str, str]
    streams: tuple[StreamFacts, ...]
    scalars: Mapping[str, Floats]
    every_update: bool
    tensors: TensorTable | None
    grouping: tuple[str, ...] = ()

    @property
    def final_step(self) -> int | None:
        """T, or `None` where the run had not finished."""
        step: int | None = self.facts.get("final_step")
        return step

    @property
    def num_parameters(self) -> int:
        """D, the number of trainable parameters."""
        return int(self.facts["num_parameters"])

    def entry(self, name: str) -> Mapping[str, Any]:
        """One of the facts that is a table of its own; empty where it is missing or something else.

        A run that a loop of its own recorded may hold anything there.
        """
        value = self.facts.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def is_of_train(self) -> bool:
        """Whether `capture train` made the run, which draws its batches in one way.

        It alone keeps a checksum of the samples.
        """
        return "samples_crc32c" in self.entry("data")

    def missing(self, count: int = 1) -> str:
        """Say of so many things that they are not known."""
        verb = "is" if count == 1 else "are"
        return f"{verb} not {'recorded' if self.every_update else 'in the table'}"

    def scalar(self, name: str) -> Floats:
        """The finite values of a scalar, float64 ``[n]``; empty where it is unknown."""
        values = self.scalars.get(name, np.empty(0))
        return np.asarray(values[np.isfinite(values)])


def read_provenance(inputs: Sequence[str]) -> list[Provenance]:
    """Read what runs and tables of `analyze compute` hold, one entry for each run.

    A run is opened and its weights are not read; it counts as measured against final. Where a run
    and a table of it are given, the run's facts stand and the references of both.
    `InputError` for what is neither run nor table.
    """
    if not inputs:
        raise UsageError("nothing to describe", fix="give runs or tables of `analyze compute`")
    found: dict[str, Provenance] = {}
    for text in without_repeats(inputs):
        for one in _read(text):
            found[one.name] = _merged(found[one.name], one) if one.name in found else one
    return list(found.values())


def of_run(run: Run, name: str | None = None) -> Provenance:
    """Read what a run holds, as measured against its final iterate if it has one."""
    name = printable(str(run.path) if name is None else name)
    references = ("final",) if run.complete else ()
    return Provenance(
        name=name,
        facts={**run.attributes, "num_parameters": run.table.num_parameters},
        references=references,
        nulls=dict.fromkeys(references, _null(run)),
        streams=tuple(
            StreamFacts(each, stream.batches, stream.steps)
            for each, stream in run.streams.items()
            if len(stream.steps)
        ),
        scalars={each: run.scalar(each) for each in _SCALARS if each in run.scalar_names()},
        every_update=True,
        tensors=run.table,
    )


def of_table(table: pa.Table) -> list[Provenance]:
    """Read what a table holds of each run in it."""
    metadata = tables.read_metadata(table)
    found = []
    for entry in metadata["runs"]:
        rows = table.filter(pc.equal(table["run"], entry["run"]))
        if not rows.num_rows:
            continue
        references = tuple(rows["reference"].unique().to_pylist())
        nulls = {each: metadata["null"].get(f"{entry['run']}|{each}") for each in references}
        found.append(
            Provenance(
                name=entry["run"],
                facts=entry,
                references=references,
                nulls={each: text for each, text in nulls.items() if text is not None},
                streams=tuple(_streams(rows)),
                scalars=_scalars(rows, entry["final_step"]),
                every_update=False,
                tensors=None,
                grouping=tuple(metadata["by"].split("+")),
            )
        )
    return found


def _read(text: str) -> list[Provenance]:
    path = place_of(text)
    if path.is_dir():
        return [of_run(open_run(text), text)]
    if isinstance(path, ObjectPath) or not path.exists():
        fix = "give a run (.zarr), or a table that `analyze compute` wrote"
        raise InputError("no such run or table", where=path, fix=fix)
    table = tables.read_table(path)
    if not table.num_rows:
        raise InputError("the table has no rows", where=path, fix="make it again from the run")
    return of_table(table)


def _merged(first: Provenance, second: Provenance) -> Provenance:
    """Put two of the same run together; the run itself tells more than a table of it."""
    best = second if second.every_update else first
    return replace(
        best,
        references=tuple(dict.fromkeys((*first.references, *second.references))),
        nulls={**first.nulls, **second.nulls},
        grouping=tuple(dict.fromkeys((*first.grouping, *second.grouping))),
    )


def _null(run: Run) -> str:
    """What the null against the final iterate rests on, or why there is none."""
    path = own_path(run)
    if isinstance(path, str):
        return path
    step = path.unsound()
    if step is None:
        return path.assumption()
    return f"no null: the run's norms are not finite at step {step}"


def _streams(rows: pa.Table) -> list[StreamFacts]:
    found = []
    for name in rows["stream"].unique().to_pylist():
        own = rows.filter(pc.equal(rows["stream"], name))
        batches = pc.max(own["batch"]).as_py()
        steps = np.unique(own["step"].to_numpy())
        found.append(StreamFacts(name, None if batches is None else batches + 1, steps))
    return found


def _scalars(rows: pa.Table, final_step: int | None) -> dict[str, Floats]:
    """Clip factor and learning rate of the steps that have rows and from which an update went."""
    steps, first = np.unique(rows["step"].to_numpy(), return_index=True)
    first = first[steps < final_step] if final_step is not None else first
    names = {"clip_factor": "clip_factor", "group_lr": "lr"}
    return {name: rows[column].to_numpy()[first] for name, column in names.items()}


def is_whole(value: Any) -> bool:
    """Whether a fact is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
