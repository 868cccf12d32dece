"""What a recorder saves, and when: pairing, the final iterate, schedules, scalars, leaving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn, optim

from capture import Recorder, open_run
from capture.store import Run, UsageError
from capture.store.verify import verify_run

STEPS = 7


def batches(count: int = STEPS, size: int = 8, width: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, width, generator=generator) for _ in range(count)]


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def momentum(model: nn.Module) -> optim.SGD:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(recorder: Recorder, model: nn.Module, optimizer: optim.Optimizer) -> None:
    for x in batches():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        recorder.log(loss=loss)
        optimizer.step()


def shard(run: Run, stream: str, row: int) -> Path:
    folder = stream if stream in ("weights", "updates") else f"gradients/{stream}"
    return run.path / folder / "value" / "c" / str(row) / "0"


def flat(parameters: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters]).numpy()


def test_gradient_row_t_is_the_gradient_at_weights_row_t(tmp_path: Path) -> None:
    model = small_model()
    optimizer = momentum(model)
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=2) as recorder:
        train(recorder, model, optimizer)
    run = open_run(tmp_path / "run.zarr")
    assert run.complete
    assert run.final_step == STEPS
    assert run.stream("weights").steps.tolist() == [0, 2, 4, 6, 7]
    assert run.stream("minibatch").steps.tolist() == [0, 2, 4, 6]
    for row, step in enumerate(run.stream("minibatch").steps):
        other = small_model(seed=9)
        values = load_file(shard(run, "weights", row))
        # BatchNorm in train mode does not read its running statistics, so that these already
        # include step t makes no difference to the gradient.
        other.load_state_dict({name: values[name] for name in other.state_dict()}, strict=True)
        gradients = torch.autograd.grad(loss_of(other, batches()[step]), list(other.parameters()))
        assert np.array_equal(run.stream("minibatch").read(row), flat(list(gradients)))


def test_updates_are_the_differences_of_consecutive_weights(tmp_path: Path) -> None:
    model = small_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    path = tmp_path / "run.zarr"
    with Recorder(path, model, optimizer, every=1, gradients="updates") as recorder:
        train(recorder, model, optimizer)
    run = open_run(path)
    weights = [run.stream("weights").read(row) for row in range(STEPS + 1)]
    for row in range(STEPS):
        assert np.array_equal(run.stream("updates").read(row), weights[row + 1] - weights[row])
    assert run.stream_names == ["weights", "updates"]


def test_last_row_is_the_model_as_it_is_after_training(tmp_path: Path) -> None:
    model = small_model()
    optimizer = momentum(model)
    with Recorder(tmp_path / "run.zarr", model, optimizer) as recorder:
        train(recorder, model, optimizer)
    run = open_run(tmp_path / "run.zarr")
    row = run.final_row()
    assert np.array_equal(run.stream("weights").read(row), flat(list(model.parameters())))
    restored = small_model(seed=9)
    values = load_file(shard(run, "weights", row))
    restored.load_state_dict({name: values[name] for name in restored.state_dict()}, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name


def test_scalars_of_every_step_agree_with_dense_float64(tmp_path: Path) -> None:
    model = small_model()
    bias, rest = [], []
    for name, parameter in model.named_parameters():
        (bias if name.endswith("bias") else rest).append(parameter)
    optimizer = optim.SGD(
        [{"params": rest, "weight_decay": 0.1}, {"params": bias, "lr": 0.05}], lr=0.2, momentum=0.5
    )
    expected: dict[str, list[object]] = {"loss": [], "grads": [], "updates": []}
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=100) as recorder:
        for x in batches():
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            recorder.log(loss=loss, accuracy=0.5)
            before = [p.detach().double() for p in model.parameters()]
            expected["grads"].append([float(p.grad.double().norm()) for p in model.parameters()])
            optimizer.step()
            after = zip(model.parameters(), before, strict=True)
            expected["updates"].append([float((p.detach().double() - q).norm()) for p, q in after])
            expected["loss"].append(float(loss.detach()))
    run = open_run(tmp_path / "run.zarr")
    # Squares are summed in float32 within a tensor: 1e-7 is the promise.
    assert run.scalar("grad_norm_by_tensor") == pytest.approx(np.array(expected["grads"]), rel=1e-7)
    # A float32 difference: its rounding is relative to the weights, here of order 1.
    assert run.scalar("update_norm_by_tensor") == pytest.approx(
        np.array(expected["updates"]), rel=1e-5, abs=1e-7
    )
    total = np.linalg.norm(run.scalar("grad_norm_by_tensor"), axis=1)
    assert run.scalar("grad_norm") == pytest.approx(total, rel=1e-15)
    assert run.scalar("loss").tolist() == expected["loss"]
    assert run.scalar("accuracy").tolist() == [0.5] * STEPS
    assert run.scalar("group_lr").tolist() == [[0.2, 0.05]] * STEPS
    assert run.scalar("group_momentum").tolist() == [[0.5, 0.5]] * STEPS
    assert run.scalar("group_weight_decay").tolist() == [[0.1, 0.0]] * STEPS
    assert np.isnan(run.scalar("clip_factor")).all()
    groups = {tensor.name: tensor.group for tensor in run.table.parameters}
    assert groups["0.weight"] == 0
    assert groups["0.bias"] == 1
    norms = [float(p.detach().double().norm()) for p in small_model().parameters()]
    assert run.attributes["initial_norm_by_tensor"] == pytest.approx(norms, rel=1e-14)


def test_float64_norms_are_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(300, 700, bias=False).double()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer) as recorder:
        model(torch.randn(3, 300, dtype=torch.float64)).square().sum().backward()
        gradient = model.weight.grad.numpy().astype(np.longdouble)
        optimizer.step()
    assert recorder.step == 1
    run = open_run(tmp_path / "run.zarr")
    exact = float(np.sqrt((gradient**2).sum()))
    assert run.scalar("grad_norm")[0] == pytest.approx(exact, rel=1e-14)
    assert run.table.value_dtype == np.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_stored_without_loss(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 4).to(dtype)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1, gradients="updates") as _:
        for x in batches(3):
            optimizer.zero_grad()
            loss_of(model, x.to(dtype)).backward()
            optimizer.step()
    run = open_run(tmp_path / "run.zarr")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert np.array_equal(
        run.stream("weights").read(3), flat([p.to(wide) for p in [*model.parameters()]])
    )
    difference = run.stream("weights").read(2) - run.stream("weights").read(1)
    assert np.array_equal(run.stream("updates").read(1), difference)
    assert {tensor.dtype for tensor in run.table.parameters} == {
        {torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}[dtype]
    }


class Odd(nn.Module):
    """Tied, 0-d, non-contiguous, frozen and never used parameters; a buffer made anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6, bias=False)
        self.decoder = nn.Linear(6, 6, bias=False)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.turned = nn.Parameter(torch.arange(12.0).reshape(3, 4).t() / 12)
        self.images = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.count = nn.Buffer(torch.tensor(0))
        self.flags = nn.Buffer(torch.tensor([True, False, True]))
        self.scratch = nn.Buffer(torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        flat = self.decoder(self.encoder(x)) * self.scale
        image = self.images(x[:1, :1].expand(1, 2, 4, 4).contiguous())
        return flat[:, :4].sum(0) @ self.turned + image.mean()


def test_odd_tensors_come_back_bit_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Odd()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1) as recorder:
        for x in batches(3, width=6):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            gradient = model.turned.grad.clone()
            optimizer.step()
    run = open_run(tmp_path / "run.zarr")
    stored = load_file(shard(run, "weights", 3))
    for name in ("encoder.weight", "scale", "turned", "images.weight", "count", "flags"):
        assert torch.equal(stored[name], model.state_dict()[name]), name
    assert stored["count"].item() == 3
    assert "decoder.weight" not in stored
    assert run.table.aliases == {"decoder.weight": "encoder.weight"}
    assert [tensor.name for tensor in run.table.frozen] == ["frozen"]
    assert torch.equal(load_file(shard(run, "minibatch", 2))["turned"], gradient)
    assert run.attributes["gradient_missing"] == {"unused": 3}
    assert not load_file(shard(run, "minibatch", 2))["unused"].any()
    assert recorder.complete
    assert verify_run(run.path).sound


