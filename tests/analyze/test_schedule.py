"""Rates from recorded runs: closed forms, dense least squares, and what cannot be told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn

from analyze.schedule import fit_schedule, schedule_run, write_schedule
from analyze.tables import measure_run
from capture.optimizers import learning_rate, read_lr_file
from capture.store import DamagedError, InputError, UsageError, open_run
from tests.analyze.descents import CURVATURE, line, rates, record
from tests.analyze.recorded import OPTIMIZER, Rows, random_run

Values = NDArray[np.float64]


def rows_of(path: Path) -> tuple[Values, Values, Values]:
    """Weights ``[T + 1, D]``, updates ``[T, D]`` and rates ``[T]``, as zarr reads them."""
    rows = Rows(path)
    return rows["weights"], rows["updates"], rows.scalar("lr")


def test_on_a_round_bowl_the_rate_is_the_inverse_of_the_curvature(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 20, lambda _: 0.1 / CURVATURE, noise=0.0, round_bowl=True)
    save_file({name: np.zeros(7) for name in ("a", "b")}, tmp_path / "minimum.safetensors")
    minimum = f"file:{tmp_path / 'minimum.safetensors'}"
    for source in ("updates", "minibatch"):
        found, _ = schedule_run(str(path), minimum, source=source)
        # The update is a difference of weights of size 1 that shrink to 0.1: one digit is lost.
        assert found.lr == pytest.approx(1 / CURVATURE, rel=1e-13)
        assert found.status.tolist() == ["fit"] * 20
    write_schedule(found, tmp_path / "rate.csv")
    # Followed from another start, the first step ends at the minimum.
    rate = learning_rate(str(tmp_path / "rate.csv"), 9.0, 5, 1)
    weight = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=rate(0))
    (CURVATURE * weight.square() / 2).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert weight.detach().numpy() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("smooth", [1, 3, 7, 99])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_window_has_the_rate_of_least_squares(
    tmp_path: Path, smooth: int, momentum: float
) -> None:
    path = record(tmp_path / "run.zarr", 30, rates, momentum=momentum)
    found, _ = schedule_run(str(path), smooth=smooth)
    weights, updates, lr = rows_of(path)
    e, d = weights[:-1] - weights[-1], -updates / lr[:, None]
    # Steps 27, 28 and 29 are the last tenth: in no window.
    for step in range(27):
        part = slice(max(step - smooth // 2, 0), min(step + smooth // 2 + 1, 27))
        (best,), *_ = np.linalg.lstsq(d[part].reshape(-1, 1), e[part].ravel(), rcond=None)
        assert found.lr[step] == pytest.approx(max(best, 0), rel=1e-11)
        assert found.window[step] == len(e[part])
    for step in range(30):
        (alone,), *_ = np.linalg.lstsq(d[step, :, None], e[step], rcond=None)
        assert found.raw[step] == pytest.approx(alone, rel=1e-11)
    assert found.lr[27:].tolist() == [found.lr[26]] * 3
    assert (found.status[27:] == "held").all()
    assert found.window[27:].tolist() == [0] * 3
    assert found.run_lr.tolist() == lr.tolist()


def test_the_raw_rate_is_eta_times_lolr_update_for_adam_too(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 30, rates, make=torch.optim.AdamW, weight_decay=0.1)
    found, verdict = schedule_run(str(path))
    table = measure_run(str(path), streams=["updates"])["model"]
    expected = table["lr"].to_numpy() * table["lolr_update"].to_numpy()
    assert found.raw == pytest.approx(expected, rel=1e-13)
    assert "minibatch: no η/η*, the rate of this optimizer is not one along -g" in verdict


@pytest.mark.parametrize(
    ("clip", "settings"),
    [(None, {}), (None, {"weight_decay": 0.3}), (2.0, {}), (None, {"maximize": True})],
)
def test_both_sources_tell_the_same_of_plain_sgd(
    tmp_path: Path, clip: float | None, settings: dict[str, Any]
) -> None:
    path = record(tmp_path / "run.zarr", 30, rates, clip=clip, **settings)
    one, other = (schedule_run(str(path), source=name)[0] for name in ("updates", "minibatch"))
    # The stored update is rounded as a difference of weights of size 1: 1e-16 in some 1e-2.
    assert one.lr == pytest.approx(other.lr, rel=1e-10)
    assert one.raw == pytest.approx(other.raw, rel=1e-10)
    assert (one.source, other.source) == ("updates", "minibatch")


def test_without_updates_plain_sgd_has_its_gradients(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 30, rates, gradients=("minibatch",))
    assert schedule_run(str(path))[0].source == "minibatch"


def test_gradients_that_were_clipped_before_decay_was_added_are_left_out(tmp_path: Path) -> None:
    path = record(
        tmp_path / "run.zarr", 30, rates, clip=3.0, weight_decay=0.3, gradients=("minibatch",)
    )
    found, _ = schedule_run(str(path), smooth=1)
    clipped = Rows(path).scalar("clip_factor") < 1
    assert 0 < clipped.sum() < 30
    assert (np.isnan(found.raw) == clipped).all()
    assert f"left out of every window: {clipped[:27].sum()}" in found.describe()


@pytest.mark.parametrize(
    ("options", "source", "words"),
    [
        ({"momentum": 0.9, "gradients": ("minibatch",)}, None, "this SGD has momentum"),
        (
            {"momentum": 0.9},
            "minibatch",
            "this SGD has momentum, and steps elsewhere: .*leave out --from",
        ),
        ({"gradients": ("minibatch",)}, "updates", "no updates are recorded: .*--gradients"),
        ({"gradients": ("updates",)}, "minibatch", "no minibatch gradients are recorded"),
        ({"gradients": ()}, None, "no minibatch gradients .*--gradients minibatch,updates"),
        (
            {"make": torch.optim.Adam, "gradients": ("minibatch",)},
            None,
            "no updates are recorded, and minibatch gradients tell no rate here: the optimizer is "
            "Adam, not plain SGD: .*record the training again with --gradients minibatch,updates",
        ),
    ],
)
def test_a_run_without_what_it_takes_says_what_to_record(
    tmp_path: Path, options: dict[str, Any], source: str | None, words: str
) -> None:
    path = record(tmp_path / "run.zarr", 4, rates, **options)
    with pytest.raises(InputError, match=words):
        schedule_run(str(path), source=source)


def test_groups_with_rates_of_their_own_need_updates(tmp_path: Path) -> None:
    path = random_run(
        tmp_path / "run.zarr",
        change=lambda s: s.update(
            group_momentum=np.zeros((6, 2)), group_lr=np.tile([0.1, 0.2], (6, 1))
        ),
    )
    with pytest.raises(InputError, match="the parameter groups have rates of their own"):
        schedule_run(str(path), source="minibatch")
    _, verdict = schedule_run(str(path))
    assert "η: that of the first parameter group, others had rates of their own" in verdict


def test_negative_windows_are_0_and_steps_without_a_rate_are_bridged(tmp_path: Path) -> None:
    # Steps 2, 3 and 4 lead away from w* = 0; 6, 7 and 8 had the rate 0, and 11 and 12 a gradient 0.
    positions = [8, 6, 4, 5, 6, 7, 4, 4, 4, 4, 1, 0.5, 0.5, 0.5, 0]
    lr = [0.5] * 6 + [0] * 3 + [0.5] * 5
    path = line(tmp_path / "run.zarr", positions, lr)
    found, _ = schedule_run(str(path), smooth=3, factor=0.5)
    assert found.status.tolist() == [
        *("fit", "fit", "fit", "zero", "fit", "fit", "fit", "gap", "fit", "fit", "fit", "fit"),
        *("gap", "held"),
    ]
    # Steps 1 to 3: d = 4, -2, -2 at e = 6, 4, 5. Steps 2 to 4: d = -2, -2, -2 at e = 4, 5, 6.
    assert found.lr[2] == pytest.approx(0.5 * (4 * 6 - 2 * 4 - 2 * 5) / (16 + 4 + 4))
    assert found.lr[3] == 0
    # Alone in their windows: step 5 with d = 6 at e = 7, step 9 with d = 6 at e = 4.
    assert found.lr[[6, 8]] == pytest.approx([0.5 * 7 / 6, 0.5 * 4 / 6])
    assert found.lr[7] == pytest.approx((found.lr[6] + found.lr[8]) / 2)
    assert found.lr[12:].tolist() == [found.lr[11]] * 2
    assert "10 fitted, 1 set to 0" in " ".join(found.describe().split())
    assert "2 between their neighbours" in found.describe()
    assert "left out of every window: 5" in found.describe()
    assert found.describe().endswith("times 0.5")


def test_a_run_that_only_leads_away_has_no_rate(tmp_path: Path) -> None:
    path = line(tmp_path / "run.zarr", [1, 2, 4, 7], [0.1] * 3)
    behind = line(tmp_path / "other.zarr", [0, 0], [0.1])
    with pytest.raises(InputError, match=r"no rate follows: .*nowhere above 0: .*--smooth"):
        schedule_run(str(path), f"run:{behind}")
    with pytest.raises(InputError, match="no saved step lies before the end effect"):
        schedule_run(str(path), "step:0")


@pytest.mark.parametrize("lr", [0.0, np.nan, np.inf])
def test_rates_that_are_no_rates_leave_nothing(tmp_path: Path, lr: float) -> None:
    path = line(tmp_path / "run.zarr", [4, 3, 2, 1, 0], [lr] * 4)
    with pytest.raises(InputError, match="no rate follows: no saved step"):
        schedule_run(str(path))


def test_one_row_is_a_constant_rate(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 1, lambda _: 0.1)
    # Its only step is the end effect as well: w* is where it led.
    found, verdict = schedule_run(str(path))
    assert found.lr == pytest.approx([0.1])
    assert "T = 1 updates" in verdict


def test_nan_in_a_row_is_left_out_of_its_windows(tmp_path: Path) -> None:
    positions = [8.0, 7.0, np.nan, 5.0, 4.0, 3.0, 0.0]
    path = line(tmp_path / "run.zarr", positions, [0.5] * 6)
    found, _ = schedule_run(str(path), smooth=3)
    assert np.isnan(found.raw).tolist() == [False, True, True, False, False, False]
    assert found.window[:5].tolist() == [1, 1, 1, 2, 3]
    assert np.isfinite(found.lr).all()


def test_a_mean_reference_has_its_end_effect_too(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 30, rates)
    found, verdict = schedule_run(str(path), "mean:4")
    weights, updates, lr = rows_of(path)
    e = weights[:-1] - weights[-4:].mean(axis=0)
    expected = -(updates * e).sum(1) / (updates**2).sum(1) * lr
    assert found.raw == pytest.approx(expected, rel=1e-10)
    assert (found.status == "held").tolist() == [False] * 27 + [True] * 3
    assert "no null: w* is a mean" in verdict


def test_rows_after_w_n_are_held_and_one_far_away_has_no_end(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 30, rates)
    other = record(tmp_path / "other.zarr", 31, rates)
    found, _ = schedule_run(str(path), "step:20")
    assert (found.status == "held").tolist() == [False] * 18 + [True] * 12
    found, verdict = schedule_run(str(path), f"run:{other}")
    assert "held" not in found.status
    assert "no null" in verdict


def test_a_run_that_has_not_finished_needs_another_reference(tmp_path: Path) -> None:
    path = line(tmp_path / "run.zarr", [4, 3, 2, 1, 0], [0.5] * 4, complete=False)
    with pytest.raises(InputError, match="has not finished"):
        schedule_run(str(path))
    found, verdict = schedule_run(str(path), "step:4", smooth=1)
    assert found.lr[:3] == pytest.approx([4 * 0.5, 3 * 0.5, 2 * 0.5])
    assert "not finished" in verdict


def test_a_branch_counts_from_the_start_of_its_parent(tmp_path: Path) -> None:
    path = line(tmp_path / "a.zarr", [4, 3, 2, 1, 0], [0.5] * 4, parent={"position": 40})
    assert schedule_run(str(path))[0].steps.tolist() == [40, 41, 42, 43]
    path = line(tmp_path / "b.zarr", [4, 3, 2, 1, 0], [0.5] * 4, parent={"position": "far"})
    with pytest.raises(DamagedError, match="parent"):
        schedule_run(str(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"smooth": 0}, "no middle"),
        ({"smooth": 4}, "a window of 4 rows has no middle; use an odd number"),
        ({"smooth": -3}, "no middle"),
        ({"factor": 0.0}, "above 0"),
        ({"factor": np.nan}, "above 0"),
        ({"factor": np.inf}, "above 0"),
        ({"source": "fixed"}, "no rate comes from 'fixed'; choose from updates, minibatch"),
    ],
)
def test_nonsense_is_refused_before_anything_is_measured(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    path = line(tmp_path / "run.zarr", [1, 0], [0.1])
    # There is no such file: that would be the complaint if w* had been looked at.
    with pytest.raises(UsageError, match=words):
        schedule_run(str(path), "file:none.safetensors", **options)


def test_the_file_gives_back_every_number(tmp_path: Path) -> None:
    path = record(tmp_path / 'a, "b".zarr', 30, rates, every=3)
    found, _ = schedule_run(str(path), f"run:{path}", smooth=3, factor=1 / 3)
    write_schedule(found, tmp_path / "rate.csv")
    steps, values = read_lr_file(str(tmp_path / "rate.csv"))
    assert steps == found.steps.tolist() == list(range(0, 30, 3))
    assert values == found.lr.tolist()
    rate = learning_rate(str(tmp_path / "rate.csv"), 1.0, 60, 1)
    asked = np.arange(60)
    assert [rate(step) for step in asked.tolist()] == np.interp(asked, steps, values).tolist()
    first = (tmp_path / "rate.csv").read_text().splitlines()[0]
    assert first == "step,lr,status,raw,window,run_lr,source,smooth,factor,reference"


def test_the_default_window_is_a_tenth_of_the_rows(tmp_path: Path) -> None:
    def smooth(total: int) -> int:
        positions = np.arange(total + 1.0)[::-1].tolist()
        path = line(tmp_path / f"{total}.zarr", positions, [1.0] * total)
        return schedule_run(str(path))[0].smooth

    assert [smooth(total) for total in (4, 50, 60, 130)] == [5, 5, 7, 13]


def test_a_table_of_ones_own_does_as_well(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", 30, rates)
    table = measure_run(str(path), ["step:3", "final"])["model"]
    found = fit_schedule(open_run(path), table, "final")
    assert found.lr.tolist() == schedule_run(str(path))[0].lr.tolist()


OTHER: Mapping[str, Any] = {**OPTIMIZER, "kind": "other", "no_null_reason": "it is of another kind"}


def test_sgd_of_another_kind_is_not_plain(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", optimizer=OTHER)
    with pytest.raises(InputError, match="it is of another kind"):
        schedule_run(str(path), source="minibatch")
