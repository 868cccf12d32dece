"""What several commands share: options, and how they show what they do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import click

from capture.command_line import Command

_OTHER_FORMATS = (".csv", ".nc", ".zarr", ".tex", ".json", ".html", ".txt", ".xlsx")

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
tls_ca_option = click.option(
    "--tls-ca", type=click.Path(), help="For tls://, certificate of the authority, a PEM file."
)
tls_cert_option = click.option(
    "--tls-cert", type=click.Path(), help="For tls://, your own certificate."
)
tls_key_option = click.option(
    "--tls-key", type=click.Path(), help="For tls://, the key of your certificate."
)
workers_option = click.option(
    "--workers", type=click.IntRange(1), help="Number of threads. Default: one per processor."
)
cache_option = click.option(
    "--cache",
    type=click.Path(),
    help="Folder for the moments that were summed before. Default: NAME.moments beside the run.",
)
no_cache_option = click.option("--no-cache", is_flag=True, help="Sum again, and keep nothing.")


def cluster(scheduler: str, ca: str | None, certificate: str | None, key: str | None) -> Any:
    """Return the scheduler that was chosen, with its certificates where there are any."""
    if not (ca or certificate or key):
        return scheduler
    from analyze.schedulers import Cluster

    return Cluster(scheduler, ca, certificate, key)


def parquet_target(path: str, inputs: Iterable[str]) -> None:
    """Refuse a place where no table may be written, and the suffix of another format."""
    from pathlib import PurePath

    from capture.store.errors import UsageError
    from capture.store.target import check_target

    check_target(path, inputs)
    if PurePath(path).suffix in _OTHER_FORMATS:
        raise UsageError(
            "this command writes Parquet",
            where=path,
            fix="let the name end in .parquet; `analyze export` writes other formats",
        )


def cache_place(cache: str | None, no_cache: bool) -> bool | str:
    """Say where moments are kept, in the words of `analyze.cache`."""
    if cache is not None and (no_cache or not cache):
        raise click.UsageError("--cache names a folder, and goes without --no-cache")
    return False if no_cache else True if cache is None else cache


def grouping(patterns: tuple[str, ...], by: str | None) -> Any:
    """Return the grouping that was chosen, by patterns or by name."""
    from analyze.groups import parse_groups

    if patterns and by is not None:
        raise click.UsageError("--group stands instead of --by: give one of them")
    return parse_groups(patterns) if patterns else by or "model"


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
