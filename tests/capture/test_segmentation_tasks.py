"""Vaihingen and CamVid on files made here, and on the real ones where they are."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from capture.models import build_model
from capture.store.errors import InputError, UsageError
from capture.tasks import build_task
from capture.tasks.segmentation import IGNORED, PixelLoss, pixels_by_class
from capture.tasks.vaihingen import CLASSES, read_tiles

# White, blue, cyan, green, yellow, red: the classes in their order; black is ignored.
COLOURS = np.array(
    [
        *([255, 255, 255], [0, 0, 255], [0, 255, 255]),
        *([0, 255, 0], [255, 255, 0], [255, 0, 0], [0, 0, 0]),
    ],
    np.uint8,
)


def write_area(root, area, mask, image=None):
    """An area in the layout of ISPRS; by default each pixel's colour tells its place."""
    for folder in ("top", "gts_for_participants"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    if image is None:
        rows, columns = np.indices(mask.shape)
        image = np.stack([rows, columns, np.full_like(rows, area)], 2).astype(np.uint8)
    name = f"top_mosaic_09cm_area{area}.tif"
    tifffile.imwrite(root / "top" / name, image, photometric="rgb")
    tifffile.imwrite(root / "gts_for_participants" / name, COLOURS[mask], photometric="rgb")
    return image


def mask_of(height, width, seed=0):
    return np.random.default_rng(seed).integers(7, size=(height, width))


def write_png(file, pixels):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file)


def make(root, **task_args):
    return build_task("vaihingen", data_root=str(root), task_args={"size": 32, **task_args})


def raw(task, image):
    """The pixels before they were standardised, as uint8 `[H, W, 3]`."""
    values = image.movedim(0, 2).numpy() * task.scale.deviation + task.scale.mean
    return values.round().astype(np.uint8)


@pytest.fixture
def areas(tmp_path):
    masks = {1: mask_of(40, 50), 3: mask_of(80, 100, 1), 28: mask_of(70, 100, 2)}
    for area, mask in masks.items():
        write_area(tmp_path, area, mask)
    return masks


def test_a_training_window_is_a_flipped_piece_of_image_and_mask(tmp_path, areas):
    task = make(tmp_path, windows=77)
    assert len(task.train) == 77
    generator = np.random.default_rng(0)
    orders = set()
    for _ in range(40):
        image, mask = task.augment(task.train[0], generator)
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert mask.shape == (32, 32)
        assert mask.dtype == torch.int64
        # The pixels tell where they come from, so the mask can be looked up, one by one.
        rows, columns, numbers = np.moveaxis(raw(task, image).astype(int), 2, 0)
        (area,) = np.unique(numbers)
        expected = areas[area][rows, columns]
        assert np.array_equal(mask.numpy(), np.where(expected == 6, IGNORED, expected))
        assert np.ptp(rows) == np.ptp(columns) == 31
        orders.add((rows[0, 0] < rows[-1, 0], columns[0, 0] < columns[0, -1]))
    assert len(orders) == 4


def test_the_windows_follow_the_generator_and_cover_areas_by_size(tmp_path, areas):
    task = make(tmp_path)
    first, second = (task.augment(0, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], task.augment(0, np.random.default_rng(4))[0])
    generator = np.random.default_rng(5)
    windows = [raw(task, task.augment(0, generator)[0]) for _ in range(500)]
    # 8,000 of 10,000 pixels are area 3; the deviation of the share of 500 draws is 0.018.
    assert abs(np.mean([window[0, 0, 2] == 3 for window in windows]) - 0.8) < 4 * 0.018
    assert min(window[..., :2].min() for window in windows) == 0
    corners = [window[..., :2].max((0, 1)) for window in windows if window[0, 0, 2] == 1]
    assert np.max(corners, 0).tolist() == [39, 49]


