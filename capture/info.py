"""What a run says of itself, as one dictionary and as a few lines of text."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from capture.config import is_of_train
from capture.importing import IMPORTED
from capture.progress import format_bytes
from capture.store import DamagedError, Run, open_run
from capture.store.errors import RESTORE
from capture.store.layout import LOCK, METADATA, PRIVATE_FOLDER, UPDATES, WEIGHTS
from capture.store.place import Place, is_locked

# What of a configuration a person wants to see first.
SHOWN = (
    *("task", "optimizer", "lr", "momentum", "weight_decay", "lr_schedule"),
    *("batch_size", "epochs", "max_steps", "seed", "data_seed", "device"),
)

TRAIN, IMPORT, RECORDER = "capture train", "capture import", "a Recorder"


def describe_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe the run at `path`: status, sizes, and the recorded steps of every stream.

    `final_step` is `None` while a run is not complete, `made_by` is "capture train", "capture
    import" or "a Recorder", `being_recorded` tells whether a process has its lock, `settings` has
    the smallest and the largest value of the first parameter group's learning rate and momentum so
    far. Raises `NotARunError`, `DamagedError`.
    """
    run = open_run(path)
    names = ("optimizer", "config", "versions", "seeds", IMPORTED)
    tables = {name: _table(run, name) for name in names}
    streams = {
        name: {
            "steps": stream.steps.tolist(),
            "batches": stream.batches,
            "bytes": int(stream.commits.sizes.sum()),
            "finished": _is_finished(run, name),
        }
        for name, stream in run.streams.items()
    }
    beside = {name: streams.pop(name) for name in (WEIGHTS, UPDATES) if name in streams}
    attributes = run.attributes
    return {
        "run": os.fspath(path),
        "status": run.status,
        "made_by": _maker(run),
        "being_recorded": _is_being_recorded(run.path),
        "final_step": run.final_step,
        "n_parameters": run.table.num_parameters,
        "tensors": len(run.table.parameters),
        **beside,
        "gradients": streams,
        "optimizer": tables["optimizer"].get("name"),
        "settings": _settings(run),
        "config": tables["config"],
        "versions": tables["versions"],
        "seeds": tables["seeds"],
        "git_commit": attributes.get("git_commit"),
        IMPORTED: tables[IMPORTED] or None,
        "not_finite": _not_finite(run, tables[IMPORTED]),
    }


