"""Trainings by torch's Adam and its kin, recorded, with all that they did as dense arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn, optim

from analyze.tables import read_metadata
from capture import Recorder

Values = NDArray[Any]

# The columns, and where the states of a run lie.
COLUMNS = ("norm_dist_adam", "norm_grad_adam", "cosine_adam", "lolr_adam")
KEPT = "weights/value/.straightway/kept"
# Without momentum an update is lr times what entered it, divided by M: so torch itself tells M.
PLAIN = {"lr": 0.02, "betas": (0.0, 0.9)}
Groups = Callable[[nn.Module], Any]


class Net(nn.Module):
    """Tensors of several shapes; `unused` is never given a gradient, `late` from update 5 on."""

    def __init__(self, dtype: torch.dtype, *, frozen: bool, unused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 4, dtype=dtype)
        self.gate = nn.Parameter(torch.ones(4, dtype=dtype), requires_grad=not frozen)
        if unused:
            self.unused = nn.Parameter(torch.ones(3, dtype=dtype))
            self.late = nn.Parameter(torch.ones(2, dtype=dtype))
        self.second = nn.Linear(4, 2, dtype=dtype)

    def loss(self, draw: torch.Generator, step: int) -> Tensor:
        """Loss of a batch of 8 random samples."""
        x, y = (
            torch.randn(8, size, dtype=self.gate.dtype, generator=draw)
            for size in (5, self.second.out_features)
        )
        out = self.second(torch.tanh(self.first(x)) * self.gate)
        if hasattr(self, "late") and step >= 5:
            out = out + self.late
        return nn.functional.mse_loss(out, y)


@dataclass
class Dense:
    """`w` of steps 0 to T; for each update `g`, unclipped, and `entered`, what torch's step saw.

    ``batches[t]`` are the gradients of the stream `extra` at w_t, ``[B, D]``; ``state[t]`` is
    torch's own state by name of the tensor after t updates.
    """

    w: list[Values] = field(default_factory=list)
    g: list[Values] = field(default_factory=list)
    entered: list[Values] = field(default_factory=list)
    batches: dict[int, list[Values]] = field(default_factory=dict)
    state: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    places: dict[str, slice] = field(default_factory=dict)


class Extra:
    """Two more batches at the weights of each saved step; what it measured goes to `seen`."""

    batches = 2

    def __init__(self, model: Net, seen: Dense) -> None:
        self._model = model
        self._seen = seen

    def describe(self) -> dict[str, Any]:
        return {}

    def measure(self, batch: int | None) -> Any:
        assert batch is not None
        step = len(self._seen.g) - 1
        draw = torch.Generator().manual_seed(1000 + batch)
        with torch.enable_grad():
            parameters = [p for p in self._model.parameters() if p.requires_grad]
            loss = self._model.loss(draw, 9)  # touches `late` from the beginning
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        dense = np.concatenate([_flat(p, g) for p, g in zip(parameters, found, strict=True)])
        self._seen.batches.setdefault(step, []).append(dense)
        return type("Measured", (), {"loss": None, "gradient": found})


def one_group(model: nn.Module) -> Any:
    """All parameters, frozen ones too, in the usual order."""
    return model.parameters()


def two_groups(model: nn.Module) -> Any:
    """The last tensors first, in two groups of different ε."""
    named = dict(model.named_parameters())
    first = [named.pop(name) for name in ("second.bias", "first.weight")]
    return [{"params": first, "eps": 0.3}, {"params": [*named.values()][::-1], "eps": 0.02}]


def train(
    path: Path,
    make: Callable[..., optim.Optimizer],
    *,
    groups: Groups = two_groups,
    total: int = 12,
    dtype: torch.dtype = torch.float64,
    frozen: bool = False,
    unused: bool = False,
    clip: float | None = None,
    extra: bool = False,
    **options: Any,
) -> Dense:
    """Train `Net` on random batches; `options` are those of the Recorder."""
    model, seen = Net(dtype, frozen=frozen, unused=unused), Dense()
    optimizer = make(groups(model))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ends = np.cumsum([p.numel() for p in trained.values()]).tolist()
    seen.places = {
        name: slice(end - p.numel(), end)
        for (name, p), end in zip(trained.items(), ends, strict=True)
    }
    settings: dict[str, Any] = {"every": 2, "keep_state": "4", "clipped": False, **options}
    if extra:
        settings |= {"gradients": "minibatch,extra", "sources": {"extra": Extra(model, seen)}}
    draw = torch.Generator().manual_seed(1)
    with Recorder(path, model, optimizer, **settings) as recorder:
        for step in range(total):
            seen.w.append(_flatten(trained, lambda p: p))
            seen.state.append(_state(optimizer, trained))
            optimizer.zero_grad()
            model.loss(draw, step).backward()  # type: ignore[no-untyped-call]
            seen.g.append(_flatten(trained, lambda p: p.grad))
            if clip is not None:
                recorder.clip_grad_norm_(clip)
            seen.entered.append(_flatten(trained, lambda p: p.grad))
            optimizer.step()
        seen.w.append(_flatten(trained, lambda p: p))
        seen.state.append(_state(optimizer, trained))
    return seen


def _state(optimizer: optim.Optimizer, trained: dict[str, nn.Parameter]) -> dict[str, Any]:
    return {
        name: {key: value.clone() for key, value in optimizer.state[p].items()}
        for name, p in trained.items()
        if p in optimizer.state
    }


def _flatten(trained: dict[str, nn.Parameter], pick: Callable[[Any], Tensor | None]) -> Values:
    return np.concatenate([_flat(p, pick(p)) for p in trained.values()])


def _flat(parameter: Tensor, value: Tensor | None) -> Values:
    found = torch.zeros_like(parameter) if value is None else value
    return found.detach().double().numpy().ravel().copy()


def note_of(table: pa.Table) -> str:
    (run,) = read_metadata(table)["runs"]
    note: str = run["adam_metric"]
    return note


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def steps_with_metric(table: pa.Table, column: str = "cosine_adam") -> list[int]:
    return sorted({row["step"] for row in rows_of(table) if not np.isnan(row[column])})
