"""What a run stores of how it was made, and whether a resumed one is made the same way."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from capture.config import TrainConfig
from capture.opening import versions
from capture.store import MismatchError
from capture.store.attributes import read_attributes
from capture.store.place import Place


def run_attributes(config: TrainConfig) -> dict[str, Any]:
    """What a run remembers of how it was made: configuration, versions, seeds, git commit."""
    return {
        "config": config.to_dict(),
        "versions": {**versions(), "zarr": version("zarr"), "safetensors": version("safetensors")},
        "seeds": {"seed": config.seed, "data_seed": config.data_seed},
        "git_commit": _git_commit(),
        "threads": torch.get_num_threads(),
        "inputs": _input_digests(config),
    }


def require_same(out: Place, attributes: Mapping[str, Any]) -> None:
    """Raise `MismatchError` where the run `out` was made otherwise than `attributes` say."""
    stored = read_attributes(out)
    if not stored.get("config"):
        raise MismatchError(
            "the run was not recorded by capture train",
            where=out,
            fix="resume it with the loop that recorded it",
        )
    difference = TrainConfig.from_dict(stored["config"], where=str(out)).difference(
        TrainConfig.from_dict(attributes["config"])
    )
    if difference is None and stored.get("inputs") != attributes["inputs"]:
        difference = f"the file {attributes['config']['lr_schedule']} was changed"
    if difference is not None:
        raise MismatchError(
            f"the run has another configuration, {difference}",
            where=out,
            fix="resume with the configuration of the run, or record into another --out",
        )


def _input_digests(config: TrainConfig) -> dict[str, str]:
    """Checksums of the files, beside data sets, that decide how a training goes."""
    if not Path(config.lr_schedule).is_file():
        return {}
    return {"lr_schedule": sha256(Path(config.lr_schedule).read_bytes()).hexdigest()}


def _git_commit() -> str | None:
    """The commit that is checked out in the working directory, if that is under git."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
