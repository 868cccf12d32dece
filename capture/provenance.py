"""What a run stores of how it was made, and whether a resumed one is made the same way."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from crc32c import crc32c
from torch import Tensor

from capture.config import TrainConfig, is_of_train
from capture.opening import versions
from capture.store import MismatchError
from capture.store.attributes import read_attributes
from capture.store.place import Place
from capture.tasks import Task, augment_of

logger = logging.getLogger("capture")

# Samples of each part of the data that the checksum is over.
SHARES = 16


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
    if not is_of_train(stored):
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
    if difference is None and stored.get("parent") != attributes.get("parent"):
        difference = _other_parent(stored.get("parent"), attributes.get("parent"))
    if difference is None:
        difference = data_difference(stored.get("data"), attributes.get("data"))
    if difference is not None:
        raise MismatchError(
            f"the run has another configuration, {difference}",
            where=out,
            fix="resume with the configuration of the run, or record into another --out",
        )


def _other_parent(stored: Any, now: Any) -> str:
    texts = [f"{p['run']}@{p['step']}" if p else "no run" for p in (stored, now)]
    return f"it branched from {texts[0]}, this from {texts[1]}, or from other weights"


def data_facts(task: Task) -> dict[str, Any]:
    """What a run remembers of its data: numbers of samples, and a checksum over some of them.

    The checksum is that of 16 samples of each part at most, as the training sees them; another
    version of a library that decodes images may change it.
    """
    augment = augment_of(task)
    checksum = 0
    for part in (task.train, task.heldout):
        count = 0 if part is None else len(part)
        for index in sorted({count * share // SHARES for share in range(SHARES)} if count else ()):
            sample = part[index]  # type: ignore[index]  # there are samples, so there is a part
            if part is task.train and augment is not None:
                sample = augment(sample, np.random.default_rng(index))
            checksum = _add(checksum, sample)
    heldout = None if task.heldout is None else len(task.heldout)
    return {"train": len(task.train), "heldout": heldout, "samples_crc32c": f"{checksum:08x}"}


def data_difference(stored: Any, now: Any) -> str | None:
    """In words, where the data of a run and those at hand differ in number; `None` where not.

    A difference of the checksum alone is a warning: decoders differ by their versions.
    """
    if not stored or not now or stored == now:
        return None
    for part in ("train", "heldout"):
        if stored[part] != now[part]:
            return f"it had {stored[part]} samples ({part}), here are {now[part]}"
    logger.warning("the samples are not those of the run, or are decoded otherwise")
    return None


def _add(checksum: int, sample: Any) -> int:
    """Go on with the crc32c over a nested sample."""
    if isinstance(sample, Tensor):
        return int(crc32c(sample.detach().cpu().contiguous().numpy().tobytes(), checksum))
    if isinstance(sample, dict):
        sample = list(sample.values())
    if isinstance(sample, list | tuple):
        for part in sample:
            checksum = _add(checksum, part)
        return checksum
    return int(crc32c(repr(sample).encode(), checksum))


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
