"""The optimizers by name, and the learning rate as a pure function of the step.

Being a pure function, the learning rate needs no state to resume. Its schedules:

    constant                   the base rate
    warmup-cosine[:EPOCHS]     linear warm-up over EPOCHS epochs (default 1), then a cosine to 0
    multistep[:E1,E2,…[:F]]    times F (default 0.1) at each of the epochs E1, E2, …
                               (default: after half and three quarters of the training)
    FILE                       a CSV file with the header step,lr: the rate itself, linear between
                               its rows and held before the first and after the last
"""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capture.store.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

# The default learning rate of each optimizer.
OPTIMIZERS = {"sgd": 0.1, "momentum": 0.01, "nesterov": 0.01, "adam": 0.001, "adamw": 0.001}
HEAVY_BALL = ("momentum", "nesterov")
DEFAULT_MOMENTUM = 0.9

LearningRate = Callable[[int], float]
LR_FORMS = "constant, warmup-cosine[:EPOCHS], multistep[:E1,E2,…[:FACTOR]] or a CSV file step,lr"


def build_optimizer(
    parameters: Iterable[Tensor], name: str, *, lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """Build an optimizer of torch; weight decay is coupled in all but ``adamw``."""
    from torch import optim

    if name == "adam":
        return optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
    if name == "adamw":
        return optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name in HEAVY_BALL:
        settings |= {"momentum": momentum, "nesterov": name == "nesterov"}
    return optim.SGD(parameters, **settings)


def learning_rate(text: str, base: float, total_steps: int, steps_per_epoch: int) -> LearningRate:
    """Return the learning rate of update t as a function of t.

    `base` is the rate that the schedule scales (a FILE replaces it). Raises `UsageError`.
    """
    name, _, rest = text.partition(":")
    if text == "constant":
        return lambda step: base
    if name == "warmup-cosine":
        epochs = _numbers(rest or "1", text)
        if len(epochs) != 1:
            raise _error(text, "expected one number of warm-up epochs")
        return _warmup_cosine(base, round(epochs[0] * steps_per_epoch), total_steps)
    if name == "multistep":
        listed, _, factor = rest.partition(":")
        epochs = _numbers(listed, text) if listed else []
        steps = [epoch * steps_per_epoch for epoch in epochs]
        steps = steps or [total_steps / 2, total_steps * 3 / 4]
        return _multistep(base, steps, _numbers(factor or "0.1", text)[0])
    return _from_file(text)


def _warmup_cosine(base: float, warmup: int, total: int) -> LearningRate:
    if warmup >= total:
        raise UsageError(
            f"the warm-up of {warmup} steps does not end within the {total} steps of the training",
            fix="train for longer, or write warmup-cosine:EPOCHS with fewer epochs",
        )

    def rate(step: int) -> float:
        if step < warmup:
            return base * (step + 1) / (warmup + 1)
        return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return rate


def _multistep(base: float, milestones: list[float], factor: float) -> LearningRate:
    def rate(step: int) -> float:
        passed = sum(step >= milestone for milestone in milestones)
        return base * factor**passed

    return rate


def _from_file(path: str) -> LearningRate:
    steps, rates = read_lr_file(path)
    return lambda step: float(np.interp(step, steps, rates))


def read_lr_file(path: str) -> tuple[list[int], list[float]]:
    """Read the steps and rates of a CSV file with the header ``step,lr``, steps ascending."""
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, ["constant", "warmup-cosine", "multistep"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there is no such file either"
        raise _error(path, hint)
    try:
        # With or without the mark that some programs put before UTF-8.
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = csv.DictReader(io.StringIO(text), strict=True)
        if not {"step", "lr"} <= set(rows.fieldnames or ()):
            raise UsageError("a learning rate file begins with the line step,lr", where=path)
        return _read_rows(rows, path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"the learning rate file cannot be read, {why}", where=path) from None


def _read_rows(rows: csv.DictReader[str], path: str) -> tuple[list[int], list[float]]:
    steps: list[int] = []
    rates: list[float] = []
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        # Columns beyond the header come under the key None, missing ones as the value None.
        if None in row or None in row.values():
            raise UsageError(f"expected {len(rows.fieldnames or ())} columns", where=where)
        try:
            step, rate = int(row["step"]), float(row["lr"])
        except ValueError:
            step, rate = -1, math.nan
        sound = 0 <= step < 2**53 and 0 <= rate < math.inf
        if not sound or (steps and step <= steps[-1]):
            raise UsageError("expected an ascending step and a rate of at least 0", where=where)
        steps.append(step)
        rates.append(rate)
    if not steps:
        raise UsageError("this learning rate file has no rows", where=path)
    return steps, rates


def _numbers(text: str, schedule: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise _error(schedule, f"expected numbers, found {text!r}") from None
    if not all(0 <= number < math.inf for number in numbers):
        raise _error(schedule, f"expected numbers of at least 0, found {text!r}")
    return numbers


def _error(text: str, why: str) -> UsageError:
    return UsageError(
        f"no learning rate schedule: {why}", where=repr(text), fix=f"write {LR_FORMS}"
    )
