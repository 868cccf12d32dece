"""ISPRS Vaihingen: aerial images of 9 cm a pixel (infrared, red, green), six classes of ground.

Two layouts are read. That of ISPRS, where the number of the area tells training from validation:

    top/top_mosaic_09cm_area{N}.tif
    gts_for_participants/top_mosaic_09cm_area{N}.tif        masks in the colours below

And that of converted windows, with indices as masks: 0 is ignored, 1 to 6 are the classes:

    img_dir/*.png, ann_dir/*.png                            named area{N}_…, divided by number
    img_dir/{train,val}/*.png, ann_dir/{train,val}/*.png    divided by folder, whatever the number

Areas on neither list are not read. A training sample is a window at a random place of a training
image, flipped at random; a held-out one is one of the windows side by side in a validation image,
from its upper left corner on, what remains at the lower and right edges left out. The images are
standardised by mean and deviation of each channel over the training images.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from capture.arguments import require_whole
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

TRAIN_AREAS = (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26)
VALIDATION_AREAS = (28, 30, 32, 34, 37)

# Class: its name and its colour in the masks of ISPRS.
CLASSES = ("impervious", "building", "low vegetation", "tree", "car", "clutter")
COLOURS = (0xFFFFFF, 0x0000FF, 0x00FFFF, 0x00FF00, 0xFFFF00, 0xFF0000)
# The edges of objects, in the masks that leave them out.
IGNORED_COLOUR = 0x000000

FIX = advice("vaihingen")


class Windows:
    """The windows of ``size * size`` pixels that lie side by side in the images."""

    def __init__(self, images: Sequence[Labelled], size: int, scale: Scale) -> None:
        self.images = images
        self.size = size
        self.scale = scale
        self.places = [
            (number, row, column)
            for number, entry in enumerate(images)
            for row in range(0, entry.mask.shape[0] - size + 1, size)
            for column in range(0, entry.mask.shape[1] - size + 1, size)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image, float32 ``[3, size, size]``, and mask, int64 ``[size, size]``."""
        number, row, column = self.places[index]
        entry = self.images[number]
        window = np.s_[row : row + self.size, column : column + self.size]
        return self.scale.sample(entry.image[window], entry.mask[window])


