"""Runs and tables that can be compared: of two optimizers, three seeds, any length."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from analyze.columns import schema
from analyze.tables import METADATA_KEY, TABLE_VERSION
from tests.analyze.recorded import OPTIMIZER, TABLE, Values, norms, write_run

ADAM = {**OPTIMIZER, "name": "Adam", "kind": "other"}
STEPS_PER_EPOCH = 4


def config_of(optimizer: str, seed: int, **others: Any) -> dict[str, Any]:
    """A configuration as `capture train` completes it, in short."""
    own = {"optimizer": optimizer, "lr": 0.1, "momentum": 0.9 if optimizer == "momentum" else None}
    return {"task": "t", **own, "batch_size": 64, "seed": seed, "data_seed": seed, **others}


def recorded_run(path: Path, optimizer: str, seed: int, *, total: int = 30, **options: Any) -> Path:
    """A run of random gradients and of weights that drift from them, with every scalar."""
    draw = np.random.default_rng([seed, len(optimizer)]).standard_normal
    size = TABLE.num_parameters
    gradients = (draw((total, size)) + draw(size)).astype("f4")
    steps = np.concatenate([np.zeros((1, size)), -0.1 * gradients.cumsum(axis=0)])
    weights = (draw(size) + steps + 0.05 * draw((total + 1, size))).astype("f4")
    scalars = {
        "loss": np.abs(draw(total)),
        "lr": np.full(total, 0.1),
        "clip_factor": np.ones(total),
        "grad_norm_by_tensor": norms(gradients.astype(np.float64)),
        "group_lr": np.full((total, 2), 0.1),
        "group_momentum": np.full((total, 2), 0.9 if optimizer == "momentum" else 0.0),
        "group_weight_decay": np.zeros((total, 2)),
    }
    streams = {
        "weights": weights,
        "minibatch": gradients,
        "fixed": (draw((total + 1, 2, size)) + 0.5 * draw((1, 2, size))).astype("f4"),
    }
    own = config_of(optimizer, seed, **options.pop("config", {}))
    return write_run(
        path,
        streams,
        scalars=scalars,
        optimizer=OPTIMIZER if optimizer == "momentum" else ADAM,
        epoch=lambda step: step / STEPS_PER_EPOCH,
        config=own,
        seeds={"seed": seed, "data_seed": seed},
        initial_norm_by_tensor=norms(weights[:1].astype(np.float64))[0].tolist(),
        **options,
    )


def table_of(
    run: str,
    cosine: Values | Callable[[Values], Values],
    *,
    total: int = 100,
    every: int = 1,
    config: Mapping[str, Any] | None = None,
    steps_per_epoch: float | None = 10,
    stream: str = "minibatch",
    reference: str = "final",
    null: str = "exact",
    **columns: Any,
) -> pa.Table:
    """A table of the whole model at steps 0, `every`, … before T = `total`, all else NaN.

    `cosine` is ``[N]``, or a function of the steps; `columns` replaces others.
    """
    steps = np.arange(0, total, every)
    values = cosine(steps) if callable(cosine) else np.asarray(cosine)
    steps = steps[: len(values)]
    count = len(steps)
    epochs = np.full(count, np.nan) if steps_per_epoch is None else steps / steps_per_epoch
    own: dict[str, Any] = {
        "run": [run] * count,
        "stream": [stream] * count,
        "group": ["model"] * count,
        "reference": [reference] * count,
        "step": steps,
        "epoch": pa.array(epochs, mask=np.isnan(epochs)),
        "batch": pa.nulls(count, pa.int64()),
        "num_parameters": np.full(count, 1234),
        "nonfinite": np.zeros(count, np.int64),
        "cosine": values,
        **columns,
    }
    arrays = [
        pa.array(own[field.name] if field.name in own else np.full(count, np.nan), field.type)
        for field in schema()
    ]
    entry = {"run": run, "status": "complete", "final_step": total, "num_parameters": 1234}
    entry |= {"config": None if config is None else dict(config)}
    document = {
        **{"table": TABLE_VERSION, "version": "0.1.0", "by": "model", "sign": "", "nan": {}},
        "runs": [entry],
        "null": {f"{run}|{reference}": null},
    }
    table = pa.Table.from_arrays(arrays, schema=schema())
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(document)})
