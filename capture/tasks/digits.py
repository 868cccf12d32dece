"""Handwritten digits: 1,797 real images of 8×8 pixels that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

# The split never changes, so that runs of any seed train and test on the same images.
SPLIT_SEED = 1
TRAIN_SHARE = 0.8


class Digits:
    """Classify the digits 0 to 9; 1,437 images train, 360 are held out."""

    defaults: Mapping[str, Any] = {"model": "mlp", "batch_size": 64, "epochs": 20}
    model_args: Mapping[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10}

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images).float()[:, None]
        labels = torch.from_numpy(data.target).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        split = int(TRAIN_SHARE * len(labels))
        train, heldout = order[:split], order[split:]
        mean, deviation = images[train].mean(), images[train].std()
        images = (images - mean) / deviation
        self.train = TensorDataset(images[train], labels[train])
        self.heldout = TensorDataset(images[heldout], labels[heldout])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy."""
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Return the mean cross-entropy and the fraction of right answers."""
        images, labels = batch
        logits = model(images)
        return {
            "loss": functional.cross_entropy(logits, labels),
            "accuracy": (logits.argmax(1) == labels).float().mean(),
        }


def digits(data_root: str | None = None) -> Digits:
    """Make the task; it needs no files, so `data_root` is not used."""
    return Digits()
