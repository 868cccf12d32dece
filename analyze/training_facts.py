"""Sentences on how a run was trained: task, optimizer, seeds, clipping, precision, software."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from analyze.marked import code, math
from analyze.provenance import Floats, Provenance, is_whole
from analyze.text_table import span

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PARTS = {"train": "training", "heldout": "held-out"}
_SEEDS = {"seed": "initialisation", "data_seed": "order of the data"}


def describe_training(run: Provenance) -> Iterator[str]:
    """Say in marked sentences how a run was trained, and what of that is not known."""
    yield _task(run)
    yield from _length(run)
    yield _optimizer(run)
    yield _decay(run)
    yield _seeds(run)
    yield from _ancestry(run)
    yield from _clipping(run)
    yield _precision(run)
    yield _software(run)


def _task(run: Provenance) -> str:
    config, data = run.entry("config"), run.entry("data")
    parts = []
    if config.get("task") is not None:
        counts = [f"{data[p]:,} {word}" for p, word in _PARTS.items() if is_whole(data.get(p))]
        samples = f" ({' and '.join(counts)} samples)" if counts else ""
        parts.append(f"task {code(config['task'])}{samples}")
    if config.get("model") is not None:
        # Of a loop of one's own, a "width" may be anything.
        width = config.get("width") if run.is_of_train else None
        scale = "" if width in (None, 1) else f", width ×{told(width)}"
        parts.append(f"model {code(config['model'])}{scale}")
    parts.append(f"{math('D =')} {run.num_parameters:,} trainable parameters")
    if config.get("batch_size") is not None:
        parts.append(f"batch size {told(config['batch_size'])}")
    known = ", ".join(parts)
    lacking = [
        key.replace("_", " ") for key in ("task", "model", "batch_size") if config.get(key) is None
    ]
    unknown = f" {_joined(lacking).capitalize()} {run.missing(len(lacking))}." if lacking else ""
    return f"{known[:1].upper()}{known[1:]}.{unknown}"


def _length(run: Provenance) -> Iterator[str]:
    if run.final_step is None:
        yield "The run had not finished, so it has no final iterate yet."
    else:
        yield f"It took {math('T =')} {run.final_step:,} updates."


def _optimizer(run: Provenance) -> str:
    optimizer, config = run.entry("optimizer"), run.entry("config")
    name = optimizer.get("name") or config.get("optimizer")
    if name is None:
        return f"The optimizer {run.missing()}."
    parts = [_rate(run)]
    momentum = span(run.scalar("group_momentum")) or told(config.get("momentum"))
    if momentum not in (None, "0"):
        kind = "Nesterov momentum" if optimizer.get("nesterov") else "momentum"
        parts.append(f"{kind} {momentum}")
    dampening = optimizer.get("dampening") or ()
    if isinstance(dampening, Sequence) and any(dampening):
        parts.append(f"dampening {', '.join(dict.fromkeys(map(str, dampening)))}")
    if optimizer.get("maximize"):
        parts.append("maximizing, with gradients negated here")
    rest = "" if optimizer.get("kind") == "sgd" else f" Its further settings {run.missing(2)}."
    return f"Optimizer: {code(name)}, {', '.join(parts)}.{rest}"


def _rate(run: Provenance) -> str:
    config = run.entry("config")
    rate = span(run.scalar("group_lr"))
    if rate is None:
        rate = told(config.get("lr"))
    elif not run.every_update:
        rate = f"{rate} at the measured steps"
    schedule = config.get("lr_schedule")
    kept = "" if schedule is None else f" (schedule {code(schedule)})"
    return f"learning rate that {run.missing()}" if rate is None else f"learning rate {rate}{kept}"


def _decay(run: Provenance) -> str:
    kind = run.entry("optimizer").get("weight_decay")
    config = run.entry("config").get("weight_decay")
    value = span(run.scalar("group_weight_decay")) or told(config)
    if value == "0":
        return "No weight decay."
    if kind not in ("coupled", "decoupled"):
        unknown = f"Weight decay {run.missing()}."
        return unknown if value is None else f"Weight decay {value}, of a kind that is not known."
    head = f"Weight decay {value}" if value else f"Weight decay of a value that {run.missing()}"
    if kind == "coupled":
        return (
            f"{head}, coupled: {math('λw')} enters the gradient of the step. Quantities are of the "
            f"gradient of the loss alone, those marked {code('_wd')} of {math('g + λw')}."
        )
    return f"{head}, decoupled: it shrinks the weights beside the gradient, as updates show."


def _seeds(run: Provenance) -> str:
    seeds = {name: value for name, value in run.entry("seeds").items() if value is not None}
    own = {key: run.entry("config").get(key) for key in _SEEDS}
    if not seeds and not run.is_of_train and any(value is not None for value in own.values()):
        # Settings of a loop of one's own: what they seed is not known.
        given = [f"{code(key)} {told(value)}" for key, value in own.items() if value is not None]
        return f"Settings of seeds: {', '.join(given)}."
    names = [*(name for name in _SEEDS if name in seeds), *sorted(seeds.keys() - _SEEDS.keys())]
    listed = ", ".join(f"{_SEEDS.get(name, code(name))} {told(seeds[name])}" for name in names)
    return f"Seeds: {listed}." if listed else f"The seeds {run.missing(2)}."


def _ancestry(run: Provenance) -> Iterator[str]:
    parent = run.entry("parent")
    if not parent:
        return
    left_out = parent.get("exclude_batch")
    without = "" if left_out is None else f", without the samples of its update {left_out}"
    yield (
        f"It branched off from {code(parent.get('run'))} after {parent.get('step')} updates"
        f"{without}, and counts its own from 0."
    )


def _clipping(run: Provenance) -> Iterator[str]:
    factors: Floats = run.scalars.get("clip_factor", np.empty(0))
    steps = "updates" if run.every_update else "measured steps"
    known = factors[np.isfinite(factors)]
    clipped = known[known < 1]
    if known.size and not clipped.size:
        yield f"No gradient was clipped in the {len(known):,} {steps} whose factor is known."
    elif known.size:
        yield (
            f"Gradients were clipped{_clip_norm(run)} in {len(clipped):,} of the {len(known):,} "
            f"{steps} whose factor is known, by factors down to {clipped.min():.3g}; quantities "
            "are of the unclipped gradient there."
        )
    yield from _unknown_factors(run, len(factors) - len(known), bool(known.size), steps)


def _clip_norm(run: Provenance) -> str:
    """To which norm the recorder clipped, ` to norm 0.25`; empty where unknown."""
    own = run.entry("clipping").get("recorder")
    if not isinstance(own, Mapping):
        return ""
    bounds, kinds = own.get("max_norm"), own.get("norm_type")
    if not isinstance(bounds, list) or not all(isinstance(each, float) for each in bounds):
        return ""
    others = [told(kind) or "" for kind in kinds if kind != 2] if isinstance(kinds, list) else []
    order = f" ({math('p =')} {_joined(others)})" if others else ""
    return f" to norm {span(np.array(bounds))}{order}" if bounds else ""


def _unknown_factors(
    run: Provenance, unknown: int, others_known: bool, steps: str
) -> Iterator[str]:
    """Say of updates without a known clip factor what the recorder noticed of them, if it did."""
    loop = run.entry("clipping").get("loop")
    changed = loop.get("updates") if isinstance(loop, Mapping) else None
    as_entered = "minibatch gradients are taken as they entered the update"
    if is_whole(changed) and changed:
        yield (
            f"In {changed:,} updates the training loop itself changed gradients between the "
            "backward pass and the step, as clipping does, by factors that are not known: there "
            f"{as_entered}."
        )
        unknown -= changed if run.every_update else unknown
        others_known = True
    if not others_known:
        yield f"Whether gradients were clipped {run.missing()}: {as_entered}."
    elif unknown > 0:
        yield f"Of {unknown:,} further {steps} the factor is not known: there {as_entered}."


def _precision(run: Provenance) -> str:
    if run.tensors is None:
        return f"The precision of the parameters {run.missing()}."
    kinds = dict.fromkeys(tensor.dtype for tensor in run.tensors.parameters)
    names = ", ".join(_DTYPES.get(kind, kind) for kind in kinds)
    autocast = "" if run.is_of_train else f"; whether autocast was used {run.missing()}"
    return f"Parameters are {names}{autocast}."


def _software(run: Provenance) -> str:
    versions = run.entry("versions")
    commit = run.facts.get("git_commit")
    at = f", git commit {code(str(commit)[:12])}" if commit else ""
    if not versions:
        return f"Versions of the software {run.missing(2)}{at}."
    listed = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    made = "Imported" if run.facts.get("imported") else "Trained"
    return f"{made} with {listed}{at}."


def told(value: Any) -> str | None:
    """A fact as it is written; `None` where unknown. A run may hold anything."""
    if value is None:
        return None
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_whole(value) else f"{value:g}" if plain else code(value)


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
