"""The table of a measurement: built from moments, written as Parquet, read back.

One row per run, stream, step, batch, group of tensors and reference, in this order. Units and
formulas are in the metadata of the fields, the facts of the runs in the metadata of the file.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import capture
from analyze.adam import AdamMoments, adam_moments
from analyze.cache import Where, measured_moments
from analyze.groups import Grouping, group_tensors, name_of
from analyze.kinds import METADATA_KEY as METADATA_KEY
from analyze.kinds import WRITERS, kind_of
from analyze.measure import Measure
from analyze.metadata import flaw, printable
from analyze.moment_table import MOMENTS, Moments, StreamMoments
from analyze.quantities import QUANTITIES, SIGN
from analyze.references import parse_reference, parting
from analyze.sums import sum_groups
from analyze.tensor_file import open_regular
from capture.store.errors import InputError
from capture.store.files import write_durably
from capture.store.layout import WEIGHTS
from capture.store.reader import Run, open_run

if TYPE_CHECKING:
    from analyze.schedulers import Cluster

Integers = NDArray[np.int64]

TABLE_VERSION = 1
_AGAIN = "make it again from the run"

# Name, type, unit and meaning of the columns before and after the quantities.
_KEYS: tuple[tuple[str, Any, str, str], ...] = (
    ("run", pa.string(), "", "the run, as typed"),
    ("stream", pa.string(), "", "where the gradient or update comes from"),
    ("step", pa.int64(), "updates", "t, the updates applied before"),
    ("epoch", pa.float64(), "epochs", "passes over the data before this step"),
    ("batch", pa.int64(), "", "which of the stream's batches; null where it has one per step"),
    ("group", pa.string(), "", "the tensors that were summed over"),
    ("reference", pa.string(), "", "w*, as typed"),
    ("num_parameters", pa.int64(), "", "coordinates in the group"),
)
# What of a run's attributes goes with its table.
_FACTS = (
    *("final_step", "optimizer", "config", "seeds", "versions", "git_commit"),
    *("data", "schedules", "parent"),
)
_FROM_SCALARS = ("lr", "clip_factor")
_LAST: tuple[tuple[str, Any, str, str], ...] = (
    (
        "loss",
        pa.float64(),
        "loss",
        "mean loss of the row's own batch, else the minibatch of step t",
    ),
    ("lr", pa.float64(), "weight²/loss", "learning rate of step t, first parameter group"),
    ("clip_factor", pa.float64(), "1", "gradient of the step / unclipped one; NaN unknown"),
    ("nonfinite", pa.int64(), "", "NaN or infinite coordinates of w, g or w* in the group"),
)
_NULLABLE = ("epoch", "batch")


def schema() -> pa.Schema:
    """List the columns of the table, with units and formulas; no file metadata."""
    quantities = [(q.name, pa.float64(), q.unit, q.formula) for q in QUANTITIES]
    return pa.schema(
        pa.field(name, kind, name in _NULLABLE, {"unit": unit, "formula": formula})
        for name, kind, unit, formula in (*_KEYS, *quantities, *_LAST)
    )


def build(
    run: Run,
    moments: Moments,
    by: Grouping = "model",
    *,
    adam: AdamMoments | None = None,
    name: str | None = None,
    weight_decay: float | None = None,
) -> pa.Table:
    """Make the table of one run from its moments; `by` as in `analyze.groups`.

    A `weight_decay` takes the place of the run's own λ in the columns `_wd`; `adam` are the sums in
    Adam's metric against the same references, where they were asked for; `name` is what the column
    `run` says, by default the path of the run.
    """
    name = printable(str(run.path) if name is None else name)
    references = [printable(text) for text in moments.references]
    measure = Measure(run, adam, weight_decay)
    labels, groups = group_tensors(run.table, by)
    blocks = [
        _block(measure, stream, references, labels, groups, name)
        for stream in moments.streams.values()
    ]
    arrays = [
        pa.chunked_array([block[field.name] for block in blocks], type=field.type)
        for field in schema()
    ]
    notes = {"weight_decay": measure.decay_note}
    if adam is not None:
        notes["adam_metric"] = adam.note
    metadata = {
        "table": TABLE_VERSION,
        "version": capture.__version__,
        "by": name_of(by),
        "sign": SIGN,
        "runs": [{**facts_of(run, name), **notes}],
        "null": {f"{name}|{reference}": text for reference, text in measure.nulls.items()},
        "branched": _branched(run, moments.references, name),
        "nan": dict(measure.undefined),
    }
    table = pa.Table.from_arrays(arrays, schema=schema())
    return table.combine_chunks().replace_schema_metadata(encode_metadata(metadata))


def _branched(run: Run, references: Sequence[str], name: str) -> dict[str, int]:
    """Where branches that end in a reference left the run, by run and reference."""
    steps = {text: parting(parse_reference(text), run) for text in references}
    return {f"{name}|{printable(text)}": step for text, step in steps.items() if step is not None}


def facts_of(run: Run, name: str) -> dict[str, Any]:
    """What of a run goes with its tables, under the name that the column `run` has."""
    own = {"run": name, "status": run.status, "num_parameters": run.table.num_parameters}
    return {**own, **{key: run.attributes.get(key) for key in _FACTS}}


def measure_run(
    path: str,
    references: Sequence[str] = ("final",),
    *,
    streams: Sequence[str] = (),
    by: Sequence[Grouping] = ("model",),
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Where = True,
    weight_decay: float | None = None,
) -> dict[str, pa.Table]:
    """Measure a run: one table for each grouping in `by`, by its name.

    One pass over its bytes, and where Adam's second moments were kept another over those rows.

    Without `streams`, all of the run that have rows but the weights, and the weights where there
    are no others; `references` as typed. What was summed before is not summed again: moments are
    kept in the folder NAME.moments beside the run, below the folder `cache` where it is a path, or
    neither looked up nor kept where it is `False`. A `weight_decay` λ takes the place of the run's
    own in the columns `_wd`, g + λw. Errors, scheduler, workers and progress are
    those of `compute_moments`; `InputError` where nothing is recorded in the streams.
    """
    parsed = [parse_reference(text) for text in dict.fromkeys(references)]
    chosen = choose_streams(open_run(path), streams)
    moments = measured_moments(
        path,
        chosen,
        parsed,
        where=cache,
        scheduler=scheduler,
        workers=workers,
        progress=progress,
    )
    adam = adam_moments(
        path,
        chosen,
        parsed,
        where=cache,
        scheduler=scheduler,
        workers=workers,
        progress=progress,
    )
    # Opened again: a run that is still recording has written more by now.
    run = open_run(path)
    return {
        name_of(grouping): build(
            run, moments, grouping, adam=adam, name=path, weight_decay=weight_decay
        )
        for grouping in by
    }


def choose_streams(run: Run, streams: Sequence[str] = ()) -> list[str]:
    """Choose what `measure_run` measures; `InputError` where nothing is recorded in it."""
    others = [name for name in run.stream_names if name != WEIGHTS and len(run.stream(name))]
    chosen = list(streams) or others or [WEIGHTS]
    if not any(len(run.stream(name)) for name in chosen):
        raise InputError(
            f"there are no rows to measure in {', '.join(map(repr, chosen))}",
            where=run.path,
            fix="choose another --stream, or wait until something is recorded",
        )
    return chosen


def concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """Put tables of several runs below each other; their metadata are merged."""
    merged, *others = (read_metadata(table) for table in tables)
    nan = Counter(merged["nan"])
    for metadata in others:
        nan.update(metadata["nan"])
        merged["runs"] += [entry for entry in metadata["runs"] if entry not in merged["runs"]]
        merged["null"] |= metadata["null"]
        merged["branched"] = merged.get("branched", {}) | metadata.get("branched", {})
    merged["nan"] = dict(nan)
    merged["by"] = "+".join(dict.fromkeys(read_metadata(table)["by"] for table in tables))
    bare = [table.replace_schema_metadata(None) for table in tables]
    return pa.concat_tables(bare).combine_chunks().replace_schema_metadata(encode_metadata(merged))


def write_table(table: pa.Table, path: str | PathLike[str]) -> None:
    """Write Parquet, in full or not at all; equal tables give equal bytes.

    `WriteError` where the disk refuses.
    """
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_durably(Path(path), buffer.getbuffer(), Path(path).parent)


def read_table(path: str | PathLike[str]) -> pa.Table:
    """Read what `write_table` wrote of a measurement; `InputError` where the file is another."""
    table = read_parquet(path)
    other = kind_of(table.schema)
    if other not in (None, "compute"):
        raise InputError(
            f"another kind of table: that of {WRITERS[str(other)]}",
            where=path,
            fix="draw it with `analyze report`, or write it in another format with `analyze "
            "export`; here goes a run, or a table of `analyze compute`",
        )
    if METADATA_KEY not in (table.schema.metadata or {}):
        what: str | None = "it has no facts of runs"
    else:
        try:
            what = flaw(table, schema(), read_metadata(table), TABLE_VERSION)
        except (ValueError, RecursionError):
            what = "its facts cannot be read"
    if what is not None:
        raise InputError(
            f"not a table of this version of `analyze compute`, {what}", where=path, fix=_AGAIN
        )
    return table


def read_parquet(path: str | PathLike[str]) -> pa.Table:
    """Read a Parquet file with whatever is in it; `InputError` where there is none."""
    with os.fdopen(open_regular(path, "table"), "rb") as file:
        try:
            return pq.read_table(file)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"no table can be read ({reason})", where=path, fix=_AGAIN) from error


def read_metadata(table: pa.Table) -> dict[str, Any]:
    """Return the facts in a table's metadata: runs, nulls, sign convention, counts of NaN."""
    document: dict[str, Any] = json.loads(table.schema.metadata[METADATA_KEY])
    return document


