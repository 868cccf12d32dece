"""The configuration of a training: a TOML file, overridden by flags, read into a frozen dataclass.

`None` stands for a default that depends on something else (the task, the optimizer, another seed);
`TrainConfig.completed` fills it in, and the completed configuration is what a run stores.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from typing import Any, Self

from capture.arguments import require_json
from capture.optimizers import DEFAULT_MOMENTUM, HEAVY_BALL, OPTIMIZERS
from capture.schedule import parse_schedule
from capture.store.errors import UsageError
from capture.streams import parse_streams

DEVICES = ("auto", "cpu", "cuda")

# Upper bounds: what would overflow somewhere, or can only be a slip.
MOST = {
    "width": 1000,
    "seed": 2**63 - 1,
    "data_seed": 2**63 - 1,
    "threads": 4096,
    "workers": 1024,
    "epochs": 2**40,
    "max_steps": 2**40,
}
MAX_TOTAL_STEPS = 10**9

# What a resumed run may change, since it cannot change a bit of the result.
# `branch` is a path: the parent itself is compared.
FREE_ON_RESUME = ("data_root", "workers", "checkpoint_every", "branch")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training. Raises `UsageError` for values out of range."""

    task: str
    model: str | None = None  # default: the task's
    width: float = 1.0
    task_args: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "momentum"
    lr: float | None = None  # default: the optimizer's
    momentum: float | None = None  # default: 0.9 for momentum and nesterov
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    batch_size: int | None = None  # default: the task's, else 64
    epochs: int | None = None  # default: the task's, else no limit beside max_steps
    max_steps: int | None = None
    seed: int = 0  # initialisation
    data_seed: int | None = None  # order of the data; default: seed
    every: str = "10"
    gradients: str = "minibatch"
    device: str = "auto"
    data_root: str | None = None
    checkpoint_every: int | None = None  # in steps; default: once per epoch
    keep_state: str | None = None  # schedule of resume states that are kept, for branches
    branch: str | None = None  # RUN@STEP to go on from
    exclude_batch: int | None = None  # update of the parent whose samples a branch leaves out
    workers: int = 0  # processes that load data
    threads: int | None = None  # of torch; default: the task's, else torch's own choice

    def __post_init__(self) -> None:
        _choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        _choice("device", self.device, DEVICES)
        _at_least(self, 1, "batch_size", "epochs", "max_steps", "checkpoint_every", "threads")
        _at_least(self, 0, "lr", "momentum", "weight_decay", "seed", "data_seed", "workers")
        _at_least(self, 0, "exclude_batch")
        _finite_and_bounded(self)
        if not self.width > 0:
            raise UsageError("width must be above 0", where=f"width = {self.width}")
        if self.momentum is not None and self.optimizer not in HEAVY_BALL:
            raise UsageError(
                f"the optimizer {self.optimizer} takes no momentum",
                where=f"momentum = {self.momentum}",
                fix=f"choose one of {', '.join(HEAVY_BALL)}, or leave it out",
            )
        if self.momentum is not None and self.momentum >= 1:
            raise UsageError("momentum must be below 1", where=f"momentum = {self.momentum}")
        for key in ("task_args", "model_args"):
            require_json(key, getattr(self, key))
        parse_streams(self.gradients)
        if self.keep_state is not None:
            parse_schedule(self.keep_state, total_steps=1)
        if self.exclude_batch is not None and self.branch is None:
            raise UsageError(
                "only a branch leaves out a batch",
                where=f"exclude_batch = {self.exclude_batch}",
                fix="give --branch RUN@STEP too",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str | None = None) -> Self:
        """Check keys and types of `values`, as read from TOML, JSON or flags."""
        kinds = {entry.name: str(entry.type) for entry in fields(cls)}
        for key in values:
            if key not in kinds:
                near = difflib.get_close_matches(key.replace("-", "_"), kinds, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(kinds)}"
                raise UsageError(f"unknown key {key!r}", where=where, fix=hint)
        if values.get("task") is None:
            raise UsageError("no task is given", where=where, fix="give --task, such as digits")
        checked = {key: _typed(key, value, kinds[key], where) for key, value in values.items()}
        return cls(**checked)

    def to_dict(self) -> dict[str, Any]:
        """All values, as JSON and TOML can hold them; `from_dict` takes them back."""
        return asdict(self)

    def completed(self, task_defaults: Mapping[str, Any]) -> Self:
        """Fill in every default that depends on the task, the optimizer or another value."""
        defaults: dict[str, Any] = {
            "batch_size": 64,
            "lr": OPTIMIZERS[self.optimizer],
            "data_seed": self.seed,
            **task_defaults,
        }
        if self.optimizer in HEAVY_BALL:
            defaults.setdefault("momentum", DEFAULT_MOMENTUM)
        if self.max_steps is not None:
            defaults.pop("epochs", None)
        missing = {key: value for key, value in defaults.items() if getattr(self, key) is None}
        config = replace(self, **missing)
        if config.epochs is None and config.max_steps is None:
            raise UsageError("the training has no end", fix="give --epochs or --max-steps")
        return config

    def total_steps(self, steps_per_epoch: int) -> int:
        """T, the number of updates: the smaller of `epochs` and `max_steps` where both are set."""
        limits = [self.max_steps, None if self.epochs is None else self.epochs * steps_per_epoch]
        total = min(limit for limit in limits if limit is not None)
        if total > MAX_TOTAL_STEPS:
            raise UsageError(
                f"a training has at most {MAX_TOTAL_STEPS:,} steps",
                where=f"{total:,} steps",
                fix="give a smaller --max-steps or --epochs",
            )
        return total

    def difference(self, other: TrainConfig) -> str | None:
        """In words, where `other` (now) differs from this one (the run's), if it matters."""
        mine, theirs = self.to_dict(), other.to_dict()
        differing = [
            f"{key} was {mine[key]!r} and is now {theirs[key]!r}"
            for key in mine
            if mine[key] != theirs[key]
            and key not in FREE_ON_RESUME
            # Runs of earlier versions do not tell; another number is a warning when they go on.
            and not (key == "threads" and mine[key] is None)
        ]
        return ", ".join(differing) or None


