"""What a report says in words: the facts of a run, its null, and the conditional rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analyze.axes import Values, number_label
from analyze.curves import Curve
from analyze.run_groups import ABSENT, text_of
from analyze.text_table import span
from capture.store.errors import InputError

Facts = list[tuple[str, str]]

# Gradients of batches that drive the training, in training mode.
_OWN = ("minibatch", "fixed", "full")


def run_facts(entry: Mapping[str, Any], reference: str, rates: Values | None = None) -> Facts:
    """(name, value) of everything known of a run; `entry` is its part of the table's metadata.

    `rates` are the learning rates of its rows, for a run whose configuration names none.
    `InputError` where the entry is not what `analyze compute` writes.
    """
    config = _mapping(entry, "config")
    facts = [
        ("Task", config.get("task")),
        ("Model", _scaled(config.get("model"), config.get("width"))),
        ("Trainable parameters D", _whole(entry.get("num_parameters"))),
        ("Optimizer", _optimizer(_mapping(entry, "optimizer"), config, entry.get("momentum"))),
        ("Learning rate", _scheduled(config, rates)),
        ("Batch size", config.get("batch_size")),
        ("Epochs", config.get("epochs")),
        ("Updates T", _whole(entry.get("final_step"))),
        ("Reference w*", _reference(reference, entry.get("final_step"))),
        ("Seed", config.get("seed")),
        ("Data seed", config.get("data_seed")),
        ("Seeds", None if "seed" in config else _listed(entry.get("seeds"))),
        ("Recorded every", _every(config.get("every"))),
        ("Status", _status(entry.get("status"))),
        ("Versions", _listed(entry.get("versions"))),
        ("Git commit", str(entry.get("git_commit") or "")[:12]),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def no_null_reason(statement: str | None) -> str:
    """The bare reason in a table's statement about a null, without "no null" before it."""
    if statement is None:
        return "the table gives no reason"
    head, colon, rest = statement.partition(":")
    return (rest.strip() if colon and head.strip().lower() == "no null" else statement).rstrip(".")


def null_sentence(statement: str) -> str:
    """A table's statement about a null as a sentence."""
    reason = no_null_reason(statement)
    return f"Null: {reason}." if reason == statement.rstrip(".") else f"No null: {reason}."


def conditional_rate(curves: Sequence[Curve], end: tuple[float, float] | None) -> str | None:
    """The contraction 1 − μ²/L² that RSI⁻ and EB⁺ would give, in words that keep it conditional.

    μ and L are the extremes over the rows of the streams `_OWN` before the end effect; the batches
    of a step enter by their quantiles as drawn.
    """
    # What the training minimizes: held-out batches and other labels are other functions.
    own = [c for c in curves if c.stream in _OWN]
    before = [c for c in own if np.isfinite(c.values["rsi"]).any()]
    lowest = _extremes(before, "rsi", end)
    highest = _extremes(before, "eb", end)
    if not lowest.size or not highest.size:
        return None
    mu, bound = float(lowest.min()), float(highest.max())
    if mu <= 0:
        return (
            f"Here the smallest RSI⁻ of a training gradient is {number_label(mu, 3)}, not above 0: "
            "no rate follows, not even a conditional one."
        )
    return (
        f"Here, over the training gradients before the end effect, μ = min RSI⁻ = "
        f"{number_label(mu, 3)} and L = max EB⁺ = {number_label(bound, 3)}: the conditional rate "
        f"is 1 − μ²/L² = 1 − {number_label((mu / bound) ** 2, 3)} a step."
    )


def _extremes(curves: Sequence[Curve], column: str, end: tuple[float, float] | None) -> Any:
    last = np.inf if end is None else end[0]
    parts = [
        values[column][curve.steps < last]
        for curve in curves
        for values in (curve.values, curve.low, curve.high)
        if column in values
    ]
    flat = np.concatenate([*parts, np.empty(0)])
    return flat[np.isfinite(flat)]


def _mapping(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = entry.get(name) or {}
    if not isinstance(value, Mapping):
        raise InputError(
            f"the entry {name!r} of the run is no list of names and values",
            where=str(entry.get("run")),
            fix="make the table again from the run",
        )
    return value


def _optimizer(optimizer: Mapping[str, Any], config: Mapping[str, Any], momenta: Any) -> str | None:
    """`momenta` are those of the every-step scalars, for a configuration that names none."""
    name = optimizer.get("name") or config.get("optimizer")
    if name is None:
        return None
    parts = [str(name)]
    momentum = text_of(config["momentum"]) if "momentum" in config else span(momenta)
    if momentum not in (None, ABSENT, "0"):
        kind = "Nesterov momentum" if optimizer.get("nesterov") else "momentum"
        parts.append(f"{kind} {momentum}")
    if config.get("weight_decay"):
        kind = str(optimizer.get("weight_decay") or "").strip()
        kind = f"{kind} " if kind in ("coupled", "decoupled") else ""
        parts.append(f"{kind}weight decay {text_of(config['weight_decay'])}")
    return ", ".join(parts)


def _reference(reference: str, final_step: Any) -> str:
    if reference == "final":
        return "final: the last iterate w_T of this run" + (
            "" if final_step is None else f", T = {_whole(final_step)}"
        )
    return reference


def _scaled(model: Any, width: Any) -> Any:
    return f"{model}, width ×{text_of(width)}" if model and width not in (None, 1, 1.0) else model


def _scheduled(config: Mapping[str, Any], rates: Values | None) -> str | None:
    if config.get("lr") is None:
        return span(rates)
    rate, schedule = text_of(config["lr"]), config.get("lr_schedule")
    return rate if schedule is None else f"{rate}, {schedule}"


def _every(every: Any) -> str | None:
    text = None if every is None else str(every)
    return f"{text} steps" if text is not None and text.isdigit() else text


def _status(status: Any) -> Any:
    known = status in (None, "complete")
    return status if known else f"{status}: this run has not finished"


def _listed(versions: Any) -> Any:
    if not isinstance(versions, Mapping):
        return versions
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _whole(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) else value
