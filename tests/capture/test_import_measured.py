"""Imported runs: what can be measured in them, and the command `capture import`."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from analyze import measure_run
from analyze.optimizer import own_path
from capture.cli import main
from capture.config import read_config
from capture.importing import import_checkpoints
from capture.probe import probe_run
from capture.store import MismatchError, UsageError, open_run, verify_run
from capture.train import losses, train
from capture.training import deterministic, prepare
from tests.capture.import_samples import STEPS, Net, save_all

ROOT = Path(__file__).parents[2]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], prog_name="capture")


def dense(state: dict[str, torch.Tensor]) -> np.ndarray:
    """The trainable tensors of `Net` as one float64 vector."""
    names = [name for name, _ in Net().named_parameters()]
    return torch.cat([state[name].double().reshape(-1) for name in names]).numpy()


# What can be measured.


def test_distances_are_those_of_the_original_tensors(tmp_path: Path) -> None:
    expected = save_all(tmp_path / "kept")
    for name in ("run", "same"):
        import_checkpoints(tmp_path / "kept", tmp_path / f"{name}.zarr")
    references = ["final", "step:5", "mean:2", f"run:{tmp_path}/same.zarr@10"]
    table = measure_run(str(tmp_path / "run.zarr"), references)["model"].to_pandas()
    assert set(table.stream) == {"weights"}
    vectors = {step: dense(state) for step, state in expected.items()}
    ends = [vectors[20], vectors[5], (vectors[10] + vectors[20]) / 2, vectors[10]]
    for reference, end in zip(references, ends, strict=True):
        rows = table[table.reference == reference].set_index("step")
        for step in STEPS:
            distance = float(np.linalg.norm(vectors[step] - end))
            # Sums of squares in float64, in another order.
            assert rows.norm_dist[step] == pytest.approx(distance, rel=1e-13)
    path = own_path(open_run(tmp_path / "run.zarr"))
    assert isinstance(path, str)
    assert path.startswith("no null: the weights were imported, and the steps between them are unk")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training twice: recorded, and by a plain loop that saves its state_dict."""
    folder = tmp_path_factory.mktemp("digits")
    config = read_config(
        flags={
            **{"task": "digits", "max_steps": 20, "every": "10", "threads": 1},
            "gradients": "minibatch,fixed:2,full",
        }
    )
    train(config, folder / "recorded.zarr")
    (folder / "kept").mkdir()
    with deterministic():
        training = prepare(config)
        training.model.train()
        loader = torch.utils.data.DataLoader(
            training.task.train, batch_sampler=list(training.order.between(0, 20))
        )
        for step, loss in enumerate(losses(training, loader)):
            if step % 10 == 0:
                save_file(training.model.state_dict(), folder / f"kept/model_{step}.safetensors")
            training.optimizer.step()
            assert loss.isfinite()
    save_file(training.model.state_dict(), folder / "kept/model_20.safetensors")
    return folder


def test_an_imported_run_is_probed_to_the_same_bytes_as_the_recorded_one(digits: Path) -> None:
    run = digits / "imported.zarr"
    import_checkpoints(digits / "kept", run, settings={"task": "digits"})
    assert open_run(run).attributes["config"] == {"task": "digits", "model": "mlp"}
    probe_run(run, "fixed:2,full", changes={"threads": 1})
    assert verify_run(run).sound
    for stream in ("weights", "gradients/fixed", "gradients/full"):
        shards = sorted((digits / f"recorded.zarr/{stream}/value/c").rglob("*"))
        for shard in filter(Path.is_file, shards):
            same = run / shard.relative_to(digits / "recorded.zarr")
            assert same.read_bytes() == shard.read_bytes(), same
    recorded = measure_run(str(digits / "recorded.zarr"), streams=["fixed"])["model"].to_pandas()
    imported = measure_run(str(run), streams=["fixed"])["model"].to_pandas()
    for column in ("norm_dist", "norm_grad", "dot_prod", "cosine", "eb", "loss"):
        np.testing.assert_array_equal(imported[column], recorded[column])
    assert imported.cosine_null.isna().all()


def test_without_a_task_it_is_told_when_probing(digits: Path) -> None:
    run = digits / "bare.zarr"
    import_checkpoints(digits / "kept", run)
    with pytest.raises(UsageError, match="or imported, so its task is not known"):
        probe_run(run, "fixed")
    # Safetensors hold the names in an order of their own.
    with pytest.raises(MismatchError, match="the model is not that of the run"):
        probe_run(run, "fixed", changes={"task": "digits"})
    with pytest.raises(UsageError, match="cannot go on here"):
        train(read_config(flags={"task": "digits", "branch": f"{run}@10"}), digits / "b.zarr")


# The command.


def test_the_command_prints_a_plan_and_then_does_it(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    planned = call("import", digits / "kept", "--task", "digits", "--dry-run", "--out", out)
    assert planned.exit_code == 0, planned.output
    lines = planned.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0", "10", "20"]
    assert lines[-1].startswith("3 checkpoints, 85,002 parameters in 6 tensors: 1.0 MB")
    assert not out.exists()
    done = call("import", digits / "kept", "--task", "digits", "--out", out)
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first == f"3 checkpoints, steps 0 to 20, 1.0 MB in {out}; next:"
    assert second.startswith(f"  analyze compute {out} --stream weights --out ")
    document = json.loads(call("info", out, "--json").stdout)
    assert document["weights"]["steps"] == [0, 10, 20]
    assert document["config"] == {"task": "digits", "model": "mlp"}
    (tmp_path / "import.toml").write_text('task = "digits"\nmodel = "mlp"\nlr = 0.5\n')
    again = call(
        "import",
        digits / "kept",
        "--config",
        tmp_path / "import.toml",
        "--out",
        tmp_path / "t.zarr",
    )
    assert again.exit_code == 0, again.output
    assert open_run(tmp_path / "t.zarr").attributes["config"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "missing option '--out'; see capture import --help"),
        (("--dry-run", "--steps", "0,x"), 2, "no list of steps"),
        (("--dry-run", "--step-pattern", "("), 2, "no regular expression"),
        (("--dry-run", "--task", "digit"), 2, "did you mean 'digits'?"),
        (
            ("--dry-run", "--task", "digits", "--model", "resnet"),
            3,
            "the checkpoint is not of the model",
        ),
        (("--dry-run", "--config", "none.toml"), 2, "none.toml"),
        (("--out", "/dev/null"), 2, "a file is in the way"),
    ],
)
def test_what_a_user_can_get_wrong(
    digits: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = call("import", digits / "kept", *arguments)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_safetensors_are_imported_where_torch_cannot_be(digits: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from capture.cli import main\n"
        "main(['import', sys.argv[1], '--out', sys.argv[2]])\n"
    )
    command = [sys.executable, "-c", code, str(digits / "kept"), str(tmp_path / "run.zarr")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert open_run(tmp_path / "run.zarr").final_step == 20
    torch.save({"w": torch.ones(2)}, tmp_path / "step_1.pt")
    command[-2:] = [str(tmp_path / "step_1.pt"), str(tmp_path / "other.zarr")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: only safetensors can be imported without torch")


def test_many_warnings_are_one_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for step in (1, 2):
        torch.save({"w": torch.ones(2)}, tmp_path / f"a\n{step}.pt")
    import_checkpoints(tmp_path, tmp_path / "run.zarr", step_pattern=r"(\d)\.pt")
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert r"a\n2.pt" in record.getMessage()
