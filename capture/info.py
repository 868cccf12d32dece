"""What a run says of itself, as one dictionary and as a few lines of text."""

from __future__ import annotations

import os
from typing import Any

from capture.progress import format_bytes
from capture.store import open_run
from capture.store.layout import UPDATES, WEIGHTS

# What of a configuration a person wants to see first.
SHOWN = (
    *("task", "optimizer", "lr", "momentum", "weight_decay", "lr_schedule"),
    *("batch_size", "epochs", "max_steps", "seed", "data_seed", "device"),
)


def describe_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe the run at `path`: status, sizes, and the recorded steps of every stream.

    `final_step` is `None` while a run is not complete. Raises `NotARunError`, `DamagedError`.
    """
    run = open_run(path)
    streams = {
        name: {
            "steps": stream.steps.tolist(),
            "batches": stream.batches,
            "bytes": sum(commit.size for commit in stream.commits),
        }
        for name, stream in run.streams.items()
    }
    beside = {name: streams.pop(name) for name in (WEIGHTS, UPDATES) if name in streams}
    attributes = run.attributes
    return {
        "run": os.fspath(path),
        "status": run.status,
        "final_step": run.final_step,
        "n_parameters": run.table.num_parameters,
        "tensors": len(run.table.parameters),
        **beside,
        "gradients": streams,
        "optimizer": attributes.get("optimizer", {}).get("name"),
        "config": attributes.get("config"),
        "versions": attributes.get("versions"),
        "seeds": attributes.get("seeds"),
        "git_commit": attributes.get("git_commit"),
    }


def format_description(description: dict[str, Any]) -> str:
    """Write a description in lines for people."""
    final, config = description["final_step"], description["config"] or {}
    status = description["status"] + ("" if final is None else f", {final} steps")
    lines = [
        ("run", description["run"]),
        ("status", status),
        (
            "model",
            f"{config.get('model') or 'a model'} with {description['n_parameters']:,} parameters "
            f"in {description['tensors']} tensors",
        ),
    ]
    if config:
        facts = [f"{key} {config[key]}" for key in SHOWN if config.get(key) is not None]
        lines.append(("training", ", ".join(facts)))
    else:
        lines.append(("optimizer", str(description["optimizer"])))
    streams = {name: description[name] for name in (WEIGHTS, UPDATES) if name in description}
    for name, stream in {**streams, **description["gradients"]}.items():
        lines.append((name, _stream_words(stream)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _stream_words(stream: dict[str, Any]) -> str:
    steps, batches = stream["steps"], stream["batches"]
    if not steps:
        return "nothing recorded yet"
    shown = [str(step) for step in steps]
    if len(shown) > 6:
        shown = [*shown[:3], "…", *shown[-2:]]
    each = f" of {batches} batches" if batches else ""
    size = format_bytes(stream["bytes"])
    return f"{len(steps)} rows{each}, {size}, at steps {', '.join(shown)}"
