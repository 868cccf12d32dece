"""Each task trains for a few real steps on real data, is probed, and is measured."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from analyze import measure_run
from capture.config import read_config
from capture.probe import probe_run
from capture.store import verify_run
from capture.train import train

SMALL = {"max_steps": 3, "every": "1", "threads": 1, "gradients": "minibatch,fixed:1"}

# What makes each of them small: the data are whole.
TASKS = {
    "digits": (None, {}),
    "stdlib-text": (None, {"batch_size": 4, "model_args": {"layers": 1}}),
    "cifar10": ("cifar-10-batches-bin", {"batch_size": 8, "width": 0.125}),
    "imagenet": (
        "imagefolder-hymenoptera",
        {"batch_size": 4, "width": 0.125, "model": "resnet18", "task_args": {"size": 64}},
    ),
    "wikitext2": ("wikitext-2", {"batch_size": 4, "width": 0.25, "model_args": {"layers": 1}}),
    "vaihingen": (
        "vaihingen-sample",
        {"batch_size": 2, "width": 0.125, "task_args": {"windows": 8, "size": 64}},
    ),
    "camvid": ("camvid", {"batch_size": 1, "width": 0.0625}),
}


def shortened(root: Path, folder: Path) -> Path:
    """WikiText-2 with 100 lines held out: 33,278 logits for each word of all take a minute."""
    (folder / "train.txt").symlink_to(root / "train.txt")
    lines = (root / "valid.txt").read_text().splitlines(keepends=True)
    (folder / "valid.txt").write_text("".join(lines[:100]))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_is_probed_and_is_measured(task, tmp_path):
    folder, changes = TASKS[task]
    data = os.environ.get("STRAIGHTWAY_DATA")
    if folder is not None and data is None:
        pytest.skip("STRAIGHTWAY_DATA names no folder with real data sets")
    root = None if folder is None else str(Path(str(data)) / folder)
    if task == "wikitext2":
        root = str(shortened(Path(str(root)), tmp_path))
    run = tmp_path / "run.zarr"
    train(read_config(flags={**SMALL, "task": task, "data_root": root, **changes}), run)
    probe_run(run, "shuffled-labels:1", steps=[0, 3])
    assert verify_run(run).sound
    rows = measure_run(run, ["final"])["model"].to_pandas()
    assert set(rows.stream) == {"minibatch", "fixed", "shuffled-labels"}
    before = rows[rows.step < 3]
    assert np.isfinite(before.cosine).all()
    assert (before.norm_dist > 0).all()
