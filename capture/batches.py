"""The order of the training data: a pure function of the data seed and the epoch.

Batch t of a run can therefore be named, and a run resumed at it, without replaying what came
before; and loading consumes no random numbers of the training. A random transformation is drawn
from the seed, the epoch and the sample alone, so neither a resume nor the number of loading
processes changes it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from capture.store.errors import UsageError

if TYPE_CHECKING:
    from capture.tasks import MapDataset

# A sample with the numbers that seed its random transformation.
Draw = tuple[int, tuple[int, ...]]
Augment = Callable[[Any, np.random.Generator], Any]


class BatchOrder(Sampler[list[int]]):
    """The sample indices of the batches `start` to `stop`, across epochs.

    Each epoch is a new permutation of all samples but those of `without`; its last partial batch
    is dropped.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        stop: int = 0,
        without: frozenset[int] = frozenset(),
    ) -> None:
        if num_samples - len(without) < batch_size:
            raise UsageError(
                f"a batch of {batch_size} does not fit into {num_samples - len(without)} training "
                "samples",
                fix="give a smaller --batch-size",
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start, self.stop, self.without = start, stop, without

    def between(self, start: int, stop: int) -> BatchOrder:
        """Return the part from batch `start` up to, not including, batch `stop`."""
        return BatchOrder(
            self.num_samples,
            self.batch_size,
            self.seed,
            start=start,
            stop=stop,
            without=self.without,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass through the samples."""
        return (self.num_samples - len(self.without)) // self.batch_size

    def epoch(self, epoch: int) -> list[list[int]]:
        """All batches of one epoch."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        if self.without:
            order = [index for index in order if index not in self.without]
        size = self.batch_size
        return [order[i * size : (i + 1) * size] for i in range(self.steps_per_epoch)]

    def __iter__(self) -> Iterator[list[int]]:
        for _, batch in self._numbered():
            yield batch

    def draws(self) -> Iterator[list[Draw]]:
        """The same batches; each sample with the seed of its random transformation."""
        for epoch, batch in self._numbered():
            yield [(index, (self.seed, epoch, index)) for index in batch]

    def __len__(self) -> int:
        return self.stop - self.start

    def _numbered(self) -> Iterator[tuple[int, list[int]]]:
        step = self.start
        while step < self.stop:
            epoch, first = divmod(step, self.steps_per_epoch)
            batches = self.epoch(epoch)[first:][: self.stop - step]
            for batch in batches:
                yield epoch, batch
            step += len(batches)


class Augmented:
    """A data set whose samples are transformed at random, each by a generator of its own.

    An index alone gives the sample as it is.
    """

    def __init__(self, dataset: MapDataset, augment: Augment | None) -> None:
        self._dataset, self._augment = dataset, augment

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, draw: int | Draw) -> Any:
        if isinstance(draw, int):
            return self._dataset[draw]
        index, seed = draw
        sample = self._dataset[index]
        return sample if self._augment is None else self._augment(sample, _generator(seed))


def _generator(seed: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng(seed)


def load_batches(
    dataset: MapDataset,
    batches: Iterable[list[int]] | Iterable[list[Draw]],
    *,
    workers: int,
    device: torch.device,
    augment: Augment | None = None,
) -> Iterator[Any]:
    """Yield the batches named by `batches`, on `device`; draws are transformed by `augment`."""
    if workers:
        _start_forkserver()
    loader: DataLoader[Any] = DataLoader(
        Augmented(dataset, augment),  # type: ignore[arg-type]  # any map-style data set will do
        batch_sampler=batches,
        num_workers=workers,
        # Forking beside the writer thread and torch's own threads could hang.
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_leave_signals_to_training,
        pin_memory=device.type == "cuda",
        # Without a generator of its own, the loader draws from the global one of the training.
        generator=torch.Generator().manual_seed(0),
    )
    for batch in loader:
        yield to_device(batch, device)


def _start_forkserver() -> None:
    """Start the process that makes the workers so that Ctrl-C, which reaches all, stops none.

    What is blocked here is blocked in it and in its children from their first instruction on; a
    Ctrl-C meanwhile reaches this process afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_training(worker: int) -> None:
    """Let the training alone act on Ctrl-C, also where the forkserver was running before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a nested batch."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [to_device(value, device) for value in batch]
    return batch


def mix(seed: int, index: int) -> int:
    """One 64-bit seed of two numbers, without the collisions of a sum."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])
