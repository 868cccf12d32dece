"""The command `capture`: its examples, what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from capture.cli import main
from capture.command_line import Command, Group
from capture.config import TrainConfig
from capture.models import build_model
from capture.schedule import parse_schedule
from capture.store import open_run
from capture.streams import PROBES, STREAMS, parse_streams

ROOT = Path(__file__).parents[2]


def call(*arguments: str):
    return CliRunner().invoke(main, arguments, prog_name="capture")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cli"))
        yield Path.cwd()


@pytest.fixture(scope="module")
def run(folder):
    """The run of the example of ``capture train``, which the other examples read."""
    done = CliRunner().invoke(main, shlex.split(main.commands["train"].example)[1:])
    assert done.exit_code == 0, done.output
    return Path("runs/first.zarr")


@pytest.fixture(scope="module")
def checkpoints(run):
    """The folder of checkpoints of the example of ``capture import``."""
    Path("checkpoints").mkdir()
    for step in (0, 40, 88):
        done = call("export", str(run), f"checkpoints/step_{step}.safetensors", "--step", str(step))
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", [name for name in main.commands if name != "train"])
def test_the_example_of_each_command_runs(run, checkpoints, name, tmp_path, monkeypatch):
    for folder in ("runs", "checkpoints"):
        shutil.copytree(folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(main.commands[name].example)
    assert program == "capture"
    done = call(*arguments)
    assert done.exit_code == 0, done.output


def test_every_command_has_an_example_and_its_help_shows_it():
    for name, command in main.commands.items():
        assert isinstance(command, Command)
        done = call(name, "--help")
        assert done.exit_code == 0
        assert done.stdout.endswith(f"Example:\n  {command.example}\n")


def test_help_lists_the_options_of_train_under_headings():
    shown = call("train", "--help").stdout
    for heading in ("What is trained:", "How:", "What is recorded:", "Run:"):
        assert f"\n{heading}\n" in shown
    # Every key of a configuration file but the two tables is an option, and nothing else is.
    keys = set(TrainConfig.__dataclass_fields__) - {"task_args", "model_args"}
    options = {parameter.name for parameter in main.commands["train"].params}
    assert options == keys | {"config", "out", "resume", "force"}


@pytest.mark.parametrize("name", [*main.commands, None])
def test_help_fits_a_terminal_of_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = call(*([name] if name else []), "--help")
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_help_says_what_the_arguments_are():
    assert "FOLDER holds them" in " ".join(call("import", "--help").stdout.split())
    for name in ("info", "verify", "export"):
        assert "RUN is the folder that" in call(name, "--help").stdout
    assert "OUT the file to write" in " ".join(call("export", "--help").stdout.split())
    shown = " ".join(call("train", "--help").stdout.split())
    assert "out, resume and force are not in it" in shown
    assert "starts it where there is none" in shown


@pytest.mark.parametrize("name", main.commands)
def test_every_option_is_explained(name):
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option):
            assert len(parameter.help.split()) >= 4, parameter.name
            assert parameter.help.endswith("."), parameter.name


@pytest.mark.parametrize(("name", "kinds"), [("train", 7), ("plan", 7), ("probe", 5)])
def test_help_explains_streams_and_schedules_by_examples_that_parse(name, kinds):
    shown = {term for terms in main.commands[name].notes.values() for term, _ in terms}
    schedules = {"10", "log:50", "epoch", "bursts:51:1,2,5", "10+log:50"} & shown
    assert len(schedules) == (0 if name == "probe" else 5)
    for schedule in schedules:
        parse_schedule(schedule, total_steps=880, steps_per_epoch=22)
    named = {
        r.name
        for term in shown
        if term[0].islower() and " " not in term and term not in schedules and term != "none"
        for r in parse_streams(term)
    }
    known = {*PROBES, *(STREAMS if name != "probe" else ())}
    assert named == known
    assert len(known) == kinds


def test_schedules_are_what_the_help_says():
    burst = parse_schedule("bursts:51:1,2,5")
    assert burst.steps(103) == [0, 1, 2, 5, 51, 52, 53, 56, 102]
    logarithmic = parse_schedule("log:50", total_steps=880).steps(880)
    assert len(logarithmic) == 50
    gaps = np.diff(logarithmic)
    assert gaps[0] == 1
    # Rounding apart.
    assert (np.diff(gaps) >= -1).all()


def test_train_prints_a_summary_and_the_next_command_on_stderr(run):
    done = call("train", "--task", "digits", "--max-steps", "3", "--out", "runs/a b.zarr")
    assert done.exit_code == 0
    assert done.stdout == ""
    first, second, third = done.stderr.splitlines()
    assert first.startswith("3 steps in ")
    assert "held-out accuracy 0." in first
    assert second.endswith("in runs/a b.zarr; next:")
    assert third == "  analyze compute 'runs/a b.zarr' --out 'runs/a b.parquet'"
    again = call("train", "--task=digits", "--max-steps=3", "--out=runs/a b.zarr", "--resume")
    assert again.exit_code == 0
    assert again.stderr == "runs/a b.zarr is complete already: 3 steps\n"


def test_flags_override_the_file(run):
    Path("run.toml").write_text('task = "digits"\nmax_steps = 2\nlr = 0.5\n')
    done = call("train", "--config", "run.toml", "--lr", "0.25", "--out", "toml.zarr")
    assert done.exit_code == 0, done.output
    config = open_run("toml.zarr").attributes["config"]
    assert (config["max_steps"], config["lr"]) == (2, 0.25)


def test_the_demo_is_a_configuration_that_trains(run):
    demo = str(ROOT / "pipelines/demo/demo.toml")
    done = call("train", "--config", demo, "--max-steps", "3", "--out", "demo.zarr")
    assert done.exit_code == 0, done.output
    assert set(open_run("demo.zarr").stream_names) == {"weights", "minibatch", "updates"}


def test_info_as_json_has_the_keys_of_the_contract(run):
    document = json.loads(call("info", str(run), "--json").stdout)
    assert document["status"] == "complete"
    assert document["n_parameters"] == 85_002
    assert document["final_step"] == 88
    assert document["weights"]["steps"] == [*range(0, 88, 10), 88]
    assert document["gradients"]["minibatch"]["steps"] == [*range(0, 88, 10)]
    assert document["gradients"]["minibatch"]["batches"] is None


def test_info_for_people(run):
    lines = dict(line.split(maxsplit=1) for line in call("info", str(run)).stdout.splitlines())
    assert lines["status"] == "complete, 88 steps"
    assert lines["model"] == "mlp with 85,002 parameters in 6 tensors"
    assert lines["weights"] == "10 rows, 3.4 MB, at steps 0, 10, 20, …, 80, 88"


def test_plan_as_json_and_a_plan_that_does_not_fit(folder):
    done = call("plan", "--task", "digits", "--max-steps", "30", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["streams"]["weights"]["rows"] == 4
    long = ["plan", "--task", "digits", "--max-steps", "100000000", "--every", "1"]
    refused = call(*long)
    assert refused.exit_code == 1
    assert "weights" in refused.stdout
    assert refused.stderr.startswith("error: the run needs ")
    assert call(*long, "--force").exit_code == 0


def test_verify_names_every_damaged_row_and_exits_with_3(run, folder):
    subprocess.run(["cp", "-r", str(run), "damaged.zarr"], check=True)
    for row in (2, 5):
        shard = Path(f"damaged.zarr/weights/value/c/{row}/0")
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    done = call("verify", "damaged.zarr")
    assert done.exit_code == 3
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: row 2 (step 20) of 'weights'")
    assert second.startswith("error: row 5 (step 50) of 'weights'")
    assert "weights/value/c/5/0" in second
    whole = call("verify", str(run))
    assert whole.exit_code == 0
    assert whole.stdout.startswith("sound: 19 shards and ")


def test_export_writes_a_state_dict_that_loads_strictly(run):
    done = call("export", str(run), "--step", "88", "end.safetensors")
    assert done.exit_code == 0, done.output
    model = build_model("mlp", {"input_shape": (1, 8, 8), "num_classes": 10})
    model.load_state_dict(load_file("end.safetensors"), strict=True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("trian", 2, "no such command 'trian': did you mean 'train'? see capture --help"),
        ("banana", 2, "the commands are train, plan, probe, import, info"),
        ("train --lrr 1", 2, "Did you mean"),
        ("train --task digits", 2, "missing option '--out'; see capture train --help"),
        ("train --out x.zarr", 2, "no task is given; give --task"),
        ("train --task digit --out x.zarr", 2, "did you mean 'digits'?"),
        ("train --task digits --every evry:3 --out x.zarr", 2, "did you mean 'every'?"),
        ("train --task digits --lr-schedule x --out x.zarr", 2, "there is no such file either"),
        ("train --task digits --gradients ful --out x.zarr", 2, "known are minibatch, updates"),
        ("train --task digits --batch-size 2000 --out x.zarr", 2, "does not fit into 1437"),
        ("train --config none.toml --out x.zarr", 2, "none.toml"),
        ("train --task digits --out runs", 2, "neither empty nor a run"),
        ("train --task digits --out runs/first.zarr", 2, "a run is already recorded here"),
        ("train --task digits --max-steps 1000000000000 --out x.zarr", 2, "at most 1,000,000,000"),
        ("plan --task digits --max-steps 1000000000000", 2, "at most 1,000,000,000"),
        ("train --task digits --model :x --out x.zarr", 2, "write module:factory"),
        ("train --task digits --out runs/first.zarr --resume", 3, "epochs was 4 and is now 20"),
        ("info none.zarr", 3, "none.zarr"),
        ("verify none.zarr", 3, "none.zarr"),
        ("export runs/first.zarr --step 3 y.safetensors", 3, "nearest recorded are 0 and 10"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_and_an_exit_code(run, arguments, code, words):
    done = call(*shlex.split(arguments))
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not Path("x.zarr").exists()
    assert not Path("y.safetensors").exists()


def test_no_command_shows_the_help_and_exits_with_2():
    done = call()
    assert done.exit_code in (0, 2)  # as this version of click has it
    assert "Commands:" in done.output


@click.group(cls=Group)
def program() -> None:
    """A program whose command fails in ways that are not the user's."""


@program.command(example="program fail interrupt")
@click.argument("how")
def fail(how: str) -> None:
    """Fail."""
    raise KeyboardInterrupt if how == "interrupt" else RuntimeError("our own mistake")


def test_ctrl_c_exits_with_130():
    done = CliRunner().invoke(program, ["fail", "interrupt"])
    assert done.exit_code == 130
    assert done.stderr.split() == ["error:", "interrupted"]


def test_a_mistake_of_ours_keeps_its_traceback():
    done = CliRunner().invoke(program, ["fail", "badly"])
    assert done.exit_code == 1
    assert isinstance(done.exception, RuntimeError)


def test_a_reader_that_goes_away_is_no_traceback(run):
    code = "from capture.cli import main; main(prog_name='capture')"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(run)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert "Traceback" not in done.stderr
