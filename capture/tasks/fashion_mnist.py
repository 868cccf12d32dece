"""Fashion-MNIST: 60,000 pictures of clothes of 28×28 grey pixels train, 10,000 are held out."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.tasks.classification import ByteImages, Classification, channel_moments
from capture.tasks.folder import missing, require_folder, unreadable

SIDE = 28
# Names of the files for each part, and how many images it has in full.
PARTS = {"train": 60_000, "t10k": 10_000}
FILES = {part: (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in PARTS}

logger = logging.getLogger("capture")


class FashionMnist(Classification):
    """Classify pictures of clothes."""

    defaults: Mapping[str, Any] = {"model": "mlp", "batch_size": 128, "epochs": 20}
    model_args: Mapping[str, Any] = {"input_shape": (1, SIDE, SIDE), "num_classes": 10}

    def __init__(self, folder: Path) -> None:
        images, labels = _tensors(folder, "train")
        moments = channel_moments(images)
        self.train = ByteImages(images, labels, *moments)
        self.heldout = ByteImages(*_tensors(folder, "t10k"), *moments)


def fashion_mnist(data_root: str | None = None) -> FashionMnist:
    """Make the task of the files in `data_root`. Raises `UsageError` or `InputError`."""
    return FashionMnist(require_folder("fashion-mnist", data_root))


def read_part(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the images of ``train`` or ``t10k``, uint8 ``[N, 28, 28]``, and their labels ``[N]``.

    A part with fewer images than there should be is read with a warning. Raises `InputError`.
    """
    images_file, labels_file = (find_file(folder, name) for name in FILES[part])
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if images.shape != (len(labels), SIDE, SIDE) or not len(labels):
        shape = f"images of shape {images.shape}, expected {(len(labels), SIDE, SIDE)}"
        raise unreadable("fashion-mnist", f"{shape} for as many labels", images_file)
    if labels.max() > 9:
        raise unreadable("fashion-mnist", "labels other than the numbers 0 to 9", labels_file)
    if len(labels) < PARTS[part]:
        count = f"{len(labels):,} of {PARTS[part]:,}"
        logger.warning("only a part of fashion-mnist is there, %s images: %s", count, images_file)
    return images, labels


def find_file(folder: Path, name: str) -> Path:
    """Return the path of this file, compressed or not. Raises `InputError`."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    every = ", ".join(name for names in FILES.values() for name in names)
    raise missing("fashion-mnist", f"the files {every} (or these with .gz)", folder)


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes: 0 0 8 D, D sizes as big-endian uint32, the bytes themselves."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise unreadable("fashion-mnist", f"cannot be read ({error})", path) from None
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise unreadable("fashion-mnist", f"no IDX file of bytes in {dimensions} dimensions", path)
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    if len(content) - start != math.prod(shape):
        size = f"{len(content) - start:,} bytes of data, expected {math.prod(shape):,}"
        raise unreadable("fashion-mnist", size, path)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _tensors(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[N, 1, 28, 28]`` and labels int64 ``[N]``, both writable as torch wants."""
    images, labels = read_part(folder, part)
    return torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64))
