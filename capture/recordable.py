"""What of a model can be recorded: all else is refused here by name, before the first step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from capture.dtypes import DTYPE_NAMES
from capture.store.errors import UnsupportedModelError
from capture.store.tensors import RESERVED_PREFIX, TRAINABLE_DTYPES


def check_parameters(model: nn.Module) -> None:
    """Raise `UnsupportedModelError`, naming it, for what cannot be recorded."""
    _check_unsharded(model)
    for name, parameter in model.named_parameters():
        check_tensor(name, parameter, trainable=parameter.requires_grad)
    if not any(p.numel() for p in model.parameters() if p.requires_grad):
        raise UnsupportedModelError(
            "the model has no trainable parameter",
            where=type(model).__name__,
            fix="set requires_grad before the recorder is attached",
        )


def _check_unsharded(model: nn.Module) -> None:
    """Refuse FSDP, under which each rank has pieces of the parameters that look like parameters.

    By the name of the wrapper, and by the mark on what it flattened where the wrapper was taken
    off, as `accelerate` does.
    """
    wrapped = [
        name
        for name, module in model.named_modules()
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)
    ]
    marked = [n for n, p in model.named_parameters() if getattr(p, "_fsdp_flattened", False)]
    if wrapped or marked:
        raise UnsupportedModelError(
            "a model that FullyShardedDataParallel shards cannot be recorded",
            where=repr([*wrapped, *marked][0] or type(model).__name__),
            fix="use plain DDP",
        )


def check_tensor(name: str, tensor: torch.Tensor, *, trainable: bool) -> None:
    """Raise `UnsupportedModelError` for a parameter or buffer that cannot be recorded."""
    reason = _refusal(name, tensor, trainable)
    if reason is not None:
        what, fix = reason
        raise UnsupportedModelError(f"{what} cannot be recorded", where=repr(name), fix=fix)


def _refusal(name: str, tensor: torch.Tensor, trainable: bool) -> tuple[str, str] | None:
    """Why a tensor cannot be recorded and what to do, or `None`."""
    kind = type(tensor).__name__
    if name.startswith(RESERVED_PREFIX) or name == "__metadata__":
        return "a tensor with a name that the format keeps for itself", "rename it"
    if is_lazy(tensor):
        return "a lazy tensor without a shape", "run one forward pass before attaching"
    if kind in ("DTensor", "FlatParameter", "ShardedTensor"):
        return f"a sharded tensor ({kind})", "use an unsharded model, or plain DDP"
    if tensor.is_meta:
        return "a tensor on the meta device", "materialise the model before attaching"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"a tensor on the device {tensor.device}", "train on cpu or cuda"
    if tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
        return f"a quantised or wrapped tensor ({kind}, {tensor.dtype})", "record the plain model"
    if tensor.layout != torch.strided:
        return f"a sparse tensor ({tensor.layout})", "make it dense"
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if trainable and dtype not in TRAINABLE_DTYPES:
        return f"a trainable tensor of {tensor.dtype}", "use a real floating-point dtype"
    if dtype is None:
        return f"a tensor of {tensor.dtype}, which safetensors lacks,", "use another dtype"
    return None
