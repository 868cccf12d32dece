"""Pinning of the host buffers, with a CUDA runtime that only notes what it is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capture.staging import HostCopies
from capture.store import ShardLayout, Staging, Tensor, TensorTable


class Runtime:
    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.registered: list[int] = []
        self.unregistered: list[int] = []

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.registered.append(pointer)
        return self.answer

    def cudaHostUnregister(self, pointer: int) -> int:
        self.unregistered.append(pointer)
        return 0


@pytest.mark.parametrize("answer", [0, 2])
def test_buffers_are_pinned_where_the_system_allows_it_and_given_back(
    monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    runtime = Runtime(answer)
    forgotten: list[bool] = []
    monkeypatch.setattr("torch.cuda.cudart", lambda: runtime)
    monkeypatch.setattr("capture.staging.forget_error", lambda: forgotten.append(True))
    table = TensorTable((Tensor("w", (5,), "F32", 0),))
    staging = Staging(ShardLayout("weights", table))
    copies = HostCopies(table)
    for _ in range(2):
        (view,) = copies.views_of(staging, pinned=True)
    view.copy_(torch.arange(5.0))
    assert np.array_equal(staging.parameters, np.arange(5, dtype=np.float32))
    assert runtime.registered == [staging.image.ctypes.data]
    # What the system refused is not taken for an error of the next kernel.
    assert len(forgotten) == (answer != 0)
    copies.close()
    copies.close()
    assert runtime.unregistered == (runtime.registered if answer == 0 else [])
