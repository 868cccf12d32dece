"""How long recording holds the training thread, beside a memcpy of the same bytes.

A model of the size and shapes of ResNet-18 (D = 11.2 M, 62 tensors, 20 BatchNorm layers) with
gradients that are there already, so that nothing but the optimizer and the recorder runs. The next
snapshot is taken once the one before is on disk: the disk keeps up. Every turn measures each way
once, so that a busy machine slows all of them alike; values are medians.

    memcpy       copy weights and gradient, 89 MB, into buffers that were used before
    staged       the copies of a snapshot of weights and gradient, as the recorder counts them
    held         all that a step with a snapshot takes beyond the bare step, norms included
    every step   what the recorder adds to a step that saves nothing: norms of gradient and update
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn, optim

from capture import Recorder

TURNS = 20
SNAPSHOT_EVERY = 2

Row = dict[str, Any]


def rows() -> Iterator[Row]:
    """Measure and give one JSON-ready row per result."""
    model = resnet18_tensors()
    bare, recorded = optimizer_of(model), optimizer_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    seconds: dict[str, list[float]] = {
        name: [] for name in ("memcpy", "staged", "saving", "bare", "recorded")
    }
    with tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder:
        recorder = Recorder(Path(folder) / "run.zarr", model, recorded, every=SNAPSHOT_EVERY)
        with recorder:
            for turn in range(-3, TURNS):
                found = one_turn(model, bare, recorded, recorder)
                for name, value in found.items():
                    if turn >= 0:
                        seconds[name].append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    coordinates = sum(parameter.numel() for parameter in model.parameters())
    shared: Row = {"unit": "ms", "parameters": coordinates, "n": TURNS}
    yield {"name": "recorder_memcpy", "value": 1e3 * median["memcpy"], **shared}
    bare_steps = seconds["bare"]
    for name, times in (
        ("recorder_staged_per_snapshot", seconds["staged"]),
        ("recorder_held_per_snapshot", beyond(seconds["saving"], bare_steps)),
        ("recorder_norms_per_step", beyond(seconds["recorded"], bare_steps)),
    ):
        ratios = [one / copy for one, copy in zip(times, seconds["memcpy"], strict=True)]
        value, ratio = 1e3 * statistics.median(times), statistics.median(ratios)
        yield {"name": name, "value": value, "ratio_to_memcpy": ratio, **shared}


def beyond(times: list[float], bare: list[float]) -> list[float]:
    """What each turn took beyond the bare step of the same turn."""
    return [one - other for one, other in zip(times, bare, strict=True)]


def one_turn(
    model: nn.Module, bare: optim.Optimizer, recorded: optim.Optimizer, recorder: Recorder
) -> dict[str, float]:
    """Seconds of each way, in turn."""
    found = {"memcpy": timed_copy(model)}
    written, held = recorder.bytes_written, recorder.held_seconds
    start = time.perf_counter()
    recorded.step()  # saves weights and gradient
    found["saving"] = time.perf_counter() - start
    found["staged"] = recorder.held_seconds - held
    wait_for(recorder, written)
    for name, optimizer in (("bare", bare), ("recorded", recorded)):
        start = time.perf_counter()
        optimizer.step()
        found[name] = time.perf_counter() - start
    return found


def timed_copy(model: nn.Module, buffers: list[list[np.ndarray]] = []) -> float:  # noqa: B006 - kept
    """Copy weights and gradient of every tensor, as the snapshot does, one memcpy each."""
    sources = [p.detach().numpy() for p in model.parameters()]
    sources += [p.grad.numpy() for p in model.parameters() if p.grad is not None]
    if not buffers:
        buffers.append([np.ones_like(source) for source in sources])
    start = time.perf_counter()
    for buffer, source in zip(buffers[0], sources, strict=True):
        np.copyto(buffer, source)
    return time.perf_counter() - start


def wait_for(recorder: Recorder, written: int) -> None:
    """Wait until both shards of the last snapshot are committed, and the disk is quiet again."""
    parts = 0
    while parts < 2:
        if recorder.bytes_written > written:
            parts, written = parts + 1, recorder.bytes_written
        time.sleep(0.01)
    time.sleep(0.1)


def optimizer_of(model: nn.Module) -> optim.SGD:
    """Momentum SGD with steps small enough to go on for ever."""
    return optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)


def resnet18_tensors() -> nn.Module:
    """The tensors of ResNet-18 for 32x32 images; never run, so their order does not matter."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64)]
    width = 64
    for stage in (64, 128, 256, 512):
        for block in range(2):
            for inputs in (width, stage):
                layers += [nn.Conv2d(inputs, stage, 3, bias=False), nn.BatchNorm2d(stage)]
            if block == 0 and stage != 64:
                layers += [nn.Conv2d(width, stage, 1, bias=False), nn.BatchNorm2d(stage)]
            width = stage
    return nn.Sequential(*layers, nn.Linear(512, 10))


if __name__ == "__main__":
    from run import main

    main(["recorder"])
