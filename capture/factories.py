"""Tasks and models by name: those that come along, or anybody's as ``module:factory``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from capture.store.errors import UsageError

Factory = Callable[..., Any]


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
    if name not in known and "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"cannot import the {kind} {name!r}: {error}",
            fix="install it, or start in the folder where the module lies",
        ) from None
    factory = getattr(found, attribute, None)
    if not callable(factory):
        raise UsageError(f"the module {module} has no function {attribute!r} for the {kind}")
    return factory  # type: ignore[no-any-return]


def call_factory(factory: Factory, kind: str, name: str, arguments: Mapping[str, Any]) -> Any:
    """Call a factory; arguments that it does not take raise `UsageError` naming those."""
    signature = inspect.signature(factory)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UsageError(
            f"the {kind} {name} cannot be made with these arguments: {error}",
            fix=f"it takes {', '.join(signature.parameters)}",
        ) from None
    return factory(**arguments)
