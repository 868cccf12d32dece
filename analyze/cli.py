"""The command `analyze`. Each command is: parse, one call, print; what is heavy loads when used."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

from capture import __version__
from capture.command_line import Group


@click.group(cls=Group)
@click.version_option(__version__, message="straightway %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Measure recorded runs, as often as you like. (Record them first with `capture`.)"""
    context.with_resource(_terminable())


@main.command(
    example="analyze compute runs/first.zarr --reference final --reference step:0 \\\n"
    "  --out runs/first.parquet"
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path())
@click.option(
    "--reference",
    "references",
    multiple=True,
    default=("final",),
    help="The point w* to measure against, may be repeated: final, step:N, mean:K, "
    "run:PATH[@STEP] or file:PATH. Default: final.",
)
@click.option(
    "--stream",
    "streams",
    multiple=True,
    help="Stream of gradients, updates or weights, may be repeated. Default: all but the weights.",
)
@click.option(
    "--by",
    type=click.Choice(["model", "layer", "tensor"]),
    default="model",
    help="The tensors that are summed over. Default: model, all of them.",
)
@click.option(
    "--scheduler",
    default="threads",
    help="threads, or the tcp:// or tls:// address of a Dask scheduler. Default: threads.",
)
@click.option("--workers", type=int, help="Number of threads. Default: one per processor.")
@click.option("--out", type=click.Path(), required=True, help="Parquet file to write.")
def compute(
    runs: tuple[str, ...],
    references: tuple[str, ...],
    streams: tuple[str, ...],
    by: str,
    scheduler: str,
    workers: int | None,
    out: str,
) -> None:
    """Measure runs into a table, and print the verdict.

    RUN is a folder that `capture train --out` or a Recorder wrote. The table has one row per run,
    stream, step, batch, group of tensors and reference. Every byte that leads to a number is
    verified.
    """
    from analyze.tables import concatenate, measure_run, write_table
    from analyze.verdict import counted, verdict
    from capture.store.target import check_target

    files = [text.removeprefix("file:") for text in references if text.startswith("file:")]
    check_target(out, [*runs, *files])
    groupings = list(dict.fromkeys(["model", by]))
    measured = []
    for run in dict.fromkeys(runs):
        with _progress(run) as show:
            tables = measure_run(
                run,
                references,
                streams=streams,
                by=groupings,
                scheduler=scheduler,
                workers=workers,
                progress=show,
            )
        measured.append(tables)
    table = concatenate([tables[by] for tables in measured])
    write_table(table, out)
    _print(verdict(concatenate([tables["model"] for tables in measured])))
    click.echo(f"{counted(table.num_rows)} in {out}; next:", err=True)
    page = shlex.quote(f"{out.removesuffix('.parquet')}.html")
    click.echo(f"  analyze report {shlex.quote(out)} --out {page}", err=True)


@main.command(example="analyze report runs/first.zarr --out runs/first.html")
@click.argument("inputs", nargs=-1, required=True, metavar="RUN|TABLE…", type=click.Path())
@click.option("--out", type=click.Path(), required=True, help="HTML page to write.")
@click.option("--figures", type=click.Path(), help="Folder to which each figure goes as a file.")
@click.option("--format", "formats", help="Of these files: png, svg, pdf or several. Default: pdf.")
@click.option(
    "--width",
    type=click.FloatRange(1.5, 20),
    default=3.25,
    help="Of these files, in inches: 3.25 for one column of a paper, 6.75 for two. Default: 3.25.",
)
def report(
    inputs: tuple[str, ...], out: str, figures: str | None, formats: str | None, width: float
) -> None:
    """Make one HTML page of figures and exact values.

    The page needs no network. A TABLE is what `analyze compute` wrote; a RUN is measured against
    final.
    """
    from analyze.report import write_report
    from capture.store.errors import UsageError
    from capture.store.target import check_target

    if formats is not None and figures is None:
        raise UsageError("--format is for files of figures", fix="say where with --figures DIR")
    check_target(out, inputs)
    chosen = [] if figures is None else ("pdf" if formats is None else formats).split(",")
    written = write_report(inputs, out, figures_dir=figures, formats=chosen, width=width)
    for path in written:
        click.echo(str(path), err=True)


@main.command(example="analyze export runs/first.zarr --out runs/first.csv")
@click.argument("inputs", nargs=-1, required=True, metavar="RUN|TABLE…", type=click.Path())
@click.option(
    "--out",
    type=click.Path(),
    required=True,
    help="File to write, or the folder of a Zarr store; its suffix names the format: .csv, "
    ".parquet, .nc, .zarr or .tex.",
)
def export(inputs: tuple[str, ...], out: str) -> None:
    """Write a table for other programs and for papers.

    A TABLE is what `analyze compute` wrote; a RUN is measured against final, as a whole and by
    layer. CSV has every float in full, an empty field where it is NaN, and no units. NetCDF and
    Zarr have a group for each stream; LaTeX has the numbers of the verdict.
    """
    from analyze.export import export_inputs

    click.echo(str(export_inputs(inputs, out)), err=True)


@main.command(example="analyze methods runs/first.zarr --out runs/methods.tex")
@click.argument("inputs", nargs=-1, required=True, metavar="RUN|TABLE…", type=click.Path())
@click.option("--out", type=click.Path(), help="File to write too, .md or .tex.")
def methods(inputs: tuple[str, ...], out: str | None) -> None:
    """Print a methods paragraph, made of what runs hold.

    Definitions, reference, seeds, optimizer, clipping, mode of BatchNorm, null and versions; what
    is not recorded is said to be so. A TABLE of `analyze compute` holds less than its RUN.
    """
    from analyze.methods import describe_methods, write_methods

    text = describe_methods(inputs) if out is None else write_methods(inputs, out)
    _print(text.rstrip("\n"))


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


@contextmanager
def _progress(run: str) -> Iterator[Callable[[int, int], None] | None]:
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


def _print(text: str) -> None:
    """Print, with question marks for what the terminal's encoding cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding))
