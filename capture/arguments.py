"""What a caller hands over, checked before anything is done with it: numbers, names, JSON."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Any

from capture.store.attributes import OWN_ATTRIBUTES
from capture.store.errors import UsageError

# Attributes that the store or the recorder writes.
TAKEN_ATTRIBUTES = OWN_ATTRIBUTES | {
    *("optimizer", "schedules", "total_steps", "initial_norm_by_tensor", "frozen_digests"),
    *("optimizer_had_state", "gradient_missing", "frozen_changed", "not_stored", "probes"),
    *("optimizer_parameters", "clipping"),
}
TABLES = ("config", "versions", "seeds")


def require_whole(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """Raise `UsageError` for what is no whole number of at least `least`; `None` where optional."""
    if optional and value is None:
        return
    try:
        sound = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        sound = False
    if not sound:
        raise UsageError(f"{name} must be a whole number of at least {least}", where=repr(value))


def parse_steps(text: str | None) -> list[int] | None:
    """Parse ``0,100,200``; `None` where nothing is given. Raises `UsageError`."""
    if text is None:
        return None
    parts = text.replace(" ", "").split(",")
    if not all(part.isdecimal() for part in parts):
        raise UsageError("no list of steps", where=repr(text), fix="write 0,100,200")
    return [int(part) for part in parts]


def with_config(
    attributes: Mapping[str, Any], config: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Put the settings of a loop among the attributes of its run, as the table `config`.

    Raises `UsageError` for settings that are no dict of JSON values, and for two of them.
    """
    if config is None:
        return attributes
    if not isinstance(config, Mapping):
        kind = type(config).__name__
        raise UsageError(
            "config must be a dict", where=f"config is a {kind}", fix="such as vars(args)"
        )
    if "config" in attributes:
        raise UsageError(
            "the settings are given twice",
            where="config, attributes['config']",
            fix="give config alone",
        )
    for name, value in config.items():
        if not isinstance(name, str):
            raise UsageError(
                "the names of settings must be text",
                where=f"config[{name!r}]",
                fix="rename it",
            )
        require_json(f"config[{name!r}]", value)
    return {**attributes, "config": dict(config)}


def require_attributes(attributes: Mapping[str, Any]) -> None:
    """Raise `UsageError` for attributes that are not the user's to set, or no JSON."""
    for name, value in attributes.items():
        where = f"attributes[{name!r}]"
        if not isinstance(name, str) or name in TAKEN_ATTRIBUTES:
            fix = "choose another name, or put it into the table config"
            raise UsageError("an attribute that the run sets by itself", where=where, fix=fix)
        if name in TABLES and not isinstance(value, Mapping):
            raise UsageError("this attribute must be a table", where=where, fix="give a dict")
        require_json(where, value)


def require_json(where: str, value: Any) -> None:
    """Raise `UsageError` for what JSON cannot hold, NaN and infinities among it."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"not JSON ({error})", where=where, fix="give text, finite numbers, lists and dicts"
        ) from None


def require_unclipped(clipped: Any) -> None:
    """Raise `UsageError` for what is neither `None` nor False."""
    if clipped is not None and clipped is not False:
        raise UsageError(
            "clipped must be None or False",
            where=repr(clipped),
            fix="clip by recorder.clip_grad_norm_(…), which keeps the factor",
        )


def require_state(state: Mapping[str, Any]) -> None:
    """Raise `UsageError` for objects that cannot be saved and loaded."""
    for name, entry in state.items():
        methods = (getattr(entry, method, None) for method in ("state_dict", "load_state_dict"))
        if not isinstance(name, str) or not all(map(callable, methods)):
            raise UsageError(
                f"a {type(entry).__name__} has no state_dict() and load_state_dict()",
                where=f"state[{name!r}]",
                fix="give objects such as schedulers; other values belong to checkpoint(…)",
            )
