"""Every error that a user can cause, as one tree.

    StraightwayError        exit 1
    ├── UsageError          exit 2   wrong options or arguments
    ├── InputError          exit 3   bad or damaged input
    │   ├── NotARunError             no run store there, or one of a newer format
    │   ├── DamagedError             bytes that are missing, changed, or in the wrong place
    │   ├── UnfinishedError          the final iterate of a run that has not finished
    │   ├── UnknownNameError         a step, stream, scalar, tensor or reference that is not there
    │   ├── MismatchError            names or shapes differ between two things that must agree
    │   ├── LockedError              another process is writing this run
    │   └── UnsupportedModelError    a model or optimizer that cannot be recorded
    └── WriteError          exit 1   the disk refused

A message is one line in three parts: what is wrong, where, what to do next.
"""

from __future__ import annotations

from os import PathLike

# What to do about bytes that are gone.
RESTORE = "restore the file from a copy of the run, or record the run again"


class StraightwayError(Exception):
    """An error with a cause that the user can see and mend.

    `str(error)` is one line: ``what: where; fix``.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str | PathLike[str] | None = None, fix: str | None = None
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        message = what if where is None else f"{what}: {self.where}"
        if fix is not None:
            message = f"{message}; {fix}"
        # Only the line ends go: a path may have two spaces in a row.
        super().__init__(" ".join(message.splitlines()))

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between Dask workers, and keyword arguments do not survive the default.
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(
    kind: type[StraightwayError], what: str, where: str | None, fix: str | None
) -> StraightwayError:
    return kind(what, where=where, fix=fix)


class UsageError(StraightwayError):
    """Wrong options or arguments."""

    exit_code = 2


class InputError(StraightwayError):
    """Bad or damaged input."""

    exit_code = 3


class NotARunError(InputError):
    """No run store at this path, or one written by a newer version."""


class DamagedError(InputError):
    """Bytes of a run that are missing, changed, or in the wrong place."""


class UnfinishedError(InputError):
    """The final iterate was asked of a run that has not finished."""


class UnknownNameError(InputError):
    """A step, stream, scalar, tensor or reference that is not there."""


class MismatchError(InputError):
    """Names or shapes differ between two things that must agree."""


class LockedError(InputError):
    """Another process is writing this run."""


class UnsupportedModelError(InputError):
    """A model or an optimizer that cannot be recorded; raised before the first step."""


class WriteError(StraightwayError):
    """The disk refused: full, read-only, or not permitted."""
