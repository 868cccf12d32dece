"""The noise of batches beside dense float64 numpy, and its estimates on draws that are known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.linalg import norm

from analyze.noise import batch_noise
from analyze.pairs_of_run import measure_pairs
from tests.analyze.dense import GROUPS
from tests.analyze.recorded import random_run, read_rows, write_run

# Sums of 25 products of numbers near 1, put together from a few terms.
CLOSE: dict[str, Any] = {"rel": 1e-10, "abs": 1e-12}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("pairs") / "run.zarr")


def test_noise_of_batches_is_that_of_the_definitions(run: Path) -> None:
    noise = measure_pairs(str(run), by=["model", "layer"])["layer"].noise
    g = read_rows(run)["fixed"]
    assert noise.num_rows == 7 * 3
    for row in noise.to_pylist():
        own = g[row["step"]][:, GROUPS["layer"][row["group"]]]
        different = [own[a] @ own[b] for a in range(3) for b in range(3) if a != b]
        squares = [batch @ batch for batch in own]
        variance = np.mean(squares) - np.mean(different)
        expected = {
            "noise_corrected": np.mean(different),
            "square_of_mean": norm(own.mean(axis=0)) ** 2,
            "mean_of_squares": np.mean(squares),
            "norm_grad_min": norm(own, axis=1).min(),
            "norm_grad_max": norm(own, axis=1).max(),
            # The unbiased variance of the batches, summed over the coordinates.
            "noise_variance": own.var(axis=0, ddof=1).sum(),
            "noise_scale": variance / np.mean(different) if np.mean(different) > 0 else math.nan,
        }
        assert {name: row[name] for name in expected} == pytest.approx(
            expected, nan_ok=True, **CLOSE
        )
        assert (row["stream"], row["batches"]) == ("fixed", 3)


def test_the_corrected_norm_is_unbiased_and_the_plain_one_is_not() -> None:
    """1,000 steps of 5 batches around a gradient of norm 1, with noise of variance 40."""
    rng = np.random.default_rng(7)
    true = np.full(10, np.sqrt(0.1))
    g = true + 2 * rng.standard_normal((1000, 5, 10))
    found = batch_noise((g @ g.swapaxes(1, 2))[..., None])
    corrected = found["noise_corrected"][:, 0]
    error = corrected.std() / np.sqrt(1000)
    assert abs(corrected.mean() - 1) < 4 * error < 1
    assert (corrected < 0).any()
    assert found["square_of_mean"].mean() == pytest.approx(1 + 40 / 5, rel=0.1)
    assert found["noise_variance"].mean() == pytest.approx(40, rel=0.05)


def test_one_batch_has_no_products_of_different_ones() -> None:
    found = batch_noise(np.full((2, 1, 1, 1), 4.0))
    assert np.isnan([found["noise_corrected"], found["noise_scale"]]).all()
    assert found["norm_grad_min"].tolist() == [[2.0], [2.0]]


def test_one_nan_batch_leaves_no_noise_of_its_step_alone(tmp_path: Path) -> None:
    streams = {"weights": np.ones((3, 25), "f4"), "fixed": np.ones((3, 2, 25), "f4")}
    streams["fixed"][1, 0, 3] = np.nan
    path = write_run(tmp_path / "run.zarr", streams)
    corrected = measure_pairs(str(path))["model"].noise["noise_corrected"].to_pylist()
    assert [math.isnan(value) for value in corrected] == [False, True, False]
