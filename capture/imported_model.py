"""The model that imported checkpoints are of, where the user names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import optim

from capture.config import TrainConfig
from capture.describe import describe
from capture.models import build_model
from capture.recordable import check_parameters
from capture.store import TensorTable, UsageError
from capture.tasks import build_task


def table_of_settings(settings: Mapping[str, Any]) -> tuple[TensorTable, dict[str, Any]]:
    """Build the model of some entries of `TrainConfig`; return its table and these, completed.

    `task` or `model` must be among them; a `module:factory` can do without a task. Names, order,
    ties, shapes, and which tensors are trained are those of the model.
    """
    named = {key: value for key, value in settings.items() if value is not None}
    config = TrainConfig.from_dict({"task": "", **named})
    known: Mapping[str, Any] = {}
    if config.task:
        task = build_task(config.task, data_root=config.data_root, task_args=config.task_args)
        known, named = task.model_args, {"model": task.defaults["model"], **named}
    if "model" not in named:
        raise UsageError("no model is given", fix="give --model, or a --task that has one")
    with torch.random.fork_rng(devices=[]):
        model = build_model(named["model"], known, width=config.width, model_args=config.model_args)
        check_parameters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Any optimizer will do: nothing is known of that of the training.
    return describe(model, optim.SGD(trained, lr=0.0)).table, named
