"""Resume states: a tree of tensors, arrays, numbers and text, on disk; never pickle.

    000000120-1c291ca3.safetensors     every tensor and array of the tree
    000000120.json                     the tree, with the name, size and crc32c of the other file

The JSON file is renamed into place last: it is the commit. The two newest states are kept, and a
damaged one is never loaded in part.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from crc32c import crc32c
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as serialize_tensors

from capture.describe import DTYPE_NAMES
from capture.store.errors import DamagedError, UsageError
from capture.store.place import Place, make_folders, read_confined, remove, write_durably

STATE_VERSION = 1
KEPT = 2
KEPT_FOLDER = "kept"
_NAME = re.compile(r"(\d{9,})\.json")
_DATA_NAME = re.compile(r"\d{9,}-[0-9a-f]{8}\.safetensors")


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
    checksum = f"{crc32c(data):08x}"
    # The checksum in the name: saving a step anew never touches a committed file.
    file = f"{step:09d}-{checksum}.safetensors"
    write_durably(folder / file, data, folder)
    entry = {"version": STATE_VERSION, "step": step, "file": file, "size": len(data)}
    body = _canonical({**entry, "crc32c": checksum, "tree": document})
    line = f'{{"crc32c":"{crc32c(body):08x}","state":'.encode() + body + b"}\n"
    write_durably(folder / f"{step:09d}.json", line, folder)
    if not keep:
        _remove_others(folder, step)


def kept_steps(folder: Place) -> list[int]:
    """Steps of the states that are kept for branches, ascending."""
    return sorted(step for step, _ in _listed(folder / KEPT_FOLDER))


def load_kept(folder: Place, step: int) -> Any:
    """Load a state that was kept; `DamagedError` where it is not as it was saved."""
    return _load(folder / KEPT_FOLDER, f"{step:09d}.json", step)


def load_newest(folder: Place) -> tuple[int, Any, list[str]] | None:
    """Load the newest sound state: its step, its tree, and a line for each damaged newer one.

    `None` where there is no state; `DamagedError` where there are some and none is sound.
    """
    notices: list[str] = []
    for step, path in _listed(folder):
        try:
            return step, _load(folder, path.name, step), notices
        except DamagedError as error:
            notices.append(f"{error}; falling back to the state before")
    if notices:
        raise DamagedError(
            "no resume state is sound",
            where=folder,
            fix=f"remove the files named in it to start over; the newest: {notices[0]}",
        )
    return None


def _load(folder: Place, name: str, step: int) -> Any:
    path = folder / name
    try:
        wrapped = json.loads(read_confined(folder, name))
        state = wrapped["state"]
        sound = int(wrapped["crc32c"], 16) == crc32c(_canonical(state))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError("the resume state cannot be read", where=path) from error
    if not sound or state["step"] != step:
        raise DamagedError("the resume state does not match its checksum", where=path)
    if state["version"] != STATE_VERSION:
        raise DamagedError(f"the resume state has version {state['version']}", where=path)
    data = read_confined(folder, state["file"])
    if len(data) != state["size"] or crc32c(data) != int(state["crc32c"], 16):
        raise DamagedError(
            "the resume state does not match its checksum", where=folder / state["file"]
        )
    try:
        return _decode(state["tree"], load(data))
    except SafetensorError as error:
        raise DamagedError("not a safetensors file", where=folder / state["file"]) from error


def _listed(folder: Place) -> list[tuple[int, Place]]:
    """States by step, newest first."""
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.glob("*.json")]
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def _remove_others(folder: Place, newest: int) -> None:
    """Remove every state but the two newest, and tensor files that no state refers to."""
    states = _listed(folder)
    kept = [path for step, path in states if step <= newest][:KEPT]
    for _, path in states:
        if path not in kept:
            remove(path)
    referred = {file for path in kept for file in _files_of(path)}
    for path in folder.glob("*.safetensors"):
        if _DATA_NAME.fullmatch(path.name) and path.name not in referred:
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


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    mapping = {key: _decode(item, tensors) for key, item in content}
    return Counter(mapping) if kind == "counter" else mapping


def _unstorable(value: Any, where: str) -> UsageError:
    return UsageError(
        f"a {type(value).__name__} cannot be kept in a resume state",
        where=where,
        fix="keep numbers, text, tensors, arrays, and lists, tuples and dicts of these",
    )


def _canonical(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