def is_of_train(attributes: Mapping[str, Any]) -> bool:
    """Whether `capture train` made the run, so that its `config` is a `TrainConfig`.

    It alone keeps a checksum of the samples.
    """
    data = attributes.get("data")
    return isinstance(data, Mapping) and "samples_crc32c" in data


def read_config(
    file: str | PathLike[str] | None = None, flags: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read a TOML file, put the flags that are not `None` over it, and check the whole.

    A branch has its parent's configuration under both.
    """
    values = {} if file is None else _read_toml(file)
    if file is not None:
        # Checked by itself first, so that the message names the file.
        TrainConfig.from_dict({"task": "", "branch": "", **values}, where=str(file))
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    branch = given.get("branch", values.get("branch"))
    if isinstance(branch, str):
        # Imported here because it brings torch along.
        from capture.branch import inherited

        values = {**inherited(branch, {**values, **given}), **values}
    return TrainConfig.from_dict({**values, **given})


def read_given(
    file: str | PathLike[str] | None = None, flags: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read what a TOML file and the flags that are not `None` say, checked; no defaults."""
    values = {} if file is None else _read_toml(file)
    given = values | {key: value for key, value in (flags or {}).items() if value is not None}
    TrainConfig.from_dict(
        {"task": "", "branch": "", **given}, where=None if file is None else str(file)
    )
    return given


def _read_toml(file: str | PathLike[str]) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise UsageError(
            f"cannot read the configuration: {error.strerror}", where=file, fix="check --config"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"this is not TOML: {error}", where=file) from None


def _typed(key: str, value: Any, kind: str, where: str | None) -> Any:
    """Return `value` as the field `key` holds it, or raise what was expected and found."""
    kind, _, optional = kind.partition(" | ")
    if optional and value is None:
        return None
    if kind == "str" and key == "every" and type(value) is int:
        return str(value)
    if kind == "str" and key == "gradients" and isinstance(value, list):
        return ",".join(str(name) for name in value) or "none"
    if kind == "float" and type(value) is int:
        # Far beyond every bound, and more than a float can hold.
        return float(value) if abs(value) < 2**1000 else math.inf
    accepted: dict[str, tuple[type, str]] = {
        "str": (str, "a text"),
        "int": (int, "a whole number"),
        "float": (float, "a number"),
        "Mapping[str, Any]": (dict, "a table"),
    }
    wanted, words = accepted[kind]
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise UsageError(
            f"{key} must be {words}, found {value!r}", where=where, fix="correct its type"
        )
    return value


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise UsageError(f"unknown {key} {value!r}", fix=hint)


def _at_least(config: TrainConfig, least: int, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        # Written so that NaN fails too.
        if value is not None and not value >= least:
            raise UsageError(f"{key} must be at least {least}", where=f"{key} = {value}")


def _finite_and_bounded(config: TrainConfig) -> None:
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{entry.name} must be finite", where=f"{entry.name} = {value}")
        most = MOST.get(entry.name)
        if most is not None and value is not None and value > most:
            raise UsageError(
                f"{entry.name} must be at most {most}", where=f"{entry.name} = {value}"
            )
