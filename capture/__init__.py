"""Stage 1: record a training run. Public names are resolved when first used, so that
`import capture.store` never loads torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capture.average import Average
    from capture.importing import import_checkpoints
    from capture.recorder import Recorder
    from capture.store.reader import open_run

__version__ = "0.1.0"
__all__ = ["Average", "Recorder", "import_checkpoints", "open_run"]

_HOMES = {
    "Average": "capture.average",
    "Recorder": "capture.recorder",
    "import_checkpoints": "capture.importing",
    "open_run": "capture.store.reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
