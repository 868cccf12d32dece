"""The tensor table of a model, the facts of its optimizer, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from capture.describe import Description, describe, unwrap
from capture.opening import parameter_order
from capture.optimizer_facts import optimizer_facts
from capture.store import Tensor, UnsupportedModelError


def described(model: nn.Module) -> Description:
    return describe(model, optim.SGD([p for p in model.parameters() if p.is_leaf], lr=0.1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(7, 3)
        self.norm = nn.BatchNorm1d(3)
        self.decoder = nn.Linear(3, 7, bias=False)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
        self.fixed = nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.register_buffer("variance", self.norm.running_var)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_table_of_a_model_with_all_kinds_of_tensors() -> None:
    model = Tied()
    optimizer = optim.SGD(
        [{"params": [model.scale]}, {"params": model.encoder.parameters()}], lr=0.1
    )
    seen = describe(model, optimizer)
    assert seen.table.parameters == (
        Tensor("scale", (), "BF16", 0),
        Tensor("encoder.weight", (7, 3), "F32", 1, ("decoder.weight",)),
        Tensor("norm.weight", (3,), "F32", None),
        Tensor("norm.bias", (3,), "F32", None),
    )
    assert seen.table.frozen == (Tensor("fixed", (3,), "F32", None),)
    assert seen.table.buffers == (
        Tensor("variance", (3,), "F32", None, ("norm.running_var",)),
        Tensor("norm.running_mean", (3,), "F32"),
        Tensor("norm.num_batches_tracked", (), "I64"),
    )
    names = [*seen.table.names, *seen.table.aliases]
    names += [tensor.name for tensor in (*seen.table.buffers, *seen.table.frozen)]
    assert sorted(names) == sorted(model.state_dict())
    assert seen.frozen_bytes()["fixed"].tobytes() == np.arange(3, dtype="<f4").tobytes()
    assert seen.table.value_dtype == np.float32
    # A module may put another tensor in a buffer's place.
    model.norm.running_mean = torch.ones(3)
    assert seen.buffers["norm.running_mean"]().tolist() == [1, 1, 1]


def test_one_float64_tensor_makes_all_values_float64() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    assert described(model).table.value_dtype == np.float64


def test_wrappers_are_looked_through() -> None:
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert unwrap(nn.DataParallel(compiled)) is model
    assert described(compiled).table.names == ("weight", "bias")
    # Only the wrapper's own prefix goes: a user's module may be called like it.
    nested = nn.Module()
    nested.module = nn.Linear(2, 2)
    assert described(nested).table.names == ("module.weight", "module.bias")


class WithExtraState(nn.Linear):
    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_is_stored_where_it_is_a_tensor_and_else_noted() -> None:
    model = WithExtraState(torch.ones(3))
    assert [tensor.name for tensor in described(model).table.buffers] == ["_extra_state"]
    with pytest.warns(UserWarning, match=r"no tensors of the state_dict: 0\._extra_state"):
        seen = described(nn.Sequential(WithExtraState({"scale": 3})))
    assert seen.not_stored == ("0._extra_state",)
    assert seen.table.buffers == ()


def with_parameter(tensor: torch.Tensor, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_parameter("odd", nn.Parameter(tensor, **options))
        return model

    return build


def with_buffer(tensor: torch.Tensor) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("odd", tensor)
        return model

    return build


def with_name(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer(name, torch.ones(1))
        return model

    return build


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))


FP8 = torch.ones(2).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (with_parameter(torch.ones(2, device="meta")), r"on the meta device .*'odd'"),
        (with_parameter(torch.ones(2, dtype=torch.complex64)), r"torch.complex64 .*'odd'"),
        (with_parameter(FP8), r"torch.float8_e4m3fn .*'odd'"),
        (with_parameter(torch.ones(2, dtype=torch.int32), requires_grad=False), None),
        (with_parameter(FP8, requires_grad=False), None),
        (lazy, r"a lazy tensor .*'1.weight'.* run one forward pass"),
        (with_buffer(torch.ones(2, device="meta")), r"on the meta device .*'odd'"),
        (with_buffer(torch.ones(2, dtype=torch.complex128)), r"which safetensors lacks.*'odd'"),
        (with_buffer(torch.eye(2).to_sparse()), r"a sparse tensor .*'odd'"),
        (with_name("__straightway__index"), r"keeps for itself .*'__straightway__index'"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), r"no trainable parameter: Linear"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name(
    build: Callable[[], nn.Module], words: str | None
) -> None:
    model = build()
    optimizer = optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    optimizer.param_groups[0]["params"] = []
    if words is None:
        describe(model, optimizer)
    else:
        with pytest.raises(UnsupportedModelError, match=words):
            describe(model, optimizer)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # the way to make such a tensor
def test_quantised_tensors_are_refused_by_name() -> None:
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    model = with_buffer(tensor)()
    with pytest.raises(UnsupportedModelError, match=r"a quantised .*'odd'"):
        described(model)


def test_sharded_tensors_are_refused_by_name() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)]))
        with pytest.raises(UnsupportedModelError, match=r"sharded tensor \(DTensor\).*'weight'"):
            described(model)
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimizer_of_another_model_is_refused_with_the_shape() -> None:
    optimizer = optim.SGD(nn.Linear(3, 5).parameters(), lr=0.1)
    expected = r"shape \[5, 3\] that is not in the model: parameter group 0"
    with pytest.raises(UnsupportedModelError, match=expected):
        describe(nn.Linear(3, 5), optimizer)


def test_optimizer_facts() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    both = [{"params": one.parameters()}, {"params": other.parameters(), "dampening": 0.1}]
    assert optimizer_facts(optim.SGD(both, lr=0.1, momentum=0.9, maximize=True)) == {
        "name": "SGD",
        "kind": "sgd",
        "nesterov": False,
        "maximize": True,
        "dampening": [0.0, 0.1],
        "weight_decay": "coupled",
    }


class Own(optim.SGD):
    pass


@pytest.mark.parametrize(
    ("kind", "options", "decay"),
    [
        (optim.SGD, {"nesterov": True, "momentum": 0.9}, "coupled"),
        (optim.Adam, {}, "coupled"),
        (optim.Adam, {"decoupled_weight_decay": True}, "decoupled"),
        (optim.NAdam, {"decoupled_weight_decay": True}, "decoupled"),
        (optim.AdamW, {}, "decoupled"),
        (optim.RMSprop, {}, "coupled"),
        (optim.Rprop, {}, "unknown"),
        (Own, {}, "unknown"),
    ],
)
def test_kinds_of_optimizers(kind: Any, options: dict[str, Any], decay: str) -> None:
    facts = optimizer_facts(kind(nn.Linear(2, 2).parameters(), lr=0.1, **options))
    assert facts["weight_decay"] == decay
    assert facts["kind"] == ("sgd" if kind is optim.SGD else "other")
    assert facts["nesterov"] is options.get("nesterov", False)


def test_groups_that_disagree() -> None:
    def groups(**options: Any) -> optim.SGD:
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        parts = [{"params": first.parameters()}, {"params": second.parameters(), **options}]
        return optim.SGD(parts, lr=0.1, momentum=0.9)

    assert optimizer_facts(groups(nesterov=True))["kind"] == "other"
    with pytest.raises(UnsupportedModelError, match="some parameter groups maximize"):
        optimizer_facts(groups(maximize=True))


def test_sgd_that_is_no_one_sgd_says_why() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": one.parameters()}, {"params": other.parameters(), "nesterov": True}]
    facts = optimizer_facts(optim.SGD(groups, lr=0.1, momentum=0.9))
    assert facts["kind"] == "other"
    assert facts["no_null_reason"] == "its parameter groups differ in nesterov"
    assert "no_null_reason" not in optimizer_facts(optim.SGD(one.parameters(), lr=0.1))
    assert "no_null_reason" not in optimizer_facts(optim.Adam(one.parameters()))


def test_devices_other_than_cpu_and_cuda_are_refused_by_name() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        try:
            model = nn.ParameterDict({"weight": torch.empty(2, device="xpu")})
        except AssertionError:
            pytest.skip("this build of torch makes no tensor of another device, not even a fake")
        with pytest.raises(
            UnsupportedModelError, match=r"on the device xpu.*'weight'.*cpu or cuda"
        ):
            described(model)


def test_the_order_of_parameters_is_that_of_the_optimizers_state() -> None:
    model = Tied()
    groups = [{"params": [model.scale, model.fixed]}, {"params": [model.encoder.weight]}]
    optimizer = optim.Adam(groups)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    order = parameter_order(describe(nn.DataParallel(model), optimizer))
    assert order == [["scale", "fixed"], ["encoder.weight"]]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()["state"]
    for index, name in enumerate(name for group in order for name in group):
        assert state[index]["exp_avg_sq"].shape == shapes[name]
