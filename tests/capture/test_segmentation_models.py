"""U-Net and SegNet: the paper's parameter counts, shapes, and the unpooling against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import max_pool2d, max_unpool2d

from capture.models import build_model
from capture.models.segnet import unpool
from capture.store.errors import UsageError

TILES = {"input_shape": (3, 256, 256), "num_classes": 6}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("name", "parameters"), [("unet", 7_763_206), ("segnet", 29_446_470)])
def test_parameter_counts_of_the_paper(name, parameters):
    with torch.device("meta"):
        model = build_model(name, TILES)
        assert count(model) == parameters
        assert model(torch.zeros(2, 3, 256, 256)).shape == (2, 6, 256, 256)


@pytest.mark.parametrize("name", ["unet", "segnet"])
def test_two_trainings_agree_bit_for_bit_without_a_warning(name):
    """Warnings are errors here, that about an operation that is not deterministic among them."""

    def gradient():
        torch.manual_seed(1)
        model = build_model(name, TILES, width=0.125)
        logits = model(torch.randn(2, 3, 64, 32))
        assert logits.shape == (2, 6, 64, 32)
        logits.square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = gradient(), gradient()
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.isfinite().all()
    assert first.abs().max() > 0
    assert torch.equal(first, second)


def test_the_unpooling_is_that_of_torch_and_so_is_its_gradient():
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values, places = max_pool2d(x, 2, return_indices=True)
    weights = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    unpooled, expected = unpool(ours, places), max_unpool2d(theirs, places, 2)
    assert torch.equal(unpooled, expected)
    for result in (unpooled, expected):
        (result.square() * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["unet", "segnet"])
def test_width_widens(name):
    with torch.device("meta"):
        assert count(build_model(name, TILES, width=2)) > 3 * count(build_model(name, TILES))


@pytest.mark.parametrize(
    ("name", "shape", "width", "words"),
    [
        ("unet", (3, 250, 256), 1, "multiples of 16: input_shape = (3, 250, 256)"),
        ("segnet", (3, 360, 480), 1, "multiples of 32: input_shape = (3, 360, 480)"),
        ("unet", (64,), 1, "multiples of 16"),
        ("unet", (3, 256, 256), 1e-9, "32 * width, rounded, must be a whole number"),
        ("segnet", (3, 256, 256), 1e-9, "64 * width, rounded, must be a whole number"),
    ],
)
def test_a_model_that_cannot_be_made_says_why(name, shape, width, words):
    with pytest.raises(UsageError) as caught:
        build_model(name, {"input_shape": shape, "num_classes": 6}, width=width)
    assert words in str(caught.value)
