"""The copies that the training thread makes: from the device into the store's staging buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from capture.halves import in_halves
from capture.store import Staging, TensorTable, UnsupportedModelError


class HostCopies:
    """Copies tensors into `Staging` buffers and waits until they are there.

    From CUDA the buffers are pinned and the copies run on a side stream of each device; that path
    has not been measured.
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

    def copy_buffers(self, staging: Staging, buffers: Mapping[str, Callable[[], Tensor]]) -> None:
        """Fill `staging.buffers` with the raw bytes of the model's buffers as they are now."""
        for entry in self._table.buffers:
            tensor = buffers[entry.name]()
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            if tuple(tensor.shape) != entry.shape or raw.numel() != entry.nbytes:
                raise UnsupportedModelError(
                    "a buffer changed its shape or dtype after the recorder was attached",
                    where=repr(entry.name),
                    fix="attach a new Recorder, or make the buffer persistent=False",
                )
            torch.from_numpy(staging.buffers[entry.name]).copy_(raw)

    def close(self) -> None:
        """Let go of the buffers, and of their pinning; closing twice is harmless."""
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())  # type: ignore[no-untyped-call]
        self._views.clear()

    def _copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        devices = {tensor.device for _, tensor in pairs if tensor.is_cuda}
        for device in devices:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        for view, tensor in pairs:
            if not tensor.is_cuda:
                copy_on_host(view, _dense(tensor))
                continue
            with torch.cuda.stream(self._streams[tensor.device]):
                view.copy_(_dense(tensor), non_blocking=True)
        for device in devices:
            # The update may not overwrite what is still being copied.
            self._streams[device].synchronize()

    def views_of(self, staging: Staging, pinned: bool = False) -> list[Tensor]:
        """View `staging.parameters` as one host tensor per trainable tensor."""
        if id(staging) not in self._views:
            flat = torch.from_numpy(staging.parameters)
            if pinned:
                runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                # Where the system refuses, for want of lockable memory, copies are merely slower.
                if int(runtime.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)) == 0:
                    self._pinned.append(flat.data_ptr())
            sizes = [entry.numel for entry in self._table.parameters]
            shapes = [entry.shape for entry in self._table.parameters]
            parts = torch.split(flat, sizes)
            views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            self._views[id(staging)] = (staging, views)
        return self._views[id(staging)][1]


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
