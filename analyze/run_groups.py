"""Runs put into groups by their configuration, and what else differs between them.

A run is known by its entry in the metadata of a table (`analyze.tables`): `config`, a mapping that
may hold others, and beside it what any run has.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capture.store.errors import UsageError

Entry = Mapping[str, Any]

# What may differ between the runs of a group: repetition is what they are for.
SEEDS = ("seed", "data_seed")
# What a run without a configuration can be grouped by too.
_FACTS = ("run", "optimizer", *SEEDS, "num_parameters", "final_step", "status")
ABSENT = "–"


@dataclass(frozen=True)
class Group:
    """Runs of equal settings: `values` are those of the keys, in their order, as text."""

    label: str
    values: tuple[str, ...]
    runs: tuple[str, ...]


def group_runs(entries: Mapping[str, Entry], keys: Sequence[str]) -> list[Group]:
    """Group runs by `keys` of their configuration, dots leading into tables; numbers ascend.

    Without a configuration, `run`, `optimizer`, `seed` and the like are told by other facts.
    `UsageError` for a key that no run has: it names the nearest.
    """
    keys = list(dict.fromkeys(key.strip() for key in keys))
    if not keys or "" in keys:
        raise UsageError("there is no key to group by", fix="give one, such as optimizer")
    known = {key for entry in entries.values() for key in _known(entry)}
    for key in keys:
        if key not in known:
            raise UsageError(f"no run has a setting {key!r}", fix=_hint(key, known))
    found: dict[tuple[str, ...], list[str]] = {}
    order: dict[tuple[str, ...], list[tuple[int, float, str]]] = {}
    for run, entry in entries.items():
        values = [setting(entry, key) for key in keys]
        texts = tuple(text_of(value) for value in values)
        found.setdefault(texts, []).append(run)
        order[texts] = [_rank(value) for value in values]
    return [
        Group(
            ", ".join(f"{key}={text}" for key, text in zip(keys, texts, strict=True)),
            texts,
            tuple(found[texts]),
        )
        for texts in sorted(found, key=lambda texts: order[texts])
    ]


def differences(
    entries: Mapping[str, Entry], groups: Sequence[Group], keys: Sequence[str]
) -> list[str]:
    """Say what differs between the runs although it is neither a key nor a seed; one line each.

    Between groups it is confounded with the keys; within a group it widens the interval over runs,
    or biases it.
    """
    leaves = {run: _leaves(entry) for run, entry in entries.items()}
    if any(not entry.get("config") for entry in entries.values()):
        for run, entry in entries.items():
            leaves[run] |= {name: entry.get(name) for name in ("num_parameters", "final_step")}
            leaves[run] |= {"optimizer": setting(entry, "optimizer")}
    names = list(dict.fromkeys(name for own in leaves.values() for name in own))
    within: list[str] = []
    between: list[str] = []
    for name in names:
        if name in SEEDS or any(name == key or name.startswith(f"{key}.") for key in keys):
            continue
        texts = {run: text_of(own.get(name)) for run, own in leaves.items()}
        if len(set(texts.values())) == 1:
            continue
        said = f"{name} ({', '.join(dict.fromkeys(texts.values()))})"
        mixed = any(len({texts[run] for run in group.runs}) > 1 for group in groups)
        (within if mixed else between).append(said)
    lines = []
    if between:
        lines.append(f"the groups also differ in {', '.join(between)}: confounded with the groups")
    if within:
        lines.append(
            f"runs of one group differ in {', '.join(within)}: not only in seeds, so that an "
            "interval over them is not one over seeds"
        )
    return lines


def seeds(entry: Entry) -> tuple[str, ...] | None:
    """The seeds of a run as text; `None` where none is known."""
    values = tuple(setting(entry, name) for name in SEEDS)
    return None if values == (None,) * len(SEEDS) else tuple(text_of(value) for value in values)


def same_settings(first: Entry, second: Entry) -> bool:
    """Whether two runs have one configuration, seeds included, that both tell."""
    own = first.get("config")
    return bool(own) and own == second.get("config") and seeds(first) == seeds(second)


def setting(entry: Entry, key: str) -> Any:
    """One setting of a run; `None` where it has none, or it is null."""
    value: Any = entry.get("config") or {}
    if key in value:
        return value[key]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is not None or key not in _FACTS:
        return value
    if key == "optimizer":
        return (entry.get("optimizer") or {}).get("name")
    if key in SEEDS:
        return (entry.get("seeds") or {}).get(key)
    return entry.get(key)


def text_of(value: Any) -> str:
    """Write a setting on one line: `0.01`, `adam`, `–` for none; only what can be printed."""
    if value is None:
        return ABSENT
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return "".join(sign for sign in " ".join(text.split()) if sign.isprintable())


def _known(entry: Entry) -> Iterator[str]:
    """Every key by which a run can be grouped."""
    for name in _FACTS:
        if setting(entry, name) is not None:
            yield name
    tables: list[tuple[str, Any]] = [("", entry.get("config") or {})]
    while tables:
        prefix, table = tables.pop()
        for name, value in table.items():
            yield f"{prefix}{name}"
            if isinstance(value, Mapping):
                tables.append((f"{prefix}{name}.", value))


def _leaves(entry: Entry) -> dict[str, Any]:
    """The configuration without its tables, and the versions of the libraries that trained."""
    leaves: dict[str, Any] = {}
    places = [("", entry.get("config") or {}), ("version of ", entry.get("versions") or {})]
    while places:
        prefix, table = places.pop(0)
        for name, value in table.items():
            if isinstance(value, Mapping):
                places.append((f"{prefix}{name}.", value))
            else:
                leaves[f"{prefix}{name}"] = value
    return leaves


def _hint(key: str, known: set[str]) -> str:
    if not known - set(_FACTS):
        return f"the runs have no configuration; group by {' or '.join(sorted(known))}"
    near = difflib.get_close_matches(key.replace("-", "_"), sorted(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"


def _rank(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, text_of(value))
