"""What tasks on text have in common: windows of a stream of tokens, and the loss over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset


@dataclass(frozen=True)
class Language:
    """Predict the next token at every position of a window.

    train, heldout  samples are a pair (inputs, targets), int64 `[window]` each
    digest          SHA-256, in hexadecimal, of the text that trains and then that held out
    """

    train: TensorDataset
    heldout: TensorDataset | None
    defaults: Mapping[str, Any]
    model_args: Mapping[str, Any]
    digest: str

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy over all target tokens, in nats."""
        inputs, targets = batch
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Return the mean cross-entropy and the fraction of tokens that were guessed right."""
        inputs, targets = batch
        logits = model(inputs).flatten(0, 1)
        return {
            "loss": functional.cross_entropy(logits, targets.flatten()),
            "accuracy": (logits.argmax(1) == targets.flatten()).float().mean(),
        }

    def loss_elements(self, batch: Any) -> int:
        """Return over how many target tokens the mean loss of this batch is taken."""
        targets: Tensor = batch[1]
        return targets.numel()


def windows(stream: Sequence[int] | Tensor, window: int) -> TensorDataset:
    """Cut a stream into pieces of `window` inputs, each with the token after it as its target.

    Every token but the first is a target once, up to the last partial window, which is dropped.
    """
    tokens = torch.as_tensor(stream, dtype=torch.int64)
    count = max(len(tokens) - 1, 0) // window
    inputs, targets = tokens[: count * window], tokens[1 : count * window + 1]
    return TensorDataset(inputs.view(count, window), targets.view(count, window))


def nonempty(dataset: TensorDataset) -> TensorDataset | None:
    """Return `None` for what has no samples, since there is no mean over them."""
    return dataset if len(dataset) else None
