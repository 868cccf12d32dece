"""The copies that the training thread makes: from the device into the store's staging buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from capture.halves import in_halves
from capture.store import Staging, TensorTable, UnsupportedModelError

# Pinned for every GPU, not only for the current one: cudaHostRegisterPortable.
PORTABLE = 1

Buffers = Mapping[str, Callable[[], Tensor]]
Pairs = Sequence[tuple[Tensor, Tensor]]


class HostCopies:
    """Copies tensors into `Staging` buffers and waits until they are there.

    From CUDA the buffers are pinned, and the copies run on a side stream of each device, all of one
    call behind each other; they are waited for once.
    """

    def __init__(self, table: TensorTable) -> None:
        self._table = table
        # The staging is kept with its views, so that its id stays its own.
        self._views: dict[int, tuple[Staging, list[Tensor]]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pinned: list[int] = []

    def copy_parameters(
        self, staging: Staging, tensors: Sequence[Tensor | None], scale: float | None = None
    ) -> None:
        """Fill `staging.parameters`, widening to its dtype; zeros for `None`.

        `scale` divides the values: what a `GradScaler` multiplied the gradients with.
        """
        views = self.views_of(staging, any(t is not None and t.is_cuda for t in tensors))
        pairs = zip(views, tensors, strict=True)
        self._copy([(view, tensor) for view, tensor in pairs if tensor is not None])
        for view, tensor in zip(views, tensors, strict=True):
            if tensor is None:
                view.zero_()
            elif scale is not None:
                view.div_(scale)

    def copy_weights(
        self, staging: Staging, parameters: Sequence[Tensor], buffers: Buffers
    ) -> None:
        """Fill `staging` with the weights, and with the raw bytes of the buffers as they are now.

        Raises `UnsupportedModelError` for a buffer of another shape or dtype.
        """
        found = [(entry, buffers[entry.name]()) for entry in self._table.buffers]
        for entry, tensor in found:
            sizes = tensor.numel() * tensor.element_size()
            if tuple(tensor.shape) != entry.shape or sizes != entry.nbytes:
                raise UnsupportedModelError(
                    "a buffer changed its shape or dtype after the recorder was attached",
                    where=repr(entry.name),
                    fix="attach a new Recorder, or make the buffer persistent=False",
                )
        everything = [*parameters, *(tensor for _, tensor in found)]
        views = self.views_of(staging, any(tensor.is_cuda for tensor in everything))
        raw = [(torch.from_numpy(staging.buffers[e.name]), _bytes_of(t)) for e, t in found]
        self._copy([*zip(views, parameters, strict=True), *raw])

    def close(self) -> None:
        """Let go of the buffers, and of their pinning; closing twice is harmless."""
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())  # type: ignore[no-untyped-call]
        self._views.clear()

    def _copy(self, pairs: Pairs) -> None:
        by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for view, tensor in pairs:
            if tensor.is_cuda:
                by_device.setdefault(tensor.device, []).append((view, tensor))
        for device, here in by_device.items():
            self._begin(device, here)
        for view, tensor in pairs:
            if not tensor.is_cuda:
                copy_on_host(view, _dense(tensor))
        for device in by_device:
            # The update may not overwrite what is still being copied. As this is waited for, no
            # memory is given back before it was read, and no `record_stream` is needed.
            self._streams[device].synchronize()

    def _begin(self, device: torch.device, pairs: Pairs) -> None:
        """Queue copies from one device, behind all that it was asked to do so far."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for view, tensor in pairs:
                view.copy_(_dense(tensor), non_blocking=True)

    def views_of(self, staging: Staging, pinned: bool = False) -> list[Tensor]:
        """View `staging.parameters` as one host tensor per trainable tensor."""
        if id(staging) not in self._views:
            if pinned:
                self._pin(staging)
            flat = torch.from_numpy(staging.parameters)
            sizes = [entry.numel for entry in self._table.parameters]
            shapes = [entry.shape for entry in self._table.parameters]
            parts = torch.split(flat, sizes)
            views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            self._views[id(staging)] = (staging, views)
        return self._views[id(staging)][1]

    def _pin(self, staging: Staging) -> None:
        """Pin the whole buffer; where the system refuses, copies are merely slower."""
        runtime, pointer = torch.cuda.cudart(), staging.image.ctypes.data  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(pointer, staging.image.nbytes, PORTABLE)) == 0:
            self._pinned.append(pointer)
        else:
            forget_error()


def forget_error() -> None:
    """Clear CUDA's last error, which would otherwise be taken for that of the next kernel."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


def copy_on_host(target: Tensor, source: Tensor) -> None:
    """Copy, and widen where `target` is wider, with two threads for large tensors."""
    if source.dtype in (torch.float32, torch.float64):
        to, values = target.numpy(), source.detach().numpy()
        if to.flags.c_contiguous and values.flags.c_contiguous:
            to, values = to.reshape(-1), values.reshape(-1)
            in_halves(lambda half: np.copyto(to[half], values[half]), to.size)
        else:
            np.copyto(to, values)
    else:
        target.copy_(source)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a tensor, uint8 ``[nbytes]``, on its device; a copy where it has gaps."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
