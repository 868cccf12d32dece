"""The files of resume states: how they are named, checked and taken apart. No torch.

    000000120-1c291ca3.safetensors     every tensor and array of the tree
    000000120.json                     the tree, with the name, size and crc32c of the other file

One JSON object on one line: ``crc32c`` of the canonical text of ``state``, and ``state`` with
``version``, ``step``, ``file``, ``size``, ``crc32c`` and ``tree``. In the tree, numbers, text,
`None` and lists stand for themselves, and everything else is an object with one key:
``{"tensor": NAME}`` and ``{"array": NAME}`` name what lies in the other file, ``{"tuple": […]}``,
``{"dict": [[KEY, VALUE], …]}``, ``{"counter": [[KEY, VALUE], …]}``. States that are kept for good
lie in the subfolder ``kept``. `capture.state` writes them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crc32c import crc32c

from capture.store.errors import DamagedError
from capture.store.place import Place, read_confined

STATE_VERSION = 1
KEPT_FOLDER = "kept"
_NAME = re.compile(r"(\d{9,})\.json")
_DATA_NAME = re.compile(r"\d{9,}-[0-9a-f]{8}\.safetensors")


@dataclass(frozen=True)
class StateFile:
    """A state as its JSON file describes it, which was as it was written.

    `file`, `size` and `checksum` are those of the file of tensors, about which nothing is known
    yet; `tree` is for `decode`; `digest` tells states apart by all that they hold.
    """

    folder: Place
    step: int
    file: str
    size: int
    checksum: int
    tree: Any
    digest: str

    def read(self) -> bytes:
        """Read the whole file of tensors; `DamagedError` where it is not as it was written."""
        data = read_confined(self.folder, self.file)
        self.require(len(data), crc32c(data))
        return data

    def require(self, size: int, checksum: int) -> None:
        """`DamagedError` where this is not the size and crc32c of the file of tensors."""
        if (size, checksum) != (self.size, self.checksum):
            raise DamagedError(
                "the resume state does not match its checksum", where=self.folder / self.file
            )


def state_name(step: int) -> str:
    """Name of the JSON file of a state."""
    return f"{step:09d}.json"


def is_data_name(name: str) -> bool:
    """Whether a file of tensors of some state is called so."""
    return _DATA_NAME.fullmatch(name) is not None


def encode(step: int, tree: Any, data: Any) -> tuple[str, bytes]:
    """Name the file of tensors whose bytes are `data`, and build the JSON file beside it.

    `tree` is the encoded one.
    """
    checksum = f"{crc32c(data):08x}"
    # The checksum in the name: saving a step anew never touches a committed file.
    file = f"{step:09d}-{checksum}.safetensors"
    entry = {"version": STATE_VERSION, "step": step, "file": file, "size": len(data)}
    body = _canonical({**entry, "crc32c": checksum, "tree": tree})
    return file, f'{{"crc32c":"{crc32c(body):08x}","state":'.encode() + body + b"}\n"


def read_state(folder: Place, step: int) -> StateFile:
    """Read the JSON file of a state; `DamagedError` where it is not as it was written."""
    name = state_name(step)
    path = folder / name
    try:
        wrapped = json.loads(read_confined(folder, name))
        state = wrapped["state"]
        body = _canonical(state)
        sound = int(wrapped["crc32c"], 16) == crc32c(body) and state["step"] == step
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError("the resume state cannot be read", where=path) from error
    if not sound:
        raise DamagedError("the resume state does not match its checksum", where=path)
    if state["version"] != STATE_VERSION:
        raise DamagedError(f"the resume state has version {state['version']}", where=path)
    return StateFile(
        folder=folder,
        step=step,
        file=state["file"],
        size=state["size"],
        checksum=int(state["crc32c"], 16),
        tree=state["tree"],
        digest=f"{step}-{wrapped['crc32c']}",
    )


def list_states(folder: Place) -> list[tuple[int, Place]]:
    """List the states of a folder by step, newest first, with their JSON files."""
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.glob("*.json")]
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def kept_steps(folder: Place) -> list[int]:
    """Steps of the states that are kept for good, ascending; `folder` is that of all states."""
    return sorted(step for step, _ in list_states(folder / KEPT_FOLDER))


def decode(tree: Any, tensor: Callable[[str], Any], array: Callable[[str], Any]) -> Any:
    """Put an encoded tree together again; `tensor` and `array` give what a name stands for."""
    if isinstance(tree, list):
        return [decode(item, tensor, array) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "array":
        return array(content)
    if kind == "tuple":
        return tuple(decode(item, tensor, array) for item in content)
    mapping = {key: decode(item, tensor, array) for key, item in content}
    return Counter(mapping) if kind == "counter" else mapping


def _canonical(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