class Vaihingen(PixelLoss):
    """Random windows of the training images; an epoch is `windows` of them.

    A sample of `train` is only a number: `augment` cuts the window, at a place that it draws.
    """

    defaults: Mapping[str, Any] = {"model": "unet", "batch_size": 10, "epochs": 26}

    def __init__(
        self, train: Sequence[Labelled], validation: Sequence[Labelled], windows: int, size: int
    ) -> None:
        self.images = train
        self.size = size
        self.scale = scale_of(train)
        self.model_args = {"input_shape": (3, size, size), "num_classes": len(CLASSES)}
        self.train = range(windows)
        self.heldout = Windows(validation, size, self.scale) if validation else None
        areas = np.array([entry.mask.size for entry in train], float)
        self.shares = areas / areas.sum()

    def augment(self, sample: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Cut a random window: image, float32 ``[3, size, size]``, mask, int64 ``[size, size]``.

        An image is drawn by its area, the place in it and each of the two flips uniformly. The
        number `sample` has no influence.
        """
        entry = self.images[generator.choice(len(self.images), p=self.shares)]
        height, width = entry.mask.shape
        row, column = generator.integers((height - self.size + 1, width - self.size + 1))
        down, right = 1 - 2 * generator.integers(2, size=2)
        window = np.s_[row : row + self.size, column : column + self.size]
        flipped = np.s_[::down, ::right]
        return self.scale.sample(entry.image[window][flipped], entry.mask[window][flipped])


def vaihingen(data_root: str | None = None, *, windows: int = 10_000, size: int = 256) -> Vaihingen:
    """Read the images under `data_root`, all of them into memory (about 320 MB).

    A part of them is enough, and a warning says what is missing. Raises `UsageError` for wrong
    arguments and `InputError` for files that are not what they should be, or none to train on.
    """
    require_whole("windows", windows, 1)
    require_whole("size", size, 1)
    train, validation = read_tiles(require_folder("vaihingen", data_root))
    for entry in (*train, *validation):
        if min(entry.mask.shape) < size:
            found = f"{entry.mask.shape[0]} by {entry.mask.shape[1]} pixels"
            raise InputError(f"no window of {size} fits into {found}", where=entry.file)
    return Vaihingen(train, validation, windows, size)


def read_tiles(folder: Path) -> tuple[list[Labelled], list[Labelled]]:
    """Read the images that train and those that validate; warns where some are missing.

    Raises `InputError` where none trains, and for files that are not what they should be.
    """
    if (folder / "top").is_dir():
        pairs = [_of_isprs(folder, areas) for areas in (TRAIN_AREAS, VALIDATION_AREAS)]
        read = read_colours
    else:
        pairs = _converted(folder)
        read = read_classes
    train, validation = ([_labelled(*pair, read) for pair in part] for part in pairs)
    if not train:
        raise InputError(
            "no training image of Vaihingen, expected top/top_mosaic_09cm_area{N}.tif with N of "
            f"{', '.join(map(str, TRAIN_AREAS))}, or img_dir/*.png",
            where=folder,
            fix=FIX,
        )
    if not validation:
        logger.warning("no validation image of Vaihingen in %s: nothing is held out", folder)
    return train, validation


def read_colours(file: Path) -> NDArray[np.int8]:
    """Read a mask of colours as classes, int8 ``[H, W]``. Raises `InputError` for other colours."""
    red, green, blue = np.moveaxis(read_image(file).astype(np.int32), 2, 0)
    colours = red << 16 | green << 8 | blue
    mask = np.full(colours.shape, IGNORED, np.int8)
    known = colours == IGNORED_COLOUR
    for index, colour in enumerate(COLOURS):
        here = colours == colour
        mask[here] = index
        known |= here
    if not known.all():
        colour = int(colours[~known][0])
        wanted = ", ".join(f"#{known:06x}" for known in COLOURS)
        raise InputError(f"#{colour:06x} is no colour of a mask ({wanted})", where=file, fix=FIX)
    return mask


def read_classes(file: Path) -> NDArray[np.int8]:
    """Read a mask of indices as classes, int8 ``[H, W]``. Raises `InputError` for those above 6."""
    indices = read_indices(file)
    if indices.size and indices.max() > len(CLASSES):
        raise InputError(
            f"{indices.max()} is no index of a mask (0 to {len(CLASSES)})", where=file, fix=FIX
        )
    return indices.astype(np.int8) - np.int8(1)


Pairs = list[tuple[Path, Path]]


def _of_isprs(folder: Path, areas: Sequence[int]) -> Pairs:
    names = [f"top_mosaic_09cm_area{area}.tif" for area in areas]
    here = [name for name in names if (folder / "top" / name).is_file()]
    if here and len(here) < len(names):
        missing = ", ".join(name for name in names if name not in here)
        logger.warning("%s has %d of %d areas: no %s", folder, len(here), len(names), missing)
    return [(folder / "top" / name, folder / "gts_for_participants" / name) for name in here]


def _converted(folder: Path) -> list[Pairs]:
    images, masks = folder / "img_dir", folder / "ann_dir"
    if (images / "train").is_dir():
        return [_pairs(images / part, masks / part) for part in ("train", "val")]
    pairs = _pairs(images, masks)
    areas = (TRAIN_AREAS, VALIDATION_AREAS)
    return [[pair for pair in pairs if _area(pair[0]) in part] for part in areas]


def _pairs(images: Path, masks: Path) -> Pairs:
    return [(file, masks / file.name) for file in sorted(images.glob("*.png"))]


def _area(file: Path) -> int | None:
    number = re.search(r"area(\d+)", file.name)
    return int(number[1]) if number else None


def _labelled(file: Path, mask_file: Path, read: Callable[[Path], NDArray[np.int8]]) -> Labelled:
    return labelled(file, read_image(file), mask_file, read(mask_file))
