"""Tasks on a running dask.distributed cluster: versions, lost workers and lost schedulers."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import distributed

from analyze.schedulers import Cluster, Progress, Take
from capture import __version__
from capture.store import InputError, MismatchError, StraightwayError, UsageError

_CONNECT_SECONDS = 10
# How long nobody may be there to work: at the start, and after the last worker is lost.
_WORKER_SECONDS = 120
# After so many of them it is said that nobody is there.
_TELL_SECONDS = 5
_POLL_SECONDS = 0.02
_LOOK_SECONDS = 1
_NOISY = ("distributed", "tornado", "asyncio")

logger = logging.getLogger("analyze")

_INSTALL = f"install straightway[analyze] {__version__} where scheduler and workers run"

# Dask has no types of its own.
_distributed: Any = distributed


def run_on_cluster(
    tasks: Sequence[Callable[[], Any]], cluster: Cluster, take: Take, report: Progress
) -> None:
    """Call every task on some worker; lost workers' tasks are given to others.

    `InputError` where no scheduler answers; `StraightwayError` where it has no worker for
    `_WORKER_SECONDS`, which a warning announces, goes away, or loses several workers over one
    task; `MismatchError` where a worker has another version of this package. However it ends,
    nothing is left in the queue.
    """
    with _silent_dask(), _connected(cluster) as client, _naming(cluster.address):
        _wait_for_a_worker(client, cluster.address)
        _check_versions(client)
        futures = [client.submit(_Returning(task, __version__), pure=False) for task in tasks]
        try:
            _collect(client, cluster.address, futures, take, report)
        finally:
            if client.status == "running":
                client.cancel(futures, force=True)


@contextmanager
def _silent_dask() -> Iterator[None]:
    """Keep Dask's logs off the terminal: what they tell of trouble is told here in one line.

    Each of its modules has a logger of its own, some with a level of their own, and its event loop
    logs what nobody awaits.
    """
    names = [name for name in logging.root.manager.loggerDict if name.startswith(_NOISY)]
    levels = {logger: logger.level for logger in map(logging.getLogger, (*names, *_NOISY))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    address, security = cluster.address, _security(cluster)
    try:
        options = {"timeout": _CONNECT_SECONDS, "set_as_default": False}
        # Dask's own limit comes first where it holds.
        client = _in_time(
            lambda: _distributed.Client(address, security=security, **options), 2 * _CONNECT_SECONDS
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        secure = address.startswith("tls://")
        raise InputError(
            "no Dask scheduler answers",
            where=address,
            fix="check its certificates and yours (--tls-ca, --tls-cert, --tls-key)"
            if secure
            else "start one with `dask scheduler`, or use --scheduler threads",
        ) from error
    with client:
        yield client


def _in_time(call: Callable[[], Any], seconds: float) -> Any:
    """Call, and raise `TimeoutError` where it takes longer: Dask waits for ever for a greeting.

    The thread that waits goes on until the process ends.
    """
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:  # raised where it is waited for
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return found


def _security(cluster: Cluster) -> Any:
    if cluster.ca is None:
        found = _distributed.Security()
        if cluster.address.startswith("tls://") and not found.tls_ca_file:
            raise UsageError(
                "a tls:// scheduler needs certificates",
                where=cluster.address,
                fix="give --tls-ca, --tls-cert and --tls-key",
            )
        return found
    return _distributed.Security(
        require_encryption=True,
        tls_ca_file=cluster.ca,
        tls_client_cert=cluster.certificate,
        tls_client_key=cluster.key,
    )


class _Absence:
    """How long nobody has been there to work: after a while it is said, in the end an error."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.end()

    def end(self) -> None:
        """Take note that somebody is there."""
        self._since, self._told = time.monotonic(), False

    def go_on(self) -> None:
        """Take note that nobody is there; `StraightwayError` after `_WORKER_SECONDS` of that."""
        seconds = time.monotonic() - self._since
        if seconds > _WORKER_SECONDS:
            raise StraightwayError(
                f"the cluster has had no worker for {_WORKER_SECONDS} seconds",
                where=self._address,
                fix="start workers with `dask worker`, see their logs, then try again",
            )
        if seconds > _TELL_SECONDS and not self._told:
            self._told = True
            logger.warning(
                "no workers are there: waiting for one, at most %.0f seconds more: %s",
                _WORKER_SECONDS - seconds,
                self._address,
            )