def _block(
    measure: Measure,
    stream: StreamMoments,
    references: Sequence[str],
    labels: Sequence[str],
    groups: Integers,
    run: str,
) -> dict[str, Any]:
    """Make the columns of one stream, whose rows are (step, batch), group, reference."""
    batches = stream.batches or 1
    steps = np.repeat(stream.steps, batches)
    shape = (len(steps), len(labels), len(references))
    row, group, reference = (index.ravel() for index in np.indices(shape))
    by_tensor = (len(steps), len(references), len(groups))
    found = measure.quantities(
        stream.stream,
        steps,
        stream.array.reshape(*by_tensor, len(MOMENTS)),
        references,
        groups,
    )
    bad = {"nonfinite": stream.nonfinite.reshape(by_tensor).astype(np.float64)}
    bad = sum_groups(bad, groups, len(labels))
    sizes = np.bincount(groups, np.diff(measure.run.table.offsets)).astype(np.int64)
    epochs = _epochs(measure.run, stream.stream, steps)[row]
    batch = np.tile(np.arange(batches), len(stream.steps))[row]
    nothing = np.full(len(row), np.nan)
    return {
        "run": texts([run], np.zeros_like(row)),
        "stream": texts([stream.stream], np.zeros_like(row)),
        "step": pa.array(steps[row]),
        "epoch": pa.array(epochs, mask=np.isnan(epochs)),
        "batch": pa.array(batch, mask=np.full(len(row), stream.batches is None)),
        "group": texts(labels, group),
        "reference": texts(references, reference),
        "num_parameters": pa.array(sizes[group]),
        **{
            q.name: pa.array(found[q.name].ravel() if q.name in found else nothing)
            for q in QUANTITIES
        },
        **{name: pa.array(measure.scalar(name, steps)[row]) for name in _FROM_SCALARS},
        "loss": pa.array(_losses(measure, stream, steps)[row]),
        "nonfinite": pa.array(bad["nonfinite"].astype(np.int64)[row, reference, group]),
    }


