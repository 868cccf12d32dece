"""Files of `torch.save`, read with `weights_only=True`: no code in them is ever run."""

from __future__ import annotations

import re
import warnings
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from capture.checkpoints.contents import Contents, find_state, is_text, step_in, tensor_of
from capture.dtypes import DTYPE_NAMES
from capture.store.errors import DamagedError, InputError, UsageError
from capture.store.tensors import Tensor

# Before this version a file could run code in spite of `weights_only` (CVE-2025-32434).
SAFE_TORCH = (2, 6)


def read_torch_file(path: Path, where: str, key: str | None) -> Contents:
    """Open a file of `torch.save` and find the `state_dict` in it; see `find_state`.

    Tensors that share one storage become aliases. Of a file in torch's zip format only what is
    asked for is read.
    """
    document = _load(path, where)
    state = find_state(document, lambda value: isinstance(value, torch.Tensor), key, where)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        tensor = _entry(name, value, where)
        place = (value.data_ptr(), tensor.shape, value.stride(), value.dtype)
        owner = first.setdefault(place, name) if value.numel() else name
        if owner == name:
            tensors[name] = tensor
        else:
            aliases[name] = owner
    return Contents(tensors, aliases, lambda name: raw_bytes(state[name]), step_in(document))


def raw_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor in its own dtype, uint8 ``[nbytes]``."""
    flat = tensor.detach().contiguous().reshape(-1)
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return raw


def check_records(path: Path, where: str) -> None:
    """Compare each record of a torch zip file with its checksum, which torch itself does not.

    `DamagedError` where some do not match. Where none does, they were switched off.
    """
    if not zipfile.is_zipfile(path):
        return
    sound, bad = 0, []
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as file:
                    while file.read(2**20):
                        pass
                sound += 1
            except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError):
                bad.append(record.filename)
    if sound and bad:
        raise DamagedError(
            f"its record {bad[0]!r} does not match its checksum",
            where=where,
            fix="take another copy of the file",
        )


def _load(path: Path, where: str) -> Any:
    _require_safe_torch()
    # Torch maps files by name, and takes only names that are text.
    lazy = zipfile.is_zipfile(path) and is_text(str(path))
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            source = path if lazy else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=lazy)
        except UnpicklingError as error:
            raise _refused(error, where) from error
        except Exception as error:  # whatever torch says of a file that is damaged or not its own
            raise InputError(
                f"torch cannot read this file ({type(error).__name__}: {first_words(error)})",
                where=where,
                fix="check that it is a whole file of torch.save",
            ) from error


def _refused(error: UnpicklingError, where: str) -> InputError:
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is None:
        return InputError(
            f"torch cannot read this file ({first_words(error)})",
            where=where,
            fix="check that it is a whole file of torch.save",
        )
    return InputError(
        f"the file is more than tensors, loading it would run {found[1]}",
        where=where,
        fix="if you trust it, load it yourself and save its state_dict alone",
    )


def first_words(error: BaseException) -> str:
    """The first sentence of an error's message."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0].partition(". ")[0][:200]


def _require_safe_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SAFE_TORCH:
        raise UsageError(
            f"torch {torch.__version__} may run code that a file brings along",
            fix="install torch 2.6 or newer, or save the checkpoints as safetensors",
        )


def _entry(name: str, tensor: torch.Tensor, where: str) -> Tensor:
    kind = type(tensor).__name__
    dtype, what = DTYPE_NAMES.get(tensor.dtype), str(tensor.dtype)
    if tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
        dtype, what = None, f"a quantised or wrapped kind ({kind}, {tensor.dtype})"
    elif tensor.layout != torch.strided:
        dtype, what = None, f"a sparse layout ({tensor.layout})"
    elif tensor.is_meta:
        dtype, what = None, "the device meta"
    return tensor_of(name, tuple(tensor.shape), dtype, what, where)
