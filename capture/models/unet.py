"""U-Net with BatchNorm (Ronneberger et al., 2015), a class for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from capture.arguments import require_whole
from capture.models.segnet import require_divisible

# Times that the image is halved on the way down.
LEVELS = 4


class UNet(nn.Module):
    """A way down that halves the image and doubles the channels, and one up that sees both."""

    def __init__(self, input_channels: int, num_classes: int, channels: int) -> None:
        super().__init__()
        sizes = [channels * 2**level for level in range(LEVELS + 1)]
        self.stem = _double(input_channels, channels)
        self.down = nn.ModuleList(_double(shallow, deep) for shallow, deep in pairwise(sizes))
        sizes.reverse()
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(deep, shallow, 2, 2) for deep, shallow in pairwise(sizes)
        )
        self.merge = nn.ModuleList(_double(2 * shallow, shallow) for shallow in sizes[1:])
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, channels, H, W]`` to logits ``[N, num_classes, H, W]``; 16 divides H and W."""
        passed = [self.stem(x)]
        for down in self.down:
            passed.append(down(max_pool2d(passed[-1], 2)))
        y = passed.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            y = merge(torch.cat([up(y), passed.pop()], 1))
        logits: Tensor = self.head(y)
        return logits


def unet(input_shape: Sequence[int], num_classes: int, *, width: float = 1.0) -> UNet:
    """Make a U-Net whose first level has ``32 * width`` channels, its fifth 16 times as many.

    That of the paper has 3 input channels and 6 classes: 7,763,206 parameters. Raises `UsageError`
    where 16 does not divide the height and the width of the image.
    """
    require_divisible("unet", input_shape, 2**LEVELS)
    require_whole("32 * width, rounded,", round(32 * width), 1)
    return UNet(input_shape[0], num_classes, round(32 * width))


def _double(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
