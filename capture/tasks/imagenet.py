"""ImageNet, or any images in folders named after their class: ``train/CLASS/*.jpeg``, ``val/…``.

Images are decoded when they are asked for. Training images are cropped at random, resized and
mirrored half of the time; held-out ones are resized and cropped in the centre, as is usual.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from capture.arguments import require_whole
from capture.store.errors import InputError
from capture.tasks.classification import Classification
from capture.tasks.folder import missing, require_folder

CLASSES = 1000
SUFFIXES = (".jpeg", ".jpg", ".png")
# Of the red, green and blue of ImageNet's training images, black being 0 and white 1.
MEAN = torch.tensor([0.485, 0.456, 0.406])
DEVIATION = torch.tensor([0.229, 0.224, 0.225])

# A random crop has this share of the area, and this ratio of width to height.
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# The shorter side of a held-out image before its centre is cropped, for crops of 224.
RESIZED, CROPPED = 256, 224

logger = logging.getLogger("capture")

Box = tuple[int, int, int, int]  # left, top, right, bottom


class ImageFiles:
    """Images by their paths, decoded one at a time."""

    def __init__(self, folder: Path, labels: Mapping[str, int]) -> None:
        self.files: list[str] = []
        self.labels: list[int] = []
        for name, label in labels.items():
            found = image_files(folder / name)
            self.files += found
            self.labels += [label] * len(found)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Return an image as it is, uint8 ``[3, H, W]``, and its label. Raises `InputError`."""
        pixels = np.array(read_image(self.files[index]))
        return torch.from_numpy(pixels).permute(2, 0, 1), self.labels[index]


class CentredImages:
    """Images for evaluation: resized, cropped in the centre, standardised."""

    def __init__(self, images: ImageFiles, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Return an image, float32 ``[3, size, size]``, and its label. Raises `InputError`."""
        image = read_image(self.images.files[index])
        return standardised(centre(image, self.size)), self.images.labels[index]


class Imagenet(Classification):
    """Classify photographs of any size, of which the model sees ``size × size`` pixels."""

    defaults: Mapping[str, Any] = {"model": "resnet50", "batch_size": 256, "epochs": 90}

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self.train, heldout = read_folders(folder)
        self.heldout = CentredImages(heldout, size)
        num_classes = max(self.train.labels) + 1
        self.model_args = {"input_shape": (3, size, size), "num_classes": num_classes}

    def augment(
        self, sample: tuple[Tensor, int], generator: np.random.Generator
    ) -> tuple[Tensor, int]:
        """Crop at random, resize, mirror: uint8 ``[3, H, W]`` to float32 ``[3, size, size]``."""
        pixels, label = sample
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        cropped = image.crop(random_box(image.width, image.height, generator))
        resized = cropped.resize((self.size, self.size), Image.Resampling.BILINEAR)
        finished = standardised(resized)
        return finished.flip(2) if generator.random() < 0.5 else finished, label


def imagenet(data_root: str | None = None, size: int = CROPPED) -> Imagenet:
    """Make the task of the folders in `data_root`. Raises `UsageError` or `InputError`."""
    require_whole("size", size, 1)
    return Imagenet(require_folder("imagenet", data_root), size)


def read_folders(folder: Path) -> tuple[ImageFiles, ImageFiles]:
    """List the images for training and those held out, the classes in alphabetical order.

    Other than 1,000 classes are read with a warning. Raises `InputError`.
    """
    classes, held = class_names(folder / "train"), class_names(folder / "val")
    if strangers := sorted(set(held) - set(classes)):
        fix = "sort the images of val/ into folders named like those of train/"
        raise InputError("a class that train/ lacks", where=folder / "val" / strangers[0], fix=fix)
    if len(classes) != CLASSES:
        count = f"{len(classes):,} classes rather than {CLASSES:,}"
        logger.warning("not all of imagenet is there, %s: %s", count, folder)
    labels = {name: label for label, name in enumerate(classes)}
    train = ImageFiles(folder / "train", labels)
    return train, ImageFiles(folder / "val", {name: labels[name] for name in held})


def class_names(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`. Raises `InputError` where there are none."""
    entries = folder.iterdir() if folder.is_dir() else ()
    names = sorted(path.name for path in entries if path.is_dir())
    if not names:
        raise missing("imagenet", "train/CLASS/ and val/CLASS/ with images", folder)
    return names


def image_files(folder: Path) -> list[str]:
    """Return the paths of the images in a class's folder. Raises `InputError` for none."""
    files = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise missing("imagenet", "images (.jpeg, .jpg or .png)", folder)
    return files


def read_image(path: str) -> Image.Image:
    """Decode an image to RGB. Raises `InputError`."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        fix = "replace it by a sound copy, or delete it"
        raise InputError(f"cannot be decoded ({error})", where=path, fix=fix) from None


def random_box(width: int, height: int, generator: np.random.Generator) -> Box:
    """Draw a part of an image by area and ratio; the largest one in the middle if none fits."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(*AREA)
        ratio = math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(0, width - w + 1))
            top = int(generator.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    return middle_box(width, height, w, h)


def middle_box(width: int, height: int, w: int, h: int) -> Box:
    """Return the part of ``w × h`` pixels in the middle."""
    left, top = round((width - w) / 2), round((height - h) / 2)
    return left, top, left + w, top + h


def centre(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size * 256 / 224``, then crop the middle ``size × size``."""
    shorter = round(size * RESIZED / CROPPED)
    scale = shorter / min(image.size)
    width, height = (max(shorter, int(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop(middle_box(width, height, size, size))


def standardised(image: Image.Image) -> Tensor:
    """Return an image as float32 ``[3, H, W]``, ImageNet's mean being 0 and its deviation 1."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return ((pixels - MEAN[:, None, None]) / DEVIATION[:, None, None]).contiguous()
