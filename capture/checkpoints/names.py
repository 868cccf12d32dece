"""What the tensors of checkpoints are called, and which of them a training trained.

A checkpoint does not say which of its tensors are parameters. Where no model is given, a floating
tensor is a trainable parameter unless its name is one of `BUFFERS` or fits the user's pattern, and
an integer or boolean tensor is a buffer. Names stand in the order of the first checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from capture.checkpoints.contents import Contents
from capture.store.errors import InputError, MismatchError, UnsupportedModelError
from capture.store.tensors import TRAINABLE_DTYPES, Tensor, TensorTable

# Prefixes of wrappers: they go where every name carries one.
PREFIXES = ("module.", "_orig_mod.")

# Last parts of the names of floating buffers, of torch's own layers and of well-known others.
BUFFERS = frozenset(
    (
        *("running_mean", "running_var", "num_batches_tracked"),  # BatchNorm, InstanceNorm
        *("_u", "_v"),  # the power iteration of spectral norms
        *("min_val", "max_val", "fake_quant_enabled", "observer_enabled"),  # observers
        *("inv_freq", "original_inv_freq", "freqs_cis", "cos_cached", "sin_cached"),  # rotary
        *("masked_bias", "causal_mask", "attn_mask", "relative_position_index"),  # attention
        *("total_ops", "total_params"),  # profilers
    )
)
# An integer tensor of this name is a weight that was quantised.
_QUANTIZED = frozenset(("weight", "qweight", "weight_packed", "weight_int8"))


@dataclass(frozen=True)
class Selection:
    """What the user says of the names: regular expressions, searched in the bare name.

    Names that do not begin with `prefix` are left out. Without `trainable` every floating tensor
    that is no buffer is trained; with it, those that do not fit are frozen.
    """

    prefix: str | None = None
    trainable: re.Pattern[str] | None = None
    buffers: re.Pattern[str] | None = None


def bare(contents: Contents, prefix: str | None, known: Collection[str], where: str) -> Contents:
    """The tensors under their bare names; `known` are names that a model has, if there is one.

    `InputError` where no name has the given prefix.
    """
    names = {name: name for name in contents.names}
    if prefix:
        names = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if not names:
            first = next(iter(contents.names), None)
            raise InputError(
                f"no tensor has the prefix {prefix!r}, the first is {first!r}",
                where=where,
                fix="give another --prefix",
            )
        names = {name: new for name, new in names.items() if new}
    while (new := _stripped(names, known)) is not None:
        names = new
    return contents.renamed(names)


def _stripped(names: dict[str, str], known: Collection[str]) -> dict[str, str] | None:
    """The names without a prefix that all of them carry; `None` where there is none to go."""
    if any(new in known for new in names.values()):
        return None
    for prefix in PREFIXES:
        if all(new.startswith(prefix) and new != prefix for new in names.values()):
            return {old: new.removeprefix(prefix) for old, new in names.items()}
    return None


def table_of_names(contents: Contents, selection: Selection, where: str) -> TensorTable:
    """The tensor table of a checkpoint by the rule at the top of this file.

    `UnsupportedModelError` for what no run can hold, and where nothing is trainable.
    """
    kinds: dict[str, list[Tensor]] = {"parameter": [], "buffer": [], "frozen": []}
    for name, tensor in contents.tensors.items():
        aliases = tuple(alias for alias, owner in contents.aliases.items() if owner == name)
        entry = replace(tensor, aliases=aliases)
        kinds[_kind(entry, selection, where)].append(entry)
    table = TensorTable(*(tuple(kinds[kind]) for kind in ("parameter", "buffer", "frozen")))
    if not table.num_parameters:
        raise UnsupportedModelError(
            "no tensor in it is trainable",
            where=where,
            fix="see the options --trainable and --buffers",
        )
    return table


def _kind(tensor: Tensor, selection: Selection, where: str) -> str:
    name, leaf = tensor.name, tensor.name.rpartition(".")[2]
    if leaf in BUFFERS or (selection.buffers and selection.buffers.search(name)):
        return "buffer"
    if tensor.dtype not in TRAINABLE_DTYPES:
        if leaf in _QUANTIZED or tensor.dtype == "C64":
            kind = "complex" if tensor.dtype == "C64" else "quantised"
            raise UnsupportedModelError(
                f"{name!r} is a {kind} tensor ({tensor.dtype}), which cannot be imported",
                where=where,
                fix="save real weights in 16 to 64 bits, or name it in --buffers if it is none",
            )
        return "buffer"
    if selection.trainable is None or selection.trainable.search(name):
        return "parameter"
    return "frozen"


def table_of_model(model: TensorTable, contents: Contents, where: str) -> TensorTable:
    """The table of a model, with the dtypes that the checkpoint has.

    `MismatchError` for the first tensor that is not in both or has another shape.
    """

    def found(tensor: Tensor) -> Tensor:
        stored = _stored(tensor, contents)
        if stored is None:
            raise MismatchError(
                f"the checkpoint is not of the model, {tensor.name!r} is missing in it",
                where=where,
                fix=_prefix_hint(tensor.name, contents),
            )
        if stored.shape != tensor.shape:
            raise MismatchError(
                f"the checkpoint is not of the model, {tensor.name!r} has shape "
                f"{list(stored.shape)} in it and {list(tensor.shape)} in the model",
                where=where,
                fix="give the --model, --task and --config of this training",
            )
        return replace(tensor, dtype=stored.dtype, group=None)

    table = TensorTable(
        *(tuple(map(found, part)) for part in (model.parameters, model.buffers, model.frozen))
    )
    for tensor in table.parameters:
        if tensor.dtype not in TRAINABLE_DTYPES:
            raise UnsupportedModelError(
                f"{tensor.name!r} is trained and has the dtype {tensor.dtype}",
                where=where,
                fix="save the weights in float32, bfloat16, float16 or float64",
            )
    if (extra := _beyond(table, contents)) is not None:
        raise MismatchError(
            f"the checkpoint is not of the model, which has no {extra!r}",
            where=where,
            fix="give the --model, --task and --config of this training",
        )
    return table


def _prefix_hint(name: str, contents: Contents) -> str:
    longer = [other for other in contents.names if other.endswith(f".{name}")]
    if longer:
        return f"give --prefix {longer[0].removesuffix(name)}"
    return "give the --model, --task and --config of this training"


def check_same(table: TensorTable, contents: Contents, here: str, first: str) -> None:
    """`MismatchError` for the first tensor that differs from those of the first checkpoint."""
    for tensor in (*table.parameters, *table.buffers, *table.frozen):
        stored = _stored(tensor, contents)
        if stored is None:
            raise _differing(f"{tensor.name!r} is missing, which is in {first}", here)
        for what, now, before in (
            ("shape", list(stored.shape), list(tensor.shape)),
            ("dtype", stored.dtype, tensor.dtype),
        ):
            if now != before:
                words = f"{tensor.name!r} has {what} {now}, and {before} in {first}"
                raise _differing(words, here)
    if (extra := _beyond(table, contents)) is not None:
        raise _differing(f"{extra!r} is not in {first}", here)


def stored_names(tensor: Tensor, contents: Contents) -> list[str]:
    """The names under which a checkpoint stores a tensor: several where it tells no tie."""
    names = (contents.stored_name(name) for name in (tensor.name, *tensor.aliases))
    return list(dict.fromkeys(name for name in names if name is not None))


def _stored(tensor: Tensor, contents: Contents) -> Tensor | None:
    names = stored_names(tensor, contents)
    return contents.tensors[names[0]] if names else None


def _beyond(table: TensorTable, contents: Contents) -> str | None:
    """The first name of a checkpoint that the table does not have."""
    known = {t.name for t in (*table.parameters, *table.buffers, *table.frozen)} | {*table.aliases}
    return next((name for name in contents.names if name not in known), None)


def _differing(words: str, where: str) -> MismatchError:
    return MismatchError(
        f"the checkpoints are not of one model, {words}",
        where=where,
        fix="import the checkpoints of one training",
    )
