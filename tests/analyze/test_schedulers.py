"""Where the work is done must not matter: threads, one thread, a real cluster of two processes."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from analyze import schedulers
from analyze.compute import Moments, compute_moments
from analyze.references import parse_reference
from capture.store import DamagedError, InputError, UsageError
from tests.analyze.small_runs import flip, random_streams, same_bytes, write_run

REFERENCES = [parse_reference(text) for text in ("final", "mean:2")]


def measure(run: Path, **options: Any) -> Moments:
    return compute_moments(run, ["weights", "minibatch"], REFERENCES, **options)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a scheduler with two worker processes."""
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as started:
        yield started.scheduler_address


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of several inner chunks of the real size, which other processes read as well."""
    sizes = (700_000, 3, 1_600_000)
    streams = random_streams(sum(sizes), rows=3)
    del streams["updates"], streams["fixed"]
    return write_run(tmp_path_factory.mktemp("schedulers") / "run.zarr", sizes, streams)


def test_a_cluster_of_two_processes_changes_no_byte(cluster: str, run: Path) -> None:
    seen: list[tuple[int, int]] = []
    there = measure(
        run,
        scheduler=cluster,
        rows_per_block=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert same_bytes(there, measure(run))
    assert [done for done, _ in seen] == list(range(seen[-1][1] + 1))


def test_an_error_on_a_worker_arrives_as_it_is(cluster: str, run: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(run, tmp_path / "damaged.zarr")
    flip(damaged / "gradients/minibatch/value/c/1/0", 5_000_000)
    with pytest.raises(DamagedError, match=r"row 1 .*'minibatch'.*inner chunk 1 does not match"):
        measure(damaged, scheduler=cluster)


def test_a_cluster_that_does_not_answer_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analyze.cluster._CONNECT_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"no Dask scheduler answers: tcp://127.0.0.1:9; start"):
        measure(run, scheduler="tcp://127.0.0.1:9")


def test_wrong_choices_are_usage_errors(run: Path) -> None:
    with pytest.raises(UsageError, match="'fibers' is no scheduler"):
        measure(run, scheduler="fibers")
    with pytest.raises(UsageError, match="0 workers"):
        measure(run, workers=0)


def test_progress_counts_blocks_up_to_the_last(run: Path) -> None:
    seen: list[tuple[int, int]] = []
    measure(run, rows_per_block=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, seen[0][1])
    assert [done for done, _ in seen] == list(range(seen[-1][1] + 1))


def test_results_keep_the_order_of_their_tasks() -> None:
    tasks = [lambda number=number: number * number for number in range(50)]
    assert schedulers.run(tasks, "threads", 8) == [number * number for number in range(50)]