def test_schedules_by_epoch_and_by_stream(tmp_path: Path) -> None:
    model = small_model()
    optimizer = momentum(model)
    path = tmp_path / "run.zarr"
    with Recorder(
        path, model, optimizer, every="epoch", gradients="minibatch,updates@5"
    ) as recorder:
        for step, x in enumerate(batches()):
            recorder.epoch = step // 3
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
    run = open_run(path)
    # Step 5 is due for the updates alone; its weights are saved with it.
    assert run.stream("weights").steps.tolist() == [0, 3, 5, 6, 7]
    assert run.stream("minibatch").steps.tolist() == [0, 3, 6]
    assert run.stream("updates").steps.tolist() == [0, 5]
    assert run.stream("weights").epochs.tolist() == [0, 1, 1, 2, 2]
    assert run.scalar("epoch").tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_weights_only(tmp_path: Path) -> None:
    model = small_model()
    optimizer = momentum(model)
    path = tmp_path / "run.zarr"
    with Recorder(path, model, optimizer, gradients=(), steps_per_epoch=2) as recorder:
        train(recorder, model, optimizer)
    run = open_run(path)
    assert run.stream_names == ["weights"]
    assert run.scalar("epoch").tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert recorder.bytes_written == sum(
        shard(run, "weights", row).stat().st_size for row in (0, 1)
    )
    assert recorder.held_seconds > 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("grad_norm", 1.0, "the recorder itself logs this scalar: grad_norm"),
        ("loss", torch.zeros(2), "a loop can log: loss"),
        ("loss", torch.zeros((), dtype=torch.complex64), "a loop can log: loss"),
        ("loss", "0.5", "a loop can log: loss"),
        ("loss", None, "a loop can log: loss"),
        ("a/b", 1.0, "not a name for a scalar: 'a/b'"),
        (".hidden", 1.0, "not a name for a scalar"),
        ("", 1.0, "not a name for a scalar"),
        ("zarr.json", 1.0, "not a name for a scalar"),
        ("x" * 101, 1.0, "at most 100"),
    ],
)
def test_log_refuses_what_is_no_scalar_of_the_loop(
    tmp_path: Path, name: str, value: object, words: str
) -> None:
    model = small_model()
    recorder = Recorder(tmp_path / "run.zarr", model, momentum(model))
    recorder.log(**{"x" * 100: np.float32(1), "count": 3, "loss": torch.zeros(1)})
    with pytest.raises(UsageError, match=words):
        recorder.log(**{name: value})
    with pytest.warns(UserWarning, match="made no step"):
        recorder.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attributes": {"optimizer": {}}}, r"sets by itself: attributes\['optimizer'\]"),
        ({"attributes": {"digests": {}}}, "sets by itself"),
        ({"attributes": {"seeds": {"seed": float("nan")}}}, "not JSON"),
        ({"attributes": {"device": torch.device("cpu")}}, "not JSON"),
        ({"attributes": {"config": 3}}, "must be a table"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number of at least 1: 0"),
        ({"steps_per_epoch": 2.5}, "steps_per_epoch must be a whole number"),
        ({"total_steps": -1}, "total_steps must be a whole number of at least 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number of at least 1"),
        ({"checkpoint_every": True}, "checkpoint_every must be a whole number"),
        ({"clipped": True}, r"clipped must be None or False: True; clip by recorder\.clip_grad"),
        ({"every": "log:50"}, r"needs the length of the run.*give Recorder\(…, total_steps=N\)"),
        ({"state": {"scheduler": 3}}, "an? int has no state_dict"),
    ],
)
def test_wrong_arguments_are_refused_before_there_is_a_folder(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    model = small_model()
    with pytest.raises(UsageError, match=words):
        Recorder(tmp_path / "run.zarr", model, momentum(model), **options)
    assert not list(tmp_path.iterdir())


def test_attributes_of_the_user_are_kept_and_no_gradients_are_none(tmp_path: Path) -> None:
    model = small_model()
    optimizer = momentum(model)
    given = {"config": {"lr": 0.1}, "note": ["ä", 1, None]}
    path = tmp_path / "run.zarr"
    with Recorder(path, model, optimizer, gradients=None, attributes=given) as recorder:
        train(recorder, model, optimizer)
    run = open_run(path)
    assert run.attributes.items() >= given.items()
    assert run.stream_names == ["weights"]


def test_a_schedule_by_epoch_that_sees_no_epoch_is_told(tmp_path: Path) -> None:
    model = small_model()
    optimizer = momentum(model)
    recorder = Recorder(tmp_path / "run.zarr", model, optimizer, every="epoch")
    train(recorder, model, optimizer)
    with pytest.warns(UserWarning, match=r"saw no epoch begin.*steps_per_epoch=N"):
        recorder.close()
