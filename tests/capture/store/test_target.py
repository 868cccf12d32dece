"""Where a file may be written, and where not: nothing that is there is ever touched."""

import os

import pytest

from capture.store import RunWriter, Tensor, TensorTable, UsageError
from capture.store.target import check_target


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run.zarr"
    RunWriter.create(path, TensorTable((Tensor("w", (3,), "F32"),)), streams={}).close()
    return path


def refused(path, words, **more):
    with pytest.raises(UsageError, match=words) as caught:
        check_target(path, **more)
    assert "\n" not in str(caught.value)


def test_a_new_file_and_an_old_one_are_fine(tmp_path):
    (tmp_path / "old").write_text("kept")
    assert check_target(tmp_path / "new") == tmp_path / "new"
    assert check_target(str(tmp_path / "old")) == tmp_path / "old"
    assert (tmp_path / "old").read_text() == "kept"


def test_folders_devices_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path, "a folder")
    refused(tmp_path / "pipe", "no ordinary file")
    refused("/dev/full", "no ordinary file")
    refused(tmp_path / "missing/new", "no such folder")
    refused("", "name a file")


def test_names_that_no_file_can_have_are_refused(tmp_path):
    refused(tmp_path / ("x" * 300), "too long")
    refused(f"{tmp_path}/a\0b", "null")


@pytest.mark.parametrize("inside", ["zarr.json", "new", "weights/value/.straightway/commits.jsonl"])
def test_inside_a_run_nothing_is_written(run, tmp_path, inside):
    refused(run / inside, "inside a run")
    (tmp_path / "link").symlink_to(run)
    refused(tmp_path / "link" / inside, "inside a run")


def test_an_input_is_not_overwritten(tmp_path):
    source = tmp_path / "source"
    source.touch()
    (tmp_path / "same").hardlink_to(source)
    refused(source, "an input", inputs=[tmp_path / "other", source])
    refused(tmp_path / "same", "an input", inputs=[source])
    check_target(tmp_path / "new", inputs=[source, tmp_path / "nowhere"])
