"""What a model is, as far as a run must know: its tensors, and which of them are updated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn, optim

from capture.dtypes import DTYPE_NAMES
from capture.recordable import check_parameters, check_tensor
from capture.store.errors import UnsupportedModelError
from capture.store.tensors import Tensor, TensorTable


@dataclass(frozen=True)
class Description:
    """A model as the recorder sees it.

    `parameters` are the trainable tensors in table order, `buffers` gives each buffer's current
    tensor by name (a module may replace its buffers at any time), `not_stored` names entries of
    the `state_dict` that are no tensors or cannot be found again.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    table: TensorTable
    parameters: tuple[nn.Parameter, ...]
    frozen: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Callable[[], torch.Tensor]]
    not_stored: tuple[str, ...]
    fingerprints: tuple[tuple[Any, ...], ...]

    def frozen_bytes(self) -> dict[str, NDArray[np.uint8]]:
        """Copy the raw bytes of every frozen tensor, uint8 ``[nbytes]``."""
        return {name: _raw_bytes(tensor) for name, tensor in self.frozen.items()}

    def check_unchanged(self) -> None:
        """Refuse, by name, a parameter that was added, removed, replaced, frozen or unfrozen.

        Identity, shape, dtype and `requires_grad` of all parameters are compared, and which of
        them the optimizer updates; values are not. Raises `UnsupportedModelError`.
        """
        if tuple(_fingerprints(self.model, self.optimizer)) == self.fingerprints:
            return
        raise UnsupportedModelError(
            "the model or its optimizer changed after the recorder was attached",
            where=self._first_change(),
            fix="add, replace, freeze and unfreeze parameters first, then attach a new Recorder",
        )

    def _first_change(self) -> str:
        known = {**dict(zip(self.table.names, self.parameters, strict=True)), **self.frozen}
        now = dict(self.model.named_parameters())
        for name, parameter in now.items():
            if name not in known:
                return f"parameter {name!r} was added"
            if parameter is not known[name]:
                return f"parameter {name!r} was replaced"
            if parameter.requires_grad == (name in self.frozen):
                return f"parameter {name!r} was {'un' if name in self.frozen else ''}frozen"
        if missing := known.keys() - now.keys():
            return f"parameter {min(missing)!r} was removed"
        for tensor in (*self.table.parameters, *self.table.frozen):
            same_dtype = DTYPE_NAMES.get(now[tensor.name].dtype) == tensor.dtype
            if tuple(now[tensor.name].shape) != tensor.shape or not same_dtype:
                return f"parameter {tensor.name!r} has another shape or dtype"
        return "the optimizer's parameter groups"


def describe(model: nn.Module, optimizer: optim.Optimizer) -> Description:
    """Build the tensor table of `model` as updated by `optimizer`.

    Names are those of the bare model, without the prefixes of `torch.compile` and of DDP.
    Raises `UnsupportedModelError`, naming the tensor, for what cannot be recorded.
    """
    model = unwrap(model)
    named = dict(model.named_parameters())
    groups = _groups(optimizer, named)
    aliases = _aliases(model.named_parameters(remove_duplicate=False))
    check_parameters(model)
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    frozen = {name: p for name, p in named.items() if not p.requires_grad}
    buffers, buffer_aliases, not_stored = _buffers(model)
    if not_stored:
        warnings.warn(
            f"not stored, since no tensors of the state_dict: {', '.join(not_stored)}",
            stacklevel=3,
        )

    def entry(name: str, parameter: nn.Parameter) -> Tensor:
        return _entry(name, parameter, groups.get(id(parameter)), aliases[name])

    table = TensorTable(
        parameters=tuple(entry(name, p) for name, p in trainable.items()),
        buffers=tuple(
            _entry(name, read(), None, buffer_aliases[name]) for name, read in buffers.items()
        ),
        frozen=tuple(entry(name, p) for name, p in frozen.items()),
    )
    fingerprints = tuple(_fingerprints(model, optimizer))
    return Description(
        model=model,
        optimizer=optimizer,
        table=table,
        parameters=tuple(trainable.values()),
        frozen=frozen,
        buffers=buffers,
        not_stored=tuple(not_stored),
        fingerprints=fingerprints,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the bare model inside `torch.compile`, `DataParallel` and DDP wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _groups(optimizer: optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[int, int]:
    """Map the id of each parameter that the optimizer updates to its parameter group."""
    known = {id(parameter) for parameter in named.values()}
    groups: dict[int, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise UnsupportedModelError(
                    f"the optimizer updates a tensor of shape {list(parameter.shape)} that is not "
                    "in the model",
                    where=f"parameter group {index}",
                    fix="give the Recorder the model whose parameters the optimizer has",
                )
            groups[id(parameter)] = index
    return groups


def _buffers(
    model: nn.Module,
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, tuple[str, ...]], list[str]]:
    """Find the persistent buffers in `state_dict` order.

    Returns how to read each of them, their further names, and the entries that are not stored.
    """
    readers: dict[str, Callable[[], torch.Tensor]] = {}
    not_stored: list[str] = []
    found: list[tuple[str, torch.Tensor]] = []
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in parameters:
            continue
        reader = _buffer_reader(model, name)
        if reader is None or not isinstance(value, torch.Tensor):
            not_stored.append(name)
            continue
        check_tensor(name, value, trainable=False)
        found.append((name, value))
        readers[name] = reader
    aliases = _aliases(found)
    return {name: readers[name] for name in aliases}, aliases, not_stored


def _buffer_reader(model: nn.Module, name: str) -> Callable[[], torch.Tensor] | None:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    if leaf == "_extra_state":
        return module.get_extra_state
    # Looked up each time: `self.count = self.count + 1` makes a new tensor.
    return (lambda: module._buffers[leaf]) if leaf in module._buffers else None  # type: ignore[return-value]


def _aliases(named: Any) -> dict[str, tuple[str, ...]]:
    """Map the first name of each tensor, in order, to its further names."""
    first: dict[int, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for name, tensor in named:
        owner = first.setdefault(id(tensor), name)
        aliases[owner] = (*aliases[owner], name) if owner in aliases else ()
    return aliases


def _entry(name: str, tensor: torch.Tensor, group: int | None, aliases: tuple[str, ...]) -> Tensor:
    return Tensor(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], group, aliases)


def _fingerprints(model: nn.Module, optimizer: optim.Optimizer) -> Iterator[tuple[Any, ...]]:
    for parameter in model.parameters():
        yield id(parameter), parameter.requires_grad, parameter.shape, parameter.dtype
    for group in optimizer.param_groups:
        yield tuple(map(id, group["params"]))


def _raw_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return raw.copy()
