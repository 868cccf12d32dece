"""The recorder on a GPU: what it stores is what was there, to the bit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn, optim
from torch.nn.functional import cross_entropy

from capture import Recorder, open_run
from capture.store.verify import verify_run
from tests.capture.cuda_loops import (
    CLIP,
    EPS,
    EVERY,
    OPTIMIZERS,
    STEPS,
    flat,
    gradients_of,
    make_batches,
    make_model,
    needs_cuda,
    one_step,
)

pytestmark = needs_cuda


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
