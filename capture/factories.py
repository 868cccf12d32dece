"""Tasks and models by name: those that come along, or anybody's as ``module:factory``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from traceback import extract_tb
from typing import Any

from capture.store.errors import StraightwayError, UsageError

# Where code lies that is not the user's: this package, Python and what is installed.
_NOT_THE_USERS = (
    str(Path(__file__).parent),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    "<",
)

Factory = Callable[..., Any]


# The module of a user that is being imported for its task or model.
_importing: ContextVar[str | None] = ContextVar("importing", default=None)


def find_factory(kind: str, name: str, known: Mapping[str, str]) -> Factory:
    """Import the factory of the task or model `name`.

    `known` has the ``module:factory`` of each name that comes along; for any other name with a
    colon the module is searched in the working directory too.
    """
    if name not in known and ":" not in name:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise UsageError(f"unknown {kind} {name!r}", fix=f"{hint}, or give module:factory")
    module, _, attribute = known.get(name, name).partition(":")
    if not module or not attribute:
        raise UsageError(f"unknown {kind} {name!r}", fix="write module:factory")
    if name not in known and "" not in sys.path:
        sys.path.insert(0, "")
    hint = "install it, or start in the folder where the module lies"
    token = _importing.set(module)
    try:
        with user_code(f"cannot import the {kind} {name!r}", hint):
            found = importlib.import_module(module)
    finally:
        _importing.reset(token)
    factory = getattr(found, attribute, None)
    if not callable(factory):
        raise UsageError(f"the module {module} has no function {attribute!r} for the {kind}")
    return factory  # type: ignore[no-any-return]


def require_not_importing() -> None:
    """Raise `UsageError` where a module that gives a task or model records while it is imported."""
    module = _importing.get()
    if module is not None:
        raise UsageError(
            f"importing the module {module} starts a training of its own",
            where=sys.modules[module].__file__ if module in sys.modules else module,
            fix='put its loop under if __name__ == "__main__":',
        )


def call_factory(factory: Factory, kind: str, name: str, arguments: Mapping[str, Any]) -> Any:
    """Call a factory; arguments that it does not take raise `UsageError` naming those."""
    takes = signature_of(factory)
    if takes is not None:
        try:
            takes.bind(**arguments)
        except TypeError as error:
            raise UsageError(
                f"the {kind} {name} cannot be made with these arguments: {error}",
                fix=f"it takes {', '.join(takes.parameters)}",
            ) from None
    with user_code(f"the {kind} {name} cannot be made"):
        return factory(**arguments)


def signature_of(factory: Factory) -> inspect.Signature | None:
    """Return the signature of a factory; `None` for some that are written in C."""
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError):
        return None


@contextmanager
def user_code(what: str, missing: str | None = None) -> Iterator[None]:
    """Turn what code of the user raises into one `UsageError` with the place in that code.

    `missing` is what to do where a module is not found.
    """
    try:
        yield
    except StraightwayError:
        raise
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        words = f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
        is_missing = isinstance(error, ModuleNotFoundError)
        raise UsageError(
            f"{what}, {words}", where=_place(error), fix=missing if is_missing else None
        ) from error


def _place(error: BaseException) -> str | None:
    """File and line of the user's own code where it happened."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    theirs = [
        f"{frame.filename}:{frame.lineno}"
        for frame in extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    return theirs[-1] if theirs else None