def test_the_held_out_windows_lie_side_by_side(tmp_path, areas):
    task = make(tmp_path)
    assert len(task.heldout) == 2 * 3
    for index in range(6):
        image, mask = task.heldout[index]
        row, column = 32 * (index // 3), 32 * (index % 3)
        pixels = raw(task, image)
        assert pixels[0, 0].tolist() == [row, column, 28]
        assert pixels[-1, -1].tolist() == [row + 31, column + 31, 28]
        expected = areas[28][row : row + 32, column : column + 32]
        assert np.array_equal(mask.numpy(), np.where(expected == 6, IGNORED, expected))


def test_the_training_images_are_standardised_together(tmp_path, areas):
    rows = np.concatenate([np.indices(areas[area].shape)[0].ravel() for area in (1, 3)])
    task = make(tmp_path)
    assert task.scale.mean[0] == pytest.approx(rows.mean(), rel=1e-6)  # rounded to float32
    assert task.scale.deviation[0] == pytest.approx(rows.std(), rel=1e-6)


def test_what_vaihingen_lacks_is_said(tmp_path, caplog):
    write_area(tmp_path, 1, mask_of(40, 50))
    with caplog.at_level(logging.WARNING, "capture"):
        task = make(tmp_path)
    assert task.heldout is None
    assert "has 1 of 11 areas: no top_mosaic_09cm_area3.tif, " in caplog.text
    assert "nothing is held out" in caplog.text


def test_a_compressed_area_is_read_too(tmp_path, areas):
    plain, _ = read_tiles(tmp_path)
    for folder in ("top", "gts_for_participants"):
        file = tmp_path / folder / "top_mosaic_09cm_area1.tif"
        Image.fromarray(tifffile.imread(file)).save(file, compression="tiff_lzw")
    compressed, _ = read_tiles(tmp_path)
    assert np.array_equal(compressed[0].image, plain[0].image)
    assert np.array_equal(compressed[0].mask, plain[0].mask)


def test_areas_on_neither_list_are_not_read(tmp_path, areas):
    write_area(tmp_path, 2, mask_of(40, 40))
    train, validation = read_tiles(tmp_path)
    assert [entry.mask.shape for entry in train] == [(40, 50), (80, 100)]
    assert [entry.mask.shape for entry in validation] == [(70, 100)]


@pytest.mark.parametrize(
    ("names", "trains", "validates"),
    [
        (["area1_0_0.png", "area3_0_0.png", "area28_0_0.png", "area2_0_0.png"], 2, 1),
        (["train/area28_0_0.png", "train/x.png", "val/area1_0_0.png"], 2, 1),
        (["train/area1_0_0.png"], 1, 0),
    ],
)
def test_converted_windows_are_divided_by_folder_or_number(tmp_path, names, trains, validates):
    for name in names:
        write_png(tmp_path / "img_dir" / name, np.zeros((40, 48, 3)))
        write_png(tmp_path / "ann_dir" / name, np.arange(40 * 48).reshape(40, 48) % 7)
    train, validation = read_tiles(tmp_path)
    assert (len(train), len(validation)) == (trains, validates)
    assert np.array_equal(train[0].mask.ravel(), np.arange(40 * 48) % 7 - 1)
    counts = pixels_by_class(train[:1], CLASSES)
    assert list(counts) == [*CLASSES, "ignored"]
    assert sum(counts.values()) == 40 * 48
    assert counts["ignored"] == 275  # ceil(1920 / 7)


def write_foreign_colour(root):
    write_area(root, 1, mask_of(40, 40))
    pixels = np.full((40, 40, 3), (1, 2, 3), np.uint8)
    file = root / "gts_for_participants" / "top_mosaic_09cm_area1.tif"
    tifffile.imwrite(file, pixels, photometric="rgb")


def write_other_size(root):
    write_area(root, 1, mask_of(40, 41), np.zeros((41, 40, 3), np.uint8))


def write_no_mask(root):
    write_area(root, 1, mask_of(40, 40))
    (root / "gts_for_participants" / "top_mosaic_09cm_area1.tif").unlink()


def write_no_tiff(root):
    write_area(root, 1, mask_of(40, 40))
    (root / "gts_for_participants" / "top_mosaic_09cm_area1.tif").write_bytes(b"<html>")


def write_small(root):
    write_area(root, 1, mask_of(31, 40))


def write_large_index(root):
    write_png(root / "img_dir" / "area1.png", np.zeros((40, 40, 3)))
    write_png(root / "ann_dir" / "area1.png", np.full((40, 40), 7))


def write_colours_as_indices(root):
    write_png(root / "img_dir" / "area1.png", np.zeros((40, 40, 3)))
    write_png(root / "ann_dir" / "area1.png", np.zeros((40, 40, 3)))


def write_grey(root):
    write_png(root / "img_dir" / "area1.png", np.zeros((40, 40)))


def write_nothing(root):
    pass


@pytest.mark.parametrize(
    ("write", "file", "words"),
    [
        (write_foreign_colour, "gts_for_participants/top_mosaic_09cm_area1.tif", "#010203 is no"),
        (write_other_size, "gts_for_participants/top_mosaic_09cm_area1.tif", "differ in size"),
        (write_no_mask, "gts_for_participants/top_mosaic_09cm_area1.tif", "a file is missing"),
        (write_no_tiff, "gts_for_participants/top_mosaic_09cm_area1.tif", "cannot read this image"),
        (write_small, "top/top_mosaic_09cm_area1.tif", "no window of 32 fits into 31 by 40 pixels"),
        (write_large_index, "ann_dir/area1.png", "7 is no index of a mask (0 to 6)"),
        (write_colours_as_indices, "ann_dir/area1.png", "expected a mask of one channel"),
        (write_grey, "img_dir/area1.png", "expected an RGB image"),
        (write_nothing, "", "run data/vaihingen/prepare.py --root DIR"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named(tmp_path, write, file, words):
    write(tmp_path)
    with pytest.raises(InputError) as caught:
        make(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / file) in str(caught.value)


@pytest.mark.parametrize("name", ["vaihingen", "camvid"])
def test_without_a_folder_the_message_tells_how_to_get_the_data(name, tmp_path):
    with pytest.raises(UsageError, match=f"give --data-root DIR; data/{name}/prepare.py fills one"):
        build_task(name)
    with pytest.raises(InputError, match=f"run data/{name}/prepare.py --root DIR"):
        build_task(name, data_root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("task_args", [{"windows": 0}, {"size": "x"}])
def test_arguments_of_vaihingen_are_checked(tmp_path, areas, task_args):
    with pytest.raises(UsageError, match="must be a whole number of at least 1"):
        make(tmp_path, **task_args)


def write_views(root, train=3, val=2, prefix=""):
    for part, number in (("train", train), ("val", val)):
        lines = []
        for index in range(number):
            image = np.full((36, 48, 3), 40 * index)
            write_png(root / part / f"{index}.png", image)
            write_png(root / f"{part}annot" / f"{index}.png", np.indices((36, 48))[1] % 12)
            lines.append(f"{prefix}{part}/{index}.png {prefix}{part}annot/{index}.png\n")
        (root / f"{part}.txt").write_text("".join(lines))


@pytest.mark.parametrize("prefix", ["", "/SegNet/CamVid/"])
def test_views_are_padded_by_pixels_that_do_not_count(tmp_path, prefix, caplog):
    write_views(tmp_path, prefix=prefix)
    task = build_task("camvid", data_root=str(tmp_path))
    assert (len(task.train), len(task.heldout)) == (3, 2)
    assert task.model_args == {"input_shape": (3, 64, 64), "num_classes": 11}
    image, mask = task.train[1]
    assert image.shape == (3, 64, 64)
    assert mask.shape == (64, 64)
    expected = np.full((64, 64), IGNORED)
    expected[:36, :48] = np.indices((36, 48))[1] % 12
    expected[expected == 11] = IGNORED
    assert np.array_equal(mask.numpy(), expected)
    # The mean of 0, 40 and 80 is 40.
    assert image.abs().max() == 0
    assert "lists 3 of the 367 images" in caplog.text


def test_what_camvid_lacks_is_said(tmp_path, caplog):
    write_views(tmp_path, val=0)
    assert build_task("camvid", data_root=str(tmp_path)).heldout is None
    assert "nothing is held out" in caplog.text
    (tmp_path / "train" / "1.png").unlink()
    with pytest.raises(InputError, match=r"a file is missing: .*train/1\.png"):
        build_task("camvid", data_root=str(tmp_path))
    write_views(tmp_path)
    write_png(tmp_path / "trainannot" / "2.png", np.full((36, 48), 12))
    with pytest.raises(InputError, match=r"12 is no index of a mask \(0 to 11\): .*annot/2\.png"):
        build_task("camvid", data_root=str(tmp_path))
    write_views(tmp_path)
    write_png(tmp_path / "val" / "0.png", np.zeros((48, 36, 3)))
    write_png(tmp_path / "valannot" / "0.png", np.zeros((48, 36)))
    with pytest.raises(InputError, match=r"another size than 0\.png: .*val/0\.png"):
        build_task("camvid", data_root=str(tmp_path))
    (tmp_path / "train.txt").write_text("train/0.png\n")
    with pytest.raises(InputError, match="expected an image and a mask in a line"):
        build_task("camvid", data_root=str(tmp_path))
    (tmp_path / "train.txt").unlink()
    with pytest.raises(InputError, match="no training image of CamVid"):
        build_task("camvid", data_root=str(tmp_path))


def test_the_loss_is_the_mean_over_the_pixels_that_count():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, generator=generator)
    masks = torch.randint(-1, 4, (2, 5, 6), generator=generator)
    losses, right = [], []
    for n, row, column in np.ndindex(2, 5, 6):
        label = int(masks[n, row, column])
        if label != IGNORED:
            values = logits[n, :, row, column].double()
            losses.append(float(values.logsumexp(0) - values[label]))
            right.append(int(values.argmax()) == label)
    task = PixelLoss()
    batch = [logits, masks]
    metrics = task.metrics(nn.Identity(), batch)
    assert task.loss_elements(batch) == len(losses) < 60
    assert task.loss(nn.Identity(), batch).item() == pytest.approx(np.mean(losses), rel=1e-6)
    assert metrics["loss"].item() == pytest.approx(np.mean(losses), rel=1e-6)  # float32
    assert metrics["accuracy"].item() == pytest.approx(np.mean(right), rel=1e-6)


def test_a_batch_without_a_pixel_that_counts_has_loss_zero_and_gradient_zero():
    model = nn.Conv2d(3, 6, 1)
    batch = [torch.ones(2, 3, 4, 4), torch.full((2, 4, 4), IGNORED)]
    task = PixelLoss()
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(model.weight.grad, torch.zeros_like(model.weight))
    assert task.loss_elements(batch) == 0
    assert {name: value.item() for name, value in task.metrics(model, batch).items()} == {
        "loss": 0,
        "accuracy": 0,
    }


def train_one_step(task, model_name):
    """One step of a narrow model on a batch, as the training loop makes it."""
    generator = np.random.default_rng(0)
    augment = getattr(task, "augment", lambda sample, generator: sample)
    batch = default_collate([augment(task.train[index], generator) for index in range(2)])
    torch.manual_seed(0)
    model = build_model(model_name, task.model_args, width=1 / 16)
    before = task.loss(model, batch)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    assert task.loss(model, batch) < before
    if task.heldout is not None:
        metrics = task.metrics(model, default_collate([task.heldout[0]]))
        assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize("model", ["unet", "segnet"])
def test_a_pickled_task_trains(tmp_path, areas, model):
    task = make(tmp_path)
    copy = pickle.loads(pickle.dumps(task))
    ours, theirs = (each.augment(0, np.random.default_rng(1)) for each in (task, copy))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(copy.heldout[5][1], task.heldout[5][1])
    train_one_step(copy, model)


def test_the_real_camvid(data_root):
    task = build_task("camvid", data_root=str(data_root / "camvid"))
    assert task.model_args["input_shape"] == (3, 384, 480)
    assert len(task.train) > 0
    assert len(task.heldout) > 0
    image, mask = pickle.loads(pickle.dumps(task)).train[0]
    assert image.isfinite().all()
    assert mask.unique().tolist()[0] == IGNORED
    train_one_step(task, task.defaults["model"])


def test_the_real_window_of_vaihingen(data_root):
    task = build_task("vaihingen", data_root=str(data_root / "vaihingen-sample"))
    assert task.heldout is None
    assert task.model_args["input_shape"] == (3, 256, 256)
    assert len(task.train) == 10_000
    train_one_step(task, task.defaults["model"])
