"""Folders of images: crops against their definition, and real photographs."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from capture.models import build_model
from capture.store.errors import InputError, UsageError
from capture.tasks import build_task
from capture.tasks.imagenet import centre, random_box

MEAN = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)
DEVIATION = np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def pixels_of(image):
    """Back from the standardised image to bytes, float64 ``[3, H, W]``."""
    return (image.double().numpy() * DEVIATION + MEAN) * 255


@pytest.fixture
def folder(tmp_path):
    """Two classes; every image tells its place: red grows to the right, green downwards."""
    for part, count in (("train", 3), ("val", 2)):
        for blue, name in enumerate(("ants", "bees")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                array = np.zeros((120, 200, 3), np.uint8)
                array[..., 0] = np.arange(200)
                array[..., 1] = np.arange(120)[:, None]
                array[..., 2] = 100 * blue + number
                Image.fromarray(array).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def test_classes_are_numbered_by_name_and_images_come_undecorated(folder):
    (folder / "train" / "ants" / "notes.txt").touch()
    task = build_task("imagenet", data_root=str(folder))
    assert [task.train[i][1] for i in range(len(task.train))] == [0, 0, 0, 1, 1, 1]
    assert [task.heldout[i][1] for i in range(len(task.heldout))] == [0, 0, 1, 1]
    image, _ = task.train[4]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 120, 200)
    assert image[:, 7, 30].tolist() == [30, 7, 101]
    assert task.model_args == {"input_shape": (3, 224, 224), "num_classes": 2}
    assert task.defaults["model"] == "resnet50"


def test_a_heldout_image_is_the_middle_of_the_resized_one(folder):
    """Of 200×120 pixels, 105 in the middle (224/256 of the shorter side) become 64."""
    task = build_task("imagenet", data_root=str(folder), task_args={"size": 64})
    image, _ = task.heldout[0]
    assert image.dtype == torch.float32
    assert image.shape == (3, 64, 64)
    red, green, blue = pixels_of(image)
    # The resized image has 121×73 pixels (73.14, rounded), and its pixel i shows what lies at
    # (i + 0.5) * scale - 0.5 of the original; bytes are rounded, which is half a unit.
    columns, rows = np.arange(64) + round((121 - 64) / 2), np.arange(64) + round((73 - 64) / 2)
    assert np.abs(red - ((columns + 0.5) * 200 / 121 - 0.5)).max() < 0.51
    assert np.abs(green - ((rows + 0.5) * 120 / 73 - 0.5)[:, None]).max() < 0.51
    assert np.abs(blue).max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (375, 500), (224, 224)])
def test_every_shape_can_be_centred_and_cropped(shape):
    image = Image.new("RGB", shape)
    assert centre(image, 224).size == (224, 224)
    for seed in range(50):
        left, top, right, bottom = random_box(*shape, np.random.default_rng(seed))
        assert 0 <= left < right <= shape[0]
        assert 0 <= top < bottom <= shape[1]


def test_random_crops_have_the_usual_areas_and_ratios():
    generator = np.random.default_rng(0)
    boxes = np.array([random_box(1000, 1000, generator) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 1e6, width / height
    # Sides are rounded to one pixel of at least 240.
    assert 0.079 < area.min() < 0.085
    assert 0.95 < area.max() <= 1.0
    assert 0.745 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.345
    # Wide and tall alike: 2,000 draws of a symmetric logarithm of deviation 0.17.
    assert abs(np.log(ratio).mean()) < 0.015
    assert {0, 1} <= set(np.sign(boxes[:, 0] + boxes[:, 2] - 1000) + 0)


def test_an_image_too_long_for_any_crop_gives_its_middle():
    generator = np.random.default_rng(0)
    assert random_box(2000, 30, generator) == (980, 0, 1020, 30)
    assert random_box(30, 2000, generator) == (0, 980, 30, 1020)


def test_augmenting_crops_resizes_and_mirrors_half_of_the_time(folder):
    task = build_task("imagenet", data_root=str(folder), task_args={"size": 32})
    sample = task.train[0]
    before = sample[0].clone()
    mirrored = 0
    for seed in range(200):
        image, label = task.augment(sample, np.random.default_rng(seed))
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert label == 0
        red, green, _ = pixels_of(image)
        left, top, right, bottom = random_box(200, 120, np.random.default_rng(seed))
        backwards = red[0, 0] > red[0, -1]
        mirrored += backwards
        columns = red[:, ::-1] if backwards else red
        expected = left + (np.arange(32) + 0.5) * (right - left) / 32 - 0.5
        # At the edges the filter of the resizing is cut off, which shifts by up to half its width.
        assert np.abs(columns - expected)[:, 2:-2].max() < 0.51
        expected = top + (np.arange(32) + 0.5) * (bottom - top) / 32 - 0.5
        assert np.abs(green - expected[:, None])[2:-2].max() < 0.51
    assert 70 < mirrored < 130  # 100 with a deviation of 7
    assert torch.equal(sample[0], before)


def test_a_task_travels_to_a_worker_and_a_named_resnet_takes_its_batches(folder):
    task = build_task("imagenet", data_root=str(folder), task_args={"size": 65})
    copy = pickle.loads(pickle.dumps(task))
    generator = np.random.default_rng(0)
    augmented = [copy.augment(copy.train[i], generator) for i in range(6)]
    batches = [next(iter(DataLoader(data, batch_size=4))) for data in (augmented, copy.heldout)]
    model = build_model("resnet18", task.model_args, width=1 / 16)
    for batch in batches:
        assert task.loss(model, batch).isfinite()
        assert set(task.metrics(model, batch)) == {"loss", "accuracy"}


def test_grey_and_transparent_images_become_red_green_and_blue(folder):
    Image.new("L", (9, 5), 77).save(folder / "train" / "ants" / "0.png")
    Image.new("RGBA", (9, 5), (1, 2, 3, 128)).save(folder / "train" / "ants" / "1.png")
    task = build_task("imagenet", data_root=str(folder))
    assert task.train[0][0][:, 4, 8].tolist() == [77, 77, 77]
    assert task.train[1][0][:, 4, 8].tolist() == [1, 2, 3]


def test_real_photographs(data_root, caplog):
    root = data_root / "imagefolder-hymenoptera"
    with caplog.at_level(logging.WARNING, "capture"):
        task = build_task("imagenet", data_root=str(root), task_args={"size": 96})
    assert "2 classes rather than 1,000" in caplog.text
    assert (len(task.train), len(task.heldout)) == (83, 52)
    assert sum(task.train.labels) == 41
    image, label = task.heldout[51]
    assert image.shape == (3, 96, 96)
    assert label == 1
    generator = np.random.default_rng(0)
    images = torch.stack([task.augment(task.train[i], generator)[0] for i in range(0, 83, 8)])
    # Photographs: of the order of the mean and deviation of ImageNet, not of bytes.
    assert images.mean().abs() < 1
    assert 0.5 < images.std() < 2


def test_what_is_missing_or_wrong(folder, tmp_path):
    with pytest.raises(UsageError, match="give --data-root DIR; data/imagenet/prepare"):
        build_task("imagenet")
    with pytest.raises(UsageError, match="size must be a whole number of at least 1: 0"):
        build_task("imagenet", data_root=str(folder), task_args={"size": 0})
    with pytest.raises(InputError, match=r"expected train/CLASS/ and val/CLASS/ .*ants/train; run"):
        build_task("imagenet", data_root=str(folder / "train" / "ants"))
    (folder / "val" / "cats").mkdir()
    with pytest.raises(InputError, match=r"a class that train/ lacks: .*val/cats; sort"):
        build_task("imagenet", data_root=str(folder))
    (folder / "train" / "cats").mkdir()
    with pytest.raises(
        InputError, match=r"expected images \(.*, which are not there: .*train/cats"
    ):
        build_task("imagenet", data_root=str(folder))


@pytest.mark.parametrize("length", [0, 30, 400])
def test_a_truncated_image_is_named(folder, length):
    path = folder / "train" / "bees" / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:length])
    task = build_task("imagenet", data_root=str(folder))
    with pytest.raises(InputError, match=r"cannot be decoded .*train/bees/2\.png; replace it"):
        task.train[5]
