"""What a run will take on disk, computed before it is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capture.progress import format_bytes
from capture.schedule import parse_schedule
from capture.store import ShardLayout, TensorTable, WriteError
from capture.store.layout import WEIGHTS
from capture.store.objects import ObjectPath
from capture.store.place import Place
from capture.streams import PROBES, parse_streams

# Copies of the parameters that an optimizer keeps in its state.
STATE_COPIES = {"sgd": 0, "momentum": 1, "nesterov": 1, "adam": 2, "adamw": 2}

# Steps whose schedules are looked at together.
PIECE = 4_000_000

# Resume states on disk while a third one is being written.
STATES = 3


@dataclass(frozen=True)
class Storage:
    """Rows and bytes of each stream (exact), and bytes of all else (about).

    `shards` is the number of files in each row: K where a stream has K batches, else 1.
    """

    rows: Mapping[str, int]
    shard_bytes: Mapping[str, int]
    other_bytes: int
    shards: Mapping[str, int]

    @property
    def files(self) -> int:
        """The number of shards of all streams."""
        return sum(self.rows[name] * self.shards[name] for name in self.rows)

    @property
    def total_shard_bytes(self) -> int:
        """Bytes of all shards, to the byte."""
        return sum(
            self.rows[name] * self.shards[name] * self.shard_bytes[name] for name in self.rows
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of the run at its largest: shards, scalars and resume states."""
        return self.total_shard_bytes + self.other_bytes


def plan_storage(
    table: TensorTable,
    *,
    every: str,
    gradients: str,
    total_steps: int,
    steps_per_epoch: int,
    optimizer: str,
    keep_state: str | None = None,
) -> Storage:
    """Count what a training of `total_steps` updates of the tensors of `table` will save."""

    requests = {request.name: request for request in parse_streams(gradients)}
    texts = {WEIGHTS: every}
    texts |= {name: request.schedule or every for name, request in requests.items()}
    schedules = {
        name: parse_schedule(text, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        for name, text in texts.items()
    }
    kept = 0
    if keep_state is not None:
        keeping = parse_schedule(
            keep_state, total_steps=total_steps, steps_per_epoch=steps_per_epoch
        )
        schedules[WEIGHTS] = schedules[WEIGHTS].union(keeping)
        kept = int(np.count_nonzero(keeping.mask(total_steps)))
    rows = dict.fromkeys(schedules, 0)
    for start in range(0, total_steps, PIECE):
        stop = min(start + PIECE, total_steps)
        saved = {name: schedule.mask(stop, start) for name, schedule in schedules.items()}
        # A gradient is never saved without its weights.
        saved[WEIGHTS] = np.logical_or.reduce(list(saved.values()))
        for name, mask in saved.items():
            rows[name] += int(np.count_nonzero(mask))
    batches = {name: requests[name].batches if name in requests else None for name in rows}
    for name in rows:
        rows[name] += name == WEIGHTS or name in PROBES  # the final iterate
    groups, tensors = 1, len(table.parameters)
    scalars = 8 * total_steps * (6 + 3 * groups + 2 * tensors)
    model = sum(tensor.nbytes for tensor in (*table.parameters, *table.buffers, *table.frozen))
    state = model + STATE_COPIES[optimizer] * sum(tensor.nbytes for tensor in table.parameters)
    return Storage(
        rows=rows,
        shard_bytes={name: ShardLayout(name, table, batches[name]).size for name in rows},
        shards={name: batches[name] or 1 for name in rows},
        other_bytes=scalars + (STATES + kept) * state,
    )


def free_bytes(path: Path) -> int:
    """Bytes free on the disk where `path` lies or will lie."""
    return shutil.disk_usage(existing_folder(path)).free


def existing_folder(path: Path) -> Path:
    """The nearest folder above `path` (or it itself) that is there already."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def require_space(path: Place, storage: Storage) -> None:
    """Raise `WriteError` where the disk cannot hold the run; what a run has already, counts.

    Object stores are taken to have room.
    """
    if isinstance(path, ObjectPath):
        return
    present = sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
    )
    needed, free = storage.total_bytes - present, free_bytes(path)
    if needed > free:
        raise WriteError(
            f"the run needs {format_bytes(needed)} and the disk has {format_bytes(free)} free",
            where=path,
            fix="save fewer steps (--every), choose another disk, or give --force",
        )
