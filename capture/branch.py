"""Branches: a new run from the weights and the optimizer state of a step of another run.

The causal control of the measurement: from the same w_t with another data order to an end of its
own, against which the gradients of the first run are measured (`analyze compute --reference
run:BRANCH`). A branch counts its updates from 0; learning rate and epoch go on where the parent
was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from capture.batches import BatchOrder
from capture.config import is_of_train
from capture.describe import describe
from capture.rng import restore_rng_state
from capture.state import kept_steps, load_kept
from capture.store import MismatchError, Run, UsageError, open_run
from capture.store.layout import PRIVATE_FOLDER, WEIGHTS
from capture.stored_weights import load_weights


@dataclass(frozen=True)
class Branch:
    """Where a branch begins: run, step, and the position of that step in the data order."""

    run: Run
    step: int
    position: int

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the parent."""
        config: Mapping[str, Any] = self.run.attributes["config"]
        return config

    def describe(self, exclude_batch: int | None) -> dict[str, Any]:
        """What a branch remembers of its parent."""
        weights = self.run.stream(WEIGHTS)
        commit = weights.commits[weights.row_of(self.step)]
        return {
            "run": self.run.name,
            "step": self.step,
            "position": self.position,
            "weights_crc32c": list(commit.chunks),
            "exclude_batch": exclude_batch,
        }

    def excluded(self, num_samples: int, batch: int | None) -> frozenset[int]:
        """The samples that drove update `batch` of the parent; none for `None`."""
        if batch is None:
            return frozenset()
        if (self.run.attributes.get("parent") or {}).get("exclude_batch") is not None:
            raise UsageError(
                "the parent leaves out a batch itself",
                where=f"exclude_batch = {batch}",
                fix="branch from the run that it came from",
            )
        updates = self.run.final_step or int(self.run.stream(WEIGHTS).steps[-1])
        if batch >= updates:
            raise UsageError(
                f"the parent has updates 0 to {updates - 1}",
                where=f"exclude_batch = {batch}",
                fix="name one of these",
            )
        size, seed = self.config["batch_size"], self.config["data_seed"]
        number = batch + self.position - self.step
        (indices,) = BatchOrder(num_samples, size, seed).between(number, number + 1)
        return frozenset(indices)

    def load(self, model: nn.Module, optimizer: Optimizer, data_seed: int) -> None:
        """Give model and optimizer the state of the parent; the random numbers too, if one seed.

        Without a kept optimizer state only a step 0, or SGD without momentum, can be branched:
        there is none to keep. `MismatchError` otherwise, and where the model is another one.
        """
        difference = self.run.table.difference(describe(model, optimizer).table)
        if difference is not None:
            raise MismatchError(
                f"the model is not that of the parent, {difference}",
                where=self.run.path,
                fix="leave out --model, --width and what else changes it",
            )
        folder = self.run.path / WEIGHTS / "value" / PRIVATE_FOLDER
        if self.step in kept_steps(folder):
            tree = load_kept(folder, self.step)
            model.load_state_dict(tree["model"])
            optimizer.load_state_dict(tree["optimizer"])
            if data_seed == self.config["data_seed"]:
                restore_rng_state(tree["rng"])
            return
        stateless = self.config["optimizer"] == "sgd"
        if self.step and not stateless:
            kept = ", ".join(map(str, kept_steps(folder))) or "none"
            raise MismatchError(
                f"no optimizer state is kept at step {self.step}; kept are {kept}",
                where=self.run.path,
                fix="choose one of these, or train the parent with --keep-state every:N",
            )
        load_weights(model, self.run, self.step)


def open_branch(text: str) -> Branch:
    """Open ``RUN@STEP``. Raises `UsageError`, `UnknownNameError` for a step without weights."""
    path, at, step = text.rpartition("@")
    if not at or not path or not step.isdecimal():
        raise UsageError("no branch", where=repr(text), fix="write RUN.zarr@STEP")
    run = open_run(path)
    if not is_of_train(run.attributes):
        raise UsageError(
            "the run was not recorded by capture train, so its training cannot go on here",
            where=run.path,
            fix="branch in the loop that recorded it",
        )
    run.stream(WEIGHTS).row_of(int(step))
    before = (run.attributes.get("parent") or {}).get("position", 0)
    return Branch(run, int(step), before + int(step))


def inherited(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parent's configuration, as the defaults of a branch; data order and ancestry are own.

    Under another optimizer than the parent's, among what is `given`, its rate and momentum go too.
    """
    config = dict(open_branch(text).config)
    own = ["branch", "exclude_batch", "data_seed", "keep_state", "device"]
    if given.get("optimizer", config["optimizer"]) != config["optimizer"]:
        own += ["lr", "momentum"]
    return {key: value for key, value in config.items() if key not in own and value is not None}
