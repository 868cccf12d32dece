"""CamVid: views from a driving car, 480×360 pixels, eleven classes, as SegNet's authors divided it.

The folder holds ``train.txt`` and ``val.txt``, a line ``train/NAME.png trainannot/NAME.png`` for
each image; of longer paths only the last two parts count. Masks hold an index for each pixel: 0 to
10 are the classes, 11 is ignored.

Rows and columns are added below and to the right until 32 divides both, as U-Net and SegNet need:
480×360 becomes 480×384. What is added has the mean colour and is ignored. The images are
standardised by mean and deviation of each channel over the training images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from capture.store.errors import InputError
from capture.tasks.folder import advice, require_folder
from capture.tasks.segmentation import (
    IGNORED,
    Labelled,
    PixelLoss,
    Scale,
    labelled,
    read_image,
    read_indices,
    scale_of,
)

logger = logging.getLogger("capture")

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
VOID = 11

# Images in the whole data set, by list.
IMAGES = {"train": 367, "val": 101}
DIVISOR = 32

FIX = advice("camvid")


class Views:
    """Whole images, padded."""

    def __init__(self, images: Sequence[Labelled], scale: Scale) -> None:
        self.images = images
        self.scale = scale

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image, float32 ``[3, H, W]``, and mask, int64 ``[H, W]``; 32 divides H and W."""
        entry = self.images[index]
        image, mask = self.scale.sample(entry.image, entry.mask)
        height, width = mask.shape
        margins = (0, -width % DIVISOR, 0, -height % DIVISOR)
        return pad(image, margins), pad(mask, margins, value=IGNORED)


class CamVid(PixelLoss):
    """Classify each pixel of a view; 367 images train, 101 are held out."""

    defaults: Mapping[str, Any] = {"model": "segnet", "batch_size": 4, "epochs": 50}

    def __init__(self, train: Sequence[Labelled], validation: Sequence[Labelled]) -> None:
        scale = scale_of(train)
        self.train = Views(train, scale)
        self.heldout = Views(validation, scale) if validation else None
        shape = tuple(self.train[0][0].shape)
        self.model_args = {"input_shape": shape, "num_classes": len(CLASSES)}


def camvid(data_root: str | None = None) -> CamVid:
    """Read the images under `data_root`, all of them into memory (about 320 MB).

    A part of them is enough, and a warning says what is missing. Raises `UsageError` for no folder
    and `InputError` for files that are not what they should be, or none to train on.
    """
    return CamVid(*read_views(require_folder("camvid", data_root)))


def read_views(folder: Path) -> tuple[list[Labelled], list[Labelled]]:
    """Read the images that train and those that validate; warns where some are missing.

    Raises `InputError` where none trains, and for files that are not what they should be.
    """
    train, validation = (_read_list(folder, part) for part in IMAGES)
    if not train:
        expected = "no training image of CamVid, expected train.txt with its lines"
        raise InputError(expected, where=folder, fix=FIX)
    if not validation:
        logger.warning("no validation image of CamVid in %s: nothing is held out", folder)
    first = train[0]
    for entry in (*train, *validation):
        if entry.mask.shape != first.mask.shape:
            raise InputError(f"another size than {first.file.name}", where=entry.file, fix=FIX)
    return train, validation


def read_classes(file: Path) -> NDArray[np.int8]:
    """Read a mask as classes, int8 ``[H, W]``. Raises `InputError` for indices above 11."""
    indices = read_indices(file)
    if indices.size and indices.max() > VOID:
        raise InputError(f"{indices.max()} is no index of a mask (0 to {VOID})", where=file)
    mask = indices.astype(np.int8)
    mask[mask == VOID] = IGNORED
    return mask


def _read_list(folder: Path, part: str) -> list[Labelled]:
    file = folder / f"{part}.txt"
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    images = [_read_line(folder, file, line) for line in lines if line.strip()]
    if images and len(images) < IMAGES[part]:
        logger.warning("%s lists %d of the %d images", file, len(images), IMAGES[part])
    return images


def _read_line(folder: Path, file: Path, line: str) -> Labelled:
    paths = [Path(*Path(path).parts[-2:]) for path in line.split()]
    if len(paths) != 2:
        raise InputError(f"expected an image and a mask in a line, found {line!r}", where=file)
    image_file, mask_file = (folder / path for path in paths)
    return labelled(image_file, read_image(image_file), mask_file, read_classes(mask_file))
