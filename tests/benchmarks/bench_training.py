"""What recording costs a whole training, and what the paper's own protocol would cost instead.

Momentum SGD on random images of CIFAR's shapes, batch 64, with a snapshot of the weights and its
gradient every 10 steps: ResNet-18 (11.2 M parameters) and the paper's MLP (46.2 M). Rows:

    training_overhead_*   blocks of 10 plain and 10 recorded steps take turns, in an order that
                          turns too; the writer's work falls into the recorded blocks, which end
                          when the block's snapshot is on disk; `value` is the median of the ratios
                          `thread_alone` is that ratio without waiting for the disk
    training_overhead_cuda_*   the same on a GPU, where there is one; the device is waited for at
                          the end of each block
    snapshot_*            the training thread held by one snapshot of 45 MB, each way in turn
    snapshot_cuda         the same from a GPU, beside a bare copy of the bytes to pinned memory
    staging_*             the staging buffers, and the memory of the process over 2,000 snapshots
    protocol_*            the paper's protocol, a second training that measures itself against the
                          w_T of the first, and ours, one recorded training and `analyze compute`,
                          both as ratios to one plain training

The disk keeps up where the next snapshot is not due before the one before is written.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed.checkpoint as checkpoint
import zarr
from safetensors.torch import save_file
from torch import nn, optim
from torch.nn.functional import cross_entropy

from analyze.compute import compute_moments
from analyze.moments import GEOMETRY
from analyze.references import parse_reference
from capture import Recorder
from capture.hooks import StepHooks
from capture.models.mlp import mlp
from capture.models.resnet import resnet

BATCH, EVERY, CLASSES = 64, 10, 10
SHAPE = (3, 32, 32)
RESNET_PAIRS, MLP_PAIRS, SNAPSHOT_TURNS, PROTOCOL_TURNS = 3, 8, 7, 2
CUDA_PAIRS, CUDA_TURNS = 15, 30
GROWTH_SNAPSHOTS, WARM_SNAPSHOTS = 2000, 200

Row = dict[str, Any]
Seconds = dict[str, list[float]]


def rows() -> Iterator[Row]:
    """Measure and give one JSON-ready row per result."""
    torch.manual_seed(0)
    large = mlp(SHAPE, CLASSES, hidden=4096, depth=3)
    residual = resnet(SHAPE, CLASSES, depth=18, channels=64)
    yield overhead("mlp", large, MLP_PAIRS)
    yield overhead("resnet18", residual, RESNET_PAIRS)
    yield from snapshots()
    yield from memory()
    yield from protocol("mlp", large, 60)
    yield from protocol("resnet18", residual, 30)
    if torch.cuda.is_available():
        yield from rows_on_cuda()


def rows_on_cuda() -> Iterator[Row]:
    """What is measured on a GPU."""
    yield overhead("mlp", mlp(SHAPE, CLASSES, hidden=4096, depth=3), CUDA_PAIRS, "cuda")
    yield overhead("resnet18", resnet(SHAPE, CLASSES, depth=18, channels=64), CUDA_PAIRS, "cuda")
    yield snapshot_cuda()


# A training, plain and recorded.


def overhead(name: str, model: nn.Module, pairs: int, device: str = "cpu") -> Row:
    """Blocks of one training, recorded and not, in turn.

    It is the same model in the same memory, since where tensors lie changes the time of a step by
    more than recording does.
    """
    x, y = (tensor.to(device) for tensor in images(BATCH))
    optimizer = optimizer_of(model.to(device))
    ratios, plain_seconds, alone, held_seconds = [], [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder,
        Recorder(Path(folder) / "run.zarr", model, optimizer, every=EVERY) as recorder,
    ):

        def block() -> None:
            train(model, optimizer, x, y, EVERY)
            if device == "cuda":
                torch.cuda.synchronize()

        def recorded_block() -> None:
            hooks = StepHooks(optimizer, recorder._before_step, recorder._after_step)
            before = recorder.held_seconds
            alone.append(timed(block))
            held_seconds.append(recorder.held_seconds - before)
            assert recorder._snapshots is not None
            recorder._snapshots.drain()
            hooks.remove()

        assert recorder._hooks is not None
        recorder._hooks.remove()
        ways = {"plain": block, "recorded": recorded_block}
        for turn in range(-1, pairs):
            order = list(ways) if turn % 2 else list(reversed(ways))
            took = {way: timed(ways[way]) for way in order}
            if turn >= 0:
                ratios.append(took["recorded"] / took["plain"])
                plain_seconds.append(took["plain"])
    # The first block of both kinds was for warming up.
    by_thread = [one / plain for one, plain in zip(alone[1:], plain_seconds, strict=True)]
    return {
        "name": f"training_overhead_{'cuda_' if device == 'cuda' else ''}{name}",
        "value": statistics.median(ratios),
        "unit": "times a plain training",
        "smallest": min(ratios),
        "largest": max(ratios),
        "thread_alone": statistics.median(by_thread),
        "held_ms_per_snapshot": 1e3 * statistics.median(held_seconds[1:]),
        "plain_ms_per_step": 1e3 * statistics.median(plain_seconds) / EVERY,
        "parameters": size_of(model),
        "steps_per_block": EVERY,
        "n": pairs,
        **device_facts(device),
    }


def device_facts(device: str) -> Row:
    """The name of the GPU, where one is measured."""
    return {"device": torch.cuda.get_device_name()} if device == "cuda" else {}


def train(
    model: nn.Module, optimizer: optim.Optimizer, x: torch.Tensor, y: torch.Tensor, steps: int
) -> None:
    """Train on one batch; what the images show does not matter for the cost."""
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


# One snapshot, by us and by others.


def snapshots() -> Iterator[Row]:
    """The training thread held for the tensors of a ResNet-18, beside a memcpy of the same."""
    model = resnet(SHAPE, CLASSES, depth=18, channels=64)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = optimizer_of(model)
    with tempfile.TemporaryDirectory(prefix="straightway-bench-") as name:
        folder = Path(name)
        with Recorder(folder / "run.zarr", model, optimizer, every=1, gradients=None) as recorder:
            ways = ways_to_save(tensors, folder)
            seconds: Seconds = {way: [] for way in ("memcpy", "straightway", *ways)}
            buffers = [np.ones_like(tensor.numpy()) for tensor in tensors.values()]
            for turn in range(-1, SNAPSHOT_TURNS):
                took = {"memcpy": timed(lambda: copy_into(buffers, tensors))}
                took["straightway"] = held(recorder, optimizer)
                took |= {way: way_held(folder, save) for way, save in ways.items()}
                for way, value in took.items():
                    if turn >= 0:
                        seconds[way].append(value)
    for way, times in seconds.items():
        ratios = [one / plain for one, plain in zip(times, seconds["memcpy"], strict=True)]
        yield {
            "name": f"snapshot_{way}",
            "value": 1e3 * statistics.median(times),
            "unit": "ms",
            "ratio_to_memcpy": statistics.median(ratios),
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "n": len(times),
        }


def snapshot_cuda() -> Row:
    """The training thread held by one snapshot from a GPU, beside a bare copy to pinned memory."""
    model = resnet(SHAPE, CLASSES, depth=18, channels=64).cuda()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = optimizer_of(model)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def bare() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    ours, copies = [], []
    with (
        tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder,
        Recorder(Path(folder) / "run.zarr", model, optimizer, every=1, gradients=None) as recorder,
    ):
        for turn in range(-2, CUDA_TURNS):
            torch.cuda.synchronize()
            took = timed(bare), held(recorder, optimizer)
            if turn >= 0:
                copies.append(took[0])
                ours.append(took[1])
    return {
        "name": "snapshot_cuda",
        "value": 1e3 * statistics.median(ours),
        "unit": "ms",
        "bare_copy_ms": 1e3 * statistics.median(copies),
        "ratio_to_bare_copy": statistics.median(
            [one / plain for one, plain in zip(ours, copies, strict=True)]
        ),
        "bytes": size,
        "n": len(ours),
        **device_facts("cuda"),
    }


def ways_to_save(
    tensors: dict[str, torch.Tensor], folder: Path
) -> dict[str, Callable[[Path], Any]]:
    """How else one would save a `state_dict`; each is given a fresh path."""

    def write_zarr(path: Path) -> None:
        group = zarr.open_group(path, mode="w")
        for name, tensor in tensors.items():
            group.create_array(name, data=tensor.numpy(), compressors=None)

    def async_save(path: Path) -> Any:
        return checkpoint.async_save(tensors, checkpoint_id=path, no_dist=True)

    return {
        "safetensors_save_file": lambda path: save_file(tensors, path),
        "torch_save": lambda path: torch.save(tensors, path),
        "dcp_async_save": async_save,
        "zarr_python": write_zarr,
    }


def way_held(folder: Path, save: Callable[[Path], Any]) -> float:
    """Seconds until `save` gives the thread back; what it left to do is then waited for."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        start = time.perf_counter()
        pending = save(Path(inner) / "snapshot")
        took = time.perf_counter() - start
        if pending is not None:
            pending.result()
    return took


