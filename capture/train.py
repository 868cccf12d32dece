"""The training loop: configuration, seed, task, model, optimizer, recorder, loop; in this order."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, SequentialSampler

from capture.batches import BatchOrder, load_batches, mix
from capture.branch import Branch, open_branch
from capture.config import TrainConfig
from capture.describe import check_parameters, describe
from capture.factories import user_code
from capture.gradients import Probe, build_probes
from capture.interruption import Interrupted, StopRequest
from capture.loss_report import LossReport
from capture.models import build_model
from capture.optimizers import LearningRate, build_optimizer, learning_rate
from capture.progress import TrainingProgress
from capture.provenance import data_facts, require_same, run_attributes
from capture.recorder import Recorder
from capture.rng import seed_all
from capture.storage import Storage, plan_storage, require_space
from capture.store import UsageError
from capture.store.layout import METADATA
from capture.store.place import target_of
from capture.streams import parse_streams
from capture.tasks import Task, augment_of, build_task, loss_elements


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


@dataclass(frozen=True)
class Summary:
    """How a training ended: `steps` updates in all, means over the held-out samples by name."""

    steps: int
    seconds: float
    loss: float
    heldout: Mapping[str, float]
    bytes_written: int
    already_complete: bool = False


def prepare(config: TrainConfig) -> Training:
    """Build task, model and optimizer of a configuration. Seeds every global generator."""
    device = _device(config.device)
    task = build_task(config.task, data_root=config.data_root, task_args=config.task_args)
    config = replace(config, device=device.type).completed(task.defaults)
    if config.model is None:
        raise UsageError("the task has no default model", where=config.task, fix="give --model")
    assert config.batch_size is not None
    assert config.lr is not None
    assert config.data_seed is not None

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


def train(
    config: TrainConfig, out: str | os.PathLike[str], *, resume: bool = False, force: bool = False
) -> Summary:
    """Train and record into the run `out`.

    `resume` continues the run from its newest resume state, bit for bit; `force` starts even
    where the disk seems too small. Raises `Interrupted` after SIGINT or SIGTERM, `MismatchError`
    where a run is resumed with another configuration, and what `Recorder` raises.
    """
    out = target_of(out)
    with deterministic(config.threads):
        training = prepare(config)
        config, model, optimizer = training.config, training.model, training.optimizer
        order, total = training.order, training.total_steps
        attributes, offset = run_attributes(config), training.offset
        attributes["data"] = data_facts(training.task)
        if training.branch is not None:
            attributes["parent"] = training.branch.describe(config.exclude_batch)
        if resume and (out / METADATA).exists():
            require_same(out, attributes)
        if not force:
            require_space(out, training.storage)

        began = time.monotonic()
        with (
            StopRequest() as stop,
            Recorder(
                out,
                model,
                optimizer,
                every=config.every,
                gradients=config.gradients,
                total_steps=total,
                steps_per_epoch=order.steps_per_epoch,
                attributes=attributes,
                checkpoint_every=config.checkpoint_every or order.steps_per_epoch,
                keep_state=config.keep_state,
                resume=resume,
                clipped=False,
                sources=training.probes,
            ) as recorder,
            TrainingProgress(total, recorder.step) as progress,
        ):
            already_complete = recorder.complete
            report = LossReport(progress, lambda: recorder.bytes_written)
            batches = order.between(recorder.step + offset, total + offset)
            recorder.epoch = (recorder.step + offset) / order.steps_per_epoch
            model.train()
            loader = load_batches(
                training.task.train,
                batches.draws(),
                workers=config.workers,
                device=training.device,
                augment=augment_of(training.task),
            )
            for batch_loss in losses(training, loader):
                for group in optimizer.param_groups:
                    group["lr"] = training.rate(recorder.step + offset)
                recorder.log(loss=batch_loss)
                optimizer.step()
                recorder.epoch = (recorder.step + offset) / order.steps_per_epoch

                report.add(recorder.step - 1, batch_loss)
                if stop.signum is not None and recorder.step < total:
                    report.flush()
                    recorder.checkpoint()
                    raise Interrupted(
                        f"interrupted after step {recorder.step} of {total}",
                        signum=stop.signum,
                        where=out,
                        fix="continue with the same command and --resume",
                    )

            report.flush()

        # Only now, so that nothing of it can reach the run.
        heldout = {} if already_complete else evaluate(training)
    return Summary(
        steps=total,
        seconds=time.monotonic() - began,
        loss=report.last,
        heldout=heldout,
        bytes_written=recorder.bytes_written,
        already_complete=already_complete,
    )


def losses(training: Training, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the loss of each batch, its gradient in place; the caller makes the update.

    What the user's own code raises on the first batch becomes one `UsageError`; later, it is no
    longer a wrong shape or dtype, and a traceback says more.
    """
    iterator, first = iter(batches), True
    while True:
        with user_code("the first step failed") if first else nullcontext():
            try:
                batch = next(iterator)
            except StopIteration:
                return
            training.optimizer.zero_grad()
            loss = training.task.loss(training.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        first = False
        yield loss


@torch.no_grad()
def evaluate(training: Training) -> dict[str, float]:
    """Return the means of the task's metrics over what is held out, in evaluation mode."""
    task, size = training.task, training.order.batch_size
    if task.heldout is None:
        return {}
    count, elements = len(task.heldout), 0
    batches = BatchSampler(SequentialSampler(range(count)), size, drop_last=False)
    totals: dict[str, float] = {}
    training.model.eval()
    for number, batch in enumerate(
        load_batches(task.heldout, batches, workers=0, device=training.device)
    ):
        weight = loss_elements(task, batch, min(size, count - number * size))
        elements += weight
        for name, mean in task.metrics(training.model, batch).items():
            totals[name] = totals.get(name, 0.0) + float(mean) * weight
    training.model.train()
    return {name: total / max(elements, 1) for name, total in totals.items()}


@contextmanager
def deterministic(threads: int | None = None) -> Iterator[None]:
    """Let torch choose algorithms that give the same bits each time, with so many threads."""
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
    if threads is not None:
        torch.set_num_threads(threads)
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
