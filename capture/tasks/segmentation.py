"""What the tasks that classify each pixel share: labelled images, and the loss over their pixels.

Legend: N images of a batch, C channels, H rows and W columns of pixels. A mask holds a class for
each pixel, or `IGNORED` for one that does not count: neither in the loss nor in the accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from capture.store.errors import InputError

IGNORED = -1


@dataclass(frozen=True)
class Labelled:
    """An image, uint8 ``[H, W, 3]``, its mask, int8 ``[H, W]``, and the file of the image."""

    file: Path
    image: NDArray[np.uint8]
    mask: NDArray[np.int8]


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each channel, on the scale of 0 to 255: float32 ``[3]``."""

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]

    def sample(self, image: NDArray[np.uint8], mask: NDArray[np.int8]) -> tuple[Tensor, Tensor]:
        """Return the standardised image, float32 ``[3, H, W]``, and the mask, int64 ``[H, W]``."""
        standardised = (image - self.mean) / self.deviation
        pixels = np.ascontiguousarray(np.moveaxis(standardised, 2, 0))
        return torch.from_numpy(pixels), torch.from_numpy(mask.astype(np.int64))


class PixelLoss:
    """Loss and metrics of a task whose batch is images, ``[N, C, H, W]``, and masks, ``[N, H, W]``.

    Each mean is over the pixels of the batch that count. Where none does, it is 0, and so is the
    gradient.
    """

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy."""
        images, masks = batch
        return _cross_entropy(model(images), masks)

    def loss_elements(self, batch: Any) -> int:
        """Return the number of pixels that the mean loss is over."""
        _, masks = batch
        return int((masks != IGNORED).sum())

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Return the mean cross-entropy and the fraction of the pixels that are right."""
        images, masks = batch
        logits = model(images)
        # No answer is IGNORED, so those pixels are never right.
        right = (logits.argmax(1) == masks).sum()
        return {"loss": _cross_entropy(logits, masks), "accuracy": right / _counted(masks)}


def read_image(file: Path) -> NDArray[np.uint8]:
    """Read an RGB image as uint8 ``[H, W, 3]``. Raises `InputError`."""
    pixels = _read(file)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        found = f"found {pixels.dtype} of shape {pixels.shape}"
        raise InputError(f"expected an RGB image of 8 bits, {found}", where=file)
    return pixels


def read_indices(file: Path) -> NDArray[np.uint8]:
    """Read a mask that holds an index for each pixel as uint8 ``[H, W]``. Raises `InputError`."""
    pixels = _read(file)
    if pixels.dtype != np.uint8 or pixels.ndim != 2:
        found = f"found {pixels.dtype} of shape {pixels.shape}"
        raise InputError(f"expected a mask of one channel of 8 bits, {found}", where=file)
    return pixels


def labelled(
    file: Path, image: NDArray[np.uint8], mask_file: Path, mask: NDArray[np.int8]
) -> Labelled:
    """Put an image and its mask together. Raises `InputError` where their sizes differ."""
    if image.shape[:2] != mask.shape:
        sizes = f"{image.shape[:2]}, the mask {mask.shape}"
        raise InputError(f"image and mask differ in size: the image is {sizes}", where=mask_file)
    return Labelled(file, image, mask)


def scale_of(images: Sequence[Labelled]) -> Scale:
    """Mean and deviation over all pixels of all images; a channel that is constant keeps unit 1."""
    counts = sum(
        np.stack([np.bincount(entry.image[..., c].ravel(), minlength=256) for c in range(3)])
        for entry in images
    )
    shares = counts / np.sum(counts, axis=1, keepdims=True)
    values = np.arange(256.0)
    mean = shares @ values
    deviation = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
    deviation[deviation == 0] = 1
    return Scale(mean.astype(np.float32), deviation.astype(np.float32))


def pixels_by_class(images: Sequence[Labelled], classes: Sequence[str]) -> dict[str, int]:
    """Count the pixels of each class, those that are ignored last."""
    counts = sum(
        np.bincount(entry.mask.ravel() - IGNORED, minlength=len(classes) + 1) for entry in images
    )
    ignored, *counted = np.broadcast_to(counts, len(classes) + 1).tolist()
    return {**dict(zip(classes, counted, strict=True)), "ignored": ignored}


def describe_images(kind: str, images: Sequence[Labelled], classes: Sequence[str]) -> Iterator[str]:
    """Say in lines how many images there are, and how many of their pixels are of each class."""
    counts = pixels_by_class(images, classes)
    yield f"{len(images):,} {kind} images, {sum(counts.values()):,} pixels"
    for name, count in counts.items():
        yield f"  {name:<16}{count:>16,}"


def _cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    # As a list of pixels: the loss of whole images has no deterministic form on CUDA.
    pixels = logits.movedim(1, -1).flatten(0, -2)
    total = functional.cross_entropy(pixels, masks.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / _counted(masks)


def _counted(masks: Tensor) -> Tensor:
    """Number of pixels that count, at least 1 to divide by."""
    return (masks != IGNORED).sum().clamp(min=1)


def _read(file: Path) -> NDArray[Any]:
    """Read a TIFF by tifffile and anything else by Pillow. Raises `InputError`."""
    try:
        return _read_tiff(file) if file.suffix.lower() == ".tif" else _read_by_pillow(file)
    except FileNotFoundError:
        raise InputError("a file is missing", where=file, fix="unpack the data again") from None
    # Pillow raises SyntaxError for a broken PNG, tifffile ValueError for a broken TIFF.
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(
            f"cannot read this image ({error})", where=file, fix="unpack the data again"
        ) from None


def _read_tiff(file: Path) -> NDArray[Any]:
    import tifffile

    try:
        return np.asarray(tifffile.imread(file))
    except ValueError:
        # A compressed one: tifffile needs imagecodecs for it, Pillow knows the usual kinds itself.
        return _read_by_pillow(file)


def _read_by_pillow(file: Path) -> NDArray[Any]:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image)
