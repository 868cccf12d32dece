"""CIFAR-10: 50,000 photographs of 32×32 pixels, of which 80 % train and 20 % are held out.

The official test images take no part. Read are the files of the binary version (a record is one
byte of label and 3072 of pixels) or, where there are none, those of the Python version.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.tasks.classification import ByteImages, Classification, channel_moments, split_of
from capture.tasks.folder import missing, require_folder, unreadable

# The split never changes, so that runs of any seed train and test on the same images.
SPLIT_SEED = 1
TRAIN_SHARE = 0.8

PADDING = 4
PIXELS = 3 * 32 * 32
BATCHES = 5
BATCH_RECORDS = 10_000
# What the two archives call the folder of the files.
FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")

logger = logging.getLogger("capture")

Records = tuple[NDArray[np.uint8], NDArray[np.int64]]


class Cifar10(Classification):
    """Classify photographs; training images are cropped at random out of a black frame."""

    defaults: Mapping[str, Any] = {"model": "resnet18", "batch_size": 256, "epochs": 190}
    model_args: Mapping[str, Any] = {"input_shape": (3, 32, 32), "num_classes": 10}

    def __init__(self, folder: Path) -> None:
        pixels, classes = read_cifar10(folder)
        images, labels = torch.from_numpy(pixels), torch.from_numpy(classes)
        train, heldout = split_of(len(labels), TRAIN_SHARE, SPLIT_SEED)
        shown = images[train]
        moments = channel_moments(shown)
        self.train = ByteImages(shown, labels[train], *moments)
        self.heldout = ByteImages(images[heldout], labels[heldout], *moments)

    def augment(
        self, sample: tuple[Tensor, int], generator: np.random.Generator
    ) -> tuple[Tensor, int]:
        """Return a crop of the size of the image, which has got 4 black pixels on every side."""
        image, label = sample
        height, width = image.shape[1:]
        black = self.train.black[:, None, None]
        framed = black.repeat(1, height + 2 * PADDING, width + 2 * PADDING)
        framed[:, PADDING:-PADDING, PADDING:-PADDING] = image
        top, left = generator.integers(0, 2 * PADDING + 1, 2).tolist()
        return framed[:, top : top + height, left : left + width], label


def cifar10(data_root: str | None = None) -> Cifar10:
    """Make the task of the files in `data_root`. Raises `UsageError` or `InputError`."""
    return Cifar10(require_folder("cifar10", data_root))


def read_cifar10(folder: Path) -> Records:
    """Read all training images there are, uint8 ``[N, 3, 32, 32]``, and their labels ``[N]``.

    A part of the data set is read with a warning. Raises `InputError`.
    """
    files = find_batches(folder)
    if not files:
        expected = "data_batch_1.bin to data_batch_5.bin, or the same without .bin"
        raise missing("cifar10", expected, folder)
    parts = [_read_binary(file) if file.suffix else _read_pickle(file) for file in files]
    images = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([classes for _, classes in parts])
    if len(labels) < BATCHES * BATCH_RECORDS:
        count = f"{len(labels):,} of {BATCHES * BATCH_RECORDS:,}"
        logger.warning("only a part of cifar10 is there, %s images: %s", count, files[0].parent)
    return images, labels


def find_batches(folder: Path) -> list[Path]:
    """Return the files with training images in order, binary ones rather than pickles."""
    for suffix in (".bin", ""):
        for name in FOLDERS:
            named = (folder / name / f"data_batch_{i + 1}{suffix}" for i in range(BATCHES))
            if files := [file for file in named if file.is_file()]:
                return files
    return []


def _read_binary(file: Path) -> Records:
    content = np.fromfile(file, np.uint8)
    count, rest = divmod(content.size, 1 + PIXELS)
    if rest or not count:
        size = f"{content.size:,} bytes are no whole number of records of {1 + PIXELS}"
        raise unreadable("cifar10", size, file)
    records = content.reshape(count, 1 + PIXELS)
    return _checked(file, records[:, 1:], records[:, 0].astype(np.int64))


def _read_pickle(file: Path) -> Records:
    try:
        with file.open("rb") as stream:
            content = ArrayUnpickler(stream, encoding="bytes").load()
        pixels, labels = content[b"data"], np.array(content[b"labels"])
    except Exception as error:  # damaged pickles raise nearly anything
        reason = f"no pickle of CIFAR-10 ({type(error).__name__}: {error})"
        raise unreadable("cifar10", reason, file) from error
    return _checked(file, pixels, labels)


def _checked(file: Path, pixels: Any, labels: Any) -> Records:
    """Raise `InputError` for what are not bytes of pixels ``[N, 3072]`` with labels 0 to 9."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise unreadable("cifar10", "the data are no array of bytes", file)
    if pixels.shape != (len(labels), PIXELS) or labels.ndim != 1 or not len(labels):
        shapes = f"data of shape {pixels.shape} with labels of shape {labels.shape}"
        raise unreadable("cifar10", f"{shapes}, expected [N, {PIXELS}] and [N]", file)
    if labels.dtype != np.int64 or labels.min() < 0 or labels.max() > 9:
        raise unreadable("cifar10", "labels other than the numbers 0 to 9", file)
    return pixels, labels


class ArrayUnpickler(pickle.Unpickler):
    """Reads lists, dicts, text, numbers and numpy arrays; whatever else a pickle asks for fails."""

    # How numpy makes an array out of a pickle; its module has had two names.
    _reconstruct = np.empty(0).__reduce__()[0]
    _allowed: Mapping[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    }

    def find_class(self, module: str, name: str, /) -> Any:
        """Return what is allowed by this name."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return self._allowed[module, name]
