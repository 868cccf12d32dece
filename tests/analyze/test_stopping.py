"""Signals: a command ends without a trace before its output is in place, and is done after that.

Outputs come by a rename; the signal is sent right before or right after that one system call, or at
random moments.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.analyze.recorded import random_run

# `analyze` that gets a signal before or after a file of this name comes into place.
SIGNALLED = """
import os, sys
from analyze import cli
when, signum, name = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
def signalling(real):
    def call(source, target, **options):
        ours = os.path.basename(target) == name
        if ours and when == "before":
            os.kill(os.getpid(), signum)
        real(source, target, **options)
        if ours and when == "after":
            os.kill(os.getpid(), signum)
    return call
os.rename, os.replace = signalling(os.rename), signalling(os.replace)
cli.main()
"""
COMMANDS = {
    "compute": ["run.zarr", "--out", "t.parquet"],
    "pairs": ["run.zarr", "--lags", "1", "--noise", "n.parquet", "--out", "t.parquet"],
    "pca": ["run.zarr", "--out", "t.parquet"],
    "schedule": ["run.zarr", "--out", "t.csv"],
    "compare": ["run.zarr", "other.zarr", "--group-by", "run", "--out", "t.csv"],
    "report": ["run.zarr", "--figures", "figures", "--format", "svg", "--out", "t.html"],
    "export": ["run.zarr", "--out", "t.zarr"],
    "methods": ["run.zarr", "--out", "t.md"],
}
WORDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("run.zarr", "other.zarr")):
        random_run(tmp_path / name, seed=seed)
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def made(folder: Path) -> list[str]:
    """What lies beside the runs and the moments that are kept of them."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(("run.", "other.")))


@pytest.mark.parametrize("signum", WORDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_word_is_true(folder: Path, command: str, signum: signal.Signals) -> None:
    arguments = COMMANDS[command]
    out = arguments[-1]
    for when in ("before", "after"):
        done = subprocess.run(
            [sys.executable, "-c", SIGNALLED, when, str(signum.value), out, command, *arguments],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if when == "before":
            code, word = WORDS[signum]
            assert (done.returncode, done.stderr) == (code, f"error: {word}\n")
            assert done.stdout == ""
            # Folders for figures are made before; of files there is none.
            assert [name for name in made(folder) if name != "figures"] == []
            assert [path for path in Path("figures").rglob("*")] == []
        else:
            assert done.returncode == 0, done.stderr
            assert "error" not in done.stderr
            others = {"n.parquet": "--noise", "figures": "--figures"}
            wanted = {out, *(name for name in others if name in arguments)}
            assert set(made(folder)) == wanted
            # Either an old one or a new one, and what was there before is no obstacle.
            assert Path(out).stat().st_size > 0


@pytest.mark.parametrize("command", ["compute", "pairs", "export"])
def test_signals_at_random_moments(folder: Path, command: str) -> None:
    arguments = COMMANDS[command]
    call = "import sys; from analyze.cli import main; sys.argv[0] = 'analyze'; main()"
    program = [sys.executable, "-c", call, command, *arguments]
    began = time.perf_counter()
    subprocess.run(program, env=environment(), capture_output=True, check=True)
    whole = time.perf_counter() - began
    outputs = made(folder)
    temporary = folder / "run.tmp"
    temporary.mkdir()
    draw = random.Random(command)
    for number in range(10):
        signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
        for name in outputs:
            subprocess.run(["rm", "-r", name], check=True)
        process = subprocess.Popen(
            program,
            env={**environment(), "TMPDIR": str(temporary)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Where Python itself has started, and up to the end.
        time.sleep(draw.uniform(0.5 * whole, 1.1 * whole))
        process.send_signal(signum)
        _, said = process.communicate()
        assert list(temporary.iterdir()) == []
        if process.returncode == 0:
            assert made(folder) == outputs
        else:
            # Before the command runs, or after it has ended, Python's own way to end.
            code, word = WORDS[signum]
            assert process.returncode in (code, -signum)
            assert process.returncode < 0 or said == f"error: {word}\n"
            assert made(folder) in ([], outputs)
            assert made(folder) == [] or process.returncode < 0
            outputs = outputs if made(folder) else []
            if not outputs:
                subprocess.run(program, env=environment(), capture_output=True, check=True)
                outputs = made(folder)
