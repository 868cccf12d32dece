"""Sums in Adam's metric, at the steps after which the optimizer's state was kept.

What the metric is, and which second moments it is made of, stands in `analyze.second_moments`.
Axes: T saved steps, B batches, P tensors, R references, K of the T steps with a kept state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from analyze.cache import MomentsCache, Where, cache_of
from analyze.optimizer import read_optimizer
from analyze.references import Reference
from analyze.second_moments import ORDER, Places, find_places, unusable
from analyze.work import Work
from capture.store import Run, Stream
from capture.store.kept_states import find_kept, list_kept, tree_of
from capture.store.layout import ITERATES, UPDATES
from capture.store.objects import ObjectPath

if TYPE_CHECKING:
    from analyze.adam_blocks import Fresh

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

NOT_KEPT = "no metric: no second moments were kept; record with --keep-state (Recorder: keep_state)"
_LABEL = "adam."


@dataclass(frozen=True)
class Entry:
    """What was summed of one stream against one reference, by tensor.

    `dist` is ‖e‖²_M, float64 ``[K, P]``, `grad` ‖g‖²_{M⁻¹} of the stored gradients, float64
    ``[K, P]`` or ``[K, B, P]``, `known` int64 ``[K, P]`` whether the tensor has second moments; the
    sums are 0 where it has none.
    """

    dist: Floats
    grad: Floats
    known: Integers


@dataclass(frozen=True)
class StreamMetric:
    """One gradient stream: `steps` int64 ``[K]``, and an `Entry` for each reference in order."""

    steps: Integers
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class AdamMoments:
    """What was summed in Adam's metric in one run, by stream.

    `note` says what the metric was made of, or why there is none; then `streams` is empty.
    """

    note: str
    streams: Mapping[str, StreamMetric]


def adam_moments(
    run: Run, streams: Sequence[str], references: Sequence[Reference], work: Work
) -> AdamMoments:
    """Sum in Adam's metric what `streams` hold at steps after which a state was kept.

    Only gradients are measured: the weights and the updates among `streams` are passed over. What
    was summed before is not summed again. Runs of other optimizers, and those without kept states,
    cost no reading. `DamagedError` where a state that is used is not as it was written; bytes
    behind sums that were kept are not read and so not verified again.
    """
    question = _ask(run, streams, references, work.cache)
    if isinstance(question, str):
        return AdamMoments(question, {})
    steps, kept, keeping = question.steps, question.kept, question.keeping
    identities = question.identities
    lacking = [name for name, entries in kept.items() if None in entries.values()]
    wanted = [one for one in dict.fromkeys(identities) if any(not kept[n][one] for n in lacking)]
    if lacking:
        from analyze.adam_blocks import measure

        fresh = measure(
            run.path,
            {name: steps[name] for name in lacking},
            [references[identities.index(one)] for one in wanted],
            **work.computing,
        )
        if isinstance(fresh, str):
            return AdamMoments(fresh, {})
        for name in lacking:
            for place, one in enumerate(wanted):
                kept[name][one] = entry = _entry_of(fresh[name], place)
                keeping.save(name, one, entry)
    found = {
        name: StreamMetric(steps[name], tuple(e for one in identities if (e := entries[one])))
        for name, entries in kept.items()
    }
    return AdamMoments(_note(run, found), found)


def states_to_read(
    run: Run, streams: Sequence[str], references: Sequence[Reference], where: Where = True
) -> tuple[int, int]:
    """Say what `adam_moments` would read: how many kept states, and their bytes.

    The rows of weights and gradients at their steps are read once more as well.
    """
    question = _ask(run, streams, references, where)
    if isinstance(question, str):
        return 0, 0
    lacking = {n: e for n, e in question.kept.items() if None in e.values()}
    steps = sorted({int(step) for name in lacking for step in question.steps[name]})
    return len(steps), sum(find_kept(run.path, step).size for step in steps)


@dataclass(frozen=True)
class _Question:
    """What is asked of a run, by stream, and which entries of it were summed before."""

    steps: Mapping[str, Integers]
    identities: Sequence[str]
    kept: dict[str, dict[str, Entry | None]]
    keeping: _Keeping


def _ask(
    run: Run, streams: Sequence[str], references: Sequence[Reference], where: Where
) -> _Question | str:
    """Find the states that count, and what was kept; in words, why there is no metric."""
    chosen = [n for n in dict.fromkeys(streams) if n not in (*ITERATES, UPDATES)]
    states = _usable_states(run, {name: run.stream(name) for name in chosen})
    if isinstance(states, str):
        return states
    shared = {name: _shared(run.stream(name), states) for name in chosen}
    steps = {name: found for name, found in shared.items() if len(found)}
    keeping = _Keeping(run, cache_of(run, where), states)
    identities = [reference.identity(run) for reference in references]
    kept = {
        name: {one: keeping.load(name, found, one) for one in identities}
        for name, found in steps.items()
    }
    return _Question(steps, identities, kept, keeping)


@dataclass(frozen=True)
class _State:
    """A kept state that may be used: what tells it from others, and its tensors' places."""

    digest: str
    places: Places


