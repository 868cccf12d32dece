"""Turn checkpoints that others saved into a run of weights.

A checkpoint of step t gives the row w_t; the last one is taken for the final iterate w_T. What a
checkpoint does not hold stays unknown: the run has no gradients (`capture probe` adds them where
the task is known), no every-step scalars, and its optimizer is unknown, so that cosines measured in
it have no null. Buffers are as they were saved, after the forward pass of step t - 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from capture import __version__
from capture.checkpoints.find import printable, reading
from capture.checkpoints.names import check_same
from capture.checkpoints.numbering import Numbered
from capture.checkpoints.rows import fill, frozen_bytes
from capture.checkpoints.watch import Watch
from capture.import_plan import Choices, ImportPlan, plan_import
from capture.progress import counting, format_bytes
from capture.storage import free_bytes
from capture.store import InputError, RunWriter, Staging, WriteError
from capture.store.attributes import read_attributes
from capture.store.layout import COMPLETE, LOCK, METADATA, PRIVATE_FOLDER, WEIGHTS
from capture.store.place import Place, make_folders, place_of, remove, take_lock
from capture.store.start import refuse_taken

# The run's attribute that tells where its rows come from.
IMPORTED = "imported"


@dataclass(frozen=True)
class Imported:
    """What `import_checkpoints` wrote: the steps, and which of them repeat an earlier one.

    `duplicates` maps a step to the first one that has the same weights and buffers; `not_finite`
    maps a step with weights that are NaN or infinite to their numbers, by tensor and kind.
    """

    steps: tuple[int, ...]
    duplicates: Mapping[int, int]
    bytes_written: int
    not_finite: Mapping[int, Mapping[str, Mapping[str, int]]]


def import_checkpoints(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    **choices: Unpack[Choices],
) -> Imported:
    """Turn checkpoints into a complete run of weights at `out`; `choices` are those of `Choices`.

    `sources` are folders of checkpoints, folders that are checkpoints, or files. The run is there
    in full or not at all. Two steps with the same weights are both imported and told as a warning;
    so are weights that are NaN or infinite, which the run's attribute `imported` counts by step and
    tensor. `InputError` where no tensor of any checkpoint is finite.

    Raises what `plan_import` raises, `UsageError` where `out` is taken, `WriteError` where the disk
    refuses, and `InputError` for a file that is damaged or changes meanwhile.
    """
    place = place_of(out)
    if not _is_unfinished_import(place):
        refuse_taken(place)
    return write_import(plan_import(sources, **choices), place)


def write_import(plan: ImportPlan, out: Place) -> Imported:
    """Write what was planned; see `import_checkpoints`."""
    _require_space(plan, out)
    if _is_unfinished_import(out):
        _remove_unfinished(out)
    first = plan.rows[0].checkpoint
    frozen = frozen_bytes(plan.open(first), plan.table, first.where) if plan.table.frozen else {}
    refuse_taken(out)
    try:
        writer = RunWriter.create(
            out, plan.table, streams={}, attributes=_attributes(plan), frozen=frozen
        )
    except WriteError:
        # What it has left is no run yet; where another process is at work, it has the lock.
        if isinstance(out, Path) and not (out / METADATA).exists():
            with suppress(WriteError, InputError):
                _remove_unfinished(out)
        raise
    try:
        return _write_rows(plan, writer)
    except BaseException:
        # Closed first: what closing writes must go too.
        writer.close()
        with suppress(WriteError):
            remove(writer.path)
        raise
    finally:
        writer.close()


def _write_rows(plan: ImportPlan, writer: RunWriter) -> Imported:
    staging, watch = writer.staging(WEIGHTS), Watch(plan.table)
    entries: list[dict[str, Any]] = []
    written = 0
    with counting("checkpoint", len(plan.rows)) as advance:
        for row in plan.rows:
            files = _read_row(plan, row, staging, watch)
            entry = {
                "step": row.step,
                "source": printable(str(row.checkpoint.path)),
                "format": row.checkpoint.format,
                "files_sha256": files,
                "row_sha256": watch.see(row, staging),
            }
            odd = watch.not_finite.get(row.step)
            entries.append(entry | ({"not_finite": odd} if odd else {}))
            written += writer.commit(WEIGHTS, staging, step=row.step, epoch=row.epoch)
            advance()
    watch.tell_not_finite(plan.rows[-1])
    if not plan.from_model:
        watch.tell_constant()
    facts = {**writer.attributes[IMPORTED], "checkpoints": entries}
    writer.update_attributes(**{IMPORTED: facts})
    writer.finish(plan.rows[-1].step)
    return Imported(
        tuple(row.step for row in plan.rows), watch.duplicates, written, watch.not_finite
    )


def _read_row(plan: ImportPlan, row: Numbered, staging: Staging, watch: Watch) -> dict[str, str]:
    """Fill the staging from a checkpoint that has not changed; return the digests of its files."""
    checkpoint = row.checkpoint
    with reading(checkpoint.where):
        contents = plan.open(checkpoint)
        check_same(plan.table, contents, checkpoint.where, plan.rows[0].checkpoint.where)
        checkpoint.check_records()
        fill(staging, contents, plan.table, checkpoint.where)
        watch.see_frozen(checkpoint, frozen_bytes(contents, plan.table, checkpoint.where))
        digests = checkpoint.digests()
        changed = checkpoint.stamp() != plan.stamps[checkpoint]
    if changed:
        raise InputError(
            "the file changed while it was imported",
            where=checkpoint.where,
            fix="wait until it is saved in full",
        )
    return digests


def _attributes(plan: ImportPlan) -> dict[str, Any]:
    """What the run says of itself; nothing that nobody knows."""
    return {
        "config": dict(plan.settings),
        "versions": {"straightway": __version__},
        "seeds": {},
        "git_commit": None,
        "optimizer": {
            "no_null_reason": "the weights were imported, and the steps between them are unknown"
        },
        IMPORTED: {"checkpoints": [], "trainable": "model" if plan.from_model else "names"},
    }


def _require_space(plan: ImportPlan, out: Place) -> None:
    if not isinstance(out, Path):
        return  # nobody knows how much an object store can take
    free = free_bytes(out)
    if plan.bytes > free:
        raise WriteError(
            f"the run needs {format_bytes(plan.bytes)} and the disk has {format_bytes(free)} free",
            where=out,
            fix="import fewer checkpoints, or choose another disk",
        )


def _is_unfinished_import(out: Place) -> bool:
    """Whether an import into this place was killed, so that it may start again."""
    if not (out / METADATA).exists():
        return False
    try:
        attributes = read_attributes(out)
    except InputError:
        return False
    return attributes["status"] != COMPLETE and IMPORTED in attributes


def _remove_unfinished(out: Place) -> None:
    private = out / WEIGHTS / "value" / PRIVATE_FOLDER
    make_folders(private, out)  # where a removal was killed halfway
    lock = take_lock(private / LOCK)
    try:
        # The root last: until then it tells that this may be removed.
        for entry in out.iterdir() if isinstance(out, Path) else ():
            if entry.name != METADATA:
                remove(entry)
        remove(out)
    finally:
        lock.release()
