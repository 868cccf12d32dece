"""The moments of a run, stream by stream: those that were kept are found, the others are summed.

What does not fit well into memory is summed in several passes, and each stream is given away when
its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze.cache import Entry, Where, cache_of
from analyze.moment_table import MOMENTS, Moments, StreamMoments
from analyze.references import Reference
from analyze.work import Work
from capture.store import Run, UsageError

# What is kept of a stream by the identity of w*; and such identities.
Entries = Mapping[str, Entry]
Identities = tuple[str, ...]

# Moments that one pass brings, at most, in bytes; a single stream may have more.
_PASS_BYTES = 96 * 2**20
_MOMENT_BYTES = 8 * (len(MOMENTS) + 1)


def measured_moments(
    run: Run, streams: Sequence[str], references: Sequence[Reference], work: Work
) -> Moments:
    """Give the moments of all these streams, as `measured_streams` does one after another."""
    found = {each.stream: each for each in measured_streams(run, streams, references, work)}
    return Moments(tuple(reference.text for reference in references), found)


def measured_streams(
    run: Run, streams: Sequence[str], references: Sequence[Reference], work: Work
) -> Iterator[StreamMoments]:
    """Give the moments of each stream in turn, reading only what was not summed before.

    As `analyze.compute.compute_moments`, all seven moments. Bytes behind moments that were kept are
    not read and so not verified again.
    """
    if not references:
        raise UsageError("there is no reference to measure against", fix="give one, such as final")
    return _Summing(run, references, work).each(streams)


def lacking_moments(
    run: Run, streams: Sequence[str], references: Sequence[Reference], *, where: Where = True
) -> list[tuple[list[str], list[Reference]]]:
    """List the passes of `measured_streams`: some streams, and the references they all lack."""
    summing = _Summing(run, references, Work(cache=where))
    passes = summing.passes(streams)
    return [(list(kept), summing.named(lacking)) for kept, lacking in passes if lacking]


class _Summing:
    """A question to a run. A reference is known by its identity: equal ones are summed once."""

    def __init__(self, run: Run, references: Sequence[Reference], work: Work) -> None:
        self._run = run
        self._references = references
        self._work = work
        self._identities = [reference.identity(run) for reference in references]
        self._cache = cache_of(run, work.cache)

    def each(self, streams: Sequence[str]) -> Iterator[StreamMoments]:
        """Give the moments of each stream in turn."""
        passes, ready = self.passes(streams), dict[str, StreamMoments]()
        for name in dict.fromkeys(streams):
            while name not in ready:
                ready |= self._take(*next(passes))
            yield ready.pop(name)

    def passes(self, streams: Sequence[str]) -> Iterator[tuple[dict[str, Entries], Identities]]:
        """Give what is kept of streams that lack the same references, and these, pass after pass.

        A stream that lacks nothing comes by itself.
        """
        left = list(dict.fromkeys(streams))
        while left:
            found = {left[0]: self._find(left[0])}
            lacking = self._lacking(found[left[0]])
            room = _PASS_BYTES - self._nbytes(left[0])
            for name in left[1:] if lacking else ():
                if (
                    self._nbytes(name) <= room
                    and self._lacking(kept := self._find(name)) == lacking
                ):
                    found[name] = kept
                    room -= self._nbytes(name)
            yield found, lacking
            left = [name for name in left if name not in found]

    def named(self, identities: Identities) -> list[Reference]:
        """The references with these identities."""
        return [self._references[self._identities.index(one)] for one in identities]

    def _take(
        self, kept: Mapping[str, Entries], lacking: Identities
    ) -> Mapping[str, StreamMoments]:
        """Sum what some streams lack, and put it beside what is kept."""
        fresh = self._sum(list(kept), lacking) if lacking else {}
        if lacking == tuple(self._identities):
            return fresh
        new = {
            name: {one: _entry_of(stream, place) for place, one in enumerate(lacking)}
            for name, stream in fresh.items()
        }
        return {name: self._joined(name, {**kept[name], **new.get(name, {})}) for name in kept}

    def _sum(self, names: list[str], lacking: Identities) -> Mapping[str, StreamMoments]:
        from analyze.compute import compute_moments

        fresh = compute_moments(
            self._run.path, names, self.named(lacking), **self._work.computing
        ).streams
        for name in names:
            if self._cache is not None and self._run.stream(name).finished:
                for place, identity in enumerate(lacking):
                    self._cache.save(name, identity, _entry_of(fresh[name], place))
        return fresh

    def _find(self, name: str) -> Entries:
        """Look up by identity of w* what is kept of a stream to which no row will be added."""
        if self._cache is None or not self._run.stream(name).finished:
            return {}
        found = {one: self._cache.load(name, one) for one in self._identities}
        return {one: entry for one, entry in found.items() if entry is not None}

    def _lacking(self, entries: Entries) -> Identities:
        return tuple(one for one in dict.fromkeys(self._identities) if one not in entries)

    def _nbytes(self, name: str) -> int:
        """Bytes that the moments of a stream take."""
        stream, tensors = self._run.stream(name), len(self._run.table.parameters)
        return len(stream.commits) * tensors * len(self._references) * _MOMENT_BYTES

    def _joined(self, name: str, entries: Entries) -> StreamMoments:
        """Put the entries of all references side by side."""
        chosen = [entries[identity] for identity in self._identities]
        batches = self._run.stream(name).batches
        moments = _side_by_side([entry.moments for entry in chosen], axis=-3)
        nonfinite = _side_by_side([entry.nonfinite for entry in chosen], axis=-2)
        return StreamMoments(name, chosen[0].steps, batches, moments, nonfinite)


def _entry_of(stream: StreamMoments, reference: int) -> Entry:
    """Take one reference out of fresh moments."""
    moments, nonfinite = stream.array[..., reference, :, :], stream.nonfinite[..., reference, :]
    return Entry(stream.steps, moments, nonfinite)


def _side_by_side(arrays: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
    """Stack arrays on a new axis; one alone without a copy."""
    return np.expand_dims(arrays[0], axis) if len(arrays) == 1 else np.stack(arrays, axis)
