"""What a run says of its optimizer and its path, checked before anything rests on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze.controls import OwnPath, sgd_recursion
from capture.store.errors import RESTORE, DamagedError
from capture.store.layout import METADATA
from capture.store.reader import Run

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_NORMS = "grad_norm_by_tensor"
_BY_GROUP = ("group_lr", "group_momentum", "group_weight_decay")
# Rounding to these is as large as an update, and no part of the recursion.
_ROUNDED = {"BF16": "bfloat16", "F16": "float16"}
_INSTEAD = "compare with branches, held-out minibatches or the updates"


@dataclass(frozen=True)
class Optimizer:
    """The optimizer of a run.

    `kind` is "sgd" for torch's SGD, else "other"; `no_null_reason` says why there is no null
    although it is SGD. `dampening` has one number per parameter group. `decay` is "coupled",
    "decoupled" or "unknown". `had_state` is whether it made steps before the run. `missing` counts
    by tensor the updates without a gradient. `groups` is the parameter group of each tensor
    ``[P]``, -1 where the optimizer does not update it. `initial_norms` is ‖w_0‖ ``[P]`` or `None`.
    """

    name: str
    kind: str
    nesterov: bool
    maximize: bool
    dampening: tuple[float, ...]
    decay: str
    no_null_reason: str | None
    had_state: bool
    missing: Mapping[str, int]
    groups: Integers
    initial_norms: Floats | None


def read_optimizer(run: Run) -> Optimizer:
    """Read the facts from a run's attributes; `DamagedError` where one has a wrong form."""
    own = run.attributes.get("optimizer", {})
    if not isinstance(own, dict):
        raise _damaged(run, "optimizer")
    facts = {**_UNKNOWN, **own, **{key: run.attributes.get(key) for key in _BESIDE}}
    facts["gradient_missing"] = {} if (m := facts["gradient_missing"]) is None else m
    unsound = [name for name, sound in _CHECKS.items() if not sound(facts[name])]
    if unsound:
        raise _damaged(run, ", ".join(unsound))
    initial, tensors = facts["initial_norm_by_tensor"], run.table.parameters
    if initial is not None and len(initial) != len(tensors):
        raise _damaged(run, "initial_norm_by_tensor")
    return Optimizer(
        name=facts["name"],
        kind=facts["kind"],
        nesterov=facts["nesterov"],
        maximize=facts["maximize"],
        dampening=tuple(float(value) for value in facts["dampening"]),
        decay=facts["weight_decay"],
        no_null_reason=facts["no_null_reason"],
        had_state=bool(facts["optimizer_had_state"]),
        missing=facts["gradient_missing"],
        groups=np.array([-1 if t.group is None else t.group for t in tensors], np.int64),
        initial_norms=None if initial is None else np.array(initial, np.float64),
    )


def group_scalar(run: Run, name: str, groups: Integers) -> Floats:
    """Read an every-step scalar by parameter group ``[S, G]``; `DamagedError` where one lacks."""
    values = run.scalar(name)
    if values.ndim != 2 or values.shape[1] <= groups.max(initial=0):
        raise _damaged(run, f"tensors: a parameter group has no {name}")
    return values


def own_path(run: Run) -> OwnPath | str:
    """Read what the null needs from a run; where there is no null, say why in words.

    `DamagedError` where the run's attributes cannot be right.
    """
    facts = read_optimizer(run)
    reason = _no_path(run, facts)
    if reason is not None:
        return f"no null: {reason}"
    norms = run.scalar(_NORMS)
    if norms.ndim != 2 or norms.shape[1] != len(facts.groups):
        raise _damaged(run, f"tensors: not those of {_NORMS}")
    lr, momentum, decay = (group_scalar(run, name, facts.groups) for name in _BY_GROUP)
    if len(facts.dampening) not in (0, lr.shape[1]):
        raise _damaged(run, "dampening")
    if decay.any() and facts.initial_norms is None:
        return "no null: weight decay brings in ‖w_0‖, which the run does not tell"
    groups = facts.groups.copy()
    for index, name in enumerate(run.table.names):
        # torch leaves a tensor without a gradient alone, momentum and decay included.
        absent = facts.missing.get(name, 0)
        if absent >= len(norms):
            groups[index] = -1
        elif absent and (momentum.any() or decay.any()):
            return f"no null: {name!r} had no gradient in {absent} steps; {_INSTEAD}"
    form = "Nesterov momentum" if facts.nesterov else "momentum"
    dampening = np.array(facts.dampening or [0.0] * lr.shape[1])
    return OwnPath(
        f"SGD with {form}" if momentum.any() else "SGD",
        sgd_recursion(lr, momentum, decay, dampening, nesterov=facts.nesterov),
        np.ascontiguousarray(norms),
        np.zeros(len(groups)) if facts.initial_norms is None else facts.initial_norms,
        groups,
    )


def _no_path(run: Run, facts: Optimizer) -> str | None:
    """Why a run has no null, as far as its attributes and the names of its scalars tell."""
    if facts.kind != "sgd":
        return f"{facts.no_null_reason or f'{facts.name} has no closed form'}; {_INSTEAD}"
    if facts.no_null_reason is not None:
        return f"{facts.no_null_reason}; {_INSTEAD}"
    if not run.complete:
        return "the run has not finished"
    if facts.had_state:
        return "the optimizer brought momentum along from before the first recorded step"
    for tensor in run.table.parameters:
        if tensor.dtype in _ROUNDED and tensor.group is not None:
            return f"updates of {tensor.name!r} are rounded to {_ROUNDED[tensor.dtype]}; {_INSTEAD}"
    missing = sorted({_NORMS, *_BY_GROUP} - set(run.scalar_names()))
    return f"the run has no every-step scalars {', '.join(missing)}" if missing else None


def _damaged(run: Run, what: str) -> DamagedError:
    return DamagedError(
        f"the run's attributes are damaged, {what}", where=run.path / METADATA, fix=RESTORE
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Where a run tells nothing, as one that no optimizer made.
_UNKNOWN: Mapping[str, Any] = {
    "name": "an unknown optimizer",
    "kind": "other",
    "nesterov": False,
    "maximize": False,
    "dampening": [],
    "weight_decay": "unknown",
    "no_null_reason": None,
}
_BESIDE = ("optimizer_had_state", "gradient_missing", "initial_norm_by_tensor")
_CHECKS: Mapping[str, Any] = {
    "name": lambda value: isinstance(value, str),
    "kind": lambda value: value in ("sgd", "other"),
    "nesterov": lambda value: isinstance(value, bool),
    "maximize": lambda value: isinstance(value, bool),
    "dampening": lambda value: (
        isinstance(value, list) and all(_is_number(v) and math.isfinite(v) for v in value)
    ),
    "weight_decay": lambda value: (
        isinstance(value, str) and value in ("coupled", "decoupled", "unknown")
    ),
    "no_null_reason": lambda value: value is None or isinstance(value, str),
    "optimizer_had_state": lambda value: value is None or isinstance(value, bool),
    "gradient_missing": lambda value: (
        isinstance(value, dict) and all(type(count) is int for count in value.values())
    ),
    "initial_norm_by_tensor": lambda value: (
        value is None
        or (isinstance(value, list) and all(v is None or _is_number(v) for v in value))
    ),
}
