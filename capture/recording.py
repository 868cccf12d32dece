"""The run of a recorder from opening to leaving: its writer, its snapshots, its resume states."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from capture.opening import RunPlan, holds_nothing, note_frozen, open_writer, start_over
from capture.resume import ResumeStates, Stateful
from capture.snapshots import Snapshots
from capture.state import load_newest
from capture.store import SnapshotQueue, StraightwayError
from capture.store.place import remove

logger = logging.getLogger("capture")


class Recording:
    """A run that is open for writing; only the rank that writes has one.

    `step`, `epoch` and `restored` tell where a resumed run goes on and what its loop had kept;
    0 and `None` for a new one. Raises what `open_writer` and `ResumeStates.restore` raise.
    """

    def __init__(self, plan: RunPlan, state: Mapping[str, Stateful], resume: bool) -> None:
        self.step = 0
        self.epoch: float | None = None
        self.restored: dict[str, Any] | None = None
        self._seen = plan.seen
        self._writer, self._created = open_writer(plan, resume)
        snapshots: Snapshots | None = None
        try:
            found = load_newest(self._writer.state_folder) if resume else None
            if resume and found is None:
                start_over(plan, self._writer)
            queue = SnapshotQueue(self._writer)
            snapshots = Snapshots(plan.seen, plan.schedules, queue, plan.sources)
            self.snapshots = snapshots
            self.states = ResumeStates(plan.seen, state, self._writer, snapshots)
            if found is not None:
                self._restore(*found)
        except BaseException:
            if snapshots is not None:
                snapshots.close()
            self._writer.close()
            raise

    def _restore(self, step: int, tree: Mapping[str, Any], notices: list[str]) -> None:
        for notice in notices:
            logger.warning("%s", notice)
        self.states.restore(step, tree)
        self.step, self.epoch, self.restored = step, tree["epoch"], tree["extra"]

    def finish(self, step: int, epoch: float | None) -> list[str]:
        """Save w_T after `step` updates and mark the run complete; return what to warn of."""
        try:
            with torch.no_grad():
                self.snapshots.final(step, epoch)
            self.states.note_counts()
            concerns = note_frozen(self._seen, self._writer) + self.snapshots.concerns(step)
            self._writer.finish(step)
        finally:
            self._close()
        return concerns

    def abandon(self, error: BaseException) -> None:
        """Leave after an exception: what was queued is written, the run stays incomplete.

        It is removed where it holds nothing yet. What fails over it is logged.
        """
        try:
            self.snapshots.rescue()
            self._writer.flush()
            self.states.note_counts()
            if self._created and holds_nothing(self._writer):
                # So that it is not in the way of the corrected loop.
                remove(self._writer.path)
        except StraightwayError as failure:
            if failure is not error:
                logger.warning("%s", failure)
        finally:
            self._close()

    def _close(self) -> None:
        self.snapshots.close()
        self._writer.close()
