"""Gradients at the current weights for other batches than the one that drives the training.

    fixed, heldout, shuffled-labels    one gradient for each of K batches that were drawn once
    full, full-eval                    the mean over a partition of all training samples

Which samples a batch has, how each is transformed, and what dropout draws, follow from the data
seed alone, so a probe of a finished run gives what a probe during the training would have given.
A probe leaves no trace: gradients, buffers, modes and random numbers are afterwards as before.

With layers that couple the samples of a batch (BatchNorm in training mode), the full gradient is
that of its partition, at the training batch size: another partition gives another vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from crc32c import crc32c
from torch import Tensor, nn

from capture.batches import Draw, load_batches, mix
from capture.rng import restore_rng_state, rng_state
from capture.store.errors import UsageError
from capture.streams import FULL_EVAL, FULL_PROBES, PROBES, StreamRequest
from capture.tasks import MapDataset, Task, augment_of, loss_elements

# What is mixed into the data seed for each probe, so that no two share their random numbers.
_FIRST_SALT = 2**33


@dataclass(frozen=True)
class Measured:
    """The mean loss of a batch and its gradient by tensor, `None` where a tensor got none."""

    loss: float
    gradient: Sequence[Tensor | None]


class Probe:
    """One stream of gradients of other batches: `batches` is K, `None` for a full gradient."""

    def __init__(self, model: nn.Module, task: Task, request: StreamRequest, **draw: int) -> None:
        """Draw the batches; `draw` holds `batch_size` and `data_seed`.

        Raises `UsageError` where the task has no such samples, or too few for one batch.
        """
        self.name, self.batches = request.name, request.batches
        self._model, self._task = model, task
        self._samples = _dataset(task, self.name)
        self._seed = mix(draw["data_seed"], _FIRST_SALT + list(PROBES).index(self.name))
        size = draw["batch_size"]
        self._indices = _partition(self._samples, size, self._seed, self.batches, self.name)
        parameters = (p for p in model.parameters() if p.requires_grad)
        self._parameters = list(dict.fromkeys(parameters))

    def describe(self) -> dict[str, Any]:
        """What a run remembers of it: seed, sizes, and the samples by index or by checksum."""
        text = ",".join(str(index) for batch in self._indices for index in batch)
        facts: dict[str, Any] = {
            "seed": self._seed,
            "parts": len(self._indices),
            "batch_size": len(self._indices[0]),
            "mode": "eval" if self.name == FULL_EVAL else "train",
            "samples_crc32c": f"{crc32c(text.encode()):08x}",
        }
        return facts if self.batches is None else {**facts, "samples": self._indices}

    def measure(self, batch: int | None) -> Measured:
        """Take the gradient of batch `batch`, or the full one, at the model's current weights."""
        with undisturbed(self._model), torch.enable_grad():
            self._model.train(self.name != FULL_EVAL)
            if batch is not None:
                loss, gradient, _ = self._gradient(batch)
                return Measured(loss, gradient)
            return self._full()

    def sample_cost(self) -> int:
        """Take the gradient of one batch; return how many of these one shard needs."""
        with undisturbed(self._model), torch.enable_grad():
            self._gradient(0)
        return 1 if self.batches is not None else len(self._indices)

    def _full(self) -> Measured:
        """The mean over the partition, weighted by loss elements and added up in float64."""
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]
        loss, elements = 0.0, 0
        for part in range(len(self._indices)):
            mean, gradient, count = self._gradient(part)
            loss, elements = loss + mean * count, elements + count
            for total, one in zip(sums, gradient, strict=True):
                if one is not None:
                    total.add_(one, alpha=count)
        for total in sums:
            total.div_(max(elements, 1))
        return Measured(loss / max(elements, 1), sums)

    def _gradient(self, part: int) -> tuple[float, Sequence[Tensor | None], int]:
        """Mean loss, gradient and number of loss elements of one batch."""
        batch = self._load(part)
        torch.manual_seed(mix(self._seed, part))
        loss = self._task.loss(self._model, batch)
        gradient = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        count = loss_elements(self._task, batch, len(self._indices[part]))
        return loss.item(), gradient, count

    def _load(self, part: int) -> Any:
        """Load one batch; the same samples are transformed in the same way each time."""
        draws: list[Draw] = [(index, (self._seed, part, index)) for index in self._indices[part]]
        augment = None if self.name == "heldout" else augment_of(self._task)
        batches: list[Any] = [draws if augment else self._indices[part]]
        device = self._parameters[0].device
        loader = load_batches(self._samples, batches, workers=0, device=device, augment=augment)
        batch = next(loader)
        if self.name == "shuffled-labels":
            return _shuffled(batch, mix(self._seed, 2**32 + part))
        return batch


def build_probes(
    model: nn.Module,
    task: Task,
    requests: Sequence[StreamRequest],
    *,
    batch_size: int,
    data_seed: int,
) -> dict[str, Probe]:
    """Make the probes among the requested streams, by name. Raises `UsageError`."""
    return {
        request.name: Probe(model, task, request, batch_size=batch_size, data_seed=data_seed)
        for request in requests
        if request.name in PROBES
    }


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put buffers, modes and random numbers back as they were; gradients are not touched."""
    random = rng_state()
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, values in buffers:
                owner[name] = buffer
                buffer.copy_(values)
        for module, training in modes:
            module.training = training
        restore_rng_state(random)


def _dataset(task: Task, name: str) -> MapDataset:
    if name != "heldout":
        return task.train
    if task.heldout is None:
        raise UsageError(
            "the task has no held-out samples", where=f"gradients = {name}", fix="leave it out"
        )
    return task.heldout


def _partition(
    samples: MapDataset, size: int, seed: int, batches: int | None, name: str
) -> list[list[int]]:
    """Cut a permutation of all samples into batches of `size`; the first K, or all of them.

    A last, smaller part belongs to a full gradient only. Where K batches need more samples than
    there are, further permutations follow.
    """
    count = len(samples)
    if count == 0 or (name not in FULL_PROBES and count < size):
        raise UsageError(
            f"a batch of {size} does not fit into {count} samples",
            where=f"gradients = {name}",
            fix="give a smaller --batch-size",
        )
    parts: list[list[int]] = []
    for turn in range(2**31):
        generator = torch.Generator().manual_seed(mix(seed, turn))
        order = torch.randperm(count, generator=generator).tolist()
        cut = [order[start : start + size] for start in range(0, count, size)]
        if batches is None:
            return cut
        parts += [part for part in cut if len(part) == size]
        if len(parts) >= batches:
            break
    return parts[:batches]


def _shuffled(batch: Any, seed: int) -> Any:
    """Give the samples of a batch ``[inputs, targets]`` each other's targets."""
    if not isinstance(batch, list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise UsageError(
            "the labels of this task's batches cannot be told from the rest",
            where="gradients = shuffled-labels",
            fix="let the task's samples be pairs (input, target), or leave it out",
        )
    order = torch.randperm(len(batch[1]), generator=torch.Generator().manual_seed(seed))
    return [batch[0], batch[1][order.to(batch[1].device)]]


def describe_probes(probes: Mapping[str, Any]) -> dict[str, Any]:
    """What a run remembers of its probes, by name."""
    return {name: probe.describe() for name, probe in probes.items()}
