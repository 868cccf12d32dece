"""Fashion-MNIST: IDX files written byte by byte, and files that are wrong."""

from __future__ import annotations

import gzip
import logging
import pickle
import struct

import numpy as np
import pytest
import torch

from capture.store.errors import InputError, UsageError
from capture.tasks import build_task
from capture.tasks.fashion_mnist import read_idx, read_part

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


def idx(array):
    """The bytes of an IDX file, as its page defines them."""
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return b"\x00\x00\x08" + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)


@pytest.fixture
def folder(tmp_path):
    """30 images to train, plain; 12 held out, compressed."""
    for array, name in zip(images(30), NAMES, strict=True):
        (tmp_path / name).write_bytes(idx(array))
    for array, name in zip(images(12, seed=1), NAMES, strict=True):
        path = tmp_path / f"{name.replace('train', 't10k')}.gz"
        path.write_bytes(gzip.compress(idx(array)))
    return tmp_path


def test_an_idx_file_is_read_row_by_row(tmp_path):
    (tmp_path / "file").write_bytes(bytes.fromhex("00000802 00000002 00000003 010203 0405ff"))
    assert read_idx(tmp_path / "file", 2).tolist() == [[1, 2, 3], [4, 5, 255]]


def test_the_train_files_train_and_the_others_are_held_out(folder):
    task = build_task("fashion-mnist", data_root=str(folder))
    for part, (pixels, labels) in ((task.train, images(30)), (task.heldout, images(12, seed=1))):
        assert len(part) == len(labels)
        assert [label for _, label in (part[i] for i in range(len(part)))] == labels.tolist()
        image = torch.stack([part[i][0] for i in range(len(part))]).double()
        assert image.shape == (len(part), 1, 28, 28)
        # float32 of numbers up to 255
        expected = (pixels - images(30)[0].mean()) / images(30)[0].std()
        assert np.abs(image[:, 0].numpy() - expected).max() < 1e-5
    assert task.model_args == {"input_shape": (1, 28, 28), "num_classes": 10}
    assert torch.equal(pickle.loads(pickle.dumps(task)).train[5][0], task.train[5][0])
    assert not hasattr(task, "augment")


def test_a_part_is_accepted_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, "capture"):
        read_part(folder, "t10k")
    assert "only a part of fashion-mnist is there, 12 of 10,000 images" in caplog.text


def test_files_that_are_missing(folder):
    with pytest.raises(UsageError, match="give --data-root DIR; data/fashion-mnist/prepare"):
        build_task("fashion-mnist")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte \(or these with .gz\)") as caught:
        build_task("fashion-mnist", data_root=str(folder))
    assert "run data/fashion-mnist/prepare.py --root DIR" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (NAMES[0], b"", "no IDX file of bytes in 3 dimensions"),
        (NAMES[0], bytes.fromhex("00000803 0000"), "no IDX file of bytes in 3 dimensions"),
        (NAMES[0], idx(images(30)[1]), "no IDX file of bytes in 3 dimensions"),
        (NAMES[0], idx(images(30)[0])[:-1], "23,519 bytes of data, expected 23,520"),
        (NAMES[0], idx(images(30)[0]) + b"x", "23,521 bytes of data, expected 23,520"),
        (NAMES[0], idx(images(29)[0]), "images of shape (29, 28, 28), expected (30, 28, 28)"),
        (NAMES[0], idx(images(30)[0][:, 1:]), "images of shape (30, 27, 28)"),
        (NAMES[1], idx(np.full(30, 10)), "labels other than the numbers 0 to 9"),
        (f"{NAMES[0]}.gz", gzip.compress(idx(images(30)[0]))[:5000], "cannot be read"),
        (f"{NAMES[0]}.gz", b"no gzip", "cannot be read"),
    ],
)
def test_a_damaged_file_says_what_and_where(folder, name, content, words):
    (folder / name.removesuffix(".gz")).unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_part(folder, "train")
    assert words in str(caught.value)
    assert str(folder / name) in str(caught.value)
