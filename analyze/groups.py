"""Groups of tensors: which of them a quantity is summed over.

model            all of them
layer            what comes before the last dot of a name; a tensor at the root is its own layer
tensor           each by itself
kind             convolution, matrix, embedding, norm, bias, scalar, other; see `kind_of`
{label: regex}   each tensor goes to the first label whose regular expression is found in its
                 name, and to `REST` where there is none
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.store.errors import UsageError
from capture.store.tensors import Tensor, TensorTable

GROUPINGS = ("model", "layer", "tensor", "kind")
REST = "rest"
CUSTOM = "custom"

Grouping = str | Mapping[str, str]


def group_tensors(table: TensorTable, by: Grouping) -> tuple[list[str], NDArray[np.int64]]:
    """Name the groups in order of appearance, and give the group of each tensor, int64 ``[P]``.

    `UsageError` for an unknown grouping, and a regular expression that does not compile or is found
    in no name.
    """
    labels = _labels(table, by)
    distinct = list(dict.fromkeys(labels))
    return distinct, np.array([distinct.index(label) for label in labels], np.int64)


def name_of(by: Grouping) -> str:
    """Name a grouping in one word: `CUSTOM` for regular expressions."""
    return by if isinstance(by, str) else CUSTOM


def parse_groups(texts: tuple[str, ...]) -> dict[str, str]:
    """Read ``LABEL=REGEX`` of the command line, in order; `UsageError` for anything else."""
    groups: dict[str, str] = {}
    for text in texts:
        label, equals, pattern = text.partition("=")
        if not (equals and label and pattern) or label in groups or not _is_text(text):
            what = "a label twice" if label in groups else "not a group of tensors"
            raise UsageError(what, where=ascii(text), fix="write LABEL=REGEX, as in attention=attn")
        if label == REST:
            fix = "choose another label"
            raise UsageError("this is what fits no pattern", where=repr(text), fix=fix)
        groups[label] = pattern
    return groups


def _is_text(text: str) -> bool:
    """Whether this can be written down; bytes of a terminal that are no UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(tensor: Tensor) -> str:
    """Tell what a tensor does from its name and shape, by PyTorch's conventions.

    `bias`: named so. `norm`: one axis, named weight, gain, gamma or scale. `embedding`: two axes,
    with "emb" or "wte"/"wpe" in its name. `matrix`: two axes. `convolution`: three axes or more.
    `scalar`: no axis. `other`: what remains.
    """
    name = tensor.name.rpartition(".")[2]
    axes = len(tensor.shape)
    if name == "bias" or name.endswith("_bias") or name.startswith("bias_"):
        return "bias"
    if axes == 0:
        return "scalar"
    if axes == 1:
        return "norm" if name in ("weight", "gain", "gamma", "scale") else "other"
    if axes > 2:
        return "convolution"
    return "embedding" if re.search(r"emb|\bw[tp]e\b", tensor.name) else "matrix"


def _labels(table: TensorTable, by: Grouping) -> list[str]:
    if not isinstance(by, str):
        compiled = {label: _compiled(pattern) for label, pattern in by.items()}
        for label, pattern in compiled.items():
            if not any(pattern.search(name) for name in table.names):
                raise UsageError(
                    "no tensor has such a name",
                    where=f"{label}={by[label]}",
                    fix=f"they are called {', '.join(table.names[:3])}, …",
                )
        return [_first(compiled, name) for name in table.names]
    labels: dict[str, Any] = {
        "model": lambda: ["model"] * len(table.names),
        "layer": lambda: [name.rpartition(".")[0] or name for name in table.names],
        "tensor": lambda: list(table.names),
        "kind": lambda: [kind_of(tensor) for tensor in table.parameters],
    }
    if by not in labels:
        raise UsageError(f"there is no grouping {by!r}", fix=f"choose from {', '.join(GROUPINGS)}")
    found: list[str] = labels[by]()
    return found


def _first(patterns: Mapping[str, re.Pattern[str]], name: str) -> str:
    return next((label for label, found in patterns.items() if found.search(name)), REST)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"no regular expression ({error})", where=repr(pattern)) from error
