"""Averaged weights, such as an exponential moving average, as the stream `ema`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from capture.resume import Stateful
from capture.sources import Source
from capture.store.errors import MismatchError, UsageError


@dataclass(frozen=True)
class _Point:
    gradient: Sequence[Tensor]
    loss: None = None


class Average:
    """Gives the averaged weights of a model to a `Recorder`; the loop keeps averaging them.

    Args:
        averaged: `torch.optim.swa_utils.AveragedModel` or any module whose parameters are the
            averages of those of `model`, in the same order.
        model: The model that is trained; tells which parameters are trained.

    Row t of the stream is the average as it is before update t. Resume states hold `averaged` too,
    so that a resumed loop goes on averaging from where it was.

    Raises:
        UsageError: One of the two is no module.
        MismatchError: The parameters of the two differ in number or shape.
    """

    batches = None

    def __init__(self, averaged: nn.Module, model: nn.Module) -> None:
        if not isinstance(averaged, nn.Module) or not isinstance(model, nn.Module):
            raise UsageError(
                "an average and its model must both be torch.nn.Module",
                where=f"Average({type(averaged).__name__}, {type(model).__name__})",
                fix="give Average(averaged, model)",
            )
        pairs = list(zip(model.parameters(), averaged.parameters(), strict=False))
        alike = len(list(model.parameters())) == len(list(averaged.parameters()))
        if not alike or any(one.shape != other.shape for one, other in pairs):
            raise MismatchError(
                "the averaged model has not the parameters of the model",
                where=type(averaged).__name__,
                fix="give an average of this very model",
            )
        self.averaged = averaged
        self._point = _Point([other for one, other in pairs if one.requires_grad])

    def measure(self, batch: int | None) -> _Point:
        """Give the averages as they are now, by trainable tensor."""
        return self._point

    def describe(self) -> dict[str, Any]:
        """What a run remembers of it."""
        return {"kind": "average"}


def with_averages(
    state: Mapping[str, Stateful], sources: Mapping[str, Source]
) -> dict[str, Stateful]:
    """Return `state` with the averages that sources give, which a resumed loop goes on with.

    Each is called ``sources[NAME]``; one that `state` has already stays under its own name.
    """
    averages = {
        f"sources[{name}]": source.averaged
        for name, source in sources.items()
        if isinstance(source, Average)
    }
    known = {id(entry) for entry in state.values()}
    return {**state, **{name: each for name, each in averages.items() if id(each) not in known}}
