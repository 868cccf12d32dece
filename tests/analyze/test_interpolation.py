"""Interpolation is called from losses and gradients of single batches at w_0 and w_T, or not."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from analyze.interpolation import call_interpolation
from analyze.tables import concatenate
from capture.store.errors import UsageError
from tests.analyze.comparable import table_of


def measured(
    stream: str, start: list[float], end: list[float], *, losses: tuple[float, float] = (2.0, 0.01)
) -> pa.Table:
    """Norms of B batches at w_0, on the way, and at w_T = w_100; the middle is large."""
    batches = len(start)
    middle = [1e9] * batches
    steps = np.repeat([0, 50, 100], batches)
    uneven = np.linspace(0.5, 1.5, batches) if batches > 1 else [1.0]
    columns: dict[str, Any] = {
        "step": steps,
        "epoch": steps / 10,
        "norm_grad": [*start, *middle, *end],
        "loss": np.repeat([losses[0], 1e9, losses[1]], batches) * np.tile(uneven, 3),
    }
    if stream == "fixed":
        columns["batch"] = pa.array(np.tile(np.arange(batches), 3))
    count = 3 * batches
    table = table_of("run", np.full(count, 0.1), total=100, every=1, stream=stream)
    for name, values in columns.items():
        place = table.column_names.index(name)
        field = table.schema.field(name)
        table = table.set_column(place, field, pa.array(values, field.type))
    return table


def test_small_loss_and_gradients_of_every_batch_interpolate() -> None:
    table = measured("fixed", [1.0, 4.0], [0.005, 0.03], losses=(2.0, 0.01))
    (call,) = call_interpolation(table)
    assert call.verdict == "interpolates"
    # 0.005 / 1 and 0.03 / 4: each batch is compared with itself.
    assert call.gradient == pytest.approx(0.0075)
    assert (call.gradient_norm, call.batches, call.loss_stream) == (0.03, 2, "fixed")
    # Losses 0.5 and 1.5 times the mean in the two batches.
    assert (call.loss_start, call.loss) == pytest.approx((2.0, 0.01))
    assert call.reason == "both ≤ 0.01"


@pytest.mark.parametrize(
    ("end", "loss", "verdict", "reason"),
    [
        ([0.005, 0.03], 0.01, "interpolates", "both ≤ 0.01"),
        # One batch is enough.
        ([0.5, 0.03], 0.01, "does not", "gradients ≥ 0.1"),
        ([0.005, 0.03], 0.3, "does not", "loss ≥ 0.1"),
        ([0.5, 0.03], 0.3, "does not", "loss and gradients ≥ 0.1"),
        ([0.05, 0.03], 0.01, "cannot be told", "between 0.01 and 0.1"),
        ([0.005, 0.03], 0.1, "cannot be told", "between 0.01 and 0.1"),
    ],
)
def test_each_call_names_what_it_rests_on(
    end: list[float], loss: float, verdict: str, reason: str
) -> None:
    (call,) = call_interpolation(measured("fixed", [1.0, 4.0], end, losses=(2.0, loss)))
    assert (call.verdict, call.reason) == (verdict, reason)


def test_the_threshold_is_the_users() -> None:
    table = measured("fixed", [1.0, 1.0], [0.05, 0.05], losses=(1.0, 0.03))
    assert call_interpolation(table)[0].verdict == "cannot be told"
    assert call_interpolation(table, 0.06)[0].verdict == "interpolates"
    assert call_interpolation(table, 0.001)[0].verdict == "does not"
    for threshold in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="threshold of interpolation"):
            call_interpolation(table, threshold)


def test_the_loss_of_the_whole_training_set_comes_first() -> None:
    fixed = measured("fixed", [1.0, 1.0], [0.001, 0.001], losses=(2.0, 0.001))
    full = measured("full", [1.0], [0.0], losses=(2.0, 0.5))
    (call,) = call_interpolation(concatenate([fixed, full]))
    assert (call.loss, call.loss_stream, call.verdict) == (0.5, "full", "does not")


def test_a_vanishing_full_gradient_shows_nothing() -> None:
    (call,) = call_interpolation(measured("full", [1.0], [1e-9], losses=(2.0, 1e-9)))
    assert call.verdict == "cannot be told"
    assert "capture probe RUN --gradients fixed:10,full" in call.reason
    assert call.loss == pytest.approx(1e-9)  # the evidence that there is


def test_rsi_and_eb_have_no_part_in_it() -> None:
    rise = np.geomspace(1, 1e6, 100)
    (call,) = call_interpolation(table_of("run", np.full(100, 0.1), rsi=rise, eb=rise))
    assert (call.verdict, call.batches) == ("cannot be told", 0)


@pytest.mark.parametrize(
    ("start", "end", "losses"),
    [
        ([1.0, 1.0], [math.nan, 0.001], (2.0, 0.001)),
        ([0.0, 1.0], [0.001, 0.001], (2.0, 0.001)),
        ([1.0, 1.0], [0.001, 0.001], (2.0, math.nan)),
        ([1.0, 1.0], [0.001, 0.001], (math.inf, 0.001)),
        ([1.0, 1.0], [0.001, 0.001], (0.0, 0.0)),
    ],
)
def test_what_is_not_finite_decides_nothing(
    start: list[float], end: list[float], losses: tuple[float, float]
) -> None:
    (call,) = call_interpolation(measured("fixed", start, end, losses=losses))
    assert call.verdict == "cannot be told"
    assert "not finite" in call.reason


def test_only_batches_at_both_ends_count() -> None:
    whole = measured("fixed", [1.0, 1.0], [0.001, 5.0])
    (call,) = call_interpolation(whole.slice(0, 5))  # the second batch lacks w_T
    assert (call.batches, call.verdict) == (1, "interpolates")
    (call,) = call_interpolation(whole.slice(0, 4))
    assert (call.batches, call.verdict) == (0, "cannot be told")


def test_several_references_change_nothing() -> None:
    table = measured("fixed", [1.0, 1.0], [0.001, 0.002])
    again = table.set_column(
        table.column_names.index("reference"),
        table.schema.field("reference"),
        pa.array(["step:0"] * table.num_rows),
    )
    assert call_interpolation(concatenate([table, again])) == call_interpolation(table)
