"""The tensor table: offsets, JSON, and the words for a difference."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.store import DamagedError, Tensor, TensorTable

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.lists(st.text(min_size=1, max_size=8), unique=True, min_size=1, max_size=12)


@st.composite
def tables(draw):
    names = draw(NAMES)
    tensors = [
        Tensor(name, draw(SHAPES), draw(st.sampled_from(["F32", "BF16", "F64"])), draw(groups))
        for name in names
    ]
    table = TensorTable(tuple(tensors), (Tensor("\0buffer", (2,), "I64", None, ("b",)),))
    return table


groups = st.none() | st.integers(0, 3)


@given(tables())
def test_a_table_goes_through_json_unchanged(table):
    document = json.loads(json.dumps(table.to_json()))
    if table.num_parameters == 0:
        with pytest.raises(DamagedError, match="offsets"):
            TensorTable.from_json(document)
        return
    assert TensorTable.from_json(document) == table
    assert [entry["offset"] for entry in document["parameters"]] == table.offsets[:-1].tolist()


@given(tables())
def test_offsets_are_running_sums_and_float64_widens_all(table):
    sizes = [int(np.prod(tensor.shape)) for tensor in table.parameters]
    assert table.offsets.tolist() == [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    wide = "F64" in [tensor.dtype for tensor in table.parameters]
    assert table.value_dtype == np.dtype("float64" if wide else "float32")


def test_aliases_of_parameters_buffers_and_frozen_tensors():
    tied = Tensor("a", (1,), "F32", 0, ("b", "c"))
    table = TensorTable((tied,), (), (Tensor("d", (1,), "F32", None, ("e",)),))
    assert table.aliases == {"b": "a", "c": "a", "e": "d"}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([("a", (2, 3)), ("b", (4,))], None),
        ([("a", (3, 2)), ("b", (4,))], "'a' has shape [2, 3] here and [3, 2] there"),
        ([("b", (4,)), ("a", (2, 3))], "tensor 0 is 'a' here and 'b' there"),
        ([("a", (2, 3))], "'b' is missing there"),
        ([("a", (2, 3)), ("b", (4,)), ("c", (1,))], "'c' is missing here"),
    ],
)
def test_the_first_difference_in_words(other, words):
    mine = TensorTable((Tensor("a", (2, 3), "F32", 0), Tensor("b", (4,), "F32", 0)))
    theirs = TensorTable(tuple(Tensor(name, shape, "F64", 1) for name, shape in other))
    assert mine.difference(theirs) == words


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1},
        {"shape": [-1]},
        {"shape": "ab"},
        {"shape": [2**40, 2**40]},
        {"dtype": "F7"},
        {"group": "x"},
        {"name": "b"},
    ],
)
def test_a_table_that_does_not_add_up_is_damaged(change):
    table = TensorTable((Tensor("a", (2,), "F32", 0), Tensor("b", (2,), "F32", 0)))
    document = table.to_json()
    document["parameters"][0].update(change)
    with pytest.raises(DamagedError, match="tensor table"):
        TensorTable.from_json(document)
    del document["parameters"][0]["name"]
    with pytest.raises(DamagedError, match="tensor table"):
        TensorTable.from_json(document)
