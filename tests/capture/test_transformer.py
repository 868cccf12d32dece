"""The language model of the paper: its size, what each position knows, and the same bits twice."""

from __future__ import annotations

import math

import pytest
import torch

from capture.models import build_model
from capture.models.transformer import positions
from capture.store.errors import UsageError
from capture.training import deterministic

SMALL = {"vocabulary": 11, "layers": 2, "heads": 2, "features": 8}


def small(**model_args):
    torch.manual_seed(0)
    return build_model("transformer", SMALL, model_args=model_args)


def test_the_paper_has_9_747_454_parameters():
    with torch.device("meta"):
        model = build_model("transformer", {"vocabulary": 33_278})
    assert sum(parameter.numel() for parameter in model.parameters()) == 9_747_454


def test_width_scales_all_but_the_vocabulary():
    model = build_model("transformer", {"vocabulary": 11}, width=0.5, model_args={"layers": 1})
    assert model.embedding.weight.shape == (11, 64)
    assert model.encoder.layers[0].linear1.weight.shape == (64, 64)
    assert model(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, 11)


@pytest.mark.parametrize("training", [True, False])
def test_no_position_knows_the_tokens_after_it(training):
    model = small(dropout=0.0).train(training)
    tokens = torch.randint(11, (3, 6))
    changed = tokens.clone()
    changed[1, 4] = (tokens[1, 4] + 1) % 11
    with torch.no_grad():
        moved = (model(tokens) - model(changed)).abs().amax(2) > 1e-6  # float32 of order 1
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[1, 4:] = True
    assert torch.equal(moved, expected)


def test_literal_attention_reaches_other_samples_and_no_other_position():
    model = small(dropout=0.0, literal=True)
    tokens = torch.randint(11, (3, 6))
    changed = tokens.clone()
    changed[1, 4] = (tokens[1, 4] + 1) % 11
    moved = (model(tokens) - model(changed)).abs().amax(2) > 1e-6  # float32 of order 1
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[1:, 4] = True
    assert torch.equal(moved, expected)


def test_positions_are_sines_and_cosines():
    table = positions(7, 5)
    assert table.shape == (7, 5)
    assert table[3, 0].item() == pytest.approx(math.sin(3), rel=1e-6)  # float32
    assert table[3, 1].item() == pytest.approx(math.cos(3), rel=1e-6)
    assert table[6, 4].item() == pytest.approx(math.sin(6 / 10000 ** (4 / 5)), rel=1e-5)


def test_gradients_are_the_same_bits_each_time():
    def gradient():
        model, tokens = small(), torch.arange(30).view(5, 6) % 11
        torch.manual_seed(1)
        model(tokens).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    with deterministic():
        torch.use_deterministic_algorithms(True)
        assert torch.equal(gradient(), gradient())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"heads": 3}, "a width of 8 is no multiple of 3 heads"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"layers": 0}, "layers must be a whole number of at least 1"),
        ({"vocabulary": "x"}, "vocabulary must be a whole number of at least 1"),
    ],
)
def test_a_transformer_that_cannot_be_made_says_why(arguments, words):
    with pytest.raises(UsageError, match=words):
        small(**arguments)
