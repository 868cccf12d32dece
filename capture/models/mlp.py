"""A multilayer perceptron with ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from capture.arguments import require_whole


def mlp(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: float = 1.0,
    hidden: int = 256,
    depth: int = 2,
) -> nn.Sequential:
    """Make `depth` hidden layers of ``hidden * width`` units.

    The default suits 8×8 digits (85,002 parameters); that of the paper has ``hidden=4096`` and
    ``depth=3`` (46,190,602 parameters for 3×32×32 inputs and 10 classes).
    """
    require_whole("hidden", hidden, 1)
    require_whole("depth", depth, 0)
    require_whole("hidden * width, rounded,", round(hidden * width), 1)
    sizes = [math.prod(input_shape), *[round(hidden * width)] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))
