"""What checkpoints that are read one after the other have in common, and should not have."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.checkpoints.find import Checkpoint
from capture.checkpoints.numbering import Numbered
from capture.checkpoints.rows import not_finite, row_digest, tensor_checksums
from capture.store import InputError, MismatchError, Staging, TensorTable

logger = logging.getLogger("capture")

# So many tensors of a checkpoint are named in a warning.
SHOWN_TENSORS = 3


class Watch:
    """Notices rows that are equal or not finite, tensors that never move, and frozen ones that do.

    `duplicates` maps a step to the first one with the same weights and buffers; `not_finite` has
    what `rows.not_finite` found of each step where there is any.
    """

    def __init__(self, table: TensorTable) -> None:
        self.duplicates: dict[int, int] = {}
        self.not_finite: dict[int, dict[str, dict[str, int]]] = {}
        self._any_finite = False
        self._table = table
        self._rows: dict[str, Numbered] = {}
        self._began: list[int] = []
        self._moved = np.zeros(len(table.parameters), bool)
        self._frozen: tuple[Checkpoint, dict[str, int]] | None = None

    def see(self, row: Numbered, staging: Staging) -> str:
        """Take in one row, and return its digest; a copy of an earlier one is told at once."""
        digest = row_digest(staging)
        first = self._rows.setdefault(digest, row)
        if first is not row:
            self.duplicates[row.step] = first.step
            logger.warning(
                "step %d (%s) has the weights of step %d (%s): a copy, mislabelled, or a training "
                "that did not move",
                row.step,
                row.checkpoint.where,
                first.step,
                first.checkpoint.where,
            )
        self._see_finite(row, staging)
        now = tensor_checksums(staging, self._table)
        self._began = self._began or now
        self._moved |= np.array(self._began) != np.array(now)
        return digest

    def _see_finite(self, row: Numbered, staging: Staging) -> None:
        """Warn of weights that are NaN or infinite; a run that diverged is data all the same."""
        found = not_finite(staging, self._table)
        self._any_finite |= len(found) < len(self._table.parameters)
        if not found:
            return
        self.not_finite[row.step] = found
        shown = [f"{name!r} ({_counts(found[name])})" for name in [*found][:SHOWN_TENSORS]]
        more = len(found) - len(shown)
        logger.warning(
            "step %d (%s): %s of %s weights are not finite, in %s%s",
            row.step,
            row.checkpoint.where,
            f"{sum(sum(counts.values()) for counts in found.values()):,}",
            f"{self._table.num_parameters:,}",
            ", ".join(shown),
            f" and {more} more tensors" if more else "",
        )

    def tell_not_finite(self, last: Numbered) -> None:
        """Warn where the last row is no end to measure against.

        Raises `InputError` where not one tensor is finite in any row: there is nothing to measure.
        """
        if not self._any_finite:
            raise InputError(
                "no tensor is finite in any of the checkpoints",
                where=last.checkpoint.where,
                fix="import checkpoints from before the training diverged",
            )
        if last.step in self.not_finite:
            logger.warning(
                "the last checkpoint is not finite, so nothing can be measured against `final`; "
                "name another end, as in --reference step:N"
            )
        kinds = [counts for found in self.not_finite.values() for counts in found.values()]
        if kinds and not any(counts["nan"] for counts in kinds):
            logger.warning(
                "all of these are infinite; if they are a mask and no weights, say so by --buffers"
            )

    def see_frozen(self, checkpoint: Checkpoint, frozen: Mapping[str, NDArray[np.uint8]]) -> None:
        """Take in the frozen tensors of one; `MismatchError` where they are not what they were."""
        now = {name: crc32c(raw.tobytes()) for name, raw in frozen.items()}
        self._frozen = self._frozen or (checkpoint, now)
        first, began = self._frozen
        for name, checksum in now.items():
            if checksum != began[name]:
                raise MismatchError(
                    f"{name!r} is frozen and has other values than in {first.where}",
                    where=checkpoint.where,
                    fix="let it be trainable or a buffer: see --trainable and --buffers",
                )

    def tell_constant(self) -> None:
        """Warn of trainable tensors that are the same in all rows, unless all of them are."""
        if not self._moved.any() or self._moved.all():
            return
        still = [
            name for name, moved in zip(self._table.names, self._moved, strict=True) if not moved
        ]
        logger.warning(
            "%d of %d tensors are the same in every checkpoint, the first is %r; if they were not "
            "trained, say so by --trainable or --buffers",
            len(still),
            len(self._moved),
            still[0],
        )


def _counts(found: Mapping[str, int]) -> str:
    words = {"nan": "NaN", "infinite": "infinite"}
    return ", ".join(f"{found[kind]:,} {word}" for kind, word in words.items() if found[kind])
