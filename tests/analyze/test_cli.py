"""The command `analyze`: its output, its exit codes, and that nothing is left behind."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from distributed import LocalCluster

from analyze.cli import main
from analyze.groups import GROUPINGS
from tests.analyze.recorded import random_run, write_run
from tests.analyze.small_runs import flip


def analyze(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def in_a_process(
    *arguments: str, before: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Call `analyze` as a program of its own, after the statements `before`."""
    call = f"{before}\nimport sys; from analyze.cli import main; sys.argv[0] = 'analyze'; main()"
    return subprocess.run(
        [sys.executable, "-c", call, *arguments],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("cli") / "run.zarr")


@pytest.fixture
def folder(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the run that the examples of the help are about."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded, tmp_path / "runs" / "first.zarr")
    return tmp_path


def test_compute_prints_the_verdict_and_writes_the_table(folder: Path) -> None:
    done = analyze("compute", "runs/first.zarr", "--out", "runs/first.parquet")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("runs/first.zarr   w* = final   T = 6 updates   D = 25\n")
    assert "γ > 0: a step along -g starts out towards w*." in done.stdout
    assert "γ⁰: exact for SGD with momentum" in done.stdout
    assert "fixed: no null, only the minibatch gradients made the path" in done.stdout
    assert "33 rows in runs/first.parquet" in done.stderr
    assert pq.read_table(folder / "runs/first.parquet").num_rows == 33


def test_references_streams_and_groups_are_chosen(folder: Path) -> None:
    random_run(folder / "runs" / "second.zarr", seed=1)
    done = analyze(
        *("compute", "runs/first.zarr", "runs/second.zarr", "--reference", "step:2"),
        *("--reference", "final", "--stream", "minibatch", "--by", "layer", "--out", "t.parquet"),
    )
    assert done.exit_code == 0, done.stderr
    table = pq.read_table("t.parquet")
    found = {name: table[name].unique().to_pylist() for name in ("run", "reference", "stream")}
    assert found == {
        "run": ["runs/first.zarr", "runs/second.zarr"],
        "reference": ["step:2", "final"],
        "stream": ["minibatch"],
    }
    assert table["group"].unique().to_pylist() == ["body.0", "head", "scale"]
    # The verdict is of the whole model all the same.
    assert done.stdout.count("minibatch  early") == 4


def test_report_writes_figures_on_request(folder: Path) -> None:
    done = analyze(
        *("report", "runs/first.zarr", "--out", "r.html", "--figures", "figures"),
        *("--format", "png,svg"),
    )
    assert done.exit_code == 0, done.stderr
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".svg"}
    assert "cosine" in Path("r.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--figures", ""), "no name"),
        (("--figures", "figures", "--format", ""), "unknown figure format"),
        (("--figures", "figures", "--width", "nan"), "nan inches"),
    ],
)
def test_report_refuses_figures_that_cannot_be(
    folder: Path, options: tuple[str, ...], words: str
) -> None:
    done = analyze("report", "runs/first.zarr", "--out", "refused.html", *options)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not Path("refused.html").exists()
    assert not Path("figures").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["runs/first.zarr", "--reference", "step:99"], 3, "99"),
        (["runs/first.zarr", "--stream", "heldout"], 3, "no stream 'heldout'"),
        (["runs/none.zarr"], 3, "runs/none.zarr"),
        (["runs/first.zarr", "--reference", "finale"], 2, "'finale' is no reference"),
        (["runs/first.zarr", "--by", "block"], 2, "'block' is not one of"),
        (["runs/first.zarr", "--workers", "0"], 2, "workers"),
        (["runs/first.zarr", "--scheduler", "slurm"], 2, "'slurm' is no scheduler"),
        ([], 2, "RUN"),
    ],
)
def test_what_a_user_can_do_wrong(
    folder: Path, arguments: list[str], code: int, words: str
) -> None:
    done = analyze("compute", *arguments, "--out", "t.parquet")
    assert done.exit_code == code
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not Path("t.parquet").exists()


