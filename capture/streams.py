"""The gradient streams that a run asks for: ``NAME[:K][@SCHEDULE]``, separated by commas."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from capture.schedule import parse_schedule
from capture.store.errors import UsageError

# Streams that need nothing but the training itself: what each row t holds.
STREAMS = {
    "minibatch": "the gradient that entered update t",
    "updates": "the update itself, w_{t+1} - w_t",
}


@dataclass(frozen=True)
class StreamRequest:
    """One stream: its name, and its own schedule where given."""

    name: str
    schedule: str | None = None


def parse_streams(text: str) -> tuple[StreamRequest, ...]:
    """Parse ``minibatch,updates`` and the like; ``none`` asks for no stream.

    Raises `UsageError` for an unknown stream, a doubled one, a bad count or a bad schedule.
    """
    requests = [_parse_stream(part) for part in _split(text)]
    names = [request.name for request in requests]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("a gradient stream is named twice", where=name, fix="name it once")
    return tuple(requests)


def _split(text: str) -> list[str]:
    """Split on commas, but not on those within the lags of a schedule, ``@bursts:51:1,2,5``."""
    parts: list[str] = []
    for part in text.replace(" ", "").split(","):
        if part[:1].isdecimal() and parts and "@" in parts[-1]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return [] if parts == ["none"] else parts


def _parse_stream(text: str) -> StreamRequest:
    body, at, schedule = text.partition("@")
    name, colon, _ = body.partition(":")
    if name not in STREAMS:
        near = difflib.get_close_matches(name, STREAMS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            "no such gradient stream in this version",
            where=repr(text),
            fix=f"{hint}known are {', '.join(STREAMS)}, or none",
        )
    if colon:
        raise UsageError(
            "this gradient stream has one batch per step", where=repr(text), fix=f"write {name}"
        )
    if at:
        # Parsed here so that a wrong one is told at once; total_steps matters for log:N alone.
        parse_schedule(schedule, total_steps=1)
    return StreamRequest(name, schedule if at else None)
