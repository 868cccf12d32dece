"""What all tasks of one label per sample share: their loss, their metrics, samples in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Classification:
    """Loss and metrics for batches ``[images, labels]``, labels int64 ``[N]``."""

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


class ByteImages:
    """Images kept as bytes, a quarter of the memory, and standardised one at a time.

    images      uint8 ``[N, C, H, W]``
    labels      int64 ``[N]``
    mean        float32 ``[C]``, in bytes; so is `deviation`
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, deviation: Tensor) -> None:
        self.images, self.labels, self.mean, self.deviation = images, labels, mean, deviation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Return one image, float32 ``[C, H, W]`` of mean 0 and deviation 1, and its label."""
        image = (self.images[index] - self.mean[:, None, None]) / self.deviation[:, None, None]
        return image, int(self.labels[index])

    @property
    def black(self) -> Tensor:
        """What a pixel of zeros becomes: float32 ``[C]``."""
        return -self.mean / self.deviation


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel of uint8 ``[N, C, H, W]``: float32 ``[C]`` each.

    Exact up to the last rounding, since the values are counted and not summed.
    """
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().float()


def split_of(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of two parts of `count` samples, the first with this share of them."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first = int(share * count)
    return order[:first], order[first:]