@pytest.mark.parametrize("command", ["compute", "report", "schedule"])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file/t.parquet", "no file can be written here|there is no such folder"),
        ("runs", "this is a folder"),
        ("nowhere/t.parquet", "there is no such folder"),
        ("runs/first.zarr/t.parquet", "inside a run"),
        ("runs/first.zarr/weights/value/c/0/0", "inside a run"),
        ("link/zarr.json", "inside a run"),
        ("/dev/null", "no ordinary file"),
        ("n" * 300, "no file can be written here"),
    ],
)
def test_a_place_that_may_not_be_written_is_refused_before_anything_is_read(
    folder: Path, command: str, out: str, words: str
) -> None:
    Path("file").write_text("here")
    Path("link").symlink_to("runs/first.zarr")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    # There is no such run: that would be the complaint if the runs had been looked at.
    done = analyze(command, "runs/none.zarr", "--out", out)
    assert done.exit_code == 2
    assert re.match(f"error: .*({words})", done.stderr)
    assert done.stderr.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_input_is_not_written_over(folder: Path) -> None:
    shutil.copy("runs/first.zarr/weights/value/c/0/0", "w.safetensors")
    Path("other").hardlink_to("w.safetensors")
    before = Path("w.safetensors").read_bytes()
    for out in ("w.safetensors", "./other"):
        done = analyze(
            *("compute", "runs/first.zarr", "--reference", "file:w.safetensors", "--out", out)
        )
        assert done.exit_code == 2
        assert "this file is an input" in done.stderr
    assert Path("w.safetensors").read_bytes() == before
    assert analyze("compute", "runs/first.zarr", "--out", "t.parquet").exit_code == 0
    assert analyze("report", "t.parquet", "--out", "t.parquet").exit_code == 2


def test_a_run_without_rows_is_one_line(folder: Path) -> None:
    streams = {"weights": np.ones((1, 25), "f4"), "minibatch": np.empty((0, 25), "f4")}
    write_run(folder / "runs" / "empty.zarr", streams)
    done = analyze("compute", "runs/empty.zarr", "--stream", "minibatch", "--out", "t.parquet")
    assert (done.exit_code, done.stderr.count("\n")) == (3, 1)
    assert "no rows" in done.stderr
    done = analyze("compute", "runs/empty.zarr", "--out", "t.parquet")
    assert done.exit_code == 0
    assert "1 row in t.parquet" in done.stderr
    assert "γ" not in done.stdout


def test_a_cluster_gives_the_same_file_and_the_same_errors(folder: Path) -> None:
    shard = "runs/bad.zarr/gradients/minibatch/value/c/1/0"
    shutil.copytree("runs/first.zarr", "runs/bad.zarr")
    assert analyze("compute", "runs/first.zarr", "--out", "here.parquet").exit_code == 0
    flip(Path(shard), 8 + int.from_bytes(Path(shard).read_bytes()[:8], "little") + 5)
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as cluster:
        there = ["--scheduler", cluster.scheduler_address, "--out", "there.parquet"]
        done = in_a_process("compute", "runs/first.zarr", *there)
        bad = in_a_process("compute", "runs/bad.zarr", *there)
    assert done.returncode == 0, done.stderr
    assert Path("here.parquet").read_bytes() == Path("there.parquet").read_bytes()
    assert bad.returncode == 3
    assert bad.stderr.startswith("error: row 1 (step 1) of 'minibatch'")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("signum", "code", "line"),
    [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 143, "error: terminated\n")],
)
def test_a_signal_ends_it_with_one_line(
    folder: Path, signum: signal.Signals, code: int, line: str
) -> None:
    # The signal comes in the middle of the measurement, wherever that runs.
    before = f"""
import os, analyze.compute
analyze.compute.compute_moments = lambda *_, **__: os.kill(os.getpid(), {signum.value})
"""
    done = in_a_process("compute", "runs/first.zarr", "--out", "t.parquet", before=before)
    assert (done.returncode, done.stderr, done.stdout) == (code, line, "")
    assert not Path("t.parquet").exists()


