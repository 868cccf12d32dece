"""The verdict on a rate: contractions of whole runs, closed forms, and the table by layer."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from analyze.rates import Contraction, contractions
from analyze.schedule import schedule_run
from analyze.tables import measure_run
from capture.store import open_run
from tests.analyze.descents import CURVATURE, line, rates, record
from tests.analyze.recorded import Rows, random_run

Values = NDArray[np.float64]


def measured(path: Path, reference: str, source: str) -> list[Contraction]:
    table = measure_run(str(path), [reference])["model"]
    return contractions(open_run(path), table, reference, source)


def numbers(verdict: str, label: str, part: str) -> list[str]:
    """The cells of the first row of the verdict that begins so."""
    rows = (row.split() for row in verdict.splitlines())
    return next(row[2:] for row in rows if row[:2] == [label, part])


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("minibatch", {}),
        ("minibatch", {"weight_decay": 0.3}),
        ("minibatch", {"clip": 2.0}),
        ("updates", {"momentum": 0.9, "weight_decay": 0.3}),
        ("updates", {"make": torch.optim.Adam}),
    ],
)
def test_single_steps_multiply_to_what_happened(
    tmp_path: Path, source: str, settings: dict[str, Any]
) -> None:
    path = record(tmp_path / "run.zarr", 60, rates, **settings)
    early, middle, late = measured(path, "final", source)
    weights = Rows(path)["weights"]
    squares = ((weights - weights[-1]) ** 2).sum(axis=1)
    d = np.diff(weights, axis=0)
    # The last tenth, from 54 on, is left out; a third of the rest has 18 steps.
    for first, found in ((0, early), (18, middle), (36, late)):
        last = first + 17
        whole = (squares[last] / squares[first]) ** (1 / 17)
        assert found.happened == pytest.approx(whole, rel=1e-12)
        # 18 steps: that of the last saved step too.
        steps = (squares[last + 1] / squares[first]) ** (1 / 18)
        assert found.taken == pytest.approx(steps, rel=1e-11)
        best = [
            np.linalg.lstsq(d[t, :, None], weights[-1] - weights[t], rcond=None)[1][0] / squares[t]
            for t in range(first, first + 18)
        ]
        assert found.optimal == pytest.approx(np.exp(np.log(best).mean()), rel=1e-9)
        assert (found.rows, found.gradients) == (18, 18)
        assert found.optimal <= found.taken


def test_bounds_are_the_extremes_of_the_part(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 60, rates, noise=0.1)
    early, *_ = measured(path, "final", "updates")
    rows = Rows(path)
    e, g = (rows["weights"][:18] - rows["weights"][-1]), rows["minibatch"][:18]
    mu = ((g * e).sum(1) / (e * e).sum(1)).min()
    bound = np.sqrt((g * g).sum(1) / (e * e).sum(1)).max()
    assert (early.mu, early.bound) == pytest.approx((mu, bound), rel=1e-12)
    assert early.negative == 0
    assert early.conditional == pytest.approx(1 - mu**2 / bound**2, rel=1e-12)


def test_on_a_round_bowl_the_conditional_rate_is_one_step(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 20, lambda _: 0.1 / CURVATURE, noise=0.0, round_bowl=True)
    save_file({name: np.zeros(7) for name in ("a", "b")}, tmp_path / "minimum.safetensors")
    minimum = f"file:{tmp_path / 'minimum.safetensors'}"
    for found in measured(path, minimum, "minibatch"):
        assert (found.mu, found.bound) == pytest.approx((CURVATURE, CURVATURE), rel=1e-13)
        assert found.conditional == pytest.approx(0, abs=1e-13)
        assert found.optimal == pytest.approx(0, abs=1e-13)
        # (1 - η c)², step by step and as a whole.
        assert (found.taken, found.happened) == pytest.approx((0.81, 0.81), rel=1e-13)
    _, verdict = schedule_run(str(path), minimum)
    assert numbers(verdict, "a", "early")[:3] == ["7", "0.1", "[0.1,"]
    cells = numbers(verdict, "early", "1")
    assert " ".join(cells) == "- 0.19 7 1 - 0.19 1 - 1 7 2 2 0.5 1 - 1"


def test_a_negative_rsi_leaves_not_even_a_conditional_rate(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr")
    rsi = measure_run(str(path), streams=["minibatch"])["model"]["rsi"].to_numpy()
    # Of 6 updates, 5.4 lie before the end: parts begin at 1.8 and 3.6.
    parts = {"early": rsi[:2], "middle": rsi[2:4], "late": rsi[4:]}
    negative = {name: int((values <= 0).sum()) for name, values in parts.items()}
    assert sum(negative.values()) > 0
    found = {one.part: one for one in measured(path, "final", "updates")}
    assert {name: one.negative for name, one in found.items()} == negative
    _, verdict = schedule_run(str(path))
    for name, count in negative.items():
        assert np.isnan(found[name].conditional) == (count > 0)
        said = f"{name}: no rate, not even a conditional one: RSI⁻ was not above 0 at {count} of 2"
        assert (said in verdict) == (count > 0)


def test_the_verdict_keeps_the_rate_conditional(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 60, rates)
    _, verdict = schedule_run(str(path))
    words = " ".join(verdict.split())
    assert "held for every point and minibatch" in words
    assert "this also forces every minibatch gradient to vanish at w*" in words
    assert "measured rows of one path, which prove nothing" in words
    path = record(tmp_path / "bare.zarr", 60, rates, gradients=("updates",))
    assert "no conditional rate: no minibatch gradients" in schedule_run(str(path))[1]


def test_the_table_by_layer_is_that_of_its_tensors(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 60, rates, momentum=0.9)
    _, verdict = schedule_run(str(path), by="tensor")
    weights = Rows(path)["weights"]
    e, u = (weights - weights[-1])[:18, 7:], np.diff(weights, axis=0)[:18, 7:]
    # η/η* is the inverse of lolr_update, whatever the rate.
    inverse = -(u * u).sum(1) / (u * e).sum(1)
    low, mid, high = np.quantile(inverse, [0.1, 0.5, 0.9])
    negative = (inverse < 0).mean()
    found = numbers(verdict, "b", "early")
    assert found[:6] == [
        *("18", f"{mid:.3g}", f"[{low:.3g},", f"{high:.3g}]"),
        *(f"{100 * negative:.3g}", "%"),
    ]
    assert "of the minibatch gradients: η* = lolr, along -g" in verdict
    for by in ("model", "layer", "kind"):
        assert f"\n{by} " in schedule_run(str(path), by=by)[1]
    _, verdict = schedule_run(str(path), by={"second": "b"})
    assert numbers(verdict, "second", "early") == found
    assert "\ncustom " in verdict
    assert numbers(verdict, "rest", "early")[0] == "18"


def test_plain_sgd_has_one_table_for_both_streams(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 30, rates)
    for source, there in (("updates", "of the updates"), ("minibatch", "of the minibatch")):
        _, verdict = schedule_run(str(path), source=source)
        assert verdict.count("\nof the ") == 1
        assert f"\n{there}" in verdict
        assert "one table for both" in verdict


def test_heavy_ball_updates_and_gradients_have_one_null(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 30, rates, momentum=0.9)
    table: pa.Table = measure_run(str(path), ["final", "mean:3"], by=["layer"])["layer"]
    by_stream = {
        name: table.filter((pc.field("stream") == name) & (pc.field("reference") == "final"))
        for name in ("minibatch", "updates")
    }
    updates, expected = by_stream["updates"], by_stream["minibatch"]["lolr_null"].to_numpy()
    found = updates["lr"].to_numpy() * updates["lolr_update_null"].to_numpy()
    assert found == pytest.approx(expected, rel=1e-12)
    means = table.filter(pc.field("reference") == "mean:3")
    assert np.isnan(means["lolr_update_null"].to_numpy()).all()


def test_a_part_without_rows_shows_no_numbers(tmp_path: Path) -> None:
    path = line(tmp_path / "run.zarr", [1, 0], [0.1])
    early, middle, late = measured(path, "final", "updates")
    assert early.rows == 1
    assert (middle.rows, late.rows) == (0, 0)
    assert np.isnan([early.happened, middle.taken, late.conditional]).all()
    _, verdict = schedule_run(str(path))
    assert numbers(verdict, "late", "–")[0] == "0"
