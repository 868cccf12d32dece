"""Parameter counts of the paper, and shapes."""

from __future__ import annotations

import pytest
import torch

from capture.models import build_model
from capture.store.errors import UsageError

DIGITS = {"input_shape": (1, 8, 8), "num_classes": 10}
CIFAR10 = {"input_shape": (3, 32, 32), "num_classes": 10}
IMAGENET = {"input_shape": (3, 224, 224), "num_classes": 1000}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "task_args", "width", "model_args", "parameters"),
    [
        ("mlp", CIFAR10, 1, {"hidden": 4096, "depth": 3}, 46_190_602),
        ("resnet", CIFAR10, 1, {"depth": 18, "channels": 64}, 11_173_962),
        ("resnet", CIFAR10, 2, {"depth": 18, "channels": 64}, 44_662_922),
        ("resnet", IMAGENET, 3, {"depth": 18, "channels": 64, "stem": "large"}, 102_011_560),
        ("resnet18", CIFAR10, 1, {}, 11_173_962),
        ("resnet18", CIFAR10, 2, {}, 44_662_922),
        ("resnet18", IMAGENET, 1, {}, 11_689_512),
        ("resnet18", IMAGENET, 2, {}, 45_693_032),
        ("resnet18", IMAGENET, 3, {}, 102_011_560),
        ("resnet50", IMAGENET, 1, {}, 25_557_032),
        ("resnet50", IMAGENET, 2, {}, 98_004_072),
        ("resnet152", IMAGENET, 0.5, {}, 15_601_160),
        ("resnet152", IMAGENET, 1, {}, 60_192_808),
    ],
)
def test_parameter_counts_of_the_paper(name, task_args, width, model_args, parameters):
    with torch.device("meta"):
        model = build_model(name, task_args, width=width, model_args=model_args)
    assert count(model) == parameters


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_model_maps_digits_to_logits_and_width_widens_it(name):
    model = build_model(name, DIGITS)
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 10)
    assert count(build_model(name, DIGITS, width=2)) > 3 * count(model)


def test_a_large_stem_shrinks_the_image_to_a_quarter():
    model = build_model("resnet", DIGITS, model_args={"stem": "large"})
    assert model.stem(torch.zeros(2, 1, 64, 64)).shape == (2, 16, 16, 16)


@pytest.mark.parametrize(("pixels", "after"), [(32, 32), (64, 64), (65, 17), (224, 56)])
def test_the_image_decides_on_the_stem_of_a_named_resnet(pixels, after):
    args = {"input_shape": (3, pixels, pixels), "num_classes": 2}
    image = torch.zeros(1, 3, pixels, pixels)
    assert build_model("resnet18", args, width=1 / 16).stem(image).shape == (1, 4, after, after)
    small = build_model("resnet18", args, model_args={"stem": "small", "channels": 4})
    assert small.stem(image).shape == (1, 4, pixels, pixels)


def test_the_weights_follow_the_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([w.flatten() for w in build_model("mlp", DIGITS).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_a_model_from_any_module_gets_only_the_arguments_that_it_names():
    layer = {"in_features": 3, "out_features": 2}
    assert count(build_model("torch.nn:Linear", DIGITS, model_args=layer)) == 8


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("mpl", {}, "did you mean 'mlp'"),
        ("vgg", {}, "known are mlp, resnet"),
        ("no_such_module:make", {}, "No module named 'no_such_module'"),
        ("torch.nn:Liner", {}, "torch.nn has no function 'Liner'"),
        (
            "mlp",
            {"model_args": {"hiden": 3}},
            "it takes input_shape, num_classes, width, hidden, depth",
        ),
        ("resnet", {"model_args": {"depth": 7}}, "known are 8, 18"),
        ("resnet", {"model_args": {"stem": "tiny"}}, "known are small, large"),
        ("torch.nn:Linear", {"width": 2.0}, "has no width"),
        ("mlp", {"model_args": {"hidden": "x"}}, "hidden must be a whole number of at least 1"),
        ("mlp", {"model_args": {"hidden": -1}}, "hidden must be a whole number of at least 1: -1"),
        ("mlp", {"model_args": {"hidden": float("nan")}}, "hidden must be a whole number"),
        ("mlp", {"width": 1e-9}, "hidden * width, rounded, must be a whole number of at least 1"),
        ("resnet", {"model_args": {"channels": 0}}, "channels must be a whole number"),
        ("resnet", {"model_args": {"depth": [8]}}, "depth must be a whole number"),
    ],
)
def test_a_model_that_cannot_be_made_says_why(name, arguments, words):
    with pytest.raises(UsageError) as caught:
        build_model(name, DIGITS, **arguments)
    assert words in str(caught.value)
