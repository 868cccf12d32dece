"""`analyze methods` of loops of one's own: who clipped, and what their settings say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

from analyze.methods import describe_methods
from capture import Recorder
from tests.analyze.recorded import random_run

Clip = Callable[[Recorder, nn.Module, int], Any]


def told(path: Path, clip: Clip, **options: Any) -> str:
    """What is told of a run of four updates with `clip` before each."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(path, model, optimizer, every=1, **options) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            model(torch.ones(1, 3) * (step + 1)).square().sum().backward()
            clip(recorder, model, step)
            optimizer.step()
    return describe_methods([str(path)], ".md")


def by_itself(recorder: Recorder, model: nn.Module, step: int) -> None:
    if step % 2:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore:the loop changes gradients")
def test_a_loop_that_clips_by_itself(tmp_path: Path) -> None:
    text = told(tmp_path / "run.zarr", by_itself)
    assert (
        "In 2 updates the training loop itself changed gradients between the backward pass and the "
        "step, as clipping does, by factors that are not known: there minibatch gradients are "
        "taken as they entered the update. Of 2 further updates the factor is not known"
    ) in text
    assert "Whether gradients were clipped" not in text


@pytest.mark.filterwarnings("ignore:the loop changes gradients")
def test_a_loop_that_breaks_its_promise(tmp_path: Path) -> None:
    text = told(tmp_path / "run.zarr", by_itself, clipped=False)
    assert (
        "No gradient was clipped in the 2 updates whose factor is known. In 2 updates the" in text
    )
    assert "further updates" not in text


def test_the_norm_that_the_recorder_clipped_to(tmp_path: Path) -> None:
    text = told(tmp_path / "one.zarr", lambda recorder, *_: recorder.clip_grad_norm_(1e-3))
    assert (
        "Gradients were clipped to norm 0.001 in 4 of the 4 updates whose factor is known" in text
    )
    text = told(
        tmp_path / "two.zarr",
        lambda recorder, _, step: recorder.clip_grad_norm_(1e-3 * (step + 1), float("inf")),
    )
    assert "clipped to norm 0.001 to 0.004 (p = `inf`) in 4 of the 4 updates" in text


def test_no_limit_is_no_clipping(tmp_path: Path) -> None:
    text = told(tmp_path / "run.zarr", lambda recorder, *_: recorder.clip_grad_norm_(float("inf")))
    assert "No gradient was clipped in the 4 updates whose factor is known." in text


@pytest.mark.parametrize(
    "odd",
    [
        3,
        {"loop": 3, "recorder": "x"},
        {"loop": {"updates": "<b>"}, "recorder": {"max_norm": ["<b>"]}},
        {"loop": {"updates": True}, "recorder": {"max_norm": [], "norm_type": 2}},
    ],
)
def test_an_attribute_of_that_name_in_a_foreign_run_is_not_believed(
    tmp_path: Path, odd: object
) -> None:
    path = random_run(tmp_path / "run.zarr", clipping=odd)
    text = describe_methods([str(path)], ".md")
    assert "Gradients were clipped in 3 of the 5 updates whose factor is known" in text
    assert "<b>" not in text


def test_settings_of_a_loop_of_ones_own_are_told_and_not_taken_for_others(tmp_path: Path) -> None:
    config = {"model": "wide", "seed": 3}
    text = told(tmp_path / "run.zarr", lambda *_: None, config=config)
    assert "Model `wide`, D = 8 trainable parameters." in text
    assert "Settings of seeds: `seed` 3." in text
    assert "initialisation 3" not in text
