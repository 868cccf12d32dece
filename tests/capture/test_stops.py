"""Stopped anywhere, resumed, the same files: with every stream, augmentation and dropout."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from capture.config import read_config
from capture.store import StraightwayError, verify_run
from capture.store.layout import METADATA
from capture.train import train

ROOT = Path(__file__).parents[2]

MODULE = """
import torch
from torch import nn
from capture.tasks.digits import Digits

def noisy(input_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(8, num_classes),
    )

class Shifted(Digits):
    def augment(self, sample, generator):
        image, label = sample
        return torch.roll(image, int(generator.integers(-1, 2)), 2), label

def shifted(data_root=None):
    return Shifted()
"""

FLAGS = {
    "task": "stopped_module:shifted",
    "model": "stopped_module:noisy",
    "max_steps": 26,
    "every": "6",
    "threads": 1,
    "checkpoint_every": 5,
    "keep_state": "every:10",
    "gradients": "minibatch,updates@bursts:9:1,fixed:2,heldout:1,full@epoch,shuffled-labels:1",
}
# Writes of the whole training, about; the stops lie anywhere among them.
STOPS = (3, 20, 41, 64, 90, 133, 170, 211)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    (folder / "stopped_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("stopped_module", None)


@pytest.fixture(scope="module")
def whole(folder):
    train(read_config(flags=FLAGS), folder / "whole.zarr")
    return files_of(folder / "whole.zarr")


def files_of(run: Path) -> dict[str, bytes]:
    """Every file of a run but the lock; resume states by content, as all else."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def without_states(files: dict[str, bytes]) -> dict[str, bytes]:
    """The two newest resume states depend on where a run was stopped; what is kept does not."""
    return {
        name: data
        for name, data in files.items()
        if ".straightway/0" not in name and name != METADATA
    }


class Stop:
    """Lets `count` writes pass and then refuses every further one as a full disk does."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.write = os.write

    def __call__(self, descriptor: int, data) -> int:
        self.left -= 1
        if self.left < 0:
            # Half of it goes through, as at the end of a disk.
            self.write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(descriptor, data)


@pytest.mark.parametrize("count", STOPS)
def test_a_disk_that_fills_up_anywhere_stops_the_training_and_loses_nothing(
    folder, whole, count, monkeypatch
):
    run = folder / f"full-{count}.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("capture.store.files.os.write", Stop(count))
        with pytest.raises(StraightwayError, match="the disk is full"):
            train(read_config(flags=FLAGS), run)
    if (run / METADATA).exists():
        assert verify_run(run).sound
    train(read_config(flags=FLAGS), run, resume=True)
    assert without_states(files_of(run)) == without_states(whole)
    assert files_of(run)[METADATA] == whole[METADATA]


@pytest.mark.parametrize(("count", "workers"), [(31, 0), (77, 2), (150, 0)])
def test_a_training_that_is_killed_anywhere_is_resumed_to_the_same_files(
    folder, whole, count, workers
):
    run = folder / f"killed-{count}.zarr"
    code = (
        "import os, signal, sys\n"
        "write, left = os.write, [%d]\n"
        "def dying(descriptor, data):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0:\n"
        "        write(descriptor, data[: len(data) // 2])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(descriptor, data)\n"
        "import capture.store.files\n"
        "capture.store.files.os.write = dying\n"
        "from capture.config import read_config\n"
        "from capture.train import train\n"
        "if __name__ == '__main__':\n"
        "    train(read_config(flags=%r), %r)\n"
    )
    (folder / "dying.py").write_text(code % (count, {**FLAGS, "workers": workers}, str(run)))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "dying.py"]
    done = subprocess.run(command, cwd=folder, env=environment, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    train(read_config(flags={**FLAGS, "workers": 2 - workers}), run, resume=True)
    assert without_states(files_of(run)) == without_states(whole)
