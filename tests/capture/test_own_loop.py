"""A run of a loop of one's own: its settings stay with it, and it can be probed later."""

from __future__ import annotations

import argparse
import csv
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import capture.tasks
from capture import Recorder, open_run
from capture.cli import main
from capture.info import describe_run, format_description
from capture.store import UsageError

# Names that `TrainConfig` has too, with values that it would refuse or take for something else.
SETTINGS = {"lr": "cosine", "optimizer": "Lion", "lr_schedule": "mine", "width": 64, "depth": 3}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module `mine` of the docstring of `capture.tasks`."""
    text = capture.tasks.__doc__ or ""
    begin, end = text.index("    import torch"), text.index("With it")
    (tmp_path / "mine.py").write_text(textwrap.dedent(text[begin:end]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def record(path: str, **options: Any) -> Path:
    import mine  # type: ignore[import-not-found]

    torch.manual_seed(0)
    task, model = mine.task(), mine.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(path, model, optimizer, every=1, **options) as _:
        for step in range(3):
            optimizer.zero_grad()
            task.loss(model, task.train[step * 32 : (step + 1) * 32]).backward()
            optimizer.step()
    return Path(path)


def probe(path: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["probe", str(path), "--gradients", "full", *options])


def assert_full_gradient(path: Path) -> None:
    """Row t is the gradient of the mean loss of all training samples at w_t."""
    import mine

    run, task, model = open_run(path), mine.task(), mine.model().double()
    assert run.stream("full").steps.tolist() == [0, 1, 2, 3]
    for row in range(4):
        weights = torch.from_numpy(run.stream("weights").read(row)).double()
        nn.utils.vector_to_parameters(weights, model.parameters())
        x, y = task.train.tensors
        found = torch.autograd.grad(task.loss(model, (x.double(), y)), list(model.parameters()))
        expected = torch.cat([gradient.reshape(-1) for gradient in found]).numpy()
        # float32 against float64, of values below 1.
        assert run.stream("full").read(row) == pytest.approx(expected, abs=1e-6)


def test_a_run_is_probed_with_the_module_that_the_docstring_shows() -> None:
    path = record("run.zarr", config=SETTINGS)
    done = probe(path)
    assert done.exit_code != 0
    assert "give --task module:factory" in done.output
    done = probe(path, "--task", "mine:task", "--model", "mine:model")
    assert done.exit_code == 0, done.output
    assert_full_gradient(path)


def test_the_settings_may_say_which_task_it_is() -> None:
    own = {"task": "mine:task", "model": "mine:model", "batch_size": 24}
    path = record("run.zarr", config={**SETTINGS, **own})
    assert probe(path).exit_code == 0
    assert_full_gradient(path)
    assert open_run(path).attributes["probes"]["full"]["batch_size"] == 24


def test_a_module_that_trains_while_it_is_imported_is_refused(folder: Path) -> None:
    path = record("run.zarr", config=SETTINGS)
    loop = """
import torch
from capture import Recorder
from mine import task, model
net = model()
with Recorder("another.zarr", net, torch.optim.SGD(net.parameters(), lr=0.1)):
    pass
"""
    (folder / "looping.py").write_text(loop)
    done = probe(path, "--task", "looping:task", "--model", "looping:model")
    assert done.exit_code == 2
    assert done.output.startswith("error: importing the module looping starts a training")
    assert 'looping.py; put its loop under if __name__ == "__main__":\n' in done.output
    assert not Path("another.zarr").exists()
    # A loop of one's own may record in the same process afterwards.
    record("third.zarr")


def test_the_module_of_the_docstring_trains() -> None:
    command = "train --task mine:task --model mine:model --max-steps 3 --out a.zarr"
    done = CliRunner().invoke(main, command.split())
    assert done.exit_code == 0, done.output
    # Without --model there is none.
    done = CliRunner().invoke(main, [*command.split()[:3], "--max-steps=3", "--out=b.zarr"])
    assert "the task has no default model: mine:task; give --model" in done.output


@pytest.mark.parametrize("command", ["train --branch run.zarr@0 --out x.zarr", "train --resume"])
def test_capture_train_does_not_go_on_with_a_foreign_run(command: str) -> None:
    record("run.zarr", config={**SETTINGS, "task": "digits"})
    if "--resume" in command:
        command += " --task digits --max-steps 3 --out run.zarr"
    done = CliRunner().invoke(main, command.split())
    assert "was not recorded by capture train" in done.output


def test_settings_are_kept_and_shown() -> None:
    settings = vars(argparse.Namespace(lr=0.1, depth=3, name="a", task="mine", tags=["x"]))
    path = record("run.zarr", config=settings, attributes={"seeds": {"seed": 3}})
    attributes = open_run(path).attributes
    assert (attributes["config"], attributes["seeds"]) == (settings, {"seed": 3})
    shown = format_description(describe_run(path))
    assert "settings   task mine, lr 0.1, depth 3, name a\n" in shown


def test_runs_are_grouped_by_their_settings(folder: Path) -> None:
    from analyze.cli import main as analyze

    for seed in range(2):
        for depth in (2, 3):
            record(f"{depth}-{seed}.zarr", config={"depth": depth})
    runs = sorted(map(str, folder.glob("*.zarr")))
    done = CliRunner().invoke(analyze, ["compare", *runs, "--group-by", "depth", "--out", "c.csv"])
    assert done.exit_code == 0, done.output
    with open(folder / "c.csv", newline="") as file:
        assert {row["by_depth"] for row in csv.DictReader(file)} == {"2", "3"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": 3}, "config must be a dict: config is a int; such as vars"),
        ({"config": argparse.Namespace(lr=1)}, "config is a Namespace"),
        ({"config": {"out": Path("a")}}, r"not JSON \(.*\): config\['out'\]"),
        ({"config": {"lr": math.nan}}, r"not JSON \(.*\): config\['lr'\]"),
        ({"config": {1: 2, None: 3}}, r"names of settings must be text: config\[1\]"),
        ({"config": {}, "attributes": {"config": {}}}, "the settings are given twice"),
        ({"attributes": {"clipping": {}}}, r"sets by itself: attributes\['clipping'\]"),
    ],
)
def test_settings_that_cannot_be_kept(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        record("run.zarr", **options)
    assert not Path("run.zarr").exists()
