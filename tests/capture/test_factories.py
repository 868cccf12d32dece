"""Code of the user that fails: one line with the place in that code, never a traceback."""

from __future__ import annotations

import pytest

from capture.config import TrainConfig, read_config
from capture.models import build_model
from capture.plan import plan
from capture.store import UnsupportedModelError, open_run
from capture.store.errors import StraightwayError, UsageError
from capture.tasks import build_task
from capture.train import train


def quick(**changes) -> TrainConfig:
    return read_config(flags={"task": "digits", "max_steps": 5, "every": "1", **changes})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("imports", "\nimport no_such_thing\n", r"No module named 'no_such_thing'.*imports\.py:2"),
        ("syntax", "x = 1\ndef make(:\n", r"SyntaxError: .*syntax\.py:2"),
        ("exits", "import sys\n\nsys.exit('bye')\n", r"SystemExit: bye: .*exits\.py:3"),
        ("raises", "def make():\n    return {}['k']\n", r"KeyError: 'k': .*raises\.py:2"),
        ("deep", "import json\ndef make():\n    json.loads('{')\n", r"JSONDecode.*deep\.py:3"),
        ("number", "def make():\n    return 3\n", "is no torch.nn.Module but a int"),
    ],
)
def test_a_factory_that_fails_is_told_in_one_line(folder, name, text, words):
    module = f"failing_{name}"
    (folder / f"{module}.py").write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        build_model(f"{module}:make", {})
    assert len(str(caught.value).splitlines()) == 1
    assert (folder / f"{module}.py").exists()


def test_errors_of_ours_and_interruptions_pass_unchanged(folder):
    (folder / "passing.py").write_text(
        "from capture.store.errors import StraightwayError\n"
        "def ours():\n    raise StraightwayError('mine')\n"
        "def stopped():\n    raise KeyboardInterrupt\n"
    )
    with pytest.raises(StraightwayError, match=r"^mine$"):
        build_model("passing:ours", {})
    with pytest.raises(KeyboardInterrupt):
        build_model("passing:stopped", {})


@pytest.mark.parametrize("name", [":x", "x:", ":"])
def test_half_a_name_is_refused(name):
    with pytest.raises(UsageError, match="write module:factory"):
        build_task(name)


def test_a_first_step_that_fails_is_one_line_and_leaves_no_run(folder):
    run = folder / "first-step.zarr"
    model = {"model": "broken_models:too_narrow"}
    (folder / "broken_models.py").write_text(
        "from torch import nn\n\n"
        "def too_narrow():\n    return nn.Sequential(nn.Flatten(), nn.Linear(63, 10))\n"
    )
    with pytest.raises(UsageError, match=r"the first step failed, RuntimeError: mat1 and mat2"):
        train(quick(**model), run)
    assert not run.exists()
    with pytest.raises(UsageError, match="the first step failed"):
        plan(quick(**model), run)
    train(quick(), run)
    assert open_run(run).complete


def test_a_later_step_that_fails_keeps_its_traceback_and_the_run(folder):
    (folder / "failing_later.py").write_text(
        "from capture.tasks.digits import Digits\n\n"
        "class Later(Digits):\n    left = 2\n\n"
        "    def loss(self, model, batch):\n"
        "        self.left -= 1\n"
        "        return super().loss(model, batch) if self.left >= 0 else [][1]\n\n"
        "def later(data_root=None):\n    return Later()\n"
    )
    with pytest.raises(IndexError):
        train(quick(task="failing_later:later"), folder / "later.zarr")
    assert open_run(folder / "later.zarr").stream("weights").steps.tolist() == [0, 1]


@pytest.mark.parametrize("maker", ["nothing", "on_meta"])
def test_a_model_that_cannot_be_recorded_is_refused_before_anything(folder, maker):
    (folder / "odd_models.py").write_text(
        "from torch import nn\n\n"
        "def nothing():\n    return nn.Flatten()\n\n"
        "def on_meta():\n    return nn.Linear(3, 2, device='meta')\n"
    )
    with pytest.raises(UnsupportedModelError, match=r"no trainable parameter|the meta device"):
        train(quick(model=f"odd_models:{maker}"), folder / "odd.zarr")
    assert not (folder / "odd.zarr").exists()
