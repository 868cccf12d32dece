"""Adam's metric against dense float64 numpy on what torch's own optimizers did."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from distributed import LocalCluster
from torch import nn, optim

from analyze import adam_blocks
from analyze.tables import measure_run
from capture import Recorder
from capture.store import DamagedError, layout, open_run
from tests.analyze.adam_runs import (
    COLUMNS,
    KEPT,
    PLAIN,
    Dense,
    Values,
    note_of,
    one_group,
    rows_of,
    steps_with_metric,
    train,
    two_groups,
)
from tests.analyze.small_runs import flip


def dense(g: Values, e: Values, m: Values) -> dict[str, float]:
    """Every quantity in the metric diag(m), one line each."""
    root = np.sqrt(m)
    return {
        "norm_dist_adam": np.linalg.norm(root * e),
        "norm_grad_adam": np.linalg.norm(g / root),
        "cosine_adam": (g / root)
        @ (root * e)
        / np.linalg.norm(g / root)
        / np.linalg.norm(root * e),
        "lolr_adam": g @ e / np.linalg.norm(g / root) ** 2,
    }


RECTIFIED = {"lr": 0.02, "betas": (0.0, 0.99)}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (partial(optim.Adam, **PLAIN), {}),
    "coupled decay": (partial(optim.Adam, **PLAIN, weight_decay=0.1), {}),
    "amsgrad": (partial(optim.Adam, **PLAIN, amsgrad=True), {}),
    "maximize": (partial(optim.Adam, **PLAIN, maximize=True), {}),
    "clipped": (partial(optim.Adam, **PLAIN), {"clip": 0.5, "clipped": None}),
    "foreach": (partial(optim.Adam, **PLAIN, foreach=True), {}),
    "fused": (partial(optim.Adam, **PLAIN, fused=True), {}),
    "rate as a tensor": (
        partial(optim.Adam, lr=torch.tensor(0.02, dtype=torch.float64), betas=(0.0, 0.9)),
        {},
    ),
    "adamw": (partial(optim.AdamW, **PLAIN, weight_decay=0.1), {}),
    "adamw amsgrad": (partial(optim.AdamW, **PLAIN, weight_decay=0.1, amsgrad=True), {}),
    "nadam": (partial(optim.NAdam, **PLAIN), {}),
    "radam": (partial(optim.RAdam, **RECTIFIED), {}),
}


def divided_by(seen: Dense, variant: str, t: int) -> Values:
    """What update t - 1 divided by, from what torch did."""
    entered, before = seen.entered[t - 1], seen.w[t - 1]
    sign = -1 if variant == "maximize" else 1
    decay = 0.1 if variant == "coupled decay" else 0.0
    kept = 1 - 0.02 * 0.1 if variant.startswith("adamw") else 1.0
    factor = 0.02
    if variant == "radam":  # Liu et al. 2020, algorithm 2
        longest = 2 / (1 - 0.99) - 1
        length = longest - 2 * t * 0.99**t / (1 - 0.99**t)
        assert length > 5
        factor *= np.sqrt(
            (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        )
    divided = factor * (sign * entered + decay * before) / (kept * before - seen.w[t])
    assert (divided > 0).all()
    return divided


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_metric_is_what_the_update_before_divided_by(tmp_path: Path, variant: str) -> None:
    make, options = VARIANTS[variant]
    seen = train(tmp_path / "run.zarr", make, total=17, keep_state="8", extra=True, **options)
    tables = measure_run(str(tmp_path / "run.zarr"), ["final", "step:4"], by=["model", "tensor"])
    sign = -1 if variant == "maximize" else 1
    counted = 0
    for name, table in tables.items():
        for row in rows_of(table):
            if row["step"] not in (8, 16):
                assert all(np.isnan(row[column]) for column in COLUMNS)
                continue
            t = row["step"]
            place = slice(None) if name == "model" else seen.places[row["group"]]
            g = seen.g[t] if row["stream"] == "minibatch" else seen.batches[t][row["batch"]]
            e = seen.w[t] - seen.w[{"final": -1, "step:4": 4}[row["reference"]]]
            expected = dense(sign * g[place], e[place], divided_by(seen, variant, t)[place])
            for column, value in expected.items():
                # w_t - w_{t-1} loses three digits or so of the sixteen in w; a gradient that
                # almost vanishes there loses more, but counts for less.
                assert row[column] == pytest.approx(value, rel=1e-9), (column, row)
            counted += 1
    assert counted == 2 * (1 + 2) * 2 * (1 + len(seen.places))
    assert "8, 16 updates" in note_of(tables["model"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [one_group, two_groups])
def test_with_momentum_by_the_formula(tmp_path: Path, groups: Any, dtype: torch.dtype) -> None:
    path = tmp_path / "run.zarr"
    make = partial(optim.AdamW, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    seen = train(path, make, groups=groups, dtype=dtype)
    (table,) = measure_run(str(path)).values()
    assert steps_with_metric(table) == [4, 8]
    eps = {name: 1e-8 for name in seen.places}
    if groups is two_groups:
        eps = {name: 0.3 if name in ("second.bias", "first.weight") else 0.02 for name in eps}
    for row in rows_of(table):
        if row["step"] not in (4, 8):
            continue
        t, m = row["step"], np.empty_like(seen.w[0])
        for name, place in seen.places.items():
            v = seen.state[t][name]["exp_avg_sq"].double().numpy().ravel()
            m[place] = np.sqrt(v / (1 - 0.95**t)) + eps[name]
        for column, value in dense(seen.g[t], seen.w[t] - seen.w[-1], m).items():
            # Sums of 34 products in another order.
            assert row[column] == pytest.approx(value, rel=1e-12)


def test_newtons_step_in_closed_form(tmp_path: Path) -> None:
    """With v̂ = H² and ε = 0, M = H: of f = (w - c)ᵀ H (w - c) / 2, γ_M = 1 and η*_M = 1."""
    h = torch.tensor([100.0, 1.0, 0.25, 4.0], dtype=torch.float64)
    c = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    model = nn.ParameterDict({"w": torch.zeros(4, dtype=torch.float64)})
    w = model["w"]
    optimizer = optim.Adam(model.parameters(), lr=0.1, eps=0.0)
    run = tmp_path / "run.zarr"
    with Recorder(run, model, optimizer, every=1, keep_state="1") as recorder:
        for step in range(3):
            optimizer.zero_grad()
            # Twice a constant gradient H, of which v̂ = H² whatever β₂; then the quadratic.
            loss = h @ w if step < 2 else (h * (w - c) ** 2).sum() / 2
            loss.backward()
            recorder.log(loss=loss)
            optimizer.step()
    end = tmp_path / "c.safetensors"
    safetensors.numpy.save_file({"w": c.numpy()}, end)
    (table,) = measure_run(str(run), [f"file:{end}"]).values()
    row = rows_of(table)[2]
    assert row["cosine"] < 0.8
    assert row["cosine_adam"] == pytest.approx(1, rel=1e-14)
    assert row["lolr_adam"] == pytest.approx(1, rel=1e-14)
    assert row["norm_dist_adam"] ** 2 == pytest.approx(2 * row["loss"], rel=1e-14)
    assert row["norm_grad_adam"] ** 2 == pytest.approx(2 * row["loss"], rel=1e-14)


def test_the_step_of_lolr_adam_lands_closest_and_contracts_by_the_cosine(tmp_path: Path) -> None:
    seen = train(tmp_path / "run.zarr", partial(optim.Adam, **PLAIN))
    (table,) = measure_run(str(tmp_path / "run.zarr")).values()
    row = next(row for row in rows_of(table) if row["step"] == 4)
    m, e = divided_by(seen, "adam", 4), seen.w[4] - seen.w[-1]
    ends = [
        np.sqrt(m) @ np.abs(np.sqrt(m) * (e - factor * row["lolr_adam"] * seen.g[4] / m) ** 2)
        for factor in (0.99, 1.0, 1.01)
    ]
    assert ends[1] < min(ends[0], ends[2])
    shorter = row["norm_dist_adam"] ** 2 * (1 - row["cosine_adam"] ** 2)
    # M comes from differences of weights, as above.
    assert ends[1] == pytest.approx(shorter, rel=1e-9)


def test_a_tensor_that_nothing_moves_is_left_out(tmp_path: Path) -> None:
    """`unused` never has a gradient, `late` has one from update 5 on; another batch touches it."""
    path = tmp_path / "run.zarr"
    seen = train(path, partial(optim.Adam, **PLAIN), unused=True, extra=True, total=9)
    tables = measure_run(str(path), by=["model", "tensor"])
    assert note_of(tables["model"]).endswith("where they had none: 'unused', 'late'")
    for row in rows_of(tables["tensor"]):
        lacking = row["group"] == "unused" or (row["group"] == "late" and row["step"] < 8)
        # Where ‖g‖ or ‖e‖ is 0, as of `late` at step 4, ratios are NaN as well.
        assert np.isnan(row["norm_dist_adam"]) == (lacking or row["step"] not in (4, 8))
    for row in rows_of(tables["model"]):
        if row["step"] not in (4, 8):
            continue
        t = row["step"]
        g = seen.g[t] if row["stream"] == "minibatch" else seen.batches[t][row["batch"]]
        e, m = seen.w[t] - seen.w[-1], np.zeros_like(g)
        for name, place in seen.places.items():
            if name in seen.state[t]:
                state = seen.state[t][name]
                eps = 0.3 if name in ("second.bias", "first.weight") else 0.02
                correction = 1 - 0.9 ** float(state["step"])
                m[place] = np.sqrt(state["exp_avg_sq"].numpy().ravel() / correction) + eps
        assert (m > 0).sum() == (len(m) - 5 if t == 4 else len(m) - 3)
        for column, value in dense(g[m > 0], e[m > 0], m[m > 0]).items():
            assert row[column] == pytest.approx(value, rel=1e-12)


def test_frozen_tensors_in_the_optimizer_do_not_shift_the_others(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    seen = train(path, partial(optim.Adam, **PLAIN), groups=one_group, frozen=True)
    assert "gate" not in seen.places
    (table,) = measure_run(str(path)).values()
    row = next(row for row in rows_of(table) if row["step"] == 8)
    expected = dense(seen.g[8], seen.w[8] - seen.w[-1], divided_by(seen, "adam", 8))
    assert row["cosine_adam"] == pytest.approx(expected["cosine_adam"], rel=1e-9)


def test_radam_has_no_metric_before_it_divides(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.RAdam, **RECTIFIED), keep_state="2", every=1, total=9)
    (table,) = measure_run(str(path)).values()
    # ρ of 5 updates is below 5, and plain descent is taken; at 6 it is above.
    assert steps_with_metric(table, "norm_dist_adam") == [6, 8]
    assert "left out at steps where they had none" in note_of(table)


class Mine(optim.Adam):
    """May divide by anything."""


def test_other_optimizers_say_that_they_have_no_metric(tmp_path: Path) -> None:
    words = {
        optim.SGD: "no metric: none is known of SGD, as there is of Adam, AdamW, NAdam, RAdam",
        optim.Adamax: "none is known of Adamax",
        optim.RMSprop: "none is known of RMSprop",
        Mine: "none is known of Mine",
        type("Adam", (optim.Adam,), {}): "the optimizer is not known to be torch's own Adam",
    }
    for number, (make, expected) in enumerate(words.items()):
        path = tmp_path / f"{number}.zarr"
        train(path, partial(make, lr=0.01), groups=one_group, total=5)
        (table,) = measure_run(str(path)).values()
        assert expected in note_of(table)
        assert steps_with_metric(table) == []


def test_workers_blocks_and_chunks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole.zarr", partial(optim.Adam, **PLAIN), extra=True)
    with monkeypatch.context() as patch:
        patch.setattr(layout, "TARGET_CHUNK_BYTES", 128)
        run = tmp_path / "run.zarr"
        train(run, partial(optim.Adam, **PLAIN), extra=True)
        assert open_run(run).stream("weights").grid.num_chunks == 3
        tables = [
            measure_run(str(run), ["final", "step:0"], cache=False, scheduler=how, workers=count)
            for how, count in (("synchronous", 1), ("threads", 1), ("threads", 4))
        ]
    (whole,) = measure_run(str(tmp_path / "whole.zarr"), ["final", "step:0"]).values()
    for (table,) in (found.values() for found in tables):
        for column in COLUMNS:
            np.testing.assert_array_equal(table[column], tables[0]["model"][column])
            # Tensors are summed in other pieces.
            np.testing.assert_allclose(table[column], whole[column], rtol=1e-12)


def test_blocks_are_cut_where_there_are_fewer_states_than_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "TARGET_CHUNK_BYTES", 64)
    run = tmp_path / "run.zarr"
    train(run, partial(optim.Adam, **PLAIN))
    opened = open_run(run)
    chunks = opened.stream("weights").grid.num_chunks
    assert chunks > 3
    for states, threads in ((1, 1), (1, 8), (2, 3), (5, 2), (1, 100)):
        steps = {"minibatch": np.arange(states), "extra": np.arange(states)[1:]}
        blocks = list(adam_blocks.cut(opened, steps, threads))
        for step in range(states):
            own = [block for block in blocks if block.step == step]
            assert [chunk for block in own for chunk in block.chunks] == list(range(chunks))
            assert (len(own) > 1) == (states < threads)
            assert set(own[0].streams) == {name for name in steps if step in steps[name]}


def test_more_batches_than_may_be_open_are_opened_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run.zarr"
    train(run, partial(optim.Adam, **PLAIN), extra=True)
    whole = measure_run(str(run), cache=False)["model"]
    monkeypatch.setattr(adam_blocks, "most_open", lambda threads: 2)
    again = measure_run(str(run), cache=False)["model"]
    for column in COLUMNS:
        np.testing.assert_array_equal(whole[column], again[column])


def test_a_cluster_gives_the_same_bytes_and_the_same_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    train(path, partial(optim.Adam, **PLAIN), extra=True)
    options: dict[str, Any] = {"cache": False}
    (here,) = measure_run(str(path), **options).values()
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as cluster:
        options["scheduler"] = cluster.scheduler_address
        (there,) = measure_run(str(path), **options).values()
        flip(next((path / KEPT).glob("000000008-*")), -1)
        with pytest.raises(DamagedError, match="the state kept after 8 updates is damaged"):
            measure_run(str(path), **options)
    for column in COLUMNS:
        np.testing.assert_array_equal(here[column], there[column])
