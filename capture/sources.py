"""Sources: where the streams of a recorder come from that are not the training's own step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from capture.schedule import Schedule
from capture.store import TensorTable, UsageError
from capture.store.layout import WEIGHTS
from capture.streams import STREAMS


class Measured(Protocol):
    """The mean loss of a batch and its gradient by tensor, `None` where a tensor got none."""

    @property
    def loss(self) -> float | None:
        """The mean loss, `None` where there is none."""

    @property
    def gradient(self) -> Sequence[Tensor | None]:
        """Its gradient, in the order of the trainable tensors."""


class Source(Protocol):
    """Where a stream comes from that is not the training's own; `batches` is K or `None`.

    It must leave model, gradients and random numbers as they were.
    """

    @property
    def batches(self) -> int | None:
        """K, the number of batches in each row; `None` without such an axis."""

    def measure(self, batch: int | None) -> Measured:
        """Measure one batch at the model's current weights."""

    def describe(self) -> dict[str, Any]:
        """What the run remembers of it, as JSON."""


def require_sources(
    sources: Mapping[str, Source], schedules: Mapping[str, Schedule]
) -> dict[str, Source]:
    """Check that streams and sources belong together, and return the sources.

    Raises `UsageError` for a stream without its source, a source without its stream or in the
    place of a stream of the training itself, and for what is no source.
    """
    own = (WEIGHTS, *STREAMS)
    for name in schedules:
        if name not in own and name not in sources:
            raise UsageError(
                "a loop's own step does not give this stream",
                where=name,
                fix=f"give Recorder(…, sources={{{name!r}: …}}), or add it later by capture probe",
            )
    for name, source in sources.items():
        where = f"sources[{name!r}]"
        if name in own:
            raise UsageError("the training itself gives this stream", where=where, fix="rename it")
        if name not in schedules:
            fix = f"name {name} in Recorder(…, gradients=…) too"
            raise UsageError("a source whose stream is not asked for", where=where, fix=fix)
        batches = getattr(source, "batches", 0)
        counted = batches is None or (isinstance(batches, int) and batches > 0)
        if not counted or not callable(getattr(source, "measure", None)):
            raise UsageError(
                f"a {type(source).__name__} is no source",
                where=where,
                fix="give it batches (a number above 0, or None), measure(batch) and describe()",
            )
    return dict(sources)


def gradient_of(measured: Any, name: str, table: TensorTable) -> Sequence[Tensor | None]:
    """Return what a source measured, if it is one tensor for each trainable one of `table`.

    Raises `UsageError` naming the stream and the tensor.
    """
    found = getattr(measured, "gradient", None)
    if not isinstance(found, Sequence) or len(found) != len(table.parameters):
        count = len(found) if isinstance(found, Sequence) else "no sequence"
        raise _unfit(f"{len(table.parameters)} tensors are expected, found {count}", name)
    for entry, tensor in zip(table.parameters, found, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise _unfit(f"{entry.name!r} must be a tensor or None, found a {kind}", name)
        if tuple(tensor.shape) != entry.shape:
            shapes = f"shape {list(entry.shape)}, found {list(tensor.shape)}"
            raise _unfit(f"{entry.name!r} must have {shapes}", name)
    return found


def loss_of(measured: Any, name: str) -> float | None:
    """Return the loss that a source measured, if any. Raises `UsageError` for no number."""
    loss = getattr(measured, "loss", None)
    try:
        return None if loss is None else float(loss)
    except (TypeError, ValueError):
        raise _unfit(f"the loss must be a number or None, found {loss!r}", name) from None


def _unfit(what: str, name: str) -> UsageError:
    return UsageError(what, where=f"sources[{name!r}].measure(…)", fix="correct the source")
