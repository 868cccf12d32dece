"""What must change in a table when a run is changed in a known way, and what must not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from analyze.tables import measure_run
from tests.analyze.small_runs import Values, random_streams, write_run

SIZES = (7, 12, 1, 20)
SIZE = sum(SIZES)
# How each quantity of a gradient goes with the lengths of gradient and of weights.
POWERS = {
    "norm_dist": (0, 1),
    "norm_grad": (1, 0),
    "dot_prod": (1, 1),
    "rsi": (1, -1),
    "eb": (1, -1),
    "cosine": (0, 0),
    "angle_deg": (0, 0),
    "lolr": (-1, 1),
    "z": (0, 0),
    "norm_weight": (0, 1),
    "cosine_reference": (0, 0),
    "dist_radial": (0, 1),
    "dist_tangential": (0, 1),
    "cosine_radial": (0, 0),
    "cosine_tangential": (0, 0),
}
OF_UPDATE = {"norm_update": 1, "dot_prod_update": 2, "cosine_update": 0, "lolr_update": 0}


def measured(path: Path, streams: dict[str, Values], sizes: Sequence[int] = SIZES) -> dict:
    """Columns of the whole model, by stream, against w_T and w_0."""
    write_run(path, sizes, streams)
    (table,) = measure_run(str(path), ["final", "step:0"], cache=False).values()
    frame = table.to_pandas()
    return {stream: rows for stream, rows in frame.groupby("stream")}


@pytest.fixture(scope="module")
def streams() -> dict[str, Values]:
    return random_streams(SIZE, rows=5)


@pytest.fixture(scope="module")
def plain(streams: dict[str, Values], tmp_path_factory: pytest.TempPathFactory) -> dict:
    return measured(tmp_path_factory.mktemp("plain") / "run.zarr", streams)


def close(found: Values, expected: Values, loose: bool = False) -> None:
    # 40 products added in another order; a root near 0 halves the digits.
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-7 if loose else 1e-12)


def changed(streams: dict[str, Values], **factors: float) -> dict[str, Values]:
    """Streams times powers of 2, which float32 takes without rounding."""
    return {name: values * np.float32(factors.get(name, 1)) for name, values in streams.items()}


@pytest.mark.parametrize(("gradient", "weight"), [(8, 1), (1, 0.25), (0.5, 4)])
def test_lengths_scale_what_they_should(
    tmp_path: Path, streams: dict[str, Values], plain: dict, gradient: float, weight: float
) -> None:
    factors = {"minibatch": gradient, "fixed": gradient, "weights": weight, "updates": weight}
    other = measured(tmp_path / "run.zarr", changed(streams, **factors))
    for stream in ("minibatch", "fixed"):
        for name, (of_gradient, of_weight) in POWERS.items():
            expected = plain[stream][name] * gradient**of_gradient * weight**of_weight
            close(other[stream][name], expected, loose=name in ("dist_tangential", "angle_deg"))
    for name, power in OF_UPDATE.items():
        close(other["updates"][name], plain["updates"][name] * weight**power)


def test_a_gradient_turned_round_turns_the_signs(
    tmp_path: Path, streams: dict[str, Values], plain: dict
) -> None:
    other = measured(tmp_path / "run.zarr", changed(streams, minibatch=-1))
    for name in ("dot_prod", "rsi", "cosine", "lolr", "z", "cosine_radial", "cosine_tangential"):
        close(other["minibatch"][name], -plain["minibatch"][name])
    close(other["minibatch"]["angle_deg"], 180 - plain["minibatch"]["angle_deg"])


@pytest.mark.parametrize("sizes", [(SIZE,), (1,) * SIZE, (3, 4, 12, 1, 13, 7), (20, 1, 12, 7)])
def test_how_tensors_are_cut_changes_no_sum_of_the_model(
    tmp_path: Path, streams: dict[str, Values], plain: dict, sizes: Sequence[int]
) -> None:
    other = measured(tmp_path / "run.zarr", streams, sizes)
    for stream, rows in plain.items():
        for name in (*POWERS, *OF_UPDATE):
            close(other[stream][name], rows[name], loose=name in ("dist_tangential", "angle_deg"))


def test_the_order_of_coordinates_changes_nothing(
    tmp_path: Path, streams: dict[str, Values], plain: dict
) -> None:
    order = np.random.default_rng(5).permutation(SIZE)
    other = measured(tmp_path / "run.zarr", {n: v[..., order] for n, v in streams.items()})
    for stream, rows in plain.items():
        for name in (*POWERS, *OF_UPDATE):
            close(other[stream][name], rows[name], loose=name in ("dist_tangential", "angle_deg"))


def test_coordinates_that_never_move_and_have_no_gradient_change_nothing(
    tmp_path: Path, streams: dict[str, Values], plain: dict
) -> None:
    padded = {n: np.concatenate([v, 0 * v[..., :9]], axis=-1) for n, v in streams.items()}
    other = measured(tmp_path / "run.zarr", padded, (*SIZES, 9))
    for stream, rows in plain.items():
        for name in (*POWERS, *OF_UPDATE):
            close(other[stream][name], rows[name], loose=name in ("dist_tangential", "angle_deg"))


def test_the_origin_matters_to_weights_alone(
    tmp_path: Path, streams: dict[str, Values], plain: dict
) -> None:
    """Whole numbers, so that float32 holds both paths exactly."""
    whole = {n: np.round(v * 100).astype("f4") for n, v in streams.items()}
    here = measured(tmp_path / "here.zarr", whole)
    there = measured(tmp_path / "there.zarr", {**whole, "weights": whole["weights"] + 1000})
    for name in ("norm_dist", "dot_prod", "rsi", "eb", "cosine", "lolr", "z"):
        np.testing.assert_array_equal(there["minibatch"][name], here["minibatch"][name])
    assert not np.allclose(there["minibatch"]["norm_weight"], here["minibatch"]["norm_weight"])
