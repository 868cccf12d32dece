"""What a resume state holds of a recorded loop, when it is taken, and how it is put back."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from capture.clipping import Clipping
from capture.describe import Description
from capture.rng import restore_rng_state, rng_state
from capture.snapshots import Snapshots
from capture.state import save
from capture.store import MismatchError, RunWriter


class Stateful(Protocol):
    """What can be saved and loaded: a scheduler, a `GradScaler`, and the like."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that matters of it."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take it over."""


@dataclass(frozen=True)
class Moment:
    """What the iteration after update `step` changes before it comes to its own update.

    `keep` says that it is kept for branches too, `beside` holds the entries of the model's
    `state_dict` that are no parameters.
    """

    step: int
    epoch: float | None
    keep: bool = False
    rng: Mapping[str, Any] = field(default_factory=rng_state)
    beside: Mapping[str, Any] = field(default_factory=dict)


class ResumeStates:
    """Saves and restores the resume states of one recorder; `objects` are the user's, by name.

    `clipping` is what was seen of it so far.
    """

    def __init__(
        self,
        seen: Description,
        objects: Mapping[str, Stateful],
        writer: RunWriter,
        snapshots: Snapshots,
    ) -> None:
        self._seen = seen
        self._objects = objects
        self._writer = writer
        self._snapshots = snapshots
        self._begun: Moment | None = None
        self.clipping = Clipping()

    def begin(self, step: int, epoch: float | None, keep: bool = False) -> None:
        """Take a state after update `step`, within the optimizer's own call.

        A loop steps its scheduler and updates its `GradScaler` only after that, so where there are
        such objects the state is finished when the next update begins, by `finish`.
        """
        if not self._objects:
            self.save(Moment(step, epoch, keep), {})
            return
        model = self._seen.model
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = model.state_dict()
        beside = {n: copy.deepcopy(value) for n, value in state.items() if n not in parameters}
        self._begun = Moment(step, epoch, keep, beside=beside)

    def finish(self) -> None:
        """Save what `begin` took, if anything; called before weights or optimizer change."""
        if self._begun is not None:
            self.save(self._begun, {})

    def save(self, moment: Moment, extra: Mapping[str, Any]) -> None:
        """Save a state, once every row before it is on disk."""
        self._begun = None
        self._snapshots.drain()
        self._writer.flush()
        self.note_counts()
        tree = {
            "model": {**self._seen.model.state_dict(), **moment.beside},
            "optimizer": self._seen.optimizer.state_dict(),
            "objects": {name: entry.state_dict() for name, entry in self._objects.items()},
            "rng": moment.rng,
            "epoch": moment.epoch,
            "epoch_begun": self._snapshots.epoch_begun,
            "gradient_missing": self._snapshots.gradient_missing,
            "extra": extra,
        }
        if seen := self.clipping.to_json():
            tree["clipping"] = seen
        # First: a training that stops between the two resumes before this step, and keeps it then.
        if moment.keep:
            save(self._writer.state_folder, moment.step, tree, keep=True)
        save(self._writer.state_folder, moment.step, tree)

    def restore(self, step: int, tree: Mapping[str, Any]) -> None:
        """Drop what was recorded after `step` updates, and put everything back as it was then."""
        saved = tree.get("objects", {})
        if saved.keys() != self._objects.keys():
            raise MismatchError(
                f"the resume state holds {_names(saved)}, this recorder {_names(self._objects)}",
                where=self._writer.path,
                fix="give Recorder(…, state={…}) the same names",
            )
        self._writer.truncate(step)
        self._seen.model.load_state_dict(tree["model"])
        self._seen.optimizer.load_state_dict(tree["optimizer"])
        for name, entry in self._objects.items():
            entry.load_state_dict(saved[name])
        self._snapshots.epoch_begun = tree["epoch_begun"]
        self._snapshots.gradient_missing = Counter(tree["gradient_missing"])
        self.clipping = Clipping.from_json(tree.get("clipping", {}))
        restore_rng_state(tree["rng"])

    def note_counts(self) -> None:
        """Keep in the attributes for how many updates a tensor had no gradient, and of clipping.

        Nothing may be under way to the disk.
        """
        counts = {
            "gradient_missing": dict(sorted(self._snapshots.gradient_missing.items())),
            "clipping": self.clipping.to_json(),
        }
        kept = self._writer.attributes
        news = {name: count for name, count in counts.items() if kept.get(name, {}) != count}
        if news:
            self._writer.update_attributes(**news)


def _names(objects: Mapping[str, Any]) -> str:
    return f"the state of {', '.join(sorted(objects))}" if objects else "no such objects"
