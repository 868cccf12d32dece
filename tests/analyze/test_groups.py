"""Groups of tensors: by names and shapes as PyTorch's modules have them."""

import pytest

from analyze.groups import REST, group_tensors, kind_of, name_of
from capture.store import Tensor, TensorTable, UsageError

# Names and shapes of a torchvision ResNet, a GPT-2, a BERT and a VGG with batch norm.
KINDS = {
    ("conv1.weight", (64, 3, 7, 7)): "convolution",
    ("layer1.0.bn1.weight", (64,)): "norm",
    ("layer1.0.bn1.bias", (64,)): "bias",
    ("fc.weight", (1000, 512)): "matrix",
    ("h.0.attn.c_attn.bias", (2304,)): "bias",
    ("transformer.wte.weight", (50257, 768)): "embedding",
    ("transformer.wpe.weight", (1024, 768)): "embedding",
    ("embeddings.word_embeddings.weight", (30522, 768)): "embedding",
    ("encoder.self_attn.in_proj_weight", (384, 128)): "matrix",
    ("encoder.self_attn.in_proj_bias", (384,)): "bias",
    ("norm.gamma", (10,)): "norm",
    ("temperature", ()): "scalar",
    ("audio.conv.weight", (8, 4, 3)): "convolution",
    ("positions", (7,)): "other",
}


@pytest.mark.parametrize(("tensor", "kind"), KINDS.items())
def test_kinds(tensor: tuple[str, tuple[int, ...]], kind: str) -> None:
    assert kind_of(Tensor(*tensor, "F32")) == kind


def table(*names: str) -> TensorTable:
    return TensorTable(tuple(Tensor(name, (1,), "F32") for name in names))


def test_the_first_pattern_that_is_found_counts_and_groups_come_in_the_order_of_tensors() -> None:
    found = group_tensors(table("b.attn", "a.mlp", "a.attn"), {"a": r"^a\.", "all": "attn"})
    assert (found[0], found[1].tolist()) == (["all", "a"], [0, 1, 1])
    assert group_tensors(table("x", "y"), {"one": "x"})[0] == ["one", REST]


def test_a_pattern_that_no_name_fits_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"no tensor has such a name: first=\^0; they are called x"
    ):
        group_tensors(table("x", "y"), {"all": ".", "first": "^0"})


def test_unknown_groupings_are_refused() -> None:
    with pytest.raises(UsageError, match="choose from model, layer, tensor, kind"):
        group_tensors(table("x"), "block")


def test_a_mapping_is_called_custom() -> None:
    assert [name_of("layer"), name_of({"a": "b"})] == ["layer", "custom"]
