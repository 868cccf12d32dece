"""SegNet (Badrinarayanan et al., 2017): VGG-16 without its head, then the same way back.

The pooling remembers where each maximum stood, and the way back puts it there again. That is
written here as a scatter: torch's `max_unpool2d` does the same, but says that it is not
deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from capture.arguments import require_whole
from capture.store.errors import UsageError

# Channels after each convolution, in multiples of the first; a pooling ends each stage.
STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))


class SegNet(nn.Module):
    """An encoder of 13 convolutions and a decoder of 13, each but the last with BatchNorm."""

    def __init__(self, input_channels: int, num_classes: int, channels: int) -> None:
        super().__init__()
        stages = [[channels * multiple for multiple in stage] for stage in STAGES]
        entries = [input_channels, *(stage[-1] for stage in stages[:-1])]
        self.encoder = nn.ModuleList(
            _stage([entry, *stage]) for entry, stage in zip(entries, stages, strict=True)
        )
        # Each stage back leads to where its way down began; the head does that for the first one.
        ends = [[], *([entry] for entry in entries[1:])]
        self.decoder = nn.ModuleList(
            _stage([*reversed(stage), *end])
            for stage, end in zip(reversed(stages), reversed(ends), strict=True)
        )
        self.head = nn.Conv2d(channels, num_classes, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, channels, H, W]`` to logits ``[N, num_classes, H, W]``; 32 divides H and W."""
        places = []
        for stage in self.encoder:
            x, place = max_pool2d(stage(x), 2, return_indices=True)
            places.append(place)
        for stage in self.decoder:
            x = stage(unpool(x, places.pop()))
        logits: Tensor = self.head(x)
        return logits


def segnet(input_shape: Sequence[int], num_classes: int, *, width: float = 1.0) -> SegNet:
    """Make a SegNet whose first stage has ``64 * width`` channels, its last 8 times as many.

    That of the paper has 3 input channels and 6 classes: 29,446,470 parameters, biases before
    BatchNorm among them. Raises `UsageError` where 32 does not divide height and width.
    """
    require_divisible("segnet", input_shape, 2 ** len(STAGES))
    require_whole("64 * width, rounded,", round(64 * width), 1)
    return SegNet(input_shape[0], num_classes, round(64 * width))


def unpool(x: Tensor, places: Tensor) -> Tensor:
    """Put ``[N, C, H, W]`` at its places in ``[N, C, 2 * H, 2 * W]``, with zeros around.

    The places are those of `max_pool2d`: int64, counted through the rows of the larger image.
    """
    n, c, h, w = x.shape
    empty = x.new_zeros(n, c, 4 * h * w)
    return empty.scatter(2, places.flatten(2), x.flatten(2)).reshape(n, c, 2 * h, 2 * w)


def require_divisible(model: str, input_shape: Sequence[int], divisor: int) -> None:
    """Raise `UsageError` where the shape is not ``(C, H, W)`` or `divisor` divides not H and W."""
    if len(input_shape) != 3 or any(size % divisor for size in input_shape[1:]):
        raise UsageError(
            f"the {model} needs images whose height and width are multiples of {divisor}",
            where=f"input_shape = {tuple(input_shape)}",
            fix="choose another size of the images, or another model",
        )


def _stage(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)
