"""Small recorded runs with scalars, parameter groups and clipping, and their raw rows."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from capture.store import RunWriter, Tensor, TensorTable

Values = NDArray[Any]

# Two layers, a tensor at the root that nothing updates, and two parameter groups.
TABLE = TensorTable(
    (
        Tensor("body.0.weight", (4, 3), "F32", 0),
        Tensor("body.0.bias", (4,), "F32", 1),
        Tensor("head.weight", (2, 4), "F32", 0),
        Tensor("scale", (), "F32", None),
    )
)
OPTIMIZER: Mapping[str, Any] = {
    "name": "SGD",
    "kind": "sgd",
    "nesterov": False,
    "maximize": False,
    "dampening": [0.0, 0.0],
    "weight_decay": "coupled",
}


def split(vector: Values, table: TensorTable = TABLE) -> list[Values]:
    """The tensors of flat coordinates ``[..., D]``."""
    return np.split(vector, table.offsets[1:-1], axis=-1)


def norms(rows: Values, table: TensorTable = TABLE) -> Values:
    """Norm of each tensor of rows ``[S, D]``: ``[S, P]``."""
    return np.stack([np.linalg.norm(part, axis=-1) for part in split(rows, table)], axis=-1)


def write_run(
    path: Path,
    streams: Mapping[str, Values],
    *,
    table: TensorTable = TABLE,
    scalars: Mapping[str, Values] | None = None,
    optimizer: Mapping[str, Any] = OPTIMIZER,
    steps: Mapping[str, Sequence[int]] | None = None,
    losses: Mapping[str, Values] | None = None,
    epoch: float | Callable[[int], float] | None = 0.5,
    complete: bool = True,
    **attributes: Any,
) -> Path:
    """Write streams ``[T, D]`` or ``[T, B, D]`` and scalars ``[S]`` or ``[S, columns]``.

    `losses` of a stream are ``[T, B]``, or ``[T]`` without batches.
    """
    batches = {name: v.shape[1] if v.ndim == 3 else None for name, v in streams.items()}
    writer = RunWriter.create(
        path,
        table,
        streams={name: count for name, count in batches.items() if name != "weights"},
        attributes={"optimizer": dict(optimizer), **attributes},
    )
    for name, rows in streams.items():
        staging = writer.staging(name)
        for row, values in enumerate(rows):
            step = row if steps is None else steps[name][row]
            now = epoch(step) if callable(epoch) else epoch
            for batch, vector in enumerate(np.atleast_2d(values)):
                staging.parameters[:] = vector
                number = None if batches[name] is None else batch
                loss = None if name not in (losses or {}) else np.atleast_1d(losses[name][row])
                writer.commit(
                    name,
                    staging,
                    step=step,
                    epoch=now,
                    batch=number,
                    loss=None if loss is None else float(loss[batch]),
                )
    for step in range(len(next(iter((scalars or {}).values()), ()))):
        writer.append_scalars(step, {name: v[step] for name, v in (scalars or {}).items()})
    if complete:
        writer.finish(len(streams["weights"]) - 1 if steps is None else steps["weights"][-1])
    writer.flush()
    writer.close()
    return path


class Rows:
    """What zarr-python reads from a run, widened to float64."""

    def __init__(self, path: Path) -> None:
        self._root: Any = zarr.open_group(path, mode="r")
        self._read: dict[str, Values] = {}

    def __getitem__(self, stream: str) -> Values:
        folder = stream if stream in ("weights", "updates") else f"gradients/{stream}"
        return self._array(f"{folder}/value")

    def scalar(self, name: str) -> Values:
        return self._array(f"scalars/{name}")

    def _array(self, key: str) -> Values:
        if key not in self._read:
            self._read[key] = np.asarray(self._root[key][:], np.float64)
        return self._read[key]


@cache
def read_rows(path: Path) -> Rows:
    return Rows(path)


def random_run(path: Path, **options: Any) -> Path:
    """A run of 6 updates of random numbers, clipped in three of them, with every stream.

    `change` may alter the scalars before they are written.
    """
    change: Callable[[dict[str, Values]], object] = options.pop("change", lambda scalars: None)
    draw = np.random.default_rng(options.pop("seed", 0)).standard_normal
    total, size = 6, TABLE.num_parameters
    gradients = draw((total, size)).astype("f4")
    decay = np.tile([0.01, 0.3], (total, 1)) * np.arange(1, total + 1)[:, None]
    scalars = {
        "loss": draw(total),
        "lr": np.full(total, 0.1),
        "clip_factor": np.array([1.0, 0.5, np.nan, 0.25, 1.0, 0.125]),
        "grad_norm_by_tensor": norms(gradients.astype(np.float64)),
        "group_lr": np.full((total, 2), 0.1),
        "group_momentum": np.full((total, 2), 0.9),
        "group_weight_decay": decay,
        "update_norm_by_tensor": np.abs(draw((total, len(TABLE.parameters)))),
    }
    streams = {
        "weights": draw((total + 1, size)).astype("f4"),
        "minibatch": gradients,
        "updates": draw((total, size)).astype("f4"),
        "fixed": draw((total + 1, 3, size)).astype("f4"),
    }
    options.setdefault("losses", {"fixed": draw((total + 1, 3))})
    change(scalars)
    initial = norms(streams["weights"][0].astype(np.float64))
    options.setdefault("initial_norm_by_tensor", initial.tolist())
    return write_run(path, streams, scalars=scalars, **options)


# What `sparse_run` keeps of each stream: no row number is a step, and no two streams agree.
SPARSE = {"weights": (0, 2, 3, 5, 7), "minibatch": (0, 3, 7), "updates": (2, 5), "fixed": (3, 5)}


def epoch_of(step: int) -> float:
    """The epoch that `sparse_run` gives each step."""
    return 0.25 + step / 8


def sparse_run(path: Path, dense: Mapping[str, Values]) -> Path:
    """Write the rows `SPARSE` of a path of 8 updates, with the scalars of every step.

    `dense` has the weights float32 ``[9, D]``, minibatch gradients and updates ``[8, D]`` and the
    batches of `fixed` ``[9, B, D]`` of all steps.
    """
    total, steps = 8, {**SPARSE, "weights": (*SPARSE["weights"], 8)}
    growing = np.arange(1.0, total + 1)
    scalars = {
        "loss": growing * 7,
        "lr": growing / 10,
        "clip_factor": 1 / growing,
        "grad_norm_by_tensor": norms(dense["minibatch"].astype(np.float64)),
        "group_lr": np.stack([growing / 10, growing / 30], axis=1),
        "group_momentum": np.full((total, 2), 0.9),
        "group_weight_decay": np.stack([growing / 100, growing / 70], axis=1),
    }
    return write_run(
        path,
        {name: dense[name][list(kept)] for name, kept in steps.items()},
        scalars=scalars,
        steps=steps,
        epoch=epoch_of,
        initial_norm_by_tensor=norms(dense["weights"][0].astype(np.float64)).tolist(),
    )