def test_tensors_are_grouped_by_what_their_names_match(folder: Path) -> None:
    groups = ("--group", "ends=head|scale", "--group", "biases=bias$")
    done = analyze("compute", "runs/first.zarr", *groups, "--out", "t.parquet")
    assert done.exit_code == 0, done.stderr
    table = pq.read_table("t.parquet")
    sizes = dict(zip(*(table[c].to_pylist() for c in ("group", "num_parameters")), strict=True))
    assert sizes == {"ends": 9, "biases": 4, "rest": 12}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (["head"], "write LABEL=REGEX"),
        (["=head"], "write LABEL=REGEX"),
        (["a=("], "no regular expression (missing )"),
        (["a=x", "a=y"], "a label twice"),
        (["rest=head"], "this is what fits no pattern"),
        (["a\udcff=head"], "not a group of tensors"),
        (["a=nowhere"], "no tensor has such a name"),
    ],
)
def test_groups_that_are_none_are_refused(folder: Path, groups: list[str], words: str) -> None:
    options = [part for group in groups for part in ("--group", group)]
    done = analyze("compute", "runs/first.zarr", *options, "--out", "t.parquet")
    assert (done.exit_code, words in done.stderr) == (2, True), done.stderr
    assert not Path("t.parquet").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--group", "a=head", "--by", "layer"], "give one of them"),
        (["--cache", "kept", "--no-cache"], "goes without --no-cache"),
        (["--cache", ""], "--cache names a folder"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_options_that_contradict_are_refused_whatever_is_kept(
    folder: Path, options: list[str], words: str
) -> None:
    assert analyze("compute", "runs/first.zarr", "--out", "t.parquet").exit_code == 0
    before = Path("t.parquet").read_bytes()
    done = analyze("compute", "runs/first.zarr", *options, "--out", "t.parquet")
    assert (done.exit_code, words in done.stderr) == (2, True), done.stderr
    assert Path("t.parquet").read_bytes() == before


@pytest.mark.parametrize("command", ["compute", "pairs", "pca"])
def test_a_name_that_promises_another_format_is_refused(folder: Path, command: str) -> None:
    done = analyze(command, "runs/first.zarr", "--out", "t.csv")
    assert (done.exit_code, Path("t.csv").exists()) == (2, False)
    assert "let the name end in .parquet" in done.stderr


def test_where_moments_are_kept_is_chosen(folder: Path) -> None:
    assert analyze("compute", "runs/first.zarr", "--no-cache", "--out", "a.parquet").exit_code == 0
    assert [path.name for path in Path("runs").iterdir()] == ["first.zarr"]
    kept = ("--cache", "kept", "--out", "b.parquet")
    assert analyze("compute", "runs/first.zarr", *kept).exit_code == 0
    assert [path.name for path in Path("runs").iterdir()] == ["first.zarr"]
    assert len(list(Path("kept").glob("first.moments-*/*.safetensors"))) == 3
    assert analyze("compute", "runs/first.zarr", "--out", "c.parquet").exit_code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["first.moments", "first.zarr"]
    tables = {Path(name).read_bytes() for name in ("a.parquet", "b.parquet", "c.parquet")}
    assert len(tables) == 1


def test_help_fits_a_terminal_and_cuts_nothing_short() -> None:
    for arguments in ([], *([command] for command in main.commands)):
        text = analyze(*arguments, "--help").stdout
        assert max(map(len, text.splitlines())) <= 80
        assert "..." not in text.replace("[ARGS]...", "")
    assert "RUN is a folder" in analyze("compute", "--help").stdout
    assert "A TABLE is what" in analyze("report", "--help").stdout


def test_a_format_without_a_folder_is_refused(folder: Path) -> None:
    done = analyze("report", "runs/first.zarr", "--out", "r.html", "--format", "png")
    assert done.exit_code == 2
    assert "--figures DIR" in done.stderr


def test_a_damaged_run_leaves_the_old_table_as_it_was(folder: Path) -> None:
    assert analyze("compute", "runs/first.zarr", "--out", "t.parquet").exit_code == 0
    before = Path("t.parquet").read_bytes()
    shard = folder / "runs/first.zarr/gradients/minibatch/value/c/1/0"
    content = bytearray(shard.read_bytes())
    # One bit among the coordinates, which begin where the header ends.
    content[8 + int.from_bytes(content[:8], "little") + 5] ^= 1
    shard.write_bytes(content)
    # What was summed while the run was sound is still right; without it, the damage shows.
    assert analyze("compute", "runs/first.zarr", "--out", "t.parquet").exit_code == 0
    done = analyze("compute", "runs/first.zarr", "--no-cache", "--out", "t.parquet")
    assert done.exit_code == 3
    assert "c/1/0" in done.stderr
    assert Path("t.parquet").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["runs", "t.parquet"]


def test_an_old_table_is_overwritten(folder: Path) -> None:
    Path("t.parquet").write_text("old")
    assert analyze("compute", "runs/first.zarr", "--out", "t.parquet").exit_code == 0
    assert pq.read_table("t.parquet").num_rows == 33


@pytest.mark.parametrize("command", ["compute", "schedule"])
def test_the_choices_of_by_are_all_groupings(command: str) -> None:
    option = next(p for p in main.commands[command].params if p.name == "by")
    assert list(option.type.choices) == list(GROUPINGS)  # type: ignore[attr-defined]


def test_output_survives_a_terminal_without_greek(folder: Path) -> None:
    arguments = ["compute", "runs/first.zarr", "--out", "t.parquet"]
    done = in_a_process(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "? > 0: a step along -g" in done.stdout
