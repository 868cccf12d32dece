"""The recorder in loops as people write them, with real optimizers: every step pairs rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from capture import Recorder, open_run
from capture.store import Run, UnsupportedModelError

INPUTS = [torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in range(6)]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).numpy()


def gradient_at(weights: np.ndarray, *inputs: torch.Tensor) -> np.ndarray:
    """The gradient at stored weights, by autograd on a model of its own."""
    model = make_model()
    nn.utils.vector_to_parameters(torch.from_numpy(weights), model.parameters())
    loss = sum(loss_of(model, x) for x in inputs)
    return flat(torch.autograd.grad(loss, list(model.parameters())))


def assert_paired(run: Run, steps: list[int] | None = None) -> None:
    """Row t of `minibatch` is the gradient of input t at row t of `weights`, bit for bit."""
    inputs = INPUTS if steps is None else [INPUTS[step] for step in steps]
    assert run.stream("minibatch").steps.tolist() == list(range(len(inputs)))
    assert run.stream("weights").steps.tolist() == list(range(len(inputs) + 1))
    for row, x in enumerate(inputs):
        expected = gradient_at(run.stream("weights").read(row), x)
        assert np.array_equal(run.stream("minibatch").read(row), expected)


def test_closure(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1) as recorder:
        for step, x in enumerate(INPUTS):

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                losses.append(loss.item())
                return loss

            returned = optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
            assert returned.item() == losses[-1]
    assert recorder.step == len(INPUTS)
    run = open_run(tmp_path / "run.zarr")
    assert_paired(run)
    assert run.scalar("loss").tolist() == losses


class TwoEvaluations(optim.SGD):
    """An optimizer in the manner of SAM: the closure runs twice in a step."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
            return closure()


