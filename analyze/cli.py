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


@main.command(
    example="analyze pairs runs/first.zarr --stream minibatch --lags 1,2,5 \\\n"
    "  --out runs/first-pairs.parquet"
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path())
@click.option(
    "--stream",
    "streams",
    multiple=True,
    help="Stream of gradients, updates or weights, may be repeated. Default: all but the weights.",
)
@click.option(
    "--reference",
    "references",
    multiple=True,
    default=("final",),
    help="The point w* that sim and cosine_dist refer to, may be repeated, in the forms of "
    "`analyze compute`. Default: final.",
)
@click.option(
    "--lags",
    help="Updates between the two steps of a pair: all, or numbers such as 1,2,5,10,20,50. "
    "Default: all, of up to 200 rows.",
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
@click.option(
    "--noise",
    type=click.Path(),
    help="Second Parquet file: of streams with batches, the gradient's norm without noise.",
)
@click.option("--out", type=click.Path(), required=True, help="Parquet file to write.")
def pairs(
    runs: tuple[str, ...],
    streams: tuple[str, ...],
    references: tuple[str, ...],
    lags: str | None,
    by: str,
    scheduler: str,
    workers: int | None,
    noise: str | None,
    out: str,
) -> None:
    """Compare saved steps with each other.

    The table has one row per run, stream, pair of steps, batch, group of tensors and reference:
    distances between weights, cosines between gradients, and the cosine between the gradient at
    one step and the way to another. Every byte that leads to a number is verified.
    """
    from analyze.pair_blocks import parse_lags
    from analyze.pair_summary import pair_summary
    from analyze.pair_table import concatenate_pairs
    from analyze.pairs_of_run import measure_pairs
    from analyze.tables import write_table
    from analyze.verdict import counted
    from capture.store.target import check_target

    files = [text.removeprefix("file:") for text in references if text.startswith("file:")]
    wanted = parse_lags(lags)
    for path in (out, noise):
        if path is not None:
            check_target(path, [*runs, *files])
    groupings = list(dict.fromkeys(["model", by]))
    measured = []
    for run in dict.fromkeys(runs):
        with _progress(run) as show:
            tables = measure_pairs(
                run,
                references,
                streams=streams,
                lags=wanted,
                by=groupings,
                scheduler=scheduler,
                workers=workers,
                progress=show,
            )
        measured.append(tables)
    found = concatenate_pairs([tables[by] for tables in measured])
    write_table(found.pairs, out)
    if noise is not None:
        write_table(found.noise, noise)
    _print(pair_summary(concatenate_pairs([tables["model"] for tables in measured])))
    click.echo(f"{counted(found.pairs.num_rows)} in {out}", err=True)


@main.command(example="analyze pca runs/first.zarr --out runs/first-path.parquet")
@click.argument("run", type=click.Path(), metavar="RUN")
@click.option(
    "--by",
    type=click.Choice(["model", "layer", "tensor"]),
    default="model",
    help="The tensors that are summed over. Default: model, all of them.",
)
@click.option(
    "--components",
    type=click.IntRange(1),
    default=10,
    help="Components in the table. Default: 10.",
)
@click.option(
    "--scheduler",
    default="threads",
    help="threads, or the tcp:// or tls:// address of a Dask scheduler. Default: threads.",
)
@click.option("--workers", type=int, help="Number of threads. Default: one per processor.")
@click.option("--out", type=click.Path(), required=True, help="Parquet file to write.")
def pca(run: str, by: str, components: int, scheduler: str, workers: int | None, out: str) -> None:
    """Find the principal components of the path of the weights.

    Prints how much each explains beside a random walk, which has large components too. The table
    has one row per group of tensors, component and saved step: the coordinate, and how far the
    path has come.
    """
    from analyze.path_summary import path_summary
    from analyze.path_table import measure_path_table
    from analyze.tables import write_table
    from analyze.verdict import counted
    from capture.store.target import check_target

    check_target(out, [run])
    with _progress(run) as show:
        table = measure_path_table(
            run,
            by=by,
            components=components,
            scheduler=scheduler,
            workers=workers,
            progress=show,
        )
    write_table(table, out)
    _print(path_summary(table))
    click.echo(f"{counted(table.num_rows)} in {out}", err=True)


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
