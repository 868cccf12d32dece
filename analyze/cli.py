"""The command `analyze`. Each command is: parse, one call, print; what is heavy loads when used."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

from analyze.commands.measure import compute, pairs, pca, schedule
from analyze.commands.tell import compare, export, methods, report
from capture import __version__
from capture.command_line import Group


@click.group(cls=Group)
@click.version_option(__version__, message="straightway %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Measure recorded runs, as often as you like. (Record them first with `capture`.)"""
    logging.basicConfig(format="warning: %(message)s")
    context.with_resource(_terminable())


# In the order in which help lists them.
for each in (compute, report, compare, pairs, pca, schedule, export, methods):
    main.add_command(each)


@contextmanager
def _terminable() -> Iterator[None]:
    """End on SIGTERM with one line and exit code 143, so that nothing half-made stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, _: FrameType | None) -> NoReturn:
        os.write(2, b"error: terminated\n")
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