def held(recorder: Recorder, optimizer: optim.Optimizer) -> float:
    """Seconds for which one snapshot holds the thread, by the recorder's own count."""
    before = recorder.held_seconds
    optimizer.step()
    assert recorder._snapshots is not None
    recorder._snapshots.queue.drain()
    return recorder.held_seconds - before


def copy_into(buffers: list[np.ndarray], tensors: dict[str, torch.Tensor]) -> None:
    """One memcpy for each tensor, into memory that was used before."""
    for buffer, tensor in zip(buffers, tensors.values(), strict=True):
        np.copyto(buffer, tensor.numpy())


# Memory.


def memory() -> Iterator[Row]:
    """The staging buffers in snapshots, and how the process grows over many small ones."""
    model = mlp((1, 8, 8), CLASSES, hidden=64)
    x, y = torch.randn(BATCH, 1, 8, 8), torch.randint(CLASSES, (BATCH,))
    optimizer = optimizer_of(model)
    process = psutil.Process()
    with (
        tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder,
        Recorder(Path(folder) / "run.zarr", model, optimizer, every=1) as recorder,
    ):
        train(model, optimizer, x, y, WARM_SNAPSHOTS)
        before = process.memory_info().rss
        train(model, optimizer, x, y, GROWTH_SNAPSHOTS)
        growth = process.memory_info().rss - before
        assert recorder._snapshots is not None
        buffers = [staging for staging, _ in recorder._snapshots._copies._views.values()]
        staged = sum(staging.parameters.nbytes for staging in buffers)
    snapshot = 2 * 4 * size_of(model)  # weights and gradient, float32
    yield {
        "name": "staging_memory",
        "value": staged / snapshot,
        "unit": "snapshots of weights and gradient",
        "n": 1,
    }
    yield {
        "name": "staging_growth",
        "value": growth / 1e6,
        "unit": "MB",
        "bytes_per_snapshot": growth / GROWTH_SNAPSHOTS,
        "snapshots": GROWTH_SNAPSHOTS,
        "snapshot_bytes": snapshot,
        "n": 1,
    }


