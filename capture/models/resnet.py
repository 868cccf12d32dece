"""Residual networks with BatchNorm (He et al., 2016), for small and for large images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import relu

from capture.arguments import require_whole
from capture.store.errors import UsageError


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, channels_in, H, W]`` to ``[N, channels, H / stride, W / stride]``."""
        y = relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3×3 convolution between two of 1×1, beside a shortcut; the stride is on the 3×3 one."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = channels * self.expansion
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, channels_in, H, W]`` to ``[N, 4 * channels, H / stride, W / stride]``."""
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return relu(y + self.shortcut(x))


# Depth, in layers with weights: kind of block and number of blocks in each stage.
DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    8: (BasicBlock, (1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


# Up to this many pixels a side, an image keeps its size through the stem.
SMALL_IMAGE = 64


class ResNet(nn.Module):
    """A stem, stages of residual blocks that halve the image and double the channels, a head."""

    def __init__(
        self, input_channels: int, num_classes: int, depth: int, channels: int, stem: str
    ) -> None:
        super().__init__()
        block, counts = DEPTHS[depth]
        self.stem = _stem(input_channels, channels, stem)
        blocks: list[nn.Module] = []
        width = channels
        for stage, count in enumerate(counts):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(width, channels * 2**stage, stride))
                width = channels * 2**stage * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, channels, H, W]`` to logits ``[N, num_classes]``."""
        y: Tensor = self.blocks(self.stem(x))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


def resnet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: float = 1.0,
    depth: int = 8,
    channels: int = 16,
    stem: str = "small",
) -> ResNet:
    """Make a ResNet whose first stage has ``channels * width`` channels.

    The default suits 8×8 digits (77,754 parameters). ``depth=18, channels=64`` is ResNet-18 for
    32×32 images (11,173,962 parameters with 10 classes); ``stem="large"`` begins with a 7×7
    convolution and a pooling, for ImageNet.
    """
    require_whole("depth", depth, 1)
    if depth not in DEPTHS:
        known = ", ".join(str(known) for known in DEPTHS)
        raise UsageError(f"no resnet of depth {depth}", fix=f"known are {known}")
    require_whole("channels", channels, 1)
    require_whole("channels * width, rounded,", round(channels * width), 1)
    return ResNet(input_shape[0], num_classes, depth, round(channels * width), stem)


def published(
    depth: int,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: float = 1.0,
    channels: int = 64,
    stem: str | None = None,
) -> ResNet:
    """Make a ResNet of the published size; the size of the image decides on the stem."""
    fitting = "small" if max(input_shape[1:]) <= SMALL_IMAGE else "large"
    return resnet(
        input_shape, num_classes, width=width, depth=depth, channels=channels, stem=stem or fitting
    )


# Parameters: 11,173,962 for CIFAR-10; 11,689,512, 25,557,032 and 60,192,808 for ImageNet.
resnet18, resnet50, resnet152 = (partial(published, depth) for depth in (18, 50, 152))


def _stem(channels_in: int, channels: int, kind: str) -> nn.Sequential:
    if kind == "small":
        return nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
    if kind == "large":
        return nn.Sequential(
            nn.Conv2d(channels_in, channels, 7, 2, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
    raise UsageError(f"no stem {kind!r}", fix="known are small, large")


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    if stride == 1 and channels_in == channels_out:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
        nn.BatchNorm2d(channels_out),
    )
