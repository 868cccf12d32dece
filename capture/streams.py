"""The gradient streams that a run asks for: ``NAME[:K][@SCHEDULE]``, separated by commas.

Two come from the training itself; the others are probes, gradients of other batches at the weights
that are saved, which `capture.gradients` takes.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from capture.schedule import Schedule, parse_schedule
from capture.store.errors import UsageError
from capture.store.layout import WEIGHTS

MINIBATCH = "minibatch"
FULL, FULL_EVAL = "full", "full-eval"

# Streams that need nothing but the training itself: what each row t holds.
STREAMS = {
    MINIBATCH: "the gradient that entered update t",
    "updates": "the update itself, w_{t+1} - w_t",
}

# Probes with a batch axis: what batch b of row t is the gradient of, at w_t.
BATCH_PROBES = {
    "fixed": "training batch b of K that were drawn once",
    "heldout": "held-out batch b of K that never drive training",
    "shuffled-labels": "training batch b of K with its labels permuted once",
}

# Probes of all training samples: the mean over the batches of a partition.
FULL_PROBES = {
    FULL: "all training samples, the model in training mode",
    FULL_EVAL: "all training samples, the model in evaluation mode",
}

PROBES = {**BATCH_PROBES, **FULL_PROBES}
DEFAULT_BATCHES = 10
MAX_BATCHES = 10_000


@dataclass(frozen=True)
class StreamRequest:
    """One stream: its name, its own schedule where given, and K where it has a batch axis."""

    name: str
    schedule: str | None = None
    batches: int | None = None


def parse_streams(text: str, others: Collection[str] = ()) -> tuple[StreamRequest, ...]:
    """Parse ``minibatch,fixed:10,full@epoch`` and the like; ``none`` asks for no stream.

    ``full:eval`` is another way to write ``full-eval``, and K is 10 where it is left out. `others`
    are names of streams that a loop of its own gives. Raises `UsageError` for an unknown stream, a
    doubled one, a bad count or a bad schedule.
    """
    requests = [_parse_stream(part, others) for part in _split(text)]
    names = [request.name for request in requests]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("a gradient stream is named twice", where=name, fix="name it once")
    return tuple(requests)


def stream_schedules(
    every: int | str | Schedule,
    gradients: str | Sequence[str] | None,
    total_steps: int | None,
    steps_per_epoch: int | None,
    others: Collection[str] = (),
) -> dict[str, Schedule]:
    """Give every stream its schedule, `weights` first; those without their own follow `every`.

    Raises `UsageError` for an unknown stream or a schedule that does not parse.
    """

    def parse(text: int | str) -> Schedule:
        return parse_schedule(text, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    main = every if isinstance(every, Schedule) else parse(every)
    text = gradients if isinstance(gradients, str) else ",".join(gradients or ()) or "none"
    requests = parse_streams(text, others)
    own = {r.name: main if r.schedule is None else parse(r.schedule) for r in requests}
    return {WEIGHTS: main, **own}


def _split(text: str) -> list[str]:
    """Split on commas, but not on those within the lags of a schedule, ``@bursts:51:1,2,5``."""
    parts: list[str] = []
    for part in text.replace(" ", "").split(","):
        if part[:1].isdecimal() and parts and "@" in parts[-1]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return [] if parts == ["none"] else parts


def _parse_stream(text: str, others: Collection[str]) -> StreamRequest:
    body, at, schedule = text.partition("@")
    body = FULL_EVAL if body == "full:eval" else body
    name, colon, count = body.partition(":")
    known = [*STREAMS, *PROBES, *(other for other in others if other not in PROBES)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            "no such gradient stream",
            where=repr(text),
            fix=f"{hint}known are {', '.join(known)}, or none; Recorder(sources=…) takes others",
        )
    if at:
        # Parsed here so that a wrong one is told at once; total_steps matters for log:N alone.
        parse_schedule(schedule, total_steps=1)
    if name not in BATCH_PROBES:
        if colon:
            what = "this gradient stream has one batch per step"
            raise UsageError(what, where=repr(text), fix=f"write {name}")
        return StreamRequest(name, schedule if at else None)
    return StreamRequest(name, schedule if at else None, _count(count, colon, text))


def _count(count: str, colon: str, text: str) -> int:
    if not colon:
        return DEFAULT_BATCHES
    if not count.isdecimal() or not 0 < int(count) <= MAX_BATCHES:
        raise UsageError(
            f"the number of batches must be a whole number from 1 to {MAX_BATCHES:,}",
            where=repr(text),
            fix=f"write {text.partition(':')[0]}:{DEFAULT_BATCHES}",
        )
    return int(count)
