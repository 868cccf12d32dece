"""What a training will cost, before it runs: bytes and files exactly, time as an estimate."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture.batches import load_batches
from capture.config import TrainConfig
from capture.progress import format_bytes
from capture.storage import Storage, existing_folder, free_bytes
from capture.store import UsageError
from capture.store.objects import ObjectPath
from capture.store.place import place_of
from capture.tasks import augment_of
from capture.train import losses
from capture.training import Training, deterministic, prepare

WARM_STEPS = 3
TIMED_STEPS = 20
TIMED_SECONDS = 3.0
PROBE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """The prediction.

    `step_seconds` is the median of a few steps of this very training without recording,
    `bytes_per_second` what the target disk took with fsync, `probe_seconds` the time that all
    gradients of other batches take, from one of each stream. All are measured on a machine that
    may be busy, so `seconds` is an estimate; the storage is exact but for `other_bytes`.
    """

    total_steps: int
    steps_per_epoch: int
    n_parameters: int
    storage: Storage
    free_bytes: int
    step_seconds: float
    bytes_per_second: float
    probe_seconds: float = 0.0

    @property
    def training_seconds(self) -> float:
        """Time of the updates and of the gradients of other batches."""
        return self.total_steps * self.step_seconds + self.probe_seconds

    @property
    def writing_seconds(self) -> float:
        """Time that the disk needs, which runs beside the training."""
        return self.storage.total_shard_bytes / self.bytes_per_second

    @property
    def seconds(self) -> float:
        """Time of the whole: that of the slower of both, since they overlap."""
        return max(self.training_seconds, self.writing_seconds)

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON; bytes and seconds."""
        storage = self.storage
        streams = {
            name: {
                "rows": rows,
                "batches": storage.shards[name],
                "bytes_per_row": storage.shards[name] * storage.shard_bytes[name],
                "bytes": rows * storage.shards[name] * storage.shard_bytes[name],
            }
            for name, rows in storage.rows.items()
        }
        return {
            "total_steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "n_parameters": self.n_parameters,
            "streams": streams,
            "shard_files": storage.files,
            "shard_bytes": storage.total_shard_bytes,
            "other_bytes": storage.other_bytes,
            "total_bytes": storage.total_bytes,
            "free_bytes": self.free_bytes,
            "step_seconds": self.step_seconds,
            "bytes_per_second": self.bytes_per_second,
            "probe_seconds": self.probe_seconds,
            "training_seconds": self.training_seconds,
            "writing_seconds": self.writing_seconds,
            "seconds": self.seconds,
        }

    def to_text(self) -> str:
        """The prediction as a small table for people."""
        storage = self.storage
        lines = [
            f"{self.total_steps} steps of {self.n_parameters:,} parameters, "
            f"{self.steps_per_epoch} steps per epoch",
            "",
            f"{'':<16}{'rows':>8}{'each':>12}{'together':>12}",
        ]
        for name, rows in storage.rows.items():
            each = storage.shards[name] * storage.shard_bytes[name]
            sizes = f"{format_bytes(each):>12}{format_bytes(rows * each):>12}"
            lines.append(f"{name:<16}{rows:>8}{sizes}")
        lines += [
            f"{'other':<16}{'':>8}{'':>12}{format_bytes(storage.other_bytes):>12}",
            f"{'all':<16}{'':>8}{'':>12}{format_bytes(storage.total_bytes):>12}"
            f"  in {storage.files} shards; {format_bytes(self.free_bytes)} are free",
            "",
            f"about {format_seconds(self.seconds)}: "
            f"training {format_seconds(self.training_seconds)} "
            f"({self.step_seconds * 1e3:.1f} ms per step), beside it "
            f"writing {format_seconds(self.writing_seconds)} "
            f"({format_bytes(self.bytes_per_second)}/s)",
        ]
        return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """Write a time for people: ``3.2 s``, ``12 min``, ``7.5 h``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plan(config: TrainConfig, out: str | os.PathLike[str]) -> Plan:
    """Predict what `capture.train.train` with the same arguments will write and how long it takes.

    Trains a few steps of its own and writes a nameless temporary file beside `out`; neither leaves
    anything behind.
    """
    out = place_of(out)
    if isinstance(out, ObjectPath):
        raise UsageError(
            "there is no telling how much room an object store has, or how fast it is",
            where=out,
            fix="give a local --out: the bytes are the same",
        )
    with deterministic():
        training = prepare(config)
        storage = training.storage
        return Plan(
            total_steps=training.total_steps,
            steps_per_epoch=training.order.steps_per_epoch,
            n_parameters=sum(p.numel() for p in training.model.parameters() if p.requires_grad),
            storage=storage,
            free_bytes=free_bytes(out),
            step_seconds=_step_seconds(training),
            bytes_per_second=_write_speed(existing_folder(out), storage.shard_bytes["weights"]),
            probe_seconds=_probe_seconds(training, storage),
        )


def _step_seconds(training: Training) -> float:
    """Median time of a step, in seconds, the first few left out."""
    batches = training.order.between(0, min(training.total_steps, WARM_STEPS + TIMED_STEPS))
    times: list[float] = []
    began = before = time.perf_counter()
    # Without worker processes: starting them would take longer than the steps.
    loader = load_batches(
        training.task.train,
        batches.draws(),
        workers=0,
        device=training.device,
        augment=augment_of(training.task),
    )
    for loss in losses(training, loader):
        training.optimizer.step()
        loss.item()  # waits for an accelerator
        now = time.perf_counter()
        times.append(now - before)
        before = now
        if now - began > TIMED_SECONDS and len(times) > WARM_STEPS:
            break
    return statistics.median(times[WARM_STEPS:] or times)


def _probe_seconds(training: Training, storage: Storage) -> float:
    """Seconds of all gradients of other batches, from one batch of each stream."""
    total = 0.0
    for name, probe in training.probes.items():
        began = time.perf_counter()
        count = probe.sample_cost()
        once = (time.perf_counter() - began) * count
        total += once * storage.rows[name] * storage.shards[name]
    return total


def _write_speed(folder: Path, shard_bytes: int) -> float:
    """Bytes per second that the disk of `folder` takes in shards of this size, with fsync."""
    data = os.urandom(min(shard_bytes, PROBE_BYTES))
    times: list[float] = []
    for _ in range(3):
        with tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return len(data) / statistics.median(times)
