"""The recorder on a GPU: the same numbers as there, and no waiting where nothing is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn, optim
from torch.nn.functional import cross_entropy

from capture import Recorder, open_run
from capture.interruption import Interrupted, StopRequest
from capture.staging import HostCopies
from capture.store import ShardLayout, Staging, Tensor, TensorTable
from capture.store.verify import verify_run

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the recorder's CUDA path is not tested"
)

ROOT = Path(__file__).parents[2]
STEPS, EVERY, CLIP = 11, 4, 0.1
EPS = 2.0**-23
# So many cycles, about a tenth of a second, let the device fall behind the loop.
LONG = 200_000_000

Batch = tuple[torch.Tensor, torch.Tensor]
Optimizers = dict[str, Callable[[Any], optim.Optimizer]]

OPTIMIZERS: Optimizers = {
    "plain": lambda p: optim.SGD(p, lr=0.05),
    "decay": lambda p: optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "fused momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: optim.Adam(p, lr=1e-3),
    "fused adam": lambda p: optim.Adam(p, lr=1e-3, fused=True),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 5)
    ).cuda()


def make_batches(count: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, 20, generator=generator).cuda()
    y = torch.randint(5, (count, 16), generator=generator).cuda()
    return list(zip(x, y, strict=True))


def one_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    batch: Batch,
    recorder: Recorder | None = None,
    clip: bool = False,
) -> torch.Tensor:
    """One update of a loop; with a recorder its loss is logged, and the recorder clips."""
    optimizer.zero_grad()
    loss = cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    if recorder is not None:
        recorder.log(loss=loss)
    if clip and recorder is not None:
        recorder.clip_grad_norm_(CLIP)
    elif clip:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.detach()


def flat(tensors: Any) -> np.ndarray:
    """All elements of some tensors, float32 ``[D]``."""
    return torch.cat([tensor.detach().reshape(-1).float().cpu() for tensor in tensors]).numpy()


def gradients_of(model: nn.Module) -> np.ndarray:
    return flat(p.grad for p in model.parameters() if p.grad is not None)


def set_mode(mode: str) -> None:
    with warnings.catch_warnings():
        # That it is a prototype which does not see every wait; those of reading a tensor it sees.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it every wait for the device that torch knows of is an error."""
    set_mode("error")
    try:
        yield
    finally:
        set_mode("default")


# What is stored.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_are_bit_for_bit_what_was_on_the_device(tmp_path: Path, name: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    path = tmp_path / "run.zarr"
    kept: list[dict[str, Any]] = []
    with Recorder(path, model, optimizer, every=EVERY, gradients="minibatch,updates") as _:
        for x, y in make_batches():
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            before = [parameter.detach().clone() for parameter in model.parameters()]
            now = {"weights": flat(before), "minibatch": gradients_of(model)}
            now["buffers"] = {key: value.cpu().clone() for key, value in model.named_buffers()}
            optimizer.step()
            pairs = zip(model.parameters(), before, strict=True)
            now["updates"] = flat(new.detach() - old for new, old in pairs)
            kept.append(now)
    run = open_run(path)
    rows = range(0, STEPS, EVERY)
    assert run.stream("weights").steps.tolist() == [*rows, STEPS]
    for row, step in enumerate(rows):
        for stream in ("weights", "minibatch", "updates"):
            assert np.array_equal(run.stream(stream).read(row), kept[step][stream]), stream
        stored = load_file(path / f"weights/value/c/{row}/0")
        assert kept[step]["buffers"].keys() <= stored.keys()
        for key, value in kept[step]["buffers"].items():
            assert stored[key].dtype == value.dtype
            assert torch.equal(stored[key], value), key
    assert np.array_equal(run.stream("weights").read(len(rows)), flat(model.parameters()))
    assert verify_run(path).sound


