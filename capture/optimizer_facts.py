"""What a run remembers of the optimizer that made its updates."""

from __future__ import annotations

from typing import Any

from torch import optim

from capture.store.errors import UnsupportedModelError

# Optimizers of torch that add `weight_decay * w` to the gradient, and those that shrink w instead.
# By name, since older versions of torch lack some of them.
COUPLED_DECAY = {
    *("SGD", "Adam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD"),
}
DECOUPLED_DECAY = {"AdamW", "Adafactor", "Muon"}


def optimizer_facts(optimizer: optim.Optimizer) -> dict[str, Any]:
    """Describe an optimizer for the run's attributes.

    `kind` is "sgd" for exactly `torch.optim.SGD` with one form of momentum, else "other".
    `no_null_reason` says of some SGD why it is "other" all the same.
    `weight_decay` is "coupled" where it enters the gradient, "decoupled" where it shrinks the
    weights beside it, else "unknown". Raises `UnsupportedModelError` for LBFGS and for groups
    of which some maximize and others minimize.
    """
    if isinstance(optimizer, optim.LBFGS):
        raise UnsupportedModelError(
            "LBFGS evaluates its closure several times in one step, so a step has no one gradient",
            where="optimizer",
            fix="record a first-order optimizer",
        )
    groups = optimizer.param_groups
    maximize = {bool(group.get("maximize", False)) for group in groups}
    nesterov = {bool(group.get("nesterov", False)) for group in groups}
    if len(maximize) > 1:
        raise UnsupportedModelError(
            "some parameter groups maximize and others minimize",
            where="optimizer",
            fix="use one optimizer and one Recorder for each",
        )
    is_sgd, mixed = type(optimizer) is optim.SGD, len(nesterov) > 1
    reason = {"no_null_reason": "its parameter groups differ in nesterov"}
    return {
        "name": type(optimizer).__name__,
        "kind": "sgd" if is_sgd and not mixed else "other",
        **(reason if is_sgd and mixed else {}),
        "nesterov": any(nesterov),
        "maximize": any(maximize),
        "dampening": [float(group.get("dampening", 0.0)) for group in groups],
        "weight_decay": _decay_kind(optimizer),
    }


def _decay_kind(optimizer: optim.Optimizer) -> str:
    name = type(optimizer).__name__
    if type(optimizer) is not getattr(optim, name, None):
        return "unknown"
    flags = {bool(group.get("decoupled_weight_decay", False)) for group in optimizer.param_groups}
    if name in DECOUPLED_DECAY or flags == {True}:
        return "decoupled"
    return "coupled" if name in COUPLED_DECAY and flags == {False} else "unknown"
