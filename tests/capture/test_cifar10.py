"""CIFAR-10: files written byte by byte, real images, and files that are wrong."""

from __future__ import annotations

import logging
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from capture.store.errors import InputError, UsageError
from capture.tasks import build_task
from capture.tasks.cifar10 import ArrayUnpickler, find_batches, read_cifar10


def records(count, seed=0):
    """Labels, and pixels that tell the place of an image: its first two bytes are its number."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    pixels[:, 0], pixels[:, 1] = np.divmod(np.arange(count), 256)
    return pixels, rng.integers(0, 10, count, dtype=np.uint8)


def write_binary(folder, count=50, batch=1):
    pixels, labels = records(count, batch)
    (folder / f"data_batch_{batch}.bin").write_bytes(np.column_stack([labels, pixels]).tobytes())
    return pixels, labels


@pytest.fixture
def folder(tmp_path):
    write_binary(tmp_path)
    return tmp_path


def python2_pickle(pixels, labels):
    """The bytes that Python 2 wrote: protocol 2, text as byte strings, numpy by its old name."""

    def text(word):
        return b"U" + bytes([len(word)]) + word

    def number(value):
        return b"J" + struct.pack("<i", value)

    def numbers(values):
        return b"](" + b"".join(map(number, values)) + b"e"

    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n"
    array += number(0) + b"\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = number(len(labels)) + number(3072) + b"\x86"
    content = b"T" + struct.pack("<i", pixels.size) + pixels.tobytes()
    array += b"(" + number(1) + shape + dtype + b"\x89" + content + b"tb"
    items = text(b"batch_label") + text(b"a batch") + b"s"
    items += text(b"labels") + numbers(labels.tolist()) + b"s" + text(b"data") + array + b"s"
    return b"\x80\x02}" + items + b"."


def test_binary_records_are_label_red_green_blue(tmp_path):
    """One image: label 7, red 1, green 2, blue 3, but for the pixel in row 2, column 5."""
    planes = [bytearray([value]) * 1024 for value in (1, 2, 3)]
    planes[1][2 * 32 + 5] = 200
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x07" + b"".join(planes))
    images, labels = read_cifar10(tmp_path)
    assert images.shape == (1, 3, 32, 32)
    assert labels.tolist() == [7]
    assert images[0, :, 2, 5].tolist() == [1, 200, 3]
    assert images[0, :, 5, 2].tolist() == [1, 2, 3]


def test_batches_are_read_in_order_from_the_folder_of_the_archive(tmp_path):
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    (tmp_path / "test_batch.bin").touch()
    parts = [write_binary(inner, batch=batch) for batch in (1, 2, 5)]
    images, labels = read_cifar10(tmp_path)
    assert np.array_equal(images.reshape(150, 3072), np.concatenate([part[0] for part in parts]))
    assert np.array_equal(labels, np.concatenate([part[1] for part in parts]))


def test_the_pickles_hold_the_same_and_come_second(folder, tmp_path_factory):
    pixels, labels = records(50, 1)
    (folder / "data_batch_1").write_bytes(b"not read, since there are binary batches")
    assert [file.name for file in find_batches(folder)] == ["data_batch_1.bin"]
    for content in (
        python2_pickle(pixels, labels),
        pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=3),
    ):
        other = tmp_path_factory.mktemp("python")
        (other / "data_batch_1").write_bytes(content)
        images, classes = read_cifar10(other)
        assert np.array_equal(images, read_cifar10(folder)[0])
        assert np.array_equal(classes, labels)


class Sneaky:
    def __reduce__(self):
        return os.mkdir, ("made",)


def test_a_pickle_can_make_arrays_and_call_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Sneaky()}))
    with pytest.raises(InputError, match=r"mkdir is not allowed\): .*data_batch_1; delete it"):
        read_cifar10(tmp_path)
    assert not (tmp_path / "made").exists()
    with (tmp_path / "data_batch_1").open("rb") as file:
        assert set(ArrayUnpickler(file)._allowed) == {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }


def test_the_split_is_80_to_20_and_always_the_same(folder):
    task = build_task("cifar10", data_root=str(folder))
    torch.manual_seed(99)
    again = build_task("cifar10", data_root=str(folder))
    numbers = [images.images[:, 0, 0, 1].tolist() for images in (task.train, task.heldout)]
    assert [len(part) for part in numbers] == [40, 10]
    assert sorted(numbers[0] + numbers[1]) == list(range(50))
    assert numbers[0] == again.train.images[:, 0, 0, 1].tolist()
    assert task.defaults == {"model": "resnet18", "batch_size": 256, "epochs": 190}
    assert not hasattr(task, "loss_elements")


def test_each_channel_of_the_training_images_is_standardised(folder):
    task = build_task("cifar10", data_root=str(folder))
    images = torch.stack([task.train[i][0] for i in range(40)])
    assert images.dtype == torch.float32
    assert isinstance(task.train[0][1], int)
    # float32, over 40,960 numbers of order 1 in each channel
    assert images.double().mean((0, 2, 3)).abs().max() < 1e-5
    assert (images.double().std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    # The held-out images by the same numbers: black is black in both.
    pixel = task.heldout[3][0][1, 4, 6] * task.train.deviation[1] + task.train.mean[1]
    assert pixel.item() == pytest.approx(int(task.heldout.images[3, 1, 4, 6]), abs=1e-4)


def test_augmenting_crops_out_of_a_black_frame(folder):
    task = build_task("cifar10", data_root=str(folder))
    image, label = sample = task.train[7]
    before, black = image.clone(), (0 - task.train.mean) / task.train.deviation
    framed = black.reshape(3, 1, 1).expand(3, 40, 40).clone()
    framed[:, 4:36, 4:36] = image
    crops = {(i, j): framed[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)}
    generator, seen = np.random.default_rng(0), set()
    for _ in range(300):
        cropped, same_label = task.augment(sample, generator)
        assert same_label == label
        seen.add(next(place for place, crop in crops.items() if torch.equal(crop, cropped)))
    # 300 draws out of 81 places miss 2 of them on average; a wrong bound would miss 9 or more.
    assert len(seen) > 72
    assert {row for row, _ in seen} == {column for _, column in seen} == set(range(9))
    assert torch.equal(image, before)
    first, second = (task.augment(sample, np.random.default_rng(5))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_task_travels_to_a_worker(folder):
    task = build_task("cifar10", data_root=str(folder))
    copy = pickle.loads(pickle.dumps(task))
    images, labels = next(iter(DataLoader(copy.train, batch_size=4)))
    assert images.shape == (4, 3, 32, 32)
    assert labels.dtype == torch.int64
    assert torch.equal(images[2], task.train[2][0])


def test_a_part_is_accepted_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, "capture"):
        read_cifar10(folder)
    assert "only a part of cifar10 is there, 50 of 50,000 images" in caplog.text


def test_the_real_images(data_root):
    """Published moments of the 50,000 images; 3,200 of them come within a few per cent."""
    task = build_task("cifar10", data_root=str(data_root / "cifar-10-batches-bin"))
    assert (len(task.train), len(task.heldout)) == (3200, 800)
    assert (task.train.mean / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], rel=0.03)
    assert (task.train.deviation / 255).tolist() == pytest.approx([0.247, 0.2435, 0.2616], rel=0.03)
    images, labels = read_cifar10(data_root / "cifar-10-batches-bin")
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert images[0, 0, 0, :4].tolist() == [59, 43, 50, 68]


def test_files_that_are_missing_or_wrong(tmp_path):
    with pytest.raises(UsageError, match=r"cifar10 needs .*; give --data-root DIR.*prepare\.py"):
        build_task("cifar10")
    with pytest.raises(InputError, match=r"no such folder: .*/nowhere; run data/cifar10/prepare"):
        build_task("cifar10", data_root=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"expected data_batch_1\.bin to .*; run data/cifar10/pre"):
        build_task("cifar10", data_root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data_batch_1.bin", bytes(3072), "3,072 bytes are no whole number of records of 3073"),
        ("data_batch_1.bin", b"", "0 bytes are no whole number"),
        ("data_batch_1.bin", b"\x0a" + bytes(3072), "labels other than the numbers 0 to 9"),
        ("data_batch_1", b"", "no pickle of CIFAR-10 (EOFError"),
        ("data_batch_1", python2_pickle(*records(5))[:9000], "no pickle of CIFAR-10"),
        ("data_batch_1", pickle.dumps({b"labels": [1]}), "no pickle of CIFAR-10 (KeyError"),
        ("data_batch_1", pickle.dumps([1]), "no pickle of CIFAR-10 (TypeError"),
        ("data_batch_1", pickle.dumps({b"data": 1, b"labels": [1]}, 3), "no array of bytes"),
        ("data_batch_1", python2_pickle(records(5)[0], np.zeros(4, int)), "no pickle of CIFAR-10"),
        (
            "data_batch_1",
            pickle.dumps({b"data": records(5)[0], b"labels": [1]}, 3),
            "data of shape (5, 3072) with labels of shape (1,), expected [N, 3072] and [N]",
        ),
        (
            "data_batch_1",
            pickle.dumps({b"data": records(1)[0], b"labels": [0.5]}, 3),
            "labels other than the numbers 0 to 9",
        ),
    ],
)
def test_a_damaged_batch_says_what_and_where(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_cifar10(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "fetch it again by data/cifar10/prepare.py" in str(caught.value)
