"""The tables of `analyze pairs`: built from products and moments, ready to be written as Parquet.

`pairs` has one row per run, stream, pair of steps, batch, group of tensors and reference, in this
order; `noise` one per run, stream with batches, step and group. Units and formulas are in the
metadata of the fields, the facts of the runs in the metadata of the file, as `analyze.tables` has
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import capture
from analyze.columns import texts
from analyze.gram import Gram
from analyze.groups import Grouping, group_tensors, name_of
from analyze.measure import Measure
from analyze.metadata import printable
from analyze.moment_table import Moments
from analyze.noise import NOISE_QUANTITIES, batch_noise
from analyze.pair_null import pair_null
from analyze.pairs import PAIR_QUANTITIES, PairMeasure
from analyze.quantities import Quantity, Values
from analyze.run_table import facts_of
from analyze.tables import concatenate, encode_metadata
from capture.store.reader import Run

Integers = NDArray[np.int64]

PAIR_TABLE_VERSION = 1
# What the metadata of a table call its kind.
PAIRS, NOISE = "pairs", "noise"
SIGN = "γ > 0: a step along -g starts out towards the other step's weights."

_KEYS: tuple[tuple[str, Any, str, str], ...] = (
    ("run", pa.string(), "", "the run, as typed"),
    ("stream", pa.string(), "", "where the gradients or updates come from"),
    ("step", pa.int64(), "updates", "i, the updates applied before the earlier row"),
    ("step_to", pa.int64(), "updates", "j, the updates applied before the later row"),
    ("lag", pa.int64(), "updates", "j - i"),
    ("batch", pa.int64(), "", "which of the stream's batches; null where it has one per step"),
    ("group", pa.string(), "", "the tensors that were summed over"),
    ("reference", pa.string(), "", "w*, as typed"),
    ("num_parameters", pa.int64(), "", "coordinates in the group"),
)
_NOISE_KEYS: tuple[tuple[str, Any, str, str], ...] = (
    ("run", pa.string(), "", "the run, as typed"),
    ("stream", pa.string(), "", "where the gradients come from"),
    ("step", pa.int64(), "updates", "t, the updates applied before"),
    ("group", pa.string(), "", "the tensors that were summed over"),
    ("batches", pa.int64(), "", "B, the batches of the stream"),
    ("num_parameters", pa.int64(), "", "coordinates in the group"),
)


@dataclass(frozen=True)
class PairTables:
    """`pairs`, and `noise`, which has no rows where no stream has several batches."""

    pairs: pa.Table
    noise: pa.Table


def pair_schema() -> pa.Schema:
    """List the columns of `pairs`, with units and formulas; no file metadata."""
    return described([*_KEYS, *_quantities(PAIR_QUANTITIES)])


def noise_schema() -> pa.Schema:
    """List the columns of `noise`, with units and formulas; no file metadata."""
    return described([*_NOISE_KEYS, *_quantities(NOISE_QUANTITIES)])


def build_pairs(
    run: Run,
    grams: dict[str, Gram],
    moments: Moments,
    by: Grouping = "model",
    *,
    name: str | None = None,
) -> PairTables:
    """Make the tables of one run; `grams`, by stream, are grouped as `by` says.

    `moments` are of the same streams. `name` is what the column `run` says, by default the path.
    """
    name = printable(str(run.path) if name is None else name)
    labels, groups = group_tensors(run.table, by)
    sizes = np.bincount(groups, np.diff(run.table.offsets), len(labels)).astype(np.int64)
    of_all = {"run": name, "labels": labels, "sizes": sizes}
    references = [printable(text) for text in moments.references]
    own = Measure(run)
    scales = {name: own.gradient_scale(name, gram.steps) for name, gram in grams.items()}
    undefined: Counter[str] = Counter()
    pairs, noise, nulls = [], [], {}
    for stream, gram in grams.items():
        null: Mapping[str, Values] = {}
        if stream == "minibatch":
            null, nulls[f"{name}|{stream}"] = pair_null(run, gram.steps, gram.pairs, groups)
        measure = PairMeasure(run, gram, moments.streams[stream], groups, scales[stream], null)
        columns = _pair_columns(measure, gram, references, of_all)
        undefined.update(columns.pop("undefined"))
        pairs.append(pa.table(columns, schema=pair_schema()))
        if gram.batch_sums is not None:
            square = (scales[stream] ** 2)[:, None, None, None]
            found = batch_noise(gram.batch_sums * square)
            noise.append(pa.table(_noise_columns(gram, found, of_all), schema=noise_schema()))
    facts: dict[str, Any] = {"table": PAIR_TABLE_VERSION, "by": name_of(by), "sign": SIGN}
    facts["pairs"] = {stream: len(gram.pairs) for stream, gram in grams.items()}
    of_pairs = {"kind": PAIRS, **facts, "null": nulls, "nan": dict(undefined)}
    return PairTables(
        with_facts([pair_schema().empty_table(), *pairs], run, name, of_pairs),
        with_facts([noise_schema().empty_table(), *noise], run, name, {"kind": NOISE, **facts}),
    )


def concatenate_pairs(tables: Sequence[PairTables]) -> PairTables:
    """Put the tables of several runs below each other; their metadata are merged."""
    return PairTables(
        concatenate([table.pairs for table in tables]),
        concatenate([table.noise for table in tables]),
    )


def _pair_columns(
    measure: PairMeasure, gram: Gram, references: Sequence[str], of_all: dict[str, Any]
) -> dict[str, Any]:
    """Make the columns of one stream, `[N, B, K, R]` in a row; and `undefined`, NaN that count."""
    shape = (*measure.shape, len(references))
    batches = shape[1]
    values = {q.name: np.full(shape, np.nan) for q in PAIR_QUANTITIES}
    undefined: Counter[str] = Counter()
    for part, found in measure.slabs():
        for name, computed in found.items():
            values[name][part] = computed
            undefined[name] += int(np.isnan(computed).sum())
    first, second = gram.steps[gram.pairs].T

    def spread(of_axis: NDArray[Any], axis: int) -> NDArray[Any]:
        """Repeat what an axis says, for each row of the table."""
        along = of_axis.reshape([-1 if place == axis else 1 for place in range(len(shape))])
        return np.broadcast_to(along, shape).ravel()

    total, labels = int(np.prod(shape)), of_all["labels"]
    return {
        "run": texts([of_all["run"]], np.zeros(total, np.int8)),
        "stream": texts([gram.stream], np.zeros(total, np.int8)),
        "step": pa.array(spread(first, 0)),
        "step_to": pa.array(spread(second, 0)),
        "lag": pa.array(spread(second - first, 0)),
        "batch": pa.array(spread(np.arange(batches), 1), mask=np.full(total, gram.batches is None)),
        "group": texts(labels, spread(np.arange(len(labels)), 2)),
        "reference": texts(references, spread(np.arange(len(references)), 3)),
        "num_parameters": pa.array(spread(of_all["sizes"], 2)),
        **{name: pa.array(column.ravel()) for name, column in values.items()},
        "undefined": undefined,
    }


def _noise_columns(gram: Gram, found: dict[str, Values], of_all: dict[str, Any]) -> dict[str, Any]:
    labels = of_all["labels"]
    rows, group = (index.ravel() for index in np.indices((len(gram.steps), len(labels))))
    return {
        "run": texts([of_all["run"]], np.zeros_like(rows)),
        "stream": texts([gram.stream], np.zeros_like(rows)),
        "step": pa.array(gram.steps[rows]),
        "group": texts(labels, group),
        "batches": pa.array(np.full(len(rows), gram.batches)),
        "num_parameters": pa.array(of_all["sizes"][group]),
        **{name: pa.array(values.ravel()) for name, values in found.items()},
    }


def described(columns: Sequence[tuple[str, Any, str, str]]) -> pa.Schema:
    """Make a schema of columns: name, type, unit and formula."""
    return pa.schema(
        pa.field(name, kind, name == "batch", {"unit": unit, "formula": formula})
        for name, kind, unit, formula in columns
    )


def with_facts(tables: Sequence[pa.Table], run: Run, name: str, facts: dict[str, Any]) -> pa.Table:
    """Put tables of one run below each other, with the facts of the run and others in metadata.

    `pairs` among the others, the number of pairs of each stream, goes to the facts of the run.
    """
    facts = dict(facts)
    beside = {key: facts.pop(key) for key in ("pairs",) if key in facts}
    entry = {**facts_of(run, name), **beside}
    own = {"version": capture.__version__, "runs": [entry], "null": {}, "nan": {}}
    metadata = encode_metadata({**own, **facts})
    return pa.concat_tables(tables).combine_chunks().replace_schema_metadata(metadata)


def _quantities(quantities: Sequence[Quantity]) -> list[tuple[str, Any, str, str]]:
    return [(q.name, pa.float64(), q.unit, q.formula) for q in quantities]