def format_description(description: dict[str, Any]) -> str:
    """Write a description in lines for people."""
    config = description["config"]
    lines = [
        ("run", description["run"]),
        ("status", _status_words(description)),
        (
            "model",
            f"{config.get('model') or 'a model'} with {description['n_parameters']:,} parameters "
            f"in {description['tensors']} tensors",
        ),
    ]
    own_loop = description["made_by"] == RECORDER
    if facts := _facts(config, own_loop):
        lines.append(("settings" if own_loop else "training", ", ".join(facts)))
    if description[IMPORTED]:
        lines.append((IMPORTED, _import_words(description)))
    elif own_loop or "lr" not in config:
        settings = [
            f"{name} {low:g}" if low == high else f"{name} {low:g} to {high:g}"
            for name, (low, high) in description["settings"].items()
        ]
        lines.append(("optimizer", ", ".join([str(description["optimizer"]), *settings])))
    if description["not_finite"]:
        lines.append(("not finite", _not_finite_words(description)))
    streams = {name: description[name] for name in (WEIGHTS, UPDATES) if name in description}
    for name, stream in {**streams, **description["gradients"]}.items():
        lines.append((name, _stream_words(stream)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _is_finished(run: Run, stream: str) -> bool:
    """False for a stream that a probe began to add to a complete run and has not ended."""
    return not run.complete or stream in run.attributes["digests"]["rows"]


def _maker(run: Run) -> str:
    """Who wrote the run: `capture train`, `capture import`, or a loop of one's own."""
    if IMPORTED in run.attributes:
        return IMPORT
    return TRAIN if is_of_train(run.attributes) else RECORDER


def _facts(config: dict[str, Any], own_loop: bool) -> list[str]:
    """What a person wants to see first; of a loop of one's own, every plain setting."""
    others = [key for key in config if own_loop and key not in (*SHOWN, "model")]
    shown = [key for key in (*SHOWN, *others) if isinstance(config.get(key), str | int | float)]
    return [f"{key} {_printable(str(config[key]))}" for key in shown]


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)


def _status_words(description: dict[str, Any]) -> str:
    if description["status"] == "complete":
        return f"complete, {description['final_step']} steps"
    if description["being_recorded"]:
        return "being recorded"
    steps = description[WEIGHTS]["steps"]
    held = f"weights up to step {steps[-1]}" if steps else "nothing recorded yet"
    if description[IMPORTED]:
        return f"incomplete, {held}; give the same `capture import` again"
    return f"incomplete, {held}; go on with --resume (resume=True in a Recorder)"


def _table(run: Run, name: str) -> dict[str, Any]:
    """One of the run's attributes that is a table; empty where it is missing."""
    value = run.attributes.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        where = run.path / METADATA
        raise DamagedError(f"the run's attribute {name} is no table", where=where, fix=RESTORE)
    return value


def _is_being_recorded(root: Place) -> bool:
    return is_locked(root / WEIGHTS / "value" / PRIVATE_FOLDER / LOCK)


def _settings(run: Run) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for name, scalar in (("lr", "lr"), ("momentum", "group_momentum")):
        if scalar not in run.scalar_names():
            continue
        values = run.scalar(scalar)
        first = values if values.ndim == 1 else values[:, 0]
        sound = [value for value in first.tolist() if math.isfinite(value)]
        if sound and (name == "lr" or any(sound)):
            found[name] = [min(sound), max(sound)]
    return found


def _not_finite(run: Run, imported: dict[str, Any]) -> dict[str, Any]:
    """How often weights or norms of the run are NaN or infinite; empty where never.

    Of an imported run the `steps` with such weights; of a recorded one the number of `updates`
    whose gradient or update has such a norm, and the `first` of them.
    """
    entries = imported.get("checkpoints")
    if isinstance(entries, list):
        steps = [e.get("step") for e in entries if isinstance(e, dict) and e.get("not_finite")]
        return {"steps": steps} if steps else {}
    names = [name for name in ("grad_norm", "update_norm") if name in run.scalar_names()]
    odd = sorted({int(t) for name in names for t in np.flatnonzero(~np.isfinite(run.scalar(name)))})
    return {"updates": len(odd), "first": odd[0]} if odd else {}


def _not_finite_words(description: dict[str, Any]) -> str:
    found = description["not_finite"]
    if "updates" in found:
        return f"norms of {found['updates']:,} updates, the first at step {found['first']}"
    steps = found["steps"]
    end = ", w_T among them" if description["final_step"] in steps else ""
    return f"weights of {len(steps)} checkpoints, at steps {_listed(steps)}{end}"


def _import_words(description: dict[str, Any]) -> str:
    """How many checkpoints an imported run is made of, and what told their trainable tensors."""
    by_model = description[IMPORTED].get("trainable") == "model"
    told = "the model" if by_model else "the names"
    count = len(description[WEIGHTS]["steps"])
    return f"from {count} checkpoints; what is trained is told by {told}"


def _stream_words(stream: dict[str, Any]) -> str:
    steps, batches = stream["steps"], stream["batches"]
    end = "" if stream["finished"] else "; not finished, give the same `capture probe` again"
    if not steps:
        return f"nothing recorded yet{end}"
    each = f" of {batches} batches" if batches else ""
    size = format_bytes(stream["bytes"])
    return f"{len(steps)} rows{each}, {size}, at steps {_listed(steps)}{end}"


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join([*shown[:3], "…", *shown[-2:]] if len(shown) > 6 else shown)
