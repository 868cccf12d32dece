"""The `prepare.py` of each data set, against a server on this machine and against real files."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"


def load(name):
    """Import data/NAME/prepare.py."""
    specification = importlib.util.spec_from_file_location("prepare", DATA / name / "prepare.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def cifar_archive():
    """The archive in small: three records in each of five batches."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for batch in range(1, 6):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{batch}.bin")
            member.size = 3 * 3073
            archive.addfile(member, io.BytesIO(bytes([batch]) + bytes(member.size - 1)))
    return content.getvalue()


def test_cifar10_is_fetched_checked_unpacked_and_counted(site, tmp_path, capsys, monkeypatch):
    folder, address = site
    archive, module, root = cifar_archive(), load("cifar10"), tmp_path / "root"
    (folder / "cifar.tar.gz").write_bytes(archive)
    arguments = ["--root", str(root), "--url", f"{address}/cifar.tar.gz"]

    assert module.main(arguments) == 3  # this archive is not the official one
    error = capsys.readouterr().err
    assert f"error: md5 is {md5(archive)}, expected c32a1d4ab5d03f1284b67883e8d87530" in error
    assert list(root.iterdir()) == []

    monkeypatch.setattr(module, "MD5", md5(archive))
    assert module.main(arguments) == 0
    assert "15 training images of 6 classes" in capsys.readouterr().out
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-bin"]

    (folder / "cifar.tar.gz").unlink()  # what is there is not fetched again
    assert module.main(arguments) == 0


def test_fashion_mnist_fetches_the_files_that_are_missing(site, tmp_path, capsys, monkeypatch):
    folder, address = site
    module, root = load("fashion-mnist"), tmp_path / "root"
    arguments = ["--root", str(root), "--url", address]
    assert module.main(arguments) == 3
    assert "the server answers 404" in capsys.readouterr().err

    files = {}
    for part, count in (("train", 4), ("t10k", 2)):
        size = count.to_bytes(4, "big")
        side = (28).to_bytes(4, "big") * 2
        images = b"\x00\x00\x08\x03" + size + side + bytes(count * 784)
        files[f"{part}-images-idx3-ubyte"] = gzip.compress(images)
        files[f"{part}-labels-idx1-ubyte"] = gzip.compress(
            b"\x00\x00\x08\x01" + size + bytes(count)
        )
    assert set(files) == set(module.MD5)
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(content)
    monkeypatch.setattr(module, "MD5", {name: md5(content) for name, content in files.items()})
    assert module.main(arguments) == 0
    assert "4 training and 2 held-out images" in capsys.readouterr().out
    for path in folder.iterdir():
        path.unlink()
    assert module.main(arguments) == 0


def test_imagenet_says_where_to_register(tmp_path, capsys):
    assert load("imagenet").main(["--root", str(tmp_path)]) == 3
    assert "register at https://image-net.org/download.php" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [
        ("cifar10", "cifar-10-batches-bin", "4,000 training images of 10 classes"),
        ("imagenet", "imagefolder-hymenoptera", "83 training and 52 held-out images of 2 classes"),
    ],
)
def test_real_files_are_counted_by_the_script_itself(data_root, name, folder, counts):
    script = DATA / name / "prepare.py"
    command = [sys.executable, str(script), "--root", str(data_root / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=DATA.parent)
    assert counts in done.stdout
    assert done.stderr.startswith("warning: ")


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist", "imagenet"])
def test_each_data_set_has_a_page_and_help(name, capsys):
    page = (DATA / name / "README.md").read_text()
    assert "**Source**" in page
    assert "**Licence**" in page
    with pytest.raises(SystemExit) as caught:
        load(name).main(["--help"])
    assert caught.value.code == 0
    assert f"usage: data/{name}/prepare.py" in capsys.readouterr().out
    assert f"({name}/README.md)" in (DATA / "README.md").read_text()
