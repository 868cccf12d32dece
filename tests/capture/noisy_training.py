"""A small training with what a careless resume would get wrong, and how to compare its runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from capture.config import TrainConfig, read_config
from capture.store.layout import ATTRIBUTES_CHECKSUM

# BatchNorm buffers and dropout: what a careless resume would get wrong. The loss of the task counts
# its calls, so that a test can do something in the midst of a step.
MODULE = """
from torch import nn
from capture.tasks.digits import Digits

def noisy(input_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(32, num_classes),
    )

class Watched(Digits):
    calls, at, action = 0, None, None

    def loss(self, model, batch):
        Watched.calls += 1
        if Watched.calls == Watched.at:
            Watched.action()
        return super().loss(model, batch)

def watched(data_root=None):
    return Watched()
"""

SETTINGS = {
    "task": "digits",
    "model": "noisy_module:noisy",
    "optimizer": "nesterov",
    "weight_decay": 1e-3,
    "lr_schedule": "warmup-cosine:1",
    "epochs": 10,
    "every": "7+epoch",
    "gradients": "minibatch,updates@13",
    "checkpoint_every": 25,
}
TOTAL = 10 * 22


@contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """Make `folder` the working directory, with a module of the user's own."""
    (folder / "noisy_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend("")
        yield folder
    sys.modules.pop("noisy_module", None)


def settings(**changes) -> TrainConfig:
    return read_config(flags={**SETTINGS, **changes})


def quick(**changes) -> TrainConfig:
    return read_config(flags={"task": "digits", "max_steps": 5, "every": "1", **changes})


def files_of(run: Path) -> dict[str, bytes]:
    """Every file of a run but the lock and the resume states."""
    state = run / "weights/value/.straightway"
    found = {}
    for path in sorted(run.rglob("*")):
        is_state = path.parent == state and path.name != "commits.jsonl"
        if path.is_file() and not is_state:
            found[str(path.relative_to(run))] = path.read_bytes()
    # The number of loading processes is free to differ.
    root = json.loads(found["zarr.json"])
    entries = root["attributes"]["straightway"]
    entries["config"]["workers"] = None
    assert len(entries.pop(ATTRIBUTES_CHECKSUM)) == 8
    return {**found, "zarr.json": json.dumps(root).encode()}


def assert_same_files(one: Path, other: Path) -> None:
    ours, theirs = files_of(one), files_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
