"""The recorder on a GPU: pinned buffers, resuming, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import optim

from capture import Recorder, open_run
from capture.staging import HostCopies
from capture.store import ShardLayout, Staging, Tensor, TensorTable
from tests.capture.cuda_loops import (
    OPTIMIZERS,
    make_batches,
    make_model,
    needs_cuda,
    one_step,
)

pytestmark = needs_cuda

ROOT = Path(__file__).parents[2]


def pinned(staging: Staging) -> list[bool]:
    arrays = [staging.parameters, *staging.buffers.values()]
    return [torch.from_numpy(array).is_pinned() for array in arrays]


def test_staging_buffers_are_pinned_until_the_recorder_is_closed(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"every": 1, "gradients": "minibatch,updates"}
    recorder = Recorder(tmp_path / "run.zarr", model, optimizer, **options)
    for batch in make_batches():
        one_step(model, optimizer, batch)
    assert recorder._snapshots is not None
    stagings = [staging for staging, _ in recorder._snapshots._copies._views.values()]
    assert len(stagings) >= 3
    assert all(all(pinned(staging)) for staging in stagings)
    recorder.close()
    assert not any(any(pinned(staging)) for staging in stagings)


def test_a_buffer_that_cannot_be_pinned_is_used_all_the_same() -> None:
    table = TensorTable((Tensor("w", (5,), "F32", 0),))
    staging = Staging(ShardLayout("weights", table))
    runtime, pointer = torch.cuda.cudart(), staging.image.ctypes.data
    # Memory that is pinned already is refused.
    assert int(runtime.cudaHostRegister(pointer, staging.image.nbytes, 0)) == 0
    try:
        copies = HostCopies(table)
        values = torch.arange(5.0, device="cuda")
        copies.copy_parameters(staging, [values])
        assert np.array_equal(staging.parameters, np.arange(5, dtype=np.float32))
        # The refusal is not taken for an error of the kernels that follow.
        assert float((values + 1.0).sum()) == 15.0
        copies.close()
        assert torch.from_numpy(staging.parameters).is_pinned()
    finally:
        assert int(runtime.cudaHostUnregister(pointer)) == 0


class Stopped(Exception):
    pass


def run_loop(
    path: Path, name: str, *, seed: int, stop_after: int | None = None, resume: bool = False
) -> None:
    """Dropout and data from the device's random numbers, a checkpoint every 4 steps."""
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    torch.manual_seed(seed)
    options: dict[str, Any] = {"every": 3, "gradients": "minibatch,updates", "resume": resume}
    with Recorder(path, model, optimizer, **options) as recorder:
        while recorder.step < 13:
            x = torch.randn(16, 20, device="cuda")
            one_step(model, optimizer, (x, x.argmax(1) % 5), recorder)
            if recorder.step % 4 == 0:
                recorder.checkpoint()
            if recorder.step == stop_after:
                raise Stopped


def files_of(run: Path) -> dict[str, bytes]:
    """Every file of the data: not the lock, nor the resume states."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and (".straightway" not in path.parts or path.name == "commits.jsonl")
    }


@pytest.mark.parametrize("name", ["momentum", "adam", "fused adam"])
def test_a_resumed_run_is_the_same_files(tmp_path: Path, name: str) -> None:
    run_loop(tmp_path / "whole.zarr", name, seed=5)
    whole = files_of(tmp_path / "whole.zarr")
    path = tmp_path / "run.zarr"
    for resume, stop in ((False, 6), (True, 11)):
        with pytest.raises(Stopped):
            # Another seed from then on: all that matters must come from the resume state.
            run_loop(path, name, seed=6 if resume else 5, stop_after=stop, resume=resume)
    run_loop(path, name, seed=7, resume=True)
    found = files_of(path)
    assert found.keys() == whole.keys()
    assert [key for key in found if found[key] != whole[key]] == []
    # The comparison can fail.
    run_loop(tmp_path / "other.zarr", name, seed=8)
    assert files_of(tmp_path / "other.zarr") != whole


MODULE = """
import os, signal
from torch import nn
from capture.tasks.digits import Digits

def noisy(input_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(16, num_classes),
    )

class Watched(Digits):
    # Samples until the process is asked to stop, once: in the middle of the 12th batch.
    left = 64 * 11 + 30

    def augment(self, sample, generator):
        Watched.left -= 1
        if Watched.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample

def watched(data_root=None):
    return Watched()
"""

PROGRAM = """
import shlex, sys
from capture.cli import main
for line in sys.argv[1:]:
    try:
        main(shlex.split(line), prog_name="capture")
    except SystemExit as done:
        print("exit", done.code, flush=True)
"""


def test_the_command_line(tmp_path: Path) -> None:
    """In one process, as its start takes longest: interrupted, resumed, verified and probed."""
    (tmp_path / "cuda_module.py").write_text(MODULE)
    train = (
        "train --task cuda_module:watched --model cuda_module:noisy --device cuda --max-steps 26 "
        "--every 6 --checkpoint-every 5 --gradients minibatch,updates,heldout:1 --out "
    )
    lines = [
        f"{train} run.zarr",
        f"{train} run.zarr --resume",
        f"{train} whole.zarr",
        "verify run.zarr",
        "probe run.zarr --gradients fixed:2,full",
        "verify run.zarr",
        "probe whole.zarr --gradients fixed:2,full",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *lines],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert codes == ["exit 143", *["exit 0"] * 6], done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    run = open_run(tmp_path / "run.zarr")
    assert run.attributes["config"]["device"] == "cuda"
    assert run.complete
    assert run.stream("full").steps.tolist() == run.stream("weights").steps.tolist()
    assert np.isfinite(run.stream("fixed").read(0, 1)).all()
    assert files_of(tmp_path / "run.zarr") == files_of(tmp_path / "whole.zarr")
