"""All that a training consists of, before its first step: configuration, task, model, optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from capture.batches import BatchOrder, load_batches, mix
from capture.branch import Branch, open_branch
from capture.config import TrainConfig
from capture.describe import describe
from capture.gradients import Probe, build_probes
from capture.models import build_model
from capture.optimizers import LearningRate, build_optimizer, learning_rate
from capture.provenance import data_facts, run_attributes
from capture.recordable import check_parameters
from capture.rng import seed_all
from capture.storage import Storage, plan_storage
from capture.store import UsageError
from capture.streams import parse_streams
from capture.tasks import Task, augment_of, build_task


@dataclass(frozen=True)
class Training:
    """All that a training consists of, before its first step; `config` is completed."""

    config: TrainConfig
    task: Task
    order: BatchOrder
    model: nn.Module
    optimizer: Optimizer
    rate: LearningRate
    device: torch.device
    total_steps: int
    branch: Branch | None = None

    @property
    def offset(self) -> int:
        """Updates before the first one of this run: 0, but for a branch."""
        return 0 if self.branch is None else self.branch.position

    def epoch(self, step: int) -> float:
        """How many epochs, with fractions, lie before update `step`; those of a parent count."""
        return (step + self.offset) / self.order.steps_per_epoch

    def batches(self, step: int) -> Iterable[Any]:
        """Load the batches of the updates from `step` to the end."""
        order = self.order.between(step + self.offset, self.total_steps + self.offset)
        return load_batches(
            self.task.train,
            order.draws(),
            workers=self.config.workers,
            device=self.device,
            augment=augment_of(self.task),
        )

    def set_learning_rate(self, step: int) -> None:
        """Give the optimizer the learning rate of update `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step + self.offset)

    def attributes(self) -> dict[str, Any]:
        """What the run remembers of how it was made."""
        found = {**run_attributes(self.config), "data": data_facts(self.task)}
        if self.branch is not None:
            found["parent"] = self.branch.describe(self.config.exclude_batch)
        return found

    @cached_property
    def probes(self) -> dict[str, Probe]:
        """The gradient streams that are not the training's own, by name."""
        assert self.config.data_seed is not None
        return build_probes(
            self.model,
            self.task,
            parse_streams(self.config.gradients),
            batch_size=self.order.batch_size,
            data_seed=self.config.data_seed,
        )

    @property
    def storage(self) -> Storage:
        """What recording it will take on disk."""
        return plan_storage(
            describe(self.model, self.optimizer).table,
            every=self.config.every,
            gradients=self.config.gradients,
            total_steps=self.total_steps,
            steps_per_epoch=self.order.steps_per_epoch,
            optimizer=self.config.optimizer,
            keep_state=self.config.keep_state,
        )


def prepare(config: TrainConfig) -> Training:
    """Build task, model and optimizer of a configuration.

    Seeds every global generator, and sets the number of torch's threads.
    """
    device = _device(config.device)
    task = build_task(config.task, data_root=config.data_root, task_args=config.task_args)
    config = replace(config, device=device.type).completed(task.defaults)
    if config.model is None:
        raise UsageError("the task has no default model", where=config.task, fix="give --model")
    assert config.batch_size is not None
    assert config.lr is not None
    assert config.data_seed is not None

    if config.threads is not None:
        torch.set_num_threads(config.threads)

    branch = open_branch(config.branch) if config.branch else None
    samples, position = len(task.train), 0 if branch is None else branch.position
    without = frozenset() if branch is None else branch.excluded(samples, config.exclude_batch)
    order = BatchOrder(samples, config.batch_size, config.data_seed, without=without)
    # The learning rate of a branch is that of its parent, which leaves nothing out.
    steps_per_epoch = samples // config.batch_size
    end = config.total_steps(steps_per_epoch)
    if end <= position:
        raise UsageError(
            f"the training ends after {end} steps, and the branch begins at {position}",
            where=f"branch = {config.branch}",
            fix="give more --epochs or --max-steps, or an earlier step",
        )
    rate = learning_rate(config.lr_schedule, config.lr, end, steps_per_epoch)

    # The seed decides the initialisation, the data seed everything random after it (dropout).
    seed_all(config.seed)
    model = build_model(
        config.model, task.model_args, width=config.width, model_args=config.model_args
    )
    check_parameters(model)
    model = model.to(device)
    seed_all(mix(config.data_seed, 2**32))
    optimizer = build_optimizer(
        model.parameters(),
        config.optimizer,
        lr=config.lr,
        momentum=config.momentum or 0.0,
        weight_decay=config.weight_decay,
    )
    if branch is not None:
        branch.load(model, optimizer, config.data_seed)
    return Training(config, task, order, model, optimizer, rate, device, end - position, branch)


@contextmanager
def deterministic() -> Iterator[None]:
    """Let torch choose algorithms that give the same bits each time.

    That, and the number of its threads, is put back afterwards.
    """
    # Must be set before CUDA starts; see torch.use_deterministic_algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    switches: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        switches.fill_uninitialized_memory,
        torch.get_num_threads(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling each new tensor first would slow training down, and we read none that is unwritten.
    switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = before[2]
        torch.set_num_threads(before[3])


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError(
            "no CUDA device is available", where="device = cuda", fix="give --device cpu"
        )
    return torch.device("cuda" if name != "cpu" and available else "cpu")