def _wait_for_a_worker(client: Any, address: str) -> None:
    absence = _Absence(address)
    while not client.nthreads():
        absence.go_on()
        time.sleep(_LOOK_SECONDS / 5)


def _check_versions(client: Any) -> None:
    """Ask the scheduler and the workers that are there; later ones find out with their first task.

    The scheduler takes tasks apart as well, and a worker that cannot load one ends.
    """
    # A function of Python's own: ours may not be there.
    question = "__import__('analyze') and __import__('capture').__version__"
    found = {}
    try:
        found[client.scheduler.address] = client.run_on_scheduler(eval, question)
    except ImportError as error:
        found[client.scheduler.address] = error
    found |= client.run(eval, question, on_error="return")
    for place, version in found.items():
        if version != __version__:
            who = "the scheduler" if place == client.scheduler.address else "a worker"
            what = f"has straightway {version}" if isinstance(version, str) else f"says: {version}"
            raise MismatchError(f"{who} {what}", where=place, fix=_INSTALL)


def _collect(client: Any, address: str, futures: list[Any], take: Take, report: Progress) -> None:
    """Take results as they come, and look now and then whether anybody is still there."""
    total, done = len(futures), 0
    place = {future.key: number for number, future in enumerate(futures)}
    completed = _distributed.as_completed(futures, loop=client.loop, with_results=True)
    looked, absence = time.monotonic(), _Absence(address)
    while done < total:
        batch = completed.next_batch(block=False)
        for future, result in batch:
            if isinstance(result, _Failure):
                raise result.error
            if isinstance(result, BaseException):
                raise result
            if future.status == "error":  # its class, value and traceback
                raise result[1]
            # The worker may be gone by now, and the future no longer finished: its result is here.
            take(place[future.key], result)
            done += 1
            report(done, total)
            future.release()  # the worker that holds the result may forget it
        if batch:
            absence.end()
        elif time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            if client.status != "running":
                raise _gone(address)
            absence.end() if client.nthreads() else absence.go_on()
        else:
            time.sleep(_POLL_SECONDS)


@contextmanager
def _naming(address: str) -> Iterator[None]:
    """Turn what Dask says of a cluster in trouble into one line."""
    try:
        yield
    except StraightwayError:
        raise
    except _distributed.KilledWorker as error:
        raise StraightwayError(
            "the workers of the cluster died over the same block several times",
            where=address,
            fix="see their logs, and whether they have memory enough",
        ) from error
    except (ImportError, RuntimeError) as error:
        if not isinstance(error, ImportError) and "deserializ" not in str(error):
            raise
        what = f"the cluster cannot load what it is sent ({error.__cause__ or error})"
        raise MismatchError(what, where=address, fix=_INSTALL) from error
    except (OSError, CancelledError, _distributed.client.FutureCancelledError) as error:
        raise _gone(address) from error


def _gone(address: str) -> StraightwayError:
    return StraightwayError(
        "the scheduler of the cluster went away", where=address, fix="see its log, then try again"
    )


@dataclass(frozen=True)
class _Failure:
    """An error of a task, as its result: a cluster writes pages about a task that raises."""

    error: StraightwayError


@dataclass(frozen=True)
class _Returning:
    """A task that returns what a user can cause and mend instead of raising it."""

    task: Callable[[], Any]
    version: str

    def __call__(self) -> Any:
        if self.version != __version__:
            return _Failure(
                MismatchError(
                    f"the worker on {socket.gethostname()} has straightway {__version__}",
                    where=os.path.dirname(__file__),
                    fix=f"install {self.version} there, which measures",
                )
            )
        try:
            return self.task()
        except StraightwayError as error:
            return _Failure(error)
