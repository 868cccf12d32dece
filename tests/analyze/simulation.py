"""Noisy quadratics descended by heavy-ball SGD, as tables with every column computed densely."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from analyze.columns import schema
from analyze.tables import METADATA_KEY, TABLE_VERSION

Values = npt.NDArray[np.float64]

TENSORS = {"layer1.weight": (0, 160), "layer1.bias": (160, 180), "layer2.weight": (180, 300)}
SIZE, BATCHES, MOMENTUM, STEPS_PER_EPOCH = 300, 3, 0.9, 40


@dataclass(frozen=True)
class Path:
    """`w` [T + 1, D], `g` and `m` (the momentum before each update) [T, D], `lr` and `a` [T]."""

    rng: np.random.Generator
    curvature: Values
    w: Values
    g: Values
    m: Values
    lr: Values
    a: Values


def simulate(
    run: str = "runs/demo.zarr",
    *,
    seed: int = 0,
    total: int = 400,
    every: int = 5,
    streams: tuple[str, ...] = ("minibatch",),
    by_tensor: bool = False,
    null: bool = True,
) -> pa.Table:
    """A table as `analyze compute --reference final` makes it, metadata included."""
    path = _descend(np.random.default_rng(seed), total)
    groups = TENSORS if by_tensor else {"model": (0, SIZE)}
    rows = [
        {"run": run, "reference": "final", "stream": stream, "group": group, **row}
        for stream in streams
        for group, (start, stop) in groups.items()
        for row in _rows(path, stream, slice(start, stop), every, null)
    ]
    columns = {field.name: _column(rows, field) for field in schema()}
    metadata = {METADATA_KEY: json.dumps(_metadata(run, total, null, by_tensor))}
    return pa.table(columns, schema=schema()).replace_schema_metadata(metadata)


def _column(rows: list[dict[str, Any]], field: pa.Field) -> pa.Array:
    missing = np.nan if field.type == pa.float64() and not field.nullable else None
    values = [row.get(field.name) for row in rows]
    return pa.array([missing if value is None else value for value in values], field.type)


def _metadata(run: str, total: int, null: bool, by_tensor: bool) -> dict[str, Any]:
    config = {
        "task": "quadratic",
        "model": "diagonal",
        "optimizer": "momentum",
        "lr": 0.02,
        "momentum": MOMENTUM,
    }
    config |= {"batch_size": 64, "seed": 0, "data_seed": 0, "every": "5", "lr_schedule": "constant"}
    optimizer = {"name": "SGD", "kind": "sgd", "nesterov": False}
    return {
        "table": TABLE_VERSION,
        "by": "tensor" if by_tensor else "model",
        "nan": {},
        "runs": [
            {
                "run": run,
                "status": "complete",
                "final_step": total,
                "num_parameters": SIZE,
                "config": config,
                "optimizer": optimizer,
                "versions": {"torch": "2.13.0", "straightway": "0.1.0"},
            }
        ],
        "null": {
            f"{run}|final": "exact for SGD with heavy-ball momentum and no weight decay"
            if null
            else "no null: Adam has no closed form"
        },
        "sign": "positive where a step along -g starts out towards w*",
        "version": "0.1.0",
    }


def _descend(rng: np.random.Generator, total: int) -> Path:
    curvature = np.geomspace(0.02, 2.0, SIZE)
    lr = 0.02 * np.minimum(1, (1 + np.arange(total)) / 20)
    w, g, m = np.empty((total + 1, SIZE)), np.empty((total, SIZE)), np.zeros((total, SIZE))
    w[0], momentum = rng.normal(size=SIZE), np.zeros(SIZE)
    for t in range(total):
        m[t] = momentum
        g[t] = curvature * w[t] + 0.3 * rng.normal(size=SIZE)
        momentum = MOMENTUM * momentum + g[t]
        w[t + 1] = w[t] - lr[t] * momentum
    a = np.zeros(total + 1)
    for t in reversed(range(total)):
        a[t] = lr[t] + MOMENTUM * a[t + 1]
    return Path(rng, curvature, w, g, m, lr, a[:-1])


def _rows(path: Path, stream: str, part: slice, every: int, null: bool) -> list[dict[str, Any]]:
    rows = []
    batches = range(BATCHES) if stream == "fixed" else (None,)
    for t in range(0, path.lr.size, every):
        e = path.w[t, part] - path.w[-1, part]
        loss = 0.5 * float(path.curvature @ path.w[t] ** 2)
        common: dict[str, Any] = {
            "step": t,
            "epoch": t / STEPS_PER_EPOCH,
            "num_parameters": e.size,
            "loss": loss,
        }
        common |= {"lr": path.lr[t], "norm_dist": float(np.linalg.norm(e)), "nonfinite": 0}
        for batch in batches:
            if stream == "updates":
                row = _update(path.w[t + 1, part] - path.w[t, part], e)
                row |= _update_null(path, t, part) if null else {}
            else:
                noise = 0.3 * path.rng.normal(size=SIZE)
                g = path.g[t] if stream == "minibatch" else path.curvature * path.w[t] + noise
                row = _gradient(g[part], e)
                if null and stream == "minibatch":
                    row |= _null(path, t, part)
            rows.append(common | {"batch": batch} | row)
    return rows


def _gradient(g: Values, e: Values) -> dict[str, float]:
    dot, norm, far = float(g @ e), float(np.linalg.norm(g)), float(np.linalg.norm(e))
    cosine = dot / norm / far
    return {
        "norm_grad": norm,
        "dot_prod": dot,
        "rsi": dot / far**2,
        "eb": norm / far,
        "cosine": cosine,
        "angle_deg": float(np.degrees(np.arccos(cosine))),
        "lolr": dot / norm**2,
        "z": dot / float(np.sqrt((g**2 * e**2).sum())),
    }


def _update(u: Values, e: Values) -> dict[str, float]:
    dot, norm = float(u @ e), float(np.linalg.norm(u))
    cosine = dot / norm / float(np.linalg.norm(e))
    return {
        "norm_update": norm,
        "dot_prod_update": dot,
        "cosine_update": cosine,
        "lolr_update": -dot / norm**2,
    }


def _null(path: Path, t: int, part: slice) -> dict[str, float]:
    norms, _, spread = _spread(path, t, part)
    return {"cosine_null": path.a[t] * norms[t] ** 0.5 / spread**0.5, "lolr_null": path.a[t]}


def _update_null(path: Path, t: int, part: slice) -> dict[str, float]:
    """An update that orthogonal gradients made: -η ⟨u, e⟩ / ‖u‖² is a_t."""
    norms, past, spread = _spread(path, t, part)
    length = path.lr[t] * (norms[t] + MOMENTUM**2 * past) ** 0.5
    factor = path.a[t] / path.lr[t]
    return {"cosine_update_null": -factor * length / spread**0.5, "lolr_update_null": factor}


def _spread(path: Path, t: int, part: slice) -> tuple[Values, float, float]:
    """‖g‖² of every step, ‖m_{t-1}‖² and ‖e_t‖², if gradients were orthogonal."""
    norms = (path.g[:, part] ** 2).sum(axis=1)
    past = float(MOMENTUM ** (2 * np.arange(t - 1, -1, -1)) @ norms[:t])
    spread = float(path.a[t:] ** 2 @ norms[t:]) + MOMENTUM**2 * path.a[t] ** 2 * past
    return norms, past, spread
