"""Resume states: a tree of tensors, arrays, numbers and text, on disk; never pickle.

The files are those of `capture.store.states`. The JSON file is renamed into place last: it is the
commit. The two newest states are kept, and a damaged one is never loaded in part.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as serialize_tensors

from capture.dtypes import DTYPE_NAMES
from capture.store.errors import DamagedError, UsageError
from capture.store.place import Place, make_folders, remove, write_durably
from capture.store.states import (
    KEPT_FOLDER,
    decode,
    encode,
    is_data_name,
    kept_steps,
    list_states,
    read_state,
    state_name,
)

__all__ = ["kept_steps", "load_kept", "load_newest", "save"]

KEPT = 2


def save(folder: Place, step: int, tree: Any, *, keep: bool = False) -> None:
    """Commit the state after `step` updates; afterwards it is one of the two newest.

    `keep` puts it into the subfolder `kept` instead, from where nothing is ever removed.

    `tree` nests dicts (any plain keys), lists, tuples, Counters, numbers, text, `None`, tensors and
    numpy arrays. States of later steps belong to a path that was given up: they are removed.
    Raises `UsageError` naming the place of anything else, `WriteError` where the disk refuses.
    """
    if keep:
        folder = folder / KEPT_FOLDER
        make_folders(folder, folder.parent)
    encoder = _Encoder()
    document = encoder.encode(tree, "state")
    data = serialize_tensors(encoder.tensors)
    file, line = encode(step, document, data)
    write_durably(folder / file, data, folder)
    write_durably(folder / state_name(step), line, folder)
    if not keep:
        _remove_others(folder, step)


def load_kept(folder: Place, step: int) -> Any:
    """Load a state that was kept; `DamagedError` where it is not as it was saved."""
    return _load(folder / KEPT_FOLDER, step)


def load_newest(folder: Place) -> tuple[int, Any, list[str]] | None:
    """Load the newest sound state: its step, its tree, and a line for each damaged newer one.

    `None` where there is no state; `DamagedError` where there are some and none is sound.
    """
    notices: list[str] = []
    for step, _ in list_states(folder):
        try:
            return step, _load(folder, step), notices
        except DamagedError as error:
            notices.append(f"{error}; falling back to the state before")
    if notices:
        raise DamagedError(
            "no resume state is sound",
            where=folder,
            fix=f"remove the files named in it to start over; the newest: {notices[0]}",
        )
    return None


def _load(folder: Place, step: int) -> Any:
    state = read_state(folder, step)
    try:
        tensors = load(state.read())
    except SafetensorError as error:
        raise DamagedError("not a safetensors file", where=folder / state.file) from error
    return decode(state.tree, tensors.__getitem__, lambda name: tensors[name].numpy())


def _remove_others(folder: Place, newest: int) -> None:
    """Remove every state but the two newest, and tensor files that no state refers to."""
    states = list_states(folder)
    kept = [path for step, path in states if step <= newest][:KEPT]
    for _, path in states:
        if path not in kept:
            remove(path)
    referred = {file for path in kept for file in _files_of(path)}
    for path in folder.glob("*.safetensors"):
        if is_data_name(path.name) and path.name not in referred:
            remove(path)


def _files_of(path: Place) -> list[str]:
    """Tensor files of a state; where its JSON is damaged, all files of its step."""
    try:
        return [json.loads(path.read_bytes())["state"]["file"]]
    except (ValueError, KeyError, TypeError):
        return [data.name for data in path.parent.glob(f"{path.stem}-*.safetensors")]


class _Encoder:
    """Turns a tree into JSON; its tensors go into `tensors` under their place in the tree."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.Tensor):
            return {"tensor": self._add(value, where)}
        if isinstance(value, np.generic):
            return self.encode(value.item(), where)
        if isinstance(value, np.ndarray):
            try:
                tensor = torch.from_numpy(value.copy())
            except (TypeError, ValueError):
                raise _unstorable(value, where) from None
            return {"array": self._add(tensor, where)}
        if isinstance(value, list | tuple):
            items = [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, Mapping):
            kind = "counter" if isinstance(value, Counter) else "dict"
            return {kind: [self._item(key, item, where) for key, item in value.items()]}
        raise _unstorable(value, where)

    def _item(self, key: Any, item: Any, where: str) -> tuple[Any, Any]:
        if not isinstance(key, bool | int | float | str):
            raise _unstorable(key, f"{where}, a key")
        # The repr tells the key 1 from the key "1".
        return key, self.encode(item, f"{where}[{key!r}]")

    def _add(self, value: torch.Tensor, where: str) -> str:
        """Keep a dense CPU tensor that shares memory with no other, as safetensors demands."""
        if value.layout != torch.strided or value.is_meta or value.dtype not in DTYPE_NAMES:
            raise _unstorable(value, where)
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in self._storages:
            tensor = tensor.clone()
        self._storages.add(tensor.untyped_storage().data_ptr())
        self.tensors[where] = tensor
        return where


def _unstorable(value: Any, where: str) -> UsageError:
    return UsageError(
        f"a {type(value).__name__} cannot be kept in a resume state",
        where=where,
        fix="keep numbers, text, tensors, arrays, and lists, tuples and dicts of these",
    )
