"""The example at the end of every help page of `analyze` is run as it stands."""

import shlex
import shutil
from pathlib import Path

import pytest

from analyze.cli import main
from tests.analyze.recorded import random_run
from tests.analyze.test_cli import analyze


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that the examples are about."""
    folder = tmp_path_factory.mktemp("examples")
    for seed, name in enumerate(("first", "second")):
        random_run(folder / f"{name}.zarr", seed=seed, config={"lr": 0.1 + seed})
    return folder


@pytest.mark.parametrize("command", main.commands)
def test_the_example_of_each_command_runs(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded, "runs")
    example = main.commands[command].example  # type: ignore[attr-defined]
    words = shlex.split(example.replace("\\\n", " "))
    assert words[:2] == ["analyze", command]
    done = analyze(*words[1:])
    assert done.exit_code == 0, done.stderr
    assert Path(words[-1]).stat().st_size > 0
    assert analyze(command, "--help").stdout.rstrip().endswith(words[-1])
