"""Handwritten digits: 1,797 real images of 8×8 pixels that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import TensorDataset

from capture.tasks.classification import Classification, split_of

# The split never changes, so that runs of any seed train and test on the same images.
SPLIT_SEED = 1
TRAIN_SHARE = 0.8


class Digits(Classification):
    """Classify the digits 0 to 9; 1,437 images train, 360 are held out."""

    defaults: Mapping[str, Any] = {"model": "mlp", "batch_size": 64, "epochs": 20, "threads": 1}
    model_args: Mapping[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10}

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images).float()[:, None]
        labels = torch.from_numpy(data.target).long()
        train, heldout = split_of(len(labels), TRAIN_SHARE, SPLIT_SEED)
        mean, deviation = images[train].mean(), images[train].std()
        images = (images - mean) / deviation
        self.train = TensorDataset(images[train], labels[train])
        self.heldout = TensorDataset(images[heldout], labels[heldout])


def digits(data_root: str | None = None) -> Digits:
    """Make the task; it needs no files, so `data_root` is not used."""
    return Digits()
