"""What a run keeps of clipping in its attributes, also across a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

from capture import Recorder, open_run
from capture.clipping import Clipping, Limit

pytestmark = pytest.mark.filterwarnings("ignore:the loop changes gradients")


class Stopped(Exception):
    pass


def record(path: Path, stop: int | None = None, **options: Any) -> dict[str, Any]:
    """Six updates; in 1, 2 and 5 the recorder clips, in 3, 4 and 5 (then after it) the loop."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(path, model, optimizer, checkpoint_every=2, **options) as recorder:
        while recorder.step < 6:
            step = recorder.step
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            if step in (1, 2, 5):
                recorder.clip_grad_norm_(0.25 * step, 2 if step < 5 else math.inf)
            if step in (3, 4, 5):
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            if step == stop:
                raise Stopped
            optimizer.step()
    return dict(open_run(path).attributes)


SEEN = {
    "recorder": {"updates": 3, "max_norm": [0.25, 1.25], "norm_type": [2.0, "inf"]},
    "loop": {"updates": 3, "first_step": 3},
}


def test_both_kinds_are_counted(tmp_path: Path) -> None:
    assert record(tmp_path / "run.zarr")["clipping"] == SEEN


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_counts_on_from_its_state(tmp_path: Path, stop: int) -> None:
    path = tmp_path / "run.zarr"
    with pytest.raises(Stopped):
        record(path, stop)
    # What was seen so far is there, though the run is not complete.
    updates = open_run(path).attributes.get("clipping", {}).get("loop", {}).get("updates", 0)
    assert updates == max(0, stop - 3)
    assert record(path, resume=True)["clipping"] == SEEN


def test_where_nothing_was_seen_there_is_no_attribute(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, clipped=False) as recorder:
        model(torch.ones(1, 3)).sum().backward()
        recorder.clip_grad_norm_(math.inf)  # as the Trainers do to know the norm
        optimizer.step()
    assert "clipping" not in open_run(tmp_path / "run.zarr").attributes


def test_a_skipped_step_is_not_counted(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = optim.Adam(model.parameters(), lr=0.1, fused=True)
    with Recorder(tmp_path / "run.zarr", model, optimizer) as recorder:
        for found_inf in (0.0, 1.0):
            optimizer.grad_scale = torch.tensor(1.0)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            recorder.clip_grad_norm_(0.5)
            optimizer.step()
    found = open_run(tmp_path / "run.zarr").attributes["clipping"]
    assert found == {"recorder": {"updates": 1, "max_norm": [0.5, 0.5], "norm_type": [2.0]}}


def test_what_is_kept_comes_back() -> None:
    clipping = Clipping()
    assert Clipping.from_json({}) == clipping
    clipping.count(3, Limit(0.5, math.inf), False)
    clipping.count(4, Limit(0.25, 1.0), True)
    kept = json.loads(json.dumps(clipping.to_json(), allow_nan=False))
    assert Clipping.from_json(kept) == clipping
