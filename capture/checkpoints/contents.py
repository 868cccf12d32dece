"""What one checkpoint holds, whatever its format: named tensors as raw bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.store.errors import InputError, UnsupportedModelError
from capture.store.tensors import DTYPE_BYTES, RESERVED_PREFIX, Tensor

# What stands between a file and the `state_dict` in it, in order of preference.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module"),
    *("net", "network", "app"),
)
# Keys under which a file tells its step.
STEP_KEYS = ("global_step", "step", "iteration", "iter", "iter_num")

Read = Callable[[str], NDArray[np.uint8]]


@dataclass(frozen=True)
class Contents:
    """The tensors of one checkpoint.

    `tensors` has each stored tensor by name, in the checkpoint's order, with its true dtype;
    `aliases` maps every further name of a tied tensor to its name there. `read` gives a tensor's
    raw little-endian bytes, uint8 ``[nbytes]``. `step` is what the checkpoint itself says.
    """

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    read: Read
    step: int | None = None

    @property
    def names(self) -> list[str]:
        """Every name, those of tied tensors included."""
        return [*self.tensors, *self.aliases]

    def stored_name(self, name: str) -> str | None:
        """The name under which a tensor is stored; `None` where there is none of this name."""
        return name if name in self.tensors else self.aliases.get(name)

    def renamed(self, names: Mapping[str, str]) -> Contents:
        """The same tensors under the names that `names` gives them; all others are left out."""
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        stored: dict[str, str] = {}
        for owner, tensor in self.tensors.items():
            tied = (owner, *(alias for alias, name in self.aliases.items() if name == owner))
            kept = [names[name] for name in tied if name in names]
            if kept:
                tensors[kept[0]] = Tensor(kept[0], tensor.shape, tensor.dtype)
                stored[kept[0]] = owner
                aliases |= dict.fromkeys(kept[1:], kept[0])
        return Contents(tensors, aliases, lambda name: self.read(stored[name]), self.step)


def find_state(
    document: Any, is_tensor: Callable[[Any], bool], key: str | None, where: str
) -> Mapping[str, Any]:
    """Find the `state_dict` in what a file holds: the mapping from names to tensors.

    `key` names the way to it, ``model_ema`` or ``app/model``; without one, it is the document
    itself or what stands under one of `WRAPPERS`. Entries that are no tensors are dropped.
    `InputError` where there is no such mapping, or it cannot be told which it is.
    """
    found = _descend(document, key, where) if key else _unwrap(document, is_tensor)
    if not isinstance(found, Mapping) or not any(map(is_tensor, found.values())):
        keys = f"its keys are {_listed(found)}" if isinstance(found, Mapping) else "it is no dict"
        raise InputError(f"no named tensors in this file, {keys}", where=where, fix=_KEY)
    beside = [
        name
        for name, value in found.items()
        if not str(name).endswith("_extra_state") and _holds_tensors(value, is_tensor)
    ]
    if beside and not key:
        what = f"it is not clear where the weights lie, tensors are also below {beside[0]!r}"
        raise InputError(what, where=where, fix=_KEY)
    return {str(name): value for name, value in found.items() if is_tensor(value)}


_KEY = "say where with --key, as in --key model_ema"


def _unwrap(document: Any, is_tensor: Callable[[Any], bool]) -> Any:
    while isinstance(document, Mapping):
        inner = [n for n in WRAPPERS if _holds_tensors(document.get(n), is_tensor)]
        if not inner:
            break
        document = document[inner[0]]
    return document


def _descend(document: Any, key: str, where: str) -> Any:
    for part in key.split("/"):
        if not isinstance(document, Mapping) or part not in document:
            raise InputError(
                f"no key {part!r} in this file, it has {_listed(document)}",
                where=where,
                fix="give another --key",
            )
        document = document[part]
    return document


def _holds_tensors(value: Any, is_tensor: Callable[[Any], bool], depth: int = 8) -> bool:
    return isinstance(value, Mapping) and any(
        is_tensor(inner) or (depth > 0 and _holds_tensors(inner, is_tensor, depth - 1))
        for inner in value.values()
    )


def _listed(document: Any) -> str:
    if not isinstance(document, Mapping):
        return "no keys"
    names = [str(name) for name in document]
    return f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}" or "none"


def step_in(document: Any) -> int | None:
    """The step that a file tells under one of `STEP_KEYS`; `None` where it tells none."""
    if isinstance(document, Mapping):
        for key in STEP_KEYS:
            value = document.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
    return None


def tensor_of(
    name: str, shape: tuple[int, ...], dtype: str | None, what: str, where: str
) -> Tensor:
    """Make the entry of one tensor; `UnsupportedModelError` for what a run cannot hold.

    `dtype` is its safetensors name, `None` for one without; `what` are the words for it.
    """
    if name.startswith(RESERVED_PREFIX) or name == "__metadata__" or not is_text(name):
        raise UnsupportedModelError(
            f"a name that the format keeps for itself, {name!r}",
            where=where,
            fix="rename the tensor; rows of a run are turned into checkpoints by capture export",
        )
    if dtype not in DTYPE_BYTES or dtype.startswith("F8"):
        raise UnsupportedModelError(
            f"{name!r} is a tensor of {what}, which cannot be imported",
            where=where,
            fix="save the weights in float32, bfloat16, float16 or float64",
        )
    return Tensor(name, shape, dtype)


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def merged(parts: list[Contents], where: str) -> Contents:
    """The parts of one sharded checkpoint as one; `InputError` where two hold the same name."""
    if len(parts) == 1:
        return parts[0]
    owner: dict[str, Contents] = {}
    for part in parts:
        for name in part.names:
            if owner.setdefault(name, part) is not part:
                raise InputError(f"two of its files hold {name!r}", where=where)
    steps = [part.step for part in parts if part.step is not None]
    return Contents(
        tensors={name: tensor for part in parts for name, tensor in part.tensors.items()},
        aliases={alias: name for part in parts for alias, name in part.aliases.items()},
        read=lambda name: owner[name].read(name),
        step=steps[0] if steps else None,
    )
