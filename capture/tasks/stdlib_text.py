"""Text that every Python has: two modules of its standard library, byte by byte. No files needed.

`difflib` trains (83,308 bytes), `heapq` is held out (23,024 bytes): English prose in docstrings and
comments, and code. Few files of the standard library are as long and the same in most versions;
these are byte for byte in Python 3.11.2, 3.11.7, 3.12.1 and 3.13.0, and not in 3.13.5. Nothing
promises that other patch versions keep them, so the task tells what it read by its `digest`; where
it is not `KNOWN_DIGEST`, runs cannot be compared with those on other Pythons.
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import inspect
from types import ModuleType

from capture.arguments import require_whole
from capture.store.errors import InputError
from capture.tasks.language import Language, nonempty, windows

KNOWN_DIGEST = "d0780670eb5a199b956025d213eced2b6bc99111f9560963940e92440b6ed48f"
# Bytes, so that no text can hold a symbol outside the vocabulary.
VOCABULARY = 256
SMALL_MODEL = {"vocabulary": VOCABULARY, "layers": 2, "heads": 2, "features": 32, "dropout": 0.0}


def stdlib_text(data_root: str | None = None, *, window: int = 32) -> Language:
    """Make the task; it needs no files, so `data_root` is not used. Raises `InputError`."""
    require_whole("window", window, 1)
    train, heldout = _source(difflib), _source(heapq)
    return Language(
        train=windows(list(train), window),
        heldout=nonempty(windows(list(heldout), window)),
        defaults={"model": "transformer", "batch_size": 32, "epochs": 5, "threads": 1},
        model_args=SMALL_MODEL,
        digest=hashlib.sha256(train + heldout).hexdigest(),
    )


def _source(module: ModuleType) -> bytes:
    try:
        return inspect.getsource(module).encode()
    except OSError:
        raise InputError(
            f"this Python has the module {module.__name__} without its source",
            where=module.__file__,
            fix="use a Python with the sources of its standard library",
        ) from None
