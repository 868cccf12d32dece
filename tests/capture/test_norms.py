"""Norms by tensor against extended precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capture.norms import Norms, WeightsCopy

GENERATOR = torch.Generator().manual_seed(0)


def exact(tensor: torch.Tensor) -> float:
    values = tensor.to_dense().double().numpy().astype(np.longdouble)
    return float(np.sqrt((values**2).sum()))


# Some versions of torch warn, once, of every sparse tensor that is made without being asked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("dtype", "sums", "tolerance"),
    [
        # Ten times what the module says of ordinary numbers; a plain float32 sum is off by 1e-4.
        (torch.float32, torch.float32, 1e-7),
        (torch.bfloat16, torch.float32, 1e-7),
        (torch.float64, torch.float64, 1e-14),
    ],
)
def test_norms_of_millions_of_elements(
    dtype: torch.dtype, sums: torch.dtype, tolerance: float
) -> None:
    large = torch.rand(3_000_001, generator=GENERATOR).to(dtype)
    turned = torch.rand(300, 70, generator=GENERATOR).to(dtype).t()
    sparse = torch.sparse_coo_tensor(
        [[1, 1, 4]], [1.0, 2.0, 2.0], (9,), dtype=dtype, check_invariants=True
    )
    scalar = torch.tensor(-2.5, dtype=dtype)
    found = Norms(sums).of([large, None, turned, sparse, scalar, torch.zeros(0, dtype=dtype)])
    expected = [exact(large), 0.0, exact(turned), np.sqrt(13), 2.5, 0.0]
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22])
def test_squares_beyond_the_range_of_float32(size: float) -> None:
    tensor = torch.full((100,), size)
    assert Norms(torch.float32).of([tensor])[0] == pytest.approx(exact(tensor), rel=1e-14)


def test_updates_and_their_norms() -> None:
    before = [torch.rand(40, 50, generator=GENERATOR).t(), torch.rand(600_000, generator=GENERATOR)]
    after = [tensor + 0.01 for tensor in before]
    copy = WeightsCopy(torch.float32)
    copy.keep(before)
    differences = [new - old for new, old in zip(after, before, strict=True)]
    # All differences are nearly equal here, the worst case that the module names.
    assert copy.update_norms(after) == pytest.approx([exact(d) for d in differences], rel=1e-6)
    for found, expected in zip(copy.take_updates(after), differences, strict=True):
        assert torch.equal(found, expected)
