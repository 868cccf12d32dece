"""What a run says of its optimizer: read as recorded, refused where damaged; a null or a reason."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze.controls import OwnPath
from analyze.measure import Measure
from analyze.optimizer import own_path, read_optimizer
from analyze.tables import measure_run, read_metadata
from capture import open_run
from capture.store import DamagedError, TensorTable
from tests.analyze.recorded import OPTIMIZER, TABLE, Values, random_run, read_rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "other", "name": "Adam"}, "no null: Adam has no closed form"),
        ({}, "no null: weight decay brings in ‖w_0‖"),
        ({"no_null_reason": "groups differ in nesterov"}, "no null: groups differ in nesterov; "),
    ],
)
def test_where_there_is_no_null_the_reason_is_told(
    tmp_path: Path, change: dict[str, str], words: str
) -> None:
    path = random_run(
        tmp_path / "run.zarr", optimizer={**OPTIMIZER, **change}, initial_norm_by_tensor=None
    )
    reason = own_path(open_run(path))
    assert isinstance(reason, str)
    assert reason.startswith(words)


def test_a_gradient_that_was_missing_now_and_then_leaves_no_null(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", gradient_missing={"head.weight": 2})
    reason = own_path(open_run(path))
    assert isinstance(reason, str)
    assert "'head.weight' had no gradient in 2 steps" in reason


def test_a_tensor_that_never_had_a_gradient_adds_nothing(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", gradient_missing={"head.weight": 6})
    found = own_path(open_run(path))
    assert isinstance(found, OwnPath)
    assert found.groups.tolist() == [0, 1, -1, -1]


def test_what_the_null_reads_is_what_was_recorded(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr")
    found, rows = own_path(open_run(path)), read_rows(path)
    assert isinstance(found, OwnPath)
    assert found.groups.tolist() == [0, 1, 0, -1]
    assert np.array_equal(found.grad_norms, rows.scalar("grad_norm_by_tensor"))
    first = np.split(rows["weights"][0], TABLE.offsets[1:-1])
    assert found.initial_norms == pytest.approx([np.linalg.norm(part) for part in first])
    assert "and to w_0, which weight decay brings in" in found.assumption()


def test_momentum_from_before_the_run_leaves_no_null(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", optimizer_had_state=True)
    table = measure_run(str(path), streams=["minibatch"])["model"]
    reason = read_metadata(table)["null"][f"{path}|final"]
    assert reason.startswith("no null: the optimizer brought momentum along")
    assert np.isnan(table["cosine_null"].to_numpy()).all()


def test_a_run_that_has_not_finished_has_no_null(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", complete=False)
    assert own_path(open_run(path)) == "no null: the run has not finished"


@pytest.mark.parametrize(("dtype", "word"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_updates_that_were_rounded_leave_no_null(tmp_path: Path, dtype: str, word: str) -> None:
    first, *others = TABLE.parameters
    table = TensorTable((replace(first, dtype=dtype), *others))
    path = random_run(tmp_path / "run.zarr", table=table)
    reason = own_path(open_run(path))
    assert isinstance(reason, str)
    assert reason.startswith(f"no null: updates of 'body.0.weight' are rounded to {word}")


def test_a_rounded_tensor_that_is_not_updated_does_no_harm(tmp_path: Path) -> None:
    *others, last = TABLE.parameters
    table = TensorTable((*others, replace(last, dtype="BF16")))
    assert isinstance(own_path(open_run(random_run(tmp_path / "r", table=table))), OwnPath)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("mean:2", "w* is a mean"),
        ("file:w.safetensors", "w* is not known to be an iterate of this run's own path"),
        ("run:b.zarr", "w* is not known to be an iterate of this run's own path"),
        ("step:7", "the every-step scalars end before step 7, at 6"),
    ],
)
def test_the_reason_is_that_of_the_reference(tmp_path: Path, reference: str, words: str) -> None:
    measure = Measure(open_run(random_run(tmp_path / "run.zarr")))
    steps = np.arange(6)
    moments = np.ones((6, 1, len(TABLE.names), 7))
    found = measure.quantities("minibatch", steps, moments, [reference], np.zeros(4, np.int64))
    assert measure.nulls[reference].startswith(f"no null: {words}")
    assert "cosine_null" not in found


def test_norms_that_are_not_finite_leave_no_null_and_it_is_said(tmp_path: Path) -> None:
    def spoil(scalars: dict[str, Values]) -> None:
        scalars["grad_norm_by_tensor"][3, 1] = np.nan

    path = random_run(tmp_path / "run.zarr", change=spoil)
    table = measure_run(str(path), ["final", "step:2"], streams=["minibatch"])["model"]
    nulls = read_metadata(table)["null"]
    why = "the run's norms are not finite"
    assert nulls[f"{path}|final"] == f"no null: {why} at step 3"
    # The way to w_2 was sound.
    assert nulls[f"{path}|step:2"].endswith(f"; no null from step 3 on, {why}")
    null, final = table["cosine_null"].to_numpy(), table["reference"].to_numpy() == "final"
    assert np.isnan(null[final]).all()
    assert np.isfinite(null[~final]).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": ["SGD"]}, "optimizer"),
        ({"optimizer": {**OPTIMIZER, "kind": 3}}, "kind"),
        ({"optimizer": {**OPTIMIZER, "dampening": "none"}}, "dampening"),
        ({"optimizer": {**OPTIMIZER, "dampening": [0.0]}}, "dampening"),
        ({"optimizer": {**OPTIMIZER, "nesterov": "no"}}, "nesterov"),
        ({"optimizer": {**OPTIMIZER, "weight_decay": ["coupled"]}}, "weight_decay"),
        ({"gradient_missing": [1]}, "gradient_missing"),
        ({"gradient_missing": {"scale": "two"}}, "gradient_missing"),
        ({"initial_norm_by_tensor": [1.0, 2.0]}, "initial_norm_by_tensor"),
        ({"initial_norm_by_tensor": "1"}, "initial_norm_by_tensor"),
        ({"optimizer_had_state": "no"}, "optimizer_had_state"),
    ],
)
def test_facts_of_a_wrong_form_are_damage(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    run = open_run(random_run(tmp_path / "run.zarr"))
    run.attributes.update(json.loads(json.dumps(change)))
    with pytest.raises(DamagedError, match=rf"attributes are damaged, .*{words}.*zarr\.json"):
        Measure(run)


def test_a_parameter_group_that_is_not_there_is_damage(tmp_path: Path) -> None:
    first, *others = TABLE.parameters
    table = TensorTable((replace(first, group=5), *others))
    run = open_run(random_run(tmp_path / "run.zarr", table=table))
    with pytest.raises(DamagedError, match="a parameter group has no group_lr"):
        own_path(run)
    with pytest.raises(DamagedError, match="a parameter group has no group_weight_decay"):
        Measure(open_run(random_run(tmp_path / "b", table=table, optimizer={"name": "Adam"})))


def test_a_run_that_tells_nothing_has_an_unknown_optimizer(tmp_path: Path) -> None:
    run = open_run(random_run(tmp_path / "run.zarr", optimizer={}))
    assert read_optimizer(run).name == "an unknown optimizer"
    assert own_path(run) == (
        "no null: an unknown optimizer has no closed form; "
        "compare with branches, held-out minibatches or the updates"
    )