def test_half_precision_and_another_order_of_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)
    )
    model = model.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    path = tmp_path / "run.zarr"
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    with Recorder(path, model, optimizer, every=1, gradients="minibatch,updates") as _:
        for _ in range(3):
            optimizer.zero_grad()
            model(
                torch.randn(6, 3, 8, 8, device="cuda").bfloat16()
            ).float().square().mean().backward()
            kept.append((flat(model.parameters()), gradients_of(model)))
            optimizer.step()
    run = open_run(path)
    weights = [run.stream("weights").read(row) for row in range(4)]
    for row, (before, gradient) in enumerate(kept):
        assert np.array_equal(weights[row], before)
        assert np.array_equal(run.stream("minibatch").read(row), gradient)
        # Differences of bfloat16 numbers, in float32.
        assert np.array_equal(run.stream("updates").read(row), weights[row + 1] - weights[row])
    found = run.scalar("update_norm")[1]
    assert found == pytest.approx(
        np.linalg.norm((weights[2] - weights[1]).astype(float)), rel=1e-12
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_recording_does_not_change_the_training(tmp_path: Path, name: str) -> None:
    ends = []
    for recorded in (False, True):
        model = make_model()
        optimizer = OPTIMIZERS[name](model.parameters())
        path = tmp_path / "run.zarr"
        options: dict[str, Any] = {"every": 2, "gradients": "minibatch,updates"}
        with Recorder(path, model, optimizer, **options) if recorded else nullcontext():
            for batch in make_batches():
                one_step(model, optimizer, batch)
        ends.append((flat(model.parameters()), flat(model.buffers())))
    assert np.array_equal(ends[0][0], ends[1][0])
    assert np.array_equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_are_those_of_the_stored_rows(tmp_path: Path, name: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    path, factors, losses = tmp_path / "run.zarr", [], []
    with Recorder(path, model, optimizer, every=1, gradients="minibatch,updates") as recorder:
        for x, y in make_batches():
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            total = recorder.clip_grad_norm_(CLIP)
            recorder.log(loss=loss)
            optimizer.step()
            factors.append(min(1.0, float(torch.clamp(CLIP / (total + 1e-6), max=1.0))))
            losses.append(float(loss.detach()))
    run = open_run(path)
    cuts = np.cumsum([tensor.numel for tensor in run.table.parameters])[:-1]

    def norms(stream: str, row: int) -> np.ndarray:
        parts = np.split(run.stream(stream).read(row).astype(np.float64), cuts)
        return np.array([np.linalg.norm(part) for part in parts])

    for row in range(STEPS):
        # Sums of at most 640 squares in float64, in another order.
        expected = norms("minibatch", row)
        assert run.scalar("grad_norm_by_tensor")[row] == pytest.approx(expected, rel=1e-13)
        assert run.scalar("grad_norm")[row] == pytest.approx(np.linalg.norm(expected), rel=1e-13)
        # What SGD's state tells lacks the rounding of w_{t+1}; see test_update_norms.
        expected, weights = norms("updates", row), norms("weights", row + 1)
        found = run.scalar("update_norm_by_tensor")[row]
        assert (np.abs(found - expected) <= EPS * (weights + 20 * expected) + 1e-13).all()
    assert run.scalar("clip_factor").tolist() == factors
    assert min(factors) < 1.0
    assert run.scalar("loss").tolist() == losses


def test_squares_beyond_the_range_of_float32(tmp_path: Path) -> None:
    model = nn.Linear(50, 2, bias=False, device="cuda")
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    with Recorder(tmp_path / "run.zarr", model, optimizer) as _:
        for size in (1e-30, 1e30):
            model.weight.grad = torch.full_like(model.weight, size)
            optimizer.step()
    # The numbers themselves are rounded to float32.
    found = open_run(tmp_path / "run.zarr").scalar("grad_norm")
    assert found == pytest.approx([1e-29, 1e31], rel=1e-6, abs=0.0)


def test_weights_on_both_kinds_of_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 3).cuda(), nn.Linear(2, 2)])
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    path, kept = tmp_path / "run.zarr", []
    with Recorder(path, model, optimizer, every=1, gradients="minibatch,updates") as _:
        for _ in range(3):
            optimizer.zero_grad()
            model[1](model[0](torch.randn(8, 6)).cuda()).square().mean().backward()
            kept.append(flat(model.parameters()))
            optimizer.step()
    run = open_run(path)
    for row in range(3):
        assert np.array_equal(run.stream("weights").read(row), kept[row])
        gradient = run.stream("minibatch").read(row).astype(float)
        assert run.scalar("grad_norm")[row] == pytest.approx(np.linalg.norm(gradient), rel=1e-7)
    by_tensor = run.scalar("update_norm_by_tensor")
    assert (by_tensor[:, :4] > 0).all()
    assert (by_tensor[:, 4:] == 0).all()


OVERFLOWS = (1, 3)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_with_steps_that_overflow(tmp_path: Path, fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).cuda()
    optimizer = optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    path, kept = tmp_path / "run.zarr", []
    with Recorder(path, model, optimizer, every=1, clipped=False) as recorder:
        for step, (x, y) in enumerate(make_batches(6)):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                # Inputs beyond the range of fp16 give gradients that are not finite.
                loss = cross_entropy(model(x * 1e6 if step in OVERFLOWS else x), y)
            scaler.scale(loss).backward()
            recorder.log(loss=loss)
            before, scaled = flat(model.parameters()), gradients_of(model)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if step in OVERFLOWS:
                assert np.array_equal(flat(model.parameters()), before)
                assert scaler.get_scale() == scale / 2
            else:
                # Dividing by a power of two is exact.
                kept.append((before, scaled / np.float32(scale), float(loss.detach())))
    assert recorder.step == 4
    run = open_run(path)
    assert run.final_step == 4
    for row, (weights, gradient, loss) in enumerate(kept):
        assert np.array_equal(run.stream("weights").read(row), weights)
        assert np.array_equal(run.stream("minibatch").read(row), gradient)
        norm = np.linalg.norm(gradient.astype(float))
        assert run.scalar("grad_norm")[row] == pytest.approx(norm, rel=1e-12)
        assert run.scalar("loss")[row] == loss
    assert run.scalar("clip_factor").tolist() == [1.0] * 4


