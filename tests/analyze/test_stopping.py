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


@pytest.mark.parametrize("command", COMMANDS)
def test_the_word_is_true(folder: Path, command: str) -> None:
    arguments = COMMANDS[command]
    out = arguments[-1]
    # Each signal for half of the commands before it is there, and for the others after that.
    early, late = sorted(WORDS, reverse=list(COMMANDS).index(command) % 2 == 1)
    done = signalled("before", early, out, command, *arguments)
    code, word = WORDS[early]
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {word}\n")
    # A folder for figures is made before; of files there is none.
    assert set(made(folder)) <= {"figures"}
    assert list(Path().glob("figures/*")) == []
    done = signalled("after", late, out, command, *arguments)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    others = {"n.parquet": "--noise", "figures": "--figures"}
    assert set(made(folder)) == {out, *(name for name in others if name in arguments)}
    assert Path(out).stat().st_size > 0


def signalled(
    when: str, signum: signal.Signals, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SIGNALLED, when, str(signum.value), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("signum", WORDS)
def test_signals_at_random_moments(folder: Path, signum: signal.Signals) -> None:
    """Whenever it comes: no table, or the whole one."""
    temporary = folder / "run.tmp"
    temporary.mkdir()
    call = "import sys; from analyze.cli import main; sys.argv[0] = 'analyze'; main()"
    program = [sys.executable, "-c", call, "compute", "run.zarr", "--reference", "mean:2"]
    program += ["--no-cache", "--out", "t.parquet"]
    began = time.perf_counter()
    subprocess.run(program, env=environment(), capture_output=True, check=True)
    whole = time.perf_counter() - began
    table = Path("t.parquet").read_bytes()
    draw = random.Random(signum.value)
    code, word = WORDS[signum]
    for _ in range(6):
        Path("t.parquet").unlink(missing_ok=True)
        process = subprocess.Popen(
            program,
            env={**environment(), "TMPDIR": str(temporary)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(draw.uniform(0.3 * whole, 1.1 * whole))
        process.send_signal(signum)
        _, said = process.communicate()
        assert list(temporary.iterdir()) == []
        assert made(folder) in ([], ["t.parquet"])
        if made(folder):
            assert Path("t.parquet").read_bytes() == table
        # Python has its own way to end while it starts, and when all is done.
        assert process.returncode in (0, code, -signum)
        if process.returncode == 0:
            assert made(folder) == ["t.parquet"]
        if process.returncode == code:
            assert (made(folder), said) == ([], f"error: {word}\n")


# `analyze compute` in whose reading a signal comes: `how` says what becomes of what it raises.
CAUGHT = """
import os, sys, weakref
import analyze.references as module
from analyze import cli
how, signum = sys.argv.pop(1), int(sys.argv.pop(1))
real = module.parse_reference
class Thing: pass
def parse(text):
    if how == "becomes another error":
        try:
            os.kill(os.getpid(), signum)
        except BaseException as error:
            raise ValueError("something of a library's") from error
    thing = Thing()
    kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signum))
    del thing
    for _ in range(1000):
        pass
    return real(text)
import analyze.tables
analyze.tables.parse_reference = parse
cli.main()
"""


@pytest.mark.parametrize("signum", WORDS)
@pytest.mark.parametrize("how", ["becomes another error", "is dropped in a callback"])
def test_a_signal_that_a_library_takes_for_its_own_ends_the_command_all_the_same(
    folder: Path, signum: signal.Signals, how: str
) -> None:
    before = sorted(folder.rglob("*"))
    question = ["compute", "run.zarr", "--no-cache", "--out", "t.parquet"]
    done = subprocess.run(
        [sys.executable, "-c", CAUGHT, how, str(int(signum)), *question],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    code, word = WORDS[signum]
    assert (done.returncode, done.stderr) == (code, f"error: {word}\n")
    assert sorted(folder.rglob("*")) == before
