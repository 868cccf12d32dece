"""Weights that a run has stored, given back to a model."""

from __future__ import annotations

import torch
from torch import nn

from capture.dtypes import DTYPE_NAMES
from capture.store import Run
from capture.store.export import read_state

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def load_weights(model: nn.Module, run: Run, step: int) -> None:
    """Give the model its parameters and buffers as they were saved at `step`, to the bit."""
    state = read_state(run, step)
    table = run.table
    with torch.no_grad():
        mine = model.state_dict(keep_vars=True)
        for tensor in (*table.parameters, *table.buffers, *table.frozen):
            raw = torch.frombuffer(bytearray(state[tensor.name]), dtype=torch.uint8)
            mine[tensor.name].copy_(raw.view(_DTYPES[tensor.dtype]).reshape(tensor.shape))
