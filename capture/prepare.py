"""What the `prepare.py` of every data set shares: its options, and errors as one line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from capture.store.errors import StraightwayError

# Called with the folder of the data and the address to fetch from, `None` without one; returns
# what there is in the end, a line each.
Prepare = Callable[[Path, str | None], Sequence[str]]


def run_prepare(
    prepare: Prepare, script: str, *, url: str | None, arguments: Sequence[str] | None = None
) -> int:
    """Prepare a data set as the command line says, and return the exit code.

    `script` is the ``__file__`` of the caller, whose folder is the default for the data; `url` is
    the official address, `None` for data that are not to be fetched.
    """
    folder = Path(script).resolve().parent
    parser = argparse.ArgumentParser(
        prog=f"data/{folder.name}/prepare.py",
        description="Check what is there, fetch what is missing, and print what there is.",
    )
    parser.add_argument("--root", metavar="DIR", type=Path, default=folder, help="folder for data")
    if url is not None:
        parser.add_argument("--url", default=url, help="address to fetch from (%(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="warning: %(message)s")
    try:
        lines = prepare(options.root, getattr(options, "url", None))
    except StraightwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(*lines, sep="\n")
    return 0
