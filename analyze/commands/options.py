"""What several commands share: options, and how they show what they do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import click

from capture.command_line import Command

command = partial(click.command, cls=Command)

inputs_argument = click.argument(
    "inputs", nargs=-1, required=True, metavar="RUN|TABLE…", type=click.Path()
)
runs_argument = click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path())
run_argument = click.argument("run", metavar="RUN", type=click.Path())

streams_option = click.option(
    "--stream",
    "streams",
    multiple=True,
    help="Stream of gradients, updates or weights, may be repeated. Default: all but the weights.",
)
by_option = click.option(
    "--by",
    type=click.Choice(["model", "layer", "tensor", "kind"]),
    default="model",
    help="The tensors that are summed over. Default: model, all of them.",
)
group_option = click.option(
    "--group",
    "patterns",
    multiple=True,
    metavar="LABEL=REGEX",
    help="Instead of --by: sum over the tensors in whose names REGEX is found, may be repeated; "
    "the first that fits counts, and what fits none is the group rest.",
)
scheduler_option = click.option(
    "--scheduler",
    default="threads",
    help="threads, or the tcp:// or tls:// address of a Dask scheduler. Default: threads.",
)
workers_option = click.option(
    "--workers", type=int, help="Number of threads. Default: one per processor."
)
cache_option = click.option(
    "--cache",
    type=click.Path(),
    help="Folder for the moments that were summed before. Default: NAME.moments beside the run.",
)
no_cache_option = click.option("--no-cache", is_flag=True, help="Sum again, and keep nothing.")


def cache_place(cache: str | None, no_cache: bool) -> bool | str:
    """Say where moments are kept, in the words of `analyze.cache`."""
    return False if no_cache else True if cache is None else cache


def grouping(patterns: tuple[str, ...], by: str) -> Any:
    """Return the grouping that was chosen: patterns go before `--by`."""
    from analyze.groups import parse_groups

    return parse_groups(patterns) if patterns else by


@contextmanager
def progress_of(run: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar of the blocks done, on stderr and only on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"measuring {escape(run)}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(text: str) -> None:
    """Print, with question marks for what the terminal's encoding cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding))