def _usable_states(run: Run, streams: Mapping[str, Stream]) -> dict[int, _State] | str:
    """Find the kept states at whose steps one of the streams has a row; in words, why none."""
    reason = unusable(run)
    if reason is not None:
        return reason
    if isinstance(run.path, ObjectPath) and run.path.is_read_only:
        return (
            "no metric: a web server does not tell which states were kept; copy the run to a disk"
        )
    kept = list_kept(run.path)
    if not kept:
        return NOT_KEPT
    recorded = {int(step) for stream in streams.values() for step in stream.steps}
    states: dict[int, _State] = {}
    for step in kept:
        if step in recorded:
            state = find_kept(run.path, step)
            places = find_places(run, tree_of(state))
            if isinstance(places, str):
                return places
            states[step] = _State(state.digest, places)
    if not states:
        return (
            f"no metric: second moments were kept after {_listed(kept)} updates, where these "
            "streams have no gradient"
        )
    return states


def _shared(stream: Stream, states: Mapping[int, _State]) -> Integers:
    """Steps of a stream after which a state was kept, int64 ``[K]``."""
    return np.array([step for step in stream.steps if int(step) in states], np.int64)


class _Keeping:
    """Entries that were summed before, found by the states that they came from."""

    def __init__(self, run: Run, cache: MomentsCache | None, states: Mapping[int, _State]) -> None:
        self._run = run
        self._cache = cache
        self._states = states

    def load(self, name: str, steps: Integers, reference: str) -> Entry | None:
        stream = self._run.stream(name)
        if self._cache is None or not stream.finished:
            return None
        by_tensor = (len(steps), len(self._run.table.parameters))
        batches = () if stream.batches is None else (stream.batches,)
        shapes = {
            "dist": by_tensor,
            "grad": (len(steps), *batches, by_tensor[1]),
            "known": by_tensor,
        }
        content = self._content(self._cache, name)
        arrays = self._cache.load_arrays(_LABEL + name, content, reference, shapes)
        return None if arrays is None else Entry(**arrays)

    def save(self, name: str, reference: str, entry: Entry) -> None:
        if self._cache is not None and self._run.stream(name).finished:
            content = self._content(self._cache, name)
            self._cache.save_arrays(_LABEL + name, content, reference, vars(entry))

    def _content(self, cache: MomentsCache, name: str) -> str:
        steps = _shared(self._run.stream(name), self._states)
        facts = [self._run.attributes.get(key) for key in ("optimizer", ORDER)]
        digests = [self._states[int(step)].digest for step in steps]
        return cache.content(name, json.dumps([facts, digests], sort_keys=True))


def _entry_of(fresh: Fresh, reference: int) -> Entry:
    return Entry(fresh.dist[:, reference], fresh.grad, fresh.known)


def _note(run: Run, streams: Mapping[str, StreamMetric]) -> str:
    """Say what the metric was made of, and which tensors were left out."""
    steps = sorted({int(step) for stream in streams.values() for step in stream.steps})
    known = np.concatenate([stream.entries[0].known for stream in streams.values()])
    by_name = zip(run.table.names, known.T, strict=True)
    lacking = ", ".join(repr(name) for name, column in by_name if not column.all())
    left_out = f"; left out at steps where they had none: {lacking}" if lacking else ""
    return (
        f"M = diag(√v̂ + ε) from the second moments that {read_optimizer(run).name} had after "
        f"{_listed(steps)} updates, before the gradient of that step was blended in{left_out}"
    )


def _listed(steps: Sequence[int]) -> str:
    """Write steps: all of a few, else the first and the last."""
    if len(steps) > 6:
        return f"{steps[0]}, {steps[1]}, … {steps[-1]}"
    return ", ".join(map(str, steps))
