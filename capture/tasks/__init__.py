"""Tasks: each is data, a loss and the name of a default model, in one file.

A task is any object with the attributes of `Task`. Those that come along are found by name; any
other by ``module:factory``, a function that is called as ``factory(data_root, **task_args)``; the
module is looked for in the working directory too. A whole one, in the file `mine.py`:

    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    class Mine:
        defaults = {"batch_size": 32, "epochs": 3}
        model_args = {}

        def __init__(self):
            x = torch.randn(256, 20, generator=torch.Generator().manual_seed(0))
            y = (x[:, 0] > 0).long()
            self.train = TensorDataset(x[:192], y[:192])
            self.heldout = TensorDataset(x[192:], y[192:])

        def loss(self, model, batch):
            x, y = batch
            return nn.functional.cross_entropy(model(x), y)

        def metrics(self, model, batch):
            return {"loss": self.loss(model, batch)}

    def task(data_root=None):
        return Mine()

    def model():
        return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))

With it ``capture train --task mine:task --model mine:model --out a.zarr`` trains, and
``capture probe b.zarr --task mine:task --model mine:model --gradients fixed:4,full`` measures
gradients in a run that a loop of one's own has recorded of such a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from capture.factories import call_factory, find_factory
from capture.store.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from capture.batches import Augment

TASKS = {
    "digits": "capture.tasks.digits:digits",
    "cifar10": "capture.tasks.cifar10:cifar10",
    "fashion-mnist": "capture.tasks.fashion_mnist:fashion_mnist",
    "imagenet": "capture.tasks.imagenet:imagenet",
    "stdlib-text": "capture.tasks.stdlib_text:stdlib_text",
    "wikitext2": "capture.tasks.wikitext2:wikitext2",
    "camvid": "capture.tasks.camvid:camvid",
    "vaihingen": "capture.tasks.vaihingen:vaihingen",
}


class MapDataset(Protocol):
    """What `torch.utils.data.Dataset` of the map style is; samples are put together by torch."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one sample; the same index always gives the same one."""


class Task(Protocol):
    """Data and loss of a training.

    train           samples that drive the training
    heldout         samples that never do; `None` where there are none
    defaults        values of `TrainConfig` where the user gives none: model, batch_size, epochs, …;
                    threads = 1 where steps are so short that more would wait for each other
    model_args      what every model for this task has to know: input_shape, num_classes, …

    Two methods may be there beside those below. ``augment(sample, generator)`` transforms one
    sample of `train` at random, drawing from a `numpy.random.Generator` only.
    ``loss_elements(batch)`` is the number of elements over which the mean loss of a batch is taken,
    where that is not the number of samples: pixels that count, tokens.
    """

    train: MapDataset
    heldout: MapDataset | None
    defaults: Mapping[str, Any]
    model_args: Mapping[str, Any]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the **mean** loss of a batch, a 0-d tensor to differentiate."""

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Return means over a batch to report, the loss among them: 0-d tensors by name."""


ATTRIBUTES = ("train", "heldout", "defaults", "model_args", "loss", "metrics")


def augment_of(task: Task) -> Augment | None:
    """Return the random transformation of the task's training samples, `None` without one."""
    found: Augment | None = getattr(task, "augment", None)
    return found


def loss_elements(task: Task, batch: Any, samples: int) -> int:
    """Over how many elements the mean loss of a batch of so many samples is taken."""
    count = getattr(task, "loss_elements", None)
    return samples if count is None else int(count(batch))


def build_task(
    name: str, *, data_root: str | None = None, task_args: Mapping[str, Any] | None = None
) -> Task:
    """Build the task of this name, or that of ``module:factory``. Raises `UsageError`."""
    factory = find_factory("task", name, TASKS)
    task: Task = call_factory(factory, "task", name, {"data_root": data_root, **(task_args or {})})
    if missing := [attribute for attribute in ATTRIBUTES if not hasattr(task, attribute)]:
        raise UsageError(
            f"the task {name} lacks {', '.join(missing)}", fix="see the class capture.tasks.Task"
        )
    return task