class NoEvaluation(optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()


def test_closures_that_are_not_evaluated_once_are_refused(tmp_path: Path) -> None:
    words = {
        TwoEvaluations: "closure several times",
        NoEvaluation: "without evaluating its closure",
    }
    for kind, expected in words.items():
        model = make_model()
        optimizer = kind(model.parameters(), lr=0.1)
        recorder = Recorder(tmp_path / f"{kind.__name__}.zarr", model, optimizer)
        with pytest.raises(UnsupportedModelError, match=f"{expected}.*{kind.__name__}"), recorder:
            optimizer.step(lambda: torch.zeros(()))


def test_lbfgs_is_refused_when_attached(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(UnsupportedModelError, match="LBFGS evaluates its closure several times"):
        Recorder(tmp_path / "run.zarr", model, optim.LBFGS(model.parameters()))
    assert not (tmp_path / "run.zarr").exists()


class Decaying(optim.SGD):
    """Changes the weights, then calls the step of its base class: hooked at both levels."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_the_step_of_its_base_counts_once(
    tmp_path: Path, with_closure: bool
) -> None:
    # torch hooks the base class's step once somebody has made an instance of it.
    optim.SGD(make_model().parameters(), lr=0.1)
    model = make_model()
    optimizer = Decaying(model.parameters(), lr=0.1)
    with Recorder(
        tmp_path / "run.zarr", model, optimizer, every=1, gradients="minibatch,updates"
    ) as recorder:
        for x in INPUTS:

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    assert recorder.step == len(INPUTS)
    run = open_run(tmp_path / "run.zarr")
    assert run.stream("weights").steps.tolist() == list(range(len(INPUTS) + 1))
    if not with_closure:
        assert_paired(run)
        first, second = run.stream("weights").read(0), run.stream("weights").read(1)
        assert np.array_equal(run.stream("updates").read(0), second - first)


def with_scaler(path: Path, optimizer_kind: Any, poisoned: tuple[int, ...], **options: Any) -> Run:
    model = make_model()
    optimizer = optimizer_kind(model.parameters(), lr=0.01, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with Recorder(path, model, optimizer, every=1) as recorder:
        for step, x in enumerate(INPUTS):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            scaler.scale(loss).backward()
            if step in poisoned:
                model[0].weight.grad[0, 0] = torch.inf
            recorder.log(loss=loss)
            scaler.step(optimizer)
            scaler.update()
        assert recorder.step == len(INPUTS) - len(poisoned)
    return open_run(path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.SGD, {}),
        (optim.SGD, {"fused": True}),
        (optim.Adam, {"fused": True}),
        (optim.AdamW, {"fused": True}),
    ],
)
def test_grad_scaler_unscales_and_skipped_steps_are_no_steps(
    tmp_path: Path, kind: Any, options: dict[str, Any]
) -> None:
    run = with_scaler(tmp_path / "run.zarr", kind, (1, 4), **options)
    kept = [0, 2, 3, 5]
    # The scale is a power of two, so unscaling is exact and the comparison is of bits.
    assert_paired(run, kept)
    norms = [
        np.linalg.norm(run.stream("minibatch").read(row).astype(float)) for row in range(len(kept))
    ]
    # The norms are summed in float32 within a tensor.
    assert run.scalar("grad_norm") == pytest.approx(norms, rel=1e-7)
    weights = [run.stream("weights").read(row) for row in range(len(kept) + 1)]
    losses = []
    for row, step in enumerate(kept):
        model = make_model()
        nn.utils.vector_to_parameters(torch.from_numpy(weights[row]), model.parameters())
        losses.append(loss_of(model, INPUTS[step]).item())
    assert run.scalar("loss").tolist() == losses
    assert (run.scalar("update_norm") > 0).all()


def test_gradient_accumulation(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1) as _:
        for first, second in zip(INPUTS[::2], INPUTS[1::2], strict=True):
            optimizer.zero_grad()
            loss_of(model, first).backward()
            loss_of(model, second).backward()
            optimizer.step()
    run = open_run(tmp_path / "run.zarr")
    for row in range(3):
        pair = INPUTS[2 * row : 2 * row + 2]
        weights = run.stream("weights").read(row)
        apart = [gradient_at(weights, x) for x in pair]
        assert np.array_equal(run.stream("minibatch").read(row), apart[0] + apart[1])


def test_clipping_through_the_recorder_keeps_the_factor(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    limit = 0.3
    totals = []
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1) as recorder:
        for step, x in enumerate(INPUTS):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            if step != 2:
                totals.append(float(recorder.clip_grad_norm_(limit if step else 1e6)))
            optimizer.step()
    run = open_run(tmp_path / "run.zarr")
    factors = run.scalar("clip_factor")
    assert factors[0] == 1.0
    assert np.isnan(factors[2])
    assert totals[1] > limit
    for row in (1, 3):
        stored = run.stream("minibatch").read(row).astype(float)
        unclipped = gradient_at(run.stream("weights").read(row), INPUTS[row])
        # One float32 multiplication per coordinate lies between the two.
        assert stored / factors[row] == pytest.approx(unclipped, rel=2e-7)
        assert run.scalar("grad_norm")[row] == pytest.approx(np.linalg.norm(stored), rel=1e-7)


def test_clipping_is_the_one_of_torch(tmp_path: Path) -> None:
    ours, theirs = make_model(), make_model()
    for model in (ours, theirs):
        loss_of(model, INPUTS[0]).backward()
    recorder = Recorder(tmp_path / "run.zarr", ours, optim.SGD(ours.parameters()))
    total = recorder.clip_grad_norm_(0.1)
    with pytest.warns(UserWarning, match="no step"):
        recorder.close()
    assert total == nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    assert np.array_equal(
        flat(p.grad for p in ours.parameters()), flat(p.grad for p in theirs.parameters())
    )


def test_a_loop_that_never_clips_can_say_so(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, clipped=False) as _:
        loss_of(model, INPUTS[0]).backward()
        optimizer.step()
    assert open_run(tmp_path / "run.zarr").scalar("clip_factor").tolist() == [1.0]


def test_maximize_keeps_the_gradient_as_it_is(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1, maximize=True)
    with Recorder(
        tmp_path / "run.zarr", model, optimizer, every=1, gradients="minibatch,updates"
    ) as _:
        for x in INPUTS:
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
    run = open_run(tmp_path / "run.zarr")
    assert run.attributes["optimizer"]["maximize"] is True
    assert_paired(run)
    # The update ascends: float32 rounding of w + 0.1 g, relative to weights below 1.
    ascent = 0.1 * run.stream("minibatch").read(0)
    assert run.stream("updates").read(0) == pytest.approx(ascent, abs=1e-7)


def test_learning_rate_schedules_show_the_rate_that_was_used(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    with Recorder(tmp_path / "run.zarr", model, optimizer) as _:
        for x in INPUTS:
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
            scheduler.step()
    expected = [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert open_run(tmp_path / "run.zarr").scalar("lr").tolist() == expected


def test_sparse_gradients_are_stored_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(10, 3, sparse=True)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1) as _:
        model(torch.tensor([1, 4, 4])).square().sum().backward()
        expected = model.weight.grad.to_dense().reshape(-1).numpy().copy()
        optimizer.step()
    run = open_run(tmp_path / "run.zarr")
    assert np.array_equal(run.stream("minibatch").read(0), expected)
    assert run.scalar("grad_norm")[0] == pytest.approx(np.linalg.norm(expected), rel=1e-7)


def test_nan_and_inf_are_recorded_as_they_are(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1) as recorder:
        loss_of(model, INPUTS[0]).backward()
        model[0].bias.grad[1] = torch.inf
        model[2].bias.grad[0] = torch.nan
        recorder.log(loss=torch.nan)
        with pytest.warns(UserWarning, match="changes gradients"):
            optimizer.step()
    run = open_run(tmp_path / "run.zarr")
    stored = run.stream("minibatch").read(0)
    assert (np.isinf(stored).sum(), np.isnan(stored).sum()) == (1, 1)
    assert np.isnan(run.scalar("grad_norm")[0])
    by_tensor = run.scalar("grad_norm_by_tensor")[0]
    assert np.isfinite(by_tensor[[0, 2]]).all()
    assert by_tensor[1] == np.inf
    assert np.isnan(by_tensor[3])


def test_wrapped_models_have_bare_names(tmp_path: Path) -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    optimizer = optim.SGD(compiled.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", compiled, optimizer, every=1) as _:
        for x in INPUTS:
            optimizer.zero_grad()
            loss_of(compiled, x).backward()
            optimizer.step()
    run = open_run(tmp_path / "run.zarr")
    assert run.table.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert_paired(run)
