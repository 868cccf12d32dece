"""The hooks around an optimizer's step, with the three ways in which a step is not simple."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import optim

from capture.store.errors import UnsupportedModelError

# Every hooked `step` runs in this one code object.
HOOKED_STEP = optim.Optimizer.profile_hook_step(lambda: None).__code__

Hooked = tuple[tuple[Any, ...], dict[str, Any]]


class StepHooks:
    """Calls `before` when the gradient of a step is there, and `after` once the step is done.

    - With a closure, the backward pass runs inside the step: `before` runs after the closure and
      is given what it returned, otherwise `None`. A second evaluation in one step is refused.
    - A `step` that calls that of its base class is hooked at both levels; the outer one counts.
    - A step that raised has no end; the next one begins anew.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        before: Callable[[Any], None],
        after: Callable[[], None],
    ) -> None:
        self._name = type(optimizer).__name__
        self._before = before
        self._after = after
        self._stepping = False
        self._nested = 0
        self._begun = False
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    def remove(self) -> None:
        """Detach from the optimizer; removing twice is harmless."""
        for handle in self._handles:
            handle.remove()

    def _enter(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Hooked | None:
        if self._stepping and _depth(optimizer) > 1:
            self._nested += 1
            return None
        self._stepping, self._nested, self._begun = True, 0, False
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._begin(None)
            return None
        watched = self._watched(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def watched() -> Any:
            if self._begun:
                raise UnsupportedModelError(
                    "the optimizer evaluates its closure several times in one step, so a step has "
                    "no one gradient",
                    where=self._name,
                    fix="record a first-order optimizer",
                )
            loss = closure()
            self._begin(loss)
            return loss

        return watched

    def _begin(self, loss: Any) -> None:
        self._before(loss)
        self._begun = True

    def _leave(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._nested:
            self._nested -= 1
            return
        self._stepping = False
        if not self._begun:
            raise UnsupportedModelError(
                "the optimizer made a step without evaluating its closure",
                where=self._name,
                fix="call optimizer.step() without a closure",
            )
        self._after()


def _depth(optimizer: optim.Optimizer) -> int:
    """How many hooked steps of this optimizer are under way, one inside the other."""
    depth, frame = 0, sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        depth += frame.f_code is HOOKED_STEP and frame.f_locals.get("self") is optimizer
    return depth