# The paper's protocol.


def protocol(name: str, initial: nn.Module, steps: int) -> Iterator[Row]:
    """Train plainly, twice with measuring, and once with recording, in turn."""
    x, y = images(BATCH)
    ratios: Seconds = {"paper": [], "ours": []}
    plain_training(initial, x, y, 2)
    for _ in range(PROTOCOL_TURNS):
        plain = timed(lambda: plain_training(initial, x, y, steps))
        took = {
            "paper": timed(lambda: paper_training(initial, x, y, steps)),
            "ours": timed(lambda: our_training(initial, x, y, steps)),
        }
        for way, seconds in took.items():
            ratios[way].append(seconds / plain)
    for way, values in ratios.items():
        yield {
            "name": f"protocol_{way}_{name}",
            "value": statistics.median(values),
            "unit": "times a plain training",
            "smallest": min(values),
            "largest": max(values),
            "steps": steps,
            "parameters": size_of(initial),
            "n": len(values),
        }


def plain_training(
    initial: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """Train a copy of `initial`; return w_T by tensor."""
    model = copy.deepcopy(initial)
    train(model, optimizer_of(model), x, y, steps)
    return [parameter.detach() for parameter in model.parameters()]


def paper_training(
    initial: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int
) -> list[tuple[float, float]]:
    """Train to find w_T, then again with RSI and EB against it at every step."""
    final = plain_training(initial, x, y, steps)
    model = copy.deepcopy(initial)
    optimizer = optimizer_of(model)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        found.append(measure(list(model.parameters()), final))
        optimizer.step()
    return found


@torch.no_grad()
def measure(parameters: list[nn.Parameter], final: list[torch.Tensor]) -> tuple[float, float]:
    """``⟨g, w - w_T⟩ / ‖w - w_T‖²`` and ``‖g‖ / ‖w - w_T‖`` of the whole model."""
    gradient = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    pairs = zip(parameters, final, strict=True)
    error = torch.cat([(w - end).reshape(-1) for w, end in pairs])
    square = float(error @ error)
    if square == 0.0:
        return math.nan, math.nan
    return float(gradient @ error) / square, float(gradient.norm()) / math.sqrt(square)


def our_training(initial: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> Any:
    """Train a copy once with recording, then measure it against its own w_T."""
    model = copy.deepcopy(initial)
    optimizer = optimizer_of(model)
    with tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder:
        run = Path(folder) / "run.zarr"
        with Recorder(run, model, optimizer, every=EVERY):
            train(model, optimizer, x, y, steps)
        final = [parse_reference("final")]
        return compute_moments(run, ["minibatch"], final, moments=GEOMETRY, workers=2)


# Shared by all of them.


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images ``[count, 3, 32, 32]`` and labels ``[count]``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *SHAPE, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def optimizer_of(model: nn.Module) -> optim.SGD:
    """Momentum SGD with steps small enough to go on for ever."""
    return optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def size_of(model: nn.Module) -> int:
    """Number of trainable coordinates, D."""
    return sum(parameter.numel() for parameter in model.parameters())


def timed(call: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    from run import main

    main(sys.argv[1:] or ["training"])