# Waiting for the device.


def test_the_check_of_waiting_can_fail() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"), no_waiting():
        x.sum().item()
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"), no_waiting():
        x.cpu()


def train_without_waiting(
    path: Path, make: Callable[[Any], optim.Optimizer], clip: bool = False
) -> None:
    """A plain loop, which must not wait after its first step, and a recorded one."""
    model = make_model()
    optimizer = make(model.parameters())
    for step, batch in enumerate(make_batches()):
        with no_waiting() if step else nullcontext():
            one_step(model, optimizer, batch, clip=clip)
    model = make_model()
    optimizer = make(model.parameters())
    losses = []
    with Recorder(path, model, optimizer, every=EVERY, gradients="minibatch,updates") as recorder:
        for step, batch in enumerate(make_batches()):
            with no_waiting() if step % EVERY else nullcontext():
                losses.append(one_step(model, optimizer, batch, recorder, clip))
    run = open_run(path)
    assert run.stream("weights").steps.tolist() == [*range(0, STEPS, EVERY), STEPS]
    assert run.scalar("loss").tolist() == [float(loss) for loss in losses]


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_saves_nothing_does_not_wait(tmp_path: Path, name: str, clip: bool) -> None:
    train_without_waiting(tmp_path / "run.zarr", OPTIMIZERS[name], clip)


def test_a_learning_rate_on_the_device_is_not_waited_for(tmp_path: Path) -> None:
    rate = torch.tensor(1e-3, device="cuda")
    train_without_waiting(
        tmp_path / "run.zarr", lambda p: optim.Adam(p, lr=rate, capturable=True, foreach=True)
    )
    run = open_run(tmp_path / "run.zarr")
    assert run.scalar("lr").tolist() == [float(rate)] * STEPS
    assert run.scalar("group_lr").tolist() == [[float(rate)]] * STEPS


def test_the_loss_of_a_closure_is_not_waited_for(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=EVERY) as _:
        for step, (x, y) in enumerate(make_batches()):

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            with no_waiting() if step % EVERY else nullcontext():
                losses.append(optimizer.step(closure).detach())
    found = open_run(tmp_path / "run.zarr").scalar("loss")
    assert found.tolist() == [float(loss) for loss in losses]


def test_scalars_that_arrive_late_are_written_in_order(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, late = [], 0
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1000) as recorder:
        assert recorder._snapshots is not None
        for step, batch in enumerate(make_batches(100)):
            if step % 10 == 5:
                torch.cuda._sleep(LONG // 10)
            losses.append(one_step(model, optimizer, batch, recorder))
            late = max(late, len(recorder._snapshots.scalars))
    # The loop did run ahead of the device, or nothing was tested.
    assert late >= 3
    found = open_run(tmp_path / "run.zarr").scalar("loss")
    assert found.tolist() == [float(loss) for loss in losses]


def test_a_state_holds_every_scalar_before_it_and_an_interruption_loses_none(
    tmp_path: Path,
) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    path, losses = tmp_path / "run.zarr", []
    recorder = Recorder(path, model, optimizer, every=1000)

    def loop() -> None:
        assert recorder._snapshots is not None
        with StopRequest() as stop, recorder:
            for step, batch in enumerate(make_batches()):
                if step == 4:
                    torch.cuda._sleep(LONG)
                losses.append(one_step(model, optimizer, batch, recorder))
                if step == 7:
                    assert len(recorder._snapshots.scalars) >= 3
                    os.kill(os.getpid(), signal.SIGTERM)
                if stop.signum is not None:
                    recorder.checkpoint()
                    # The state is on disk, and so are the scalars of all updates before it.
                    assert len(open_run(path).scalar("loss")) == recorder.step
                    raise Interrupted("stopped", signum=stop.signum)

    with pytest.raises(Interrupted):
        loop()
    assert recorder.step == 8
    found = open_run(path).scalar("loss")
    assert found.tolist() == [float(loss) for loss in losses]


def test_an_error_in_the_loop_loses_no_scalar(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recorder = Recorder(tmp_path / "run.zarr", model, optimizer, every=1000)
    one_step(model, optimizer, make_batches()[0], recorder)
    torch.cuda._sleep(LONG)
    for batch in make_batches()[1:]:
        one_step(model, optimizer, batch, recorder)
    with pytest.raises(ZeroDivisionError), recorder:
        raise ZeroDivisionError
    assert len(open_run(tmp_path / "run.zarr").scalar("loss")) == STEPS


# The staging buffers.


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


# Resuming, and the command line.


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
