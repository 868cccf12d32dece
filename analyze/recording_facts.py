"""Sentences on what was recorded and measured of a run: references, streams, modes, nulls."""

from __future__ import annotations

import math as arithmetic
from collections.abc import Iterator, Mapping
from typing import Any

from analyze.marked import code, math
from analyze.provenance import Provenance, StreamFacts, is_whole
from analyze.references import end_of_path, read_form
from analyze.verdict import END_SHARE
from capture.store.layout import ITERATES, WEIGHTS
from capture.streams import FULL, FULL_EVAL, MINIBATCH

_DRAWN = {
    "fixed": "training batches",
    "heldout": "held-out batches, which never drive training,",
    "shuffled-labels": "training batches with their labels permuted once",
}
_MODES = {"train": "in training mode", "eval": "in evaluation mode, with stored statistics"}
# The buffer of a layer that keeps statistics over batches.
_STATISTICS = "running_mean"


def describe_recording(run: Provenance) -> Iterator[str]:
    """Say in marked sentences what was recorded and measured, and what of that is not known."""
    yield from _references(run)
    yield _weights(run)
    yield from (_stream(run, stream) for stream in run.streams if stream.name not in ITERATES)
    yield _coupling(run)
    yield from _modes(run)
    yield from _nulls(run)


def _references(run: Provenance) -> Iterator[str]:
    meanings = [_meaning(reference) for reference in run.references]
    if len(meanings) == 1:
        yield f"{math('w*')} is {meanings[0]}."
    elif meanings:
        named = zip(run.references, meanings, strict=True)
        listed = "; ".join(f"{meaning} ({code(reference)})" for reference, meaning in named)
        yield f"Several {math('w*')} were taken: {listed}."


def _meaning(reference: str) -> str:
    form = read_form(reference)
    if form is None:
        return code(reference)
    number, path = form.number, code(form.path or "")
    iterate = "the last iterate" if number is None else f"the iterate after {number} updates"
    return {
        "final": f"the last iterate {math('w_T')} of this run",
        "step": f"{iterate} of this run",
        "mean": f"the mean of the last {number} saved iterates of this run, {math('w_T')} included",
        "run": f"{iterate} of the run {path}",
        "file": f"the point in the file {path}",
    }[form.kind]


def _weights(run: Provenance) -> str:
    weights = next((stream for stream in run.streams if stream.name == WEIGHTS), None)
    if weights is None:
        return f"How often weights were saved {run.missing()}."
    every = "; settings and gradient norms of every update" if "group_lr" in run.scalars else ""
    return f"Saved were the weights at {_steps(run, weights)}{every}."


def _stream(run: Provenance, stream: StreamFacts) -> str:
    return f"Stream {code(stream.name)}: {_source(run, stream)}; {_steps(run, stream)}."


def _steps(run: Provenance, stream: StreamFacts) -> str:
    schedule = run.entry("schedules").get(stream.name)
    kept = "" if schedule is None else f" (schedule {code(schedule)})"
    first, last = int(stream.steps[0]), int(stream.steps[-1])
    if len(stream.steps) == 1:
        return f"one step, {math('t =')} {first:,}{kept}"
    return f"{len(stream.steps):,} steps from {math('t =')} {first:,} to {last:,}{kept}"


def _source(run: Provenance, stream: StreamFacts) -> str:
    if stream.name == MINIBATCH:
        return f"the gradient that entered update {math('t')}, {_order(run)}"
    if stream.name == "updates":
        return f"the update {math('w_{t+1} − w_t')} itself"
    probe = _probe(run, stream.name)
    size = f" of {probe['batch_size']} samples" if is_whole(probe.get("batch_size")) else ""
    seed = " from the data seed" if probe else ""
    if stream.name in (FULL, FULL_EVAL):
        parts = f"{probe['parts']} batches{size}" if is_whole(probe.get("parts")) else "batches"
        return (
            "the gradient of all training samples, a mean weighted by loss elements over one "
            f"partition into {parts}, drawn once{seed}"
        )
    if stream.name in _DRAWN:
        drawn = _DRAWN[stream.name]
        return f"gradients of {stream.batches} {drawn}{size} drawn once{seed}"
    count = "" if stream.batches is None else f" of {stream.batches} batches"
    return f"gradients{count} from a source of the training loop's own"


def _order(run: Provenance) -> str:
    if not run.is_of_train:
        return f"of batches whose order {run.missing()}"
    return (
        "of batches from a new permutation of the training samples in each epoch, the last partial "
        "batch dropped"
    )


def _probe(run: Provenance, name: str) -> Mapping[str, Any]:
    facts = run.entry("probes").get(name)
    return facts if isinstance(facts, Mapping) else {}


def _coupling(run: Provenance) -> str:
    if run.tensors is None:
        return f"Whether layers such as BatchNorm couple the samples of a batch {run.missing()}."
    names = [tensor.name for tensor in run.tensors.buffers]
    count = sum(name.rpartition(".")[2] == _STATISTICS for name in names)
    if not count:
        return "No layer keeps running statistics, as BatchNorm would."
    verb = "layer keeps" if count == 1 else "layers keep"
    return (
        f"{count} {verb} running statistics, as BatchNorm does: in training mode they couple the "
        "samples of a batch."
    )


def _modes(run: Provenance) -> Iterator[str]:
    modes = {name: _mode(run, name) for name in (stream.name for stream in run.streams)}
    for mode, words in _MODES.items():
        names = [code(name) for name, own in modes.items() if own == mode]
        if names:
            yield f"Gradients taken {words}: {', '.join(names)}."
    if MINIBATCH in modes and modes[MINIBATCH] is None:
        yield (
            f"{code(MINIBATCH)} has the gradients of the training loop, whose mode {run.missing()}."
        )


def _mode(run: Provenance, name: str) -> Any:
    if name == MINIBATCH:
        return "train" if run.is_of_train else None
    return "eval" if name == FULL_EVAL else _probe(run, name).get("mode")


def _nulls(run: Provenance) -> Iterator[str]:
    several = len(run.references) > 1
    for reference in run.references:
        text = run.nulls.get(reference)
        where = f"Against {code(reference)}" if several else "Here"
        if text is None:
            yield f"{where}, nothing is known of a null."
        elif text.startswith("no null"):
            yield f"{where}, there is {text}."
        else:
            yield f"{where}, the null is {text}."
        end = None if run.final_step is None else end_of_path(reference, run.final_step)
        if end:
            first = arithmetic.ceil((1 - END_SHARE) * end)
            yield f"{where}, {math('t =')} {first:,} to {end:,} is the end that was left out."
