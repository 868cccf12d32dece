"""Where blocks are computed: threads of this process, or a running dask.distributed cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import dask
from dask.callbacks import Callback

from capture.store import InputError, StraightwayError, UsageError

Result = TypeVar("Result")
Progress = Callable[[int, int], None]

LOCAL = ("threads", "synchronous")
_CONNECT_SECONDS = 10

# Dask has no types of its own.
_dask: Any = dask
_callback: Any = Callback


def check(scheduler: str, workers: int | None) -> int:
    """Check both choices; return the number of threads, by default one per processor."""
    if scheduler not in LOCAL and "://" not in scheduler:
        raise UsageError(
            f"{scheduler!r} is no scheduler", fix="use threads, or an address like tcp://host:8786"
        )
    if workers is None:
        return len(os.sched_getaffinity(0))
    if workers < 1:
        raise UsageError(f"{workers} workers cannot compute anything", fix="use 1 or more")
    return workers


def run(
    tasks: Sequence[Callable[[], Result]],
    scheduler: str,
    workers: int,
    progress: Progress | None = None,
) -> list[Result]:
    """Call every task and return the results in their order; the first error is raised as it is.

    `scheduler` is one of `LOCAL` or the address of a cluster, to which tasks and results travel by
    pickle; `workers` counts for threads. `progress` is called with tasks done and all tasks.
    """
    report = progress or (lambda done, total: None)
    report(0, len(tasks))
    if scheduler in LOCAL:
        return _run_here(tasks, scheduler, workers, report)
    return _run_on_cluster(tasks, scheduler, report)


def _run_here(
    tasks: Sequence[Callable[[], Result]], scheduler: str, workers: int, report: Progress
) -> list[Result]:
    keys = {f"block-{number}" for number in range(len(tasks))}
    done: set[str] = set()

    def finished(key: Any, *_: Any) -> None:
        if key in keys:
            done.add(key)
            report(len(done), len(tasks))

    calls = [
        _dask.delayed(task, pure=False, traverse=False)(dask_key_name=f"block-{number}")
        for number, task in enumerate(tasks)
    ]
    with _callback(posttask=finished):
        return list(_dask.compute(*calls, scheduler=scheduler, num_workers=workers))


def _run_on_cluster(
    tasks: Sequence[Callable[[], Result]], address: str, report: Progress
) -> list[Result]:
    # Takes most of a second to import, and most measurements do without it.
    import distributed

    cluster: Any = distributed
    try:
        client = cluster.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            "no Dask scheduler answers",
            where=address,
            fix="start one with `dask scheduler`, or use --scheduler threads",
        ) from error
    results: dict[int, Result] = {}
    with client:
        futures = [client.submit(_Returning(task), pure=False) for task in tasks]
        place = {future.key: number for number, future in enumerate(futures)}
        completed = cluster.as_completed(futures, loop=client.loop, with_results=True)
        try:
            for future, result in completed:
                if isinstance(result, _Failure):
                    raise result.error
                results[place[future.key]] = result
                report(len(results), len(tasks))
        except distributed.KilledWorker as error:
            raise StraightwayError(
                "the workers of the cluster died over the same block several times",
                where=address,
                fix="see their logs, and whether they have memory enough",
            ) from error
        finally:
            client.cancel(futures)
    return [results[number] for number in range(len(tasks))]


@dataclass(frozen=True)
class _Failure:
    """An error of a task, as its result: a cluster writes pages about a task that raises."""

    error: StraightwayError


@dataclass(frozen=True)
class _Returning(Generic[Result]):
    """A task that returns what a user can cause and mend instead of raising it."""

    task: Callable[[], Result]

    def __call__(self) -> Result | _Failure:
        try:
            return self.task()
        except StraightwayError as error:
            return _Failure(error)
