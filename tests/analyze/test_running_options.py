"""Every command that measures takes the same options of where it runs and what it keeps."""

from pathlib import Path

import pytest
from distributed import LocalCluster

from analyze.cli import main
from tests.analyze.recorded import random_run
from tests.analyze.test_cli import analyze, in_a_process

COMMANDS = {
    "compute": ["run.zarr", "--reference", "mean:2", "--out", "t.parquet"],
    "pairs": ["run.zarr", "--lags", "1,2", "--out", "t.parquet"],
    "pca": ["run.zarr", "--out", "t.parquet"],
    "schedule": ["run.zarr", "--out", "t.csv"],
    "compare": ["run.zarr", "other.zarr", "--group-by", "run", "--out", "t.csv"],
    "report": ["run.zarr", "--out", "t.html"],
    "export": ["run.zarr", "--out", "t.csv"],
}
KEEPING = [command for command in COMMANDS if command != "pca"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("run.zarr", "other.zarr")):
        random_run(tmp_path / name, seed=seed)
    return tmp_path


def test_the_options_are_the_same_everywhere() -> None:
    names = {"scheduler", "tls_ca", "tls_cert", "tls_key", "workers"}
    for command in COMMANDS:
        own = {parameter.name for parameter in main.commands[command].params}
        assert {*names, "plan", "out"} <= own
        assert ({"cache", "no_cache"} <= own) is (command != "pca")


@pytest.mark.parametrize("command", KEEPING)
def test_sums_are_kept_where_it_is_said_and_used_again(folder: Path, command: str) -> None:
    arguments = COMMANDS[command]
    out = Path(arguments[-1])
    assert analyze(command, *arguments, "--no-cache").exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["other.zarr", "run.zarr", out.name]
    summed = out.read_bytes()
    done = analyze(command, *arguments, "--cache", "kept")
    assert done.exit_code == 0, done.stderr
    kept = list(Path("kept").rglob("*.safetensors"))
    assert kept
    assert not list(folder.glob("*.moments"))
    # Nothing but what was kept can have given the same answer.
    for run in ("run.zarr", "other.zarr"):
        for shard in Path(run).glob("gradients/*/value/c/*/0"):
            if shard.is_file() and command != "pairs":
                shard.write_bytes(b"\0" * shard.stat().st_size)
    assert analyze(command, *arguments, "--cache", "kept", "--workers", "1").exit_code == 0
    assert out.read_bytes() == summed


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheduler", "tcp://::::"], "is no scheduler; use threads"),
        (["--scheduler", "tcp://h:1", "--tls-ca", "ca.pem"], "certificates are for tls://"),
        (["--workers", "0"], "--workers"),
        (["--cache", "kept", "--no-cache"], "goes without --no-cache"),
    ],
)
def test_nonsense_is_refused_by_all(
    folder: Path, command: str, options: list[str], words: str
) -> None:
    done = analyze(command, *COMMANDS[command], *options)
    expected = "no such option" if command == "pca" and "--no-cache" in options else words
    assert (done.exit_code, expected in done.stderr) == (2, True), done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["other.zarr", "run.zarr"]


def test_a_cluster_gives_all_commands_the_same_bytes(folder: Path) -> None:
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=True, dashboard_address=":0"
    ) as cluster:
        for command in ("schedule", "export", "pca"):
            arguments = COMMANDS[command]
            keep = [] if command == "pca" else ["--no-cache"]
            assert analyze(command, *arguments, *keep).exit_code == 0
            here = Path(arguments[-1]).read_bytes()
            there = ["--scheduler", cluster.scheduler_address]
            done = in_a_process(command, *arguments, *keep, *there)
            assert done.returncode == 0, done.stderr
            assert Path(arguments[-1]).read_bytes() == here
