"""The connection to an object store: retries and timeouts, and its errors as ours.

Requests that a server refuses for now (5xx, timeouts, broken connections) are sent again by
`obstore`, up to `RETRIES` times with waits that double and vary at random. `obstore` is the
optional extra `objects`; it is imported when the first such address is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING

from capture.store.errors import (
    RESTORE,
    DamagedError,
    InputError,
    StraightwayError,
    UsageError,
    WriteError,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

RETRIES = 8
FIRST_WAIT = timedelta(seconds=0.1)
LONGEST_WAIT = timedelta(seconds=10)
GIVE_UP = timedelta(minutes=3)

# One request sends or fetches at most `PART_BYTES` within this time, else it counts as failed.
REQUEST_SECONDS = 120

AGAIN = "check address, credentials and network, then try again"


@lru_cache(maxsize=64)
def connect(root: str) -> ObjectStore:
    """Open the store of obstore whose root is this address, without a request; once for each.

    `UsageError` where obstore is not installed or cannot make anything of the address.
    """
    try:
        from obstore.store import MemoryStore, from_url
    except ImportError as error:
        raise UsageError(
            "runs on object stores need the package obstore",
            where=root,
            fix="pip install 'straightway[objects]'",
        ) from error
    if root.partition("://")[0] == "memory":
        return MemoryStore()
    retries: RetryConfig = {
        "max_retries": RETRIES,
        "retry_timeout": GIVE_UP,
        "backoff": {"init_backoff": FIRST_WAIT, "max_backoff": LONGEST_WAIT, "base": 2},
    }
    options: ClientConfig = {
        "allow_http": root.startswith("http://") or _allows_http(),
        "connect_timeout": "10s",
        "timeout": f"{REQUEST_SECONDS}s",
    }
    try:
        return from_url(root, retry_config=retries, client_options=options)
    except Exception as error:  # what obstore says of an address has no common class
        raise UsageError(
            f"no object store can be opened here ({_reason(error)})", where=root, fix=AGAIN
        ) from error


def _allows_http() -> bool:
    """Whether the user names an endpoint without TLS, a server of their own."""
    endpoints = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
    plain = any(os.environ.get(name, "").startswith("http://") for name in endpoints)
    return plain or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")


@contextmanager
def reading(place: PathLike[str]) -> Iterator[None]:
    """Turn what the store says while it is read into an `InputError` that names the object."""
    try:
        yield
    except (StraightwayError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise DamagedError("the file is missing", where=place, fix=RESTORE) from error
    except Exception as error:
        what = f"the object store does not give this ({_reason(error)})"
        raise InputError(what, where=place, fix=AGAIN) from error


@contextmanager
def writing(place: PathLike[str]) -> Iterator[None]:
    """Turn what the store refuses into a `WriteError`, but for conditions that do not hold."""
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    try:
        yield
    except (StraightwayError, AlreadyExistsError, PreconditionError):
        raise
    except Exception as error:
        what = f"cannot write, the object store refuses ({_reason(error)})"
        raise WriteError(what, where=place, fix=AGAIN) from error


def _reason(error: Exception) -> str:
    """The first line of what a library says: the rest repeats it for programmers."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
