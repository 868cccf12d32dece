"""Where blocks are computed: threads of this process, or a running dask.distributed cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import dask
import dask.local
import dask.threaded
from dask.callbacks import Callback

from capture.store import UsageError

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
Take = Callable[[int, Any], None]

_LOCAL: dict[str, Any] = {"threads": dask.threaded.get, "synchronous": dask.local.get_sync}
LOCAL = tuple(_LOCAL)

# Dask has no types of its own.
_dask: Any = dask
_callback: Any = Callback


@dataclass(frozen=True)
class Cluster:
    """A running dask.distributed scheduler: its address, and what a `tls://` one asks for.

    `ca` is the certificate of the authority, `certificate` and `key` are this client's own: paths
    of PEM files, or their text. Without them, Dask's own settings hold (`distributed.comm.tls`).
    """

    address: str
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None


def check(scheduler: str | Cluster, workers: int | None) -> int:
    """Check both choices; return the number of threads, by default one per processor."""
    if isinstance(scheduler, Cluster):
        _check_certificates(scheduler)
        _check_address(scheduler.address)
    elif scheduler not in LOCAL:
        _check_address(scheduler)
    if workers is None:
        return len(os.sched_getaffinity(0))
    if workers < 1:
        raise UsageError(f"{workers} workers cannot compute anything", fix="use 1 or more")
    return workers


def _check_address(address: str) -> None:
    """Refuse what Dask would stumble over: an address needs one of two schemes, a host and a port.

    `UsageError`, in milliseconds: Dask itself waits, and ends in a traceback.
    """
    try:
        parts = urlsplit(address)
        sound = bool(parts.scheme in ("tcp", "tls") and parts.hostname and parts.port)
    except ValueError:  # a port that is none, brackets that do not close
        sound = False
    if not sound or parts.path.strip("/") or "@" in parts.netloc:
        raise UsageError(
            f"{address!r} is no scheduler",
            fix="use threads, or an address like tcp://host:8786 or tls://host:8786",
        )


def _check_certificates(cluster: Cluster) -> None:
    given = {"CA": cluster.ca, "certificate": cluster.certificate, "key": cluster.key}
    if not cluster.address.startswith("tls://"):
        if any(given.values()):
            raise UsageError(
                "certificates are for tls:// schedulers", where=cluster.address, fix="leave them"
            )
        return
    if any(given.values()) and not all(given.values()):
        missing = ", ".join(name for name, value in given.items() if not value)
        raise UsageError(f"the {missing} is missing", fix="give CA, certificate and key together")
    for name, value in given.items():
        if value and "-----BEGIN" not in value and not os.path.isfile(value):
            raise UsageError(f"there is no such {name} file", where=value, fix="check the path")


def tasks_at_once(scheduler: str | Cluster, threads: int) -> int:
    """How many tasks one process works on at a time; on a cluster, as many as is usual."""
    return threads if scheduler in LOCAL else max(threads, _CLUSTER_THREADS)


# Threads of a worker whose limits are the usual ones; with more, limits are to be raised as well.
_CLUSTER_THREADS = 8


def run(
    tasks: Sequence[Callable[[], Result]],
    scheduler: str | Cluster,
    workers: int,
    progress: Progress | None = None,
) -> list[Result]:
    """Call every task and return the results in their order; see `run_each`."""
    results: dict[int, Result] = {}
    run_each(tasks, scheduler, workers, results.__setitem__, progress)
    return [results[number] for number in range(len(tasks))]


def run_each(
    tasks: Sequence[Callable[[], Any]],
    scheduler: str | Cluster,
    workers: int,
    take: Take,
    progress: Progress | None = None,
) -> None:
    """Call every task, and `take` with its number and result: one at a time, in any order.

    The first error is raised as it is. `scheduler` is one of `LOCAL` or a cluster, to which tasks
    and results travel by pickle; `workers` counts for threads. `progress` is called with tasks done
    and all tasks. No result is kept.
    """
    report = progress or (lambda done, total: None)
    report(0, len(tasks))
    if isinstance(scheduler, str) and scheduler in LOCAL:
        _run_here(tasks, scheduler, workers, take, report)
        return
    from analyze.cluster import run_on_cluster

    cluster = scheduler if isinstance(scheduler, Cluster) else Cluster(scheduler)
    run_on_cluster(tasks, cluster, take, report)


def _run_here(
    tasks: Sequence[Callable[[], Any]],
    scheduler: str,
    workers: int,
    take: Take,
    report: Progress,
) -> None:
    keys = {f"block-{number}" for number in range(len(tasks))}
    done: set[str] = set()
    taking, stopped = threading.Lock(), threading.Event()

    def finished(key: Any, *_: Any) -> None:
        if key in keys:
            done.add(key)
            report(len(done), len(tasks))

    def call(number: int) -> None:
        # After an error or Ctrl-C nobody waits for what is still in the queue of the threads.
        if not stopped.is_set():
            result = tasks[number]()
            with taking:
                take(number, result)

    calls = [
        _dask.delayed(call, pure=False, traverse=False)(number, dask_key_name=f"block-{number}")
        for number in range(len(tasks))
    ]
    try:
        with _callback(posttask=finished):
            # By name, Dask would import dask.distributed to ask it first: half a second.
            _dask.compute(*calls, scheduler=_LOCAL[scheduler], num_workers=workers)
    finally:
        stopped.set()