def _losses(measure: Measure, stream: StreamMoments, steps: Integers) -> NDArray[np.float64]:
    """Loss of each row: that of its own batch where the stream keeps it, else the minibatch's."""
    recorded = measure.run.stream(stream.stream)
    if recorded.losses is None:
        return measure.scalar("loss", steps)
    rows = np.searchsorted(recorded.steps, stream.steps)
    return np.asarray(recorded.losses[rows].reshape(len(steps)))


def texts(names: Sequence[str], index: NDArray[Any]) -> Any:
    """Make a column of names by their number; `index` is int ``[N]``."""
    return pa.DictionaryArray.from_arrays(index, pa.array(names, pa.string())).cast(pa.string())


def _epochs(run: Run, stream: str, steps: Integers) -> NDArray[np.float64]:
    """Epoch of each step; NaN where it is not known, or the row came after the run was opened."""
    recorded = run.stream(stream)
    if not len(recorded):
        return np.full(len(steps), np.nan)
    place = np.minimum(np.searchsorted(recorded.steps, steps), len(recorded.steps) - 1)
    return np.where(recorded.steps[place] == steps, recorded.epochs[place], np.nan)


def encode_metadata(metadata: dict[str, Any]) -> dict[bytes, bytes]:
    """Write the facts of a table as its file keeps them; `read_metadata` gives them back."""
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
    # A lone surrogate, which a run may hold, becomes its escape again, as JSON has it.
    return {METADATA_KEY: text.encode("utf-8", "backslashreplace")}
