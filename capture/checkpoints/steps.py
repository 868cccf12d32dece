"""The step of a checkpoint, read off its name.

    step_500.pt, iter500, global_step500, epoch=3-step=500.ckpt      the number after such a word
    checkpoint-500, ckpt500.pt, model_00500.safetensors, 500.pt      the only number in the name
    epoch_3.pt                                                       an epoch: needs its steps

A number that is glued to other letters, as in `resnet18` or `bf16`, does not count, nor do decimal
fractions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from capture.store.errors import InputError, UsageError

MAX_STEP = 2**63 - 1

_EPOCH = re.compile(r"(?<![a-z])(?:epochs?|ep)[-_=. ]?([0-9]+)", re.IGNORECASE)
_AFTER_WORD = re.compile(
    r"(?<![a-z])(?:global[-_ ]?)?(?:steps?|iter(?:ation)?s?|updates?)[-_=. ]?([0-9]+)",
    re.IGNORECASE,
)
_AFTER_CHECKPOINT = re.compile(r"(?:checkpoint|ckpt)[-_=. ]?([0-9]+)(?![0-9a-z])", re.IGNORECASE)
_ALONE = re.compile(r"(?<![0-9A-Za-z])(?<![0-9]\.)([0-9]+)(?![0-9A-Za-z]|\.[0-9])")
_SUFFIX = re.compile(r"\.(safetensors|pt|pth|bin|ckpt)$", re.IGNORECASE)

FIX = (
    "give --step-pattern REGEX (its group is the step; other names are left out), --steps 0,100,… "
    "or only the checkpoints that you mean"
)


@dataclass(frozen=True)
class Told:
    """What a name tells: its step, or its epoch alone; `None` where it tells neither."""

    step: int | None = None
    epoch: int | None = None


def read_name(name: str, where: str) -> Told:
    """Read step or epoch off the name of a checkpoint; `InputError` where it has several."""
    stem = _SUFFIX.sub("", name)
    epochs = _numbers(_EPOCH, stem)
    steps = _numbers(_AFTER_WORD, stem)
    if not steps:
        rest = _EPOCH.sub(" ", stem)
        steps = _numbers(_AFTER_CHECKPOINT, rest) | _numbers(_ALONE, rest)
    if len(steps) > 1:
        found = " or ".join(str(step) for step in sorted(steps))
        raise InputError(
            f"the name has several numbers, its step may be {found}", where=where, fix=FIX
        )
    if steps:
        return Told(step=steps.pop())
    return Told(epoch=epochs.pop()) if len(epochs) == 1 else Told()


def compile_pattern(text: str, option: str) -> re.Pattern[str]:
    """Compile a regular expression of the user's; `UsageError` where it is none."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(
            f"no regular expression ({error})", where=f"{option} {text!r}", fix="correct it"
        ) from error


def match_step(pattern: re.Pattern[str], name: str, where: str) -> int | None:
    """The step that the user's pattern finds in a name; `None` where it does not match."""
    found = pattern.search(name)
    if found is None:
        return None
    text = found["step"] if "step" in pattern.groupindex else found[1] if found.groups() else None
    if text is None or not (text.isascii() and text.isdigit()):
        raise UsageError(
            f"--step-pattern finds {text!r}, which is no number",
            where=where,
            fix=r"put the number into its first group, as in 'step_(\d+)'",
        )
    return int(text)


def _numbers(pattern: re.Pattern[str], text: str) -> set[int]:
    return {int(number) for number in pattern.findall(text) if len(number) < 40}


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names with their numbers as numbers: `model_2` before `model_10`."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(p), p) if i % 2 else (1, 0, p) for i, p in enumerate(parts)]
