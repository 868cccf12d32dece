"""Creating the run of a recorder, or reopening it: what stands in its attributes and must agree."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from crc32c import crc32c

from capture import __version__
from capture.describe import Description
from capture.norms import Norms
from capture.schedule import Schedule
from capture.sources import Source
from capture.store import MismatchError, RunWriter, TensorTable
from capture.store.attributes import read_attributes
from capture.store.layout import METADATA, WEIGHTS
from capture.store.place import Place

logger = logging.getLogger("capture")


@dataclass(frozen=True)
class RunPlan:
    """What a recorder is about to record; `total_steps` is what the user said of its length."""

    path: Place
    seen: Description
    optimizer: Mapping[str, Any]
    schedules: Mapping[str, Schedule]
    total_steps: int | None
    attributes: Mapping[str, Any]
    sources: Mapping[str, Source] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share; the length only where a schedule depends on it."""
        by_length = any(schedule.listed for schedule in self.schedules.values())
        return {
            "optimizer": dict(self.optimizer),
            "schedules": {name: schedule.text for name, schedule in self.schedules.items()},
            "total_steps": self.total_steps if by_length else None,
            "probes": {name: source.describe() for name, source in self.sources.items()},
            # The optimizer's state knows its parameters by their place in this order alone.
            "optimizer_parameters": parameter_order(self.seen),
        }

    def entries(self) -> dict[str, Any]:
        """Build the run's attributes; those that the user gave override the general ones."""
        given: dict[str, Any] = {"config": {}, "versions": versions(), "seeds": {}}
        given |= {"git_commit": None, "threads": torch.get_num_threads()}
        with torch.no_grad():
            initial = Norms(torch.float64).of(self.seen.parameters).tolist()
        own: dict[str, Any] = {
            **self.identity,
            "initial_norm_by_tensor": [norm if math.isfinite(norm) else None for norm in initial],
            "frozen_digests": frozen_digests(self.seen),
            # Momentum from before the first recorded step is no part of the recorded path.
            "optimizer_had_state": bool(self.seen.optimizer.state),
        }
        if self.seen.not_stored:
            own["not_stored"] = list(self.seen.not_stored)
        return {**given, **self.attributes, **own}


def finished_step(plan: RunPlan) -> int | None:
    """T of a run that is there and complete, else `None`; it is only read.

    Raises `MismatchError` where it is the run of another model, optimizer or schedule.
    """
    if not (plan.path / METADATA).exists():
        return None
    attributes = read_attributes(plan.path)
    if attributes["status"] != "complete":
        return None
    difference = TensorTable.from_json(attributes["tensors"]).difference(plan.seen.table)
    if difference is not None:
        raise MismatchError(
            f"the run was recorded from another model, {difference}", where=plan.path
        )
    _check_same(plan, attributes)
    return int(attributes["final_step"])


def open_writer(plan: RunPlan, resume: bool) -> tuple[RunWriter, bool]:
    """Create the run, or reopen it where `resume` is set and it is there; tell if it was created.

    Raises `UsageError` for a path that is taken, `MismatchError` for a run of another model,
    optimizer or schedule.
    """
    if resume and (plan.path / METADATA).exists():
        writer = RunWriter.reopen(plan.path, plan.seen.table)
        try:
            _check_same(plan, writer.attributes)
        except BaseException:
            writer.close()
            raise
        threads = writer.attributes.get("threads")
        if threads not in (None, torch.get_num_threads()):
            logger.warning(
                "the run began with %s threads of torch and goes on with %d, so the last bits may "
                "differ: %s",
                threads,
                torch.get_num_threads(),
                plan.path,
            )
        return writer, False
    streams = {
        name: plan.sources[name].batches if name in plan.sources else None
        for name in plan.schedules
        if name != WEIGHTS
    }
    frozen = plan.seen.frozen_bytes()
    writer = RunWriter.create(
        plan.path, plan.seen.table, streams=streams, attributes=plan.entries(), frozen=frozen
    )
    return writer, True


def holds_nothing(writer: RunWriter) -> bool:
    """Whether a run has neither a row nor a resume state."""
    return not writer.committed_steps(WEIGHTS) and not any(writer.state_folder.glob("*.json"))


def start_over(plan: RunPlan, writer: RunWriter) -> None:
    """Drop every row of a reopened run that has no resume state."""
    if writer.attributes["frozen_digests"] != frozen_digests(plan.seen):
        raise MismatchError(
            "the frozen tensors have other values than those of the run",
            where=plan.path,
            fix="start from the same weights, or record into another path",
        )
    writer.truncate(0)
    writer.update_attributes(**plan.entries())


def note_frozen(seen: Description, writer: RunWriter) -> list[str]:
    """Keep in the attributes which frozen tensors changed since the run began; return a warning."""
    before, after = writer.attributes["frozen_digests"], frozen_digests(seen)
    changed = [name for name in before if before[name] != after[name]]
    if not changed:
        return []
    writer.update_attributes(frozen_changed=changed)
    return [f"frozen tensors changed during the run: {', '.join(changed)}"]


def frozen_digests(seen: Description) -> dict[str, str]:
    """Crc32c of the bytes of every frozen tensor as 8 hexadecimal digits, by name."""
    return {name: f"{crc32c(data.tobytes()):08x}" for name, data in seen.frozen_bytes().items()}


def parameter_order(seen: Description) -> list[list[str]]:
    """Name the parameters of each group of the optimizer, in its own order, frozen ones too.

    Entry i of the optimizer's ``state_dict`` is that of the i-th of them, groups one after another.
    """
    names = {id(parameter): name for name, parameter in seen.model.named_parameters()}
    groups = seen.optimizer.param_groups
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def versions() -> dict[str, str]:
    """Versions of what the numbers of a training depend on."""
    return {
        "straightway": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def _check_same(plan: RunPlan, attributes: Mapping[str, Any]) -> None:
    # What earlier versions did not keep is taken to be the same.
    earlier = {"probes": {}, "optimizer_parameters": plan.identity["optimizer_parameters"]}
    for name, ours in plan.identity.items():
        theirs = attributes.get(name, earlier.get(name))
        if theirs != ours:
            what = f"the run has {name} {theirs}, this recorder {ours}"
            if name == "optimizer_parameters":
                what = f"the run's optimizer has other parameters, {_first_other(theirs, ours)}"
            raise MismatchError(
                what,
                where=plan.path,
                fix="resume with the same settings, or record into another path",
            )


def _first_other(theirs: Any, ours: list[list[str]]) -> str:
    """Say where two orders of parameters first differ."""
    for number, (their_group, our_group) in enumerate(zip(theirs, ours, strict=False)):
        for their_name, our_name in zip(their_group, our_group, strict=False):
            if their_name != our_name:
                return f"group {number} has {their_name!r} where this one has {our_name!r}"
    return "more or fewer of them"
