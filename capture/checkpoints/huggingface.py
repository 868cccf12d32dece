"""Folders as the Hugging Face libraries write them: which files are the model, and its step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from capture.store.errors import DamagedError, UnsupportedModelError

# The model in a folder, in order of preference; those ending in .json list its shards.
MODEL_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "adapter_model.bin"),
)
# Where Accelerate puts the model of sharded FSDP, a folder of `torch.distributed.checkpoint`.
FSDP_FOLDER = "pytorch_model_fsdp_0"

# What trainings save beside the model.
_NO_MODEL = re.compile(
    r"(optim|optimizer|scheduler|lr_scheduler|scaler|sampler|rng_state|random_states|"
    r"training_args|trainer_state|dl_state_dict)(?![a-z])",
    re.IGNORECASE,
)


def is_model_name(name: str) -> bool:
    """Whether a file of this name may hold a model: not an optimizer's state and the like."""
    return not name.startswith(".") and _NO_MODEL.match(name) is None


def model_parts(folder: Path, where: str) -> list[Path]:
    """The files that hold the model of a folder, one or its shards; empty where there is none."""
    for name in MODEL_FILES:
        if not (folder / name).is_file():
            continue
        _refuse_quantized(folder, where)
        return _shards(folder, name, where) if name.endswith(".json") else [folder / name]
    return []


def trainer_state(folder: Path, where: str) -> tuple[int | None, float | None]:
    """Step and epoch of `trainer_state.json`, `None` where it does not tell."""
    document = _read_json(folder / "trainer_state.json", where)
    step: Any = document.get("global_step")
    epoch: Any = document.get("epoch")
    whole = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    known = isinstance(epoch, int | float) and epoch == epoch and abs(epoch) < 1e15
    return (step if whole else None), (float(epoch) if known else None)


def _shards(folder: Path, index: str, where: str) -> list[Path]:
    """The shards that an index lists, in order; each must be a file of the same folder."""
    names = _read_json(folder / index, where).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DamagedError("the index lists no files", where=f"{where}/{index}")
    files = list(dict.fromkeys(names.values()))
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise DamagedError(
                f"the index names a file {name!r}, which is not in its folder",
                where=f"{where}/{index}",
            )
        if not (folder / name).is_file():
            raise DamagedError(
                f"the index names a file {name!r}, which is missing",
                where=f"{where}/{index}",
                fix="take the whole folder",
            )
    return [folder / name for name in files]


def _refuse_quantized(folder: Path, where: str) -> None:
    if _read_json(folder / "config.json", where).get("quantization_config"):
        raise UnsupportedModelError(
            "the model is quantised (quantization_config in its config.json)",
            where=where,
            fix="save the weights in float32, bfloat16 or float16",
        )


def _read_json(path: Path, where: str) -> dict[str, Any]:
    """Read a JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path.name} is no JSON", where=where) from error
    return document if isinstance(document, dict) else {}
