"""The command `analyze`. Each command is: parse, one call, print; what is heavy loads when used."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

from capture import __version__
from capture.command_line import Group


@click.group(cls=Group)
@click.version_option(__version__, message="straightway %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Measure recorded runs, as often as you like. (Record them first with `capture`.)"""
    logging.basicConfig(format="warning: %(message)s")
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
    type=click.Choice(["model", "layer", "tensor", "kind"]),
    default="model",
    help="The tensors that are summed over. Default: model, all of them.",
)
@click.option(
    "--group",
    "patterns",
    multiple=True,
    metavar="LABEL=REGEX",
    help="Instead of --by: sum over the tensors in whose names REGEX is found, may be repeated; "
    "the first that fits counts, and what fits none is the group rest.",
)
@click.option(
    "--scheduler",
    default="threads",
    help="threads, or the tcp:// or tls:// address of a Dask scheduler. Default: threads.",
)
@click.option(
    "--tls-ca", type=click.Path(), help="For tls://, certificate of the authority, a PEM file."
)
@click.option("--tls-cert", type=click.Path(), help="For tls://, your own certificate.")
@click.option("--tls-key", type=click.Path(), help="For tls://, the key of your certificate.")
@click.option("--workers", type=int, help="Number of threads. Default: one per processor.")
@click.option(
    "--cache",
    type=click.Path(),
    help="Folder for the moments that were summed before. Default: NAME.moments beside the run.",
)
@click.option("--no-cache", is_flag=True, help="Sum again, and keep nothing.")
@click.option(
    "--plan", is_flag=True, help="Say what would be read, and what that takes; measure nothing."
)
@click.option("--out", type=click.Path(), help="Parquet file to write.")
@click.pass_context
def compute(
    context: click.Context,
    runs: tuple[str, ...],
    references: tuple[str, ...],
    streams: tuple[str, ...],
    by: str,
    patterns: tuple[str, ...],
    scheduler: str,
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    workers: int | None,
    cache: str | None,
    no_cache: bool,
    plan: bool,
    out: str | None,
) -> None:
    """Measure runs into a table, and print the verdict.

    RUN is a folder that `capture train --out` or a Recorder wrote. The table has one row per run,
    stream, step, batch, group of tensors and reference. Every byte that leads to a number is
    verified when it is first read; what was summed from it is kept, so that the next question
    about the same gradients and references reads none of them again. Means, and references on
    object stores, are kept in the folder for temporary files (TMPDIR) meanwhile.
    """
    from analyze.groups import name_of, parse_groups
    from analyze.tables import concatenate, measure_run, write_table
    from analyze.verdict import counted, verdict
    from capture.store.target import check_target

    where: Any = scheduler
    if tls_ca or tls_cert or tls_key:
        from analyze.schedulers import Cluster

        where = Cluster(scheduler, tls_ca, tls_cert, tls_key)
    place = False if no_cache else True if cache is None else cache
    options: dict[str, Any] = {
        "streams": streams,
        "scheduler": where,
        "workers": workers,
        "cache": place,
    }
    if plan:
        for run in dict.fromkeys(runs):
            _print(_projected(run, references, options))
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.", context)
    files = [text.removeprefix("file:") for text in references if text.startswith("file:")]
    check_target(out, [*runs, *files])
    chosen: Any = parse_groups(patterns) if patterns else by
    groupings = ["model"] if chosen == "model" else ["model", chosen]
    measured = []
    for run in dict.fromkeys(runs):
        if sys.stderr.isatty():
            click.echo(_projected(run, references, options), err=True)
        with _progress(run) as show:
            tables = measure_run(run, references, by=groupings, progress=show, **options)
        measured.append(tables)
    table = concatenate([tables[name_of(chosen)] for tables in measured])
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
    type=click.Choice(["model", "layer", "tensor", "kind"]),
    default="model",
    help="The tensors that are summed over. Default: model, all of them.",
)
@click.option(
    "--group",
    "patterns",
    multiple=True,
    metavar="LABEL=REGEX",
    help="Instead of --by: sum over the tensors in whose names REGEX is found, as in "
    "`analyze compute`.",
)
@click.option(
    "--scheduler",
    default="threads",
    help="threads, or the tcp:// or tls:// address of a Dask scheduler. Default: threads.",
)
@click.option("--workers", type=int, help="Number of threads. Default: one per processor.")
@click.option(
    "--cache",
    type=click.Path(),
    help="Folder for the moments that were summed before. Default: NAME.moments beside the run.",
)
@click.option("--no-cache", is_flag=True, help="Sum the moments again, and keep nothing.")
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
    patterns: tuple[str, ...],
    scheduler: str,
    workers: int | None,
    cache: str | None,
    no_cache: bool,
    noise: str | None,
    out: str,
) -> None:
    """Compare saved steps with each other.

    The table has one row per run, stream, pair of steps, batch, group of tensors and reference:
    distances between weights, cosines between gradients, and the cosine between the gradient at
    one step and the way to another. Every byte that leads to a number is verified.
    """
    from analyze.groups import name_of, parse_groups
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
    chosen: Any = parse_groups(patterns) if patterns else by
    groupings = ["model"] if chosen == "model" else ["model", chosen]
    place = False if no_cache else True if cache is None else cache
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
                cache=place,
            )
        measured.append(tables)
    found = concatenate_pairs([tables[name_of(chosen)] for tables in measured])
    write_table(found.pairs, out)
    if noise is not None:
        write_table(found.noise, noise)
    _print(pair_summary(concatenate_pairs([tables["model"] for tables in measured])))
    click.echo(f"{counted(found.pairs.num_rows)} in {out}", err=True)


@main.command(example="analyze pca runs/first.zarr --out runs/first-path.parquet")
@click.argument("run", type=click.Path(), metavar="RUN")
@click.option(
    "--by",
    type=click.Choice(["model", "layer", "tensor", "kind"]),
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
    "--group",
    "patterns",
    multiple=True,
    metavar="LABEL=REGEX",
    help="Instead of --by: sum over the tensors in whose names REGEX is found, as in "
    "`analyze compute`.",
)
@click.option(
    "--scheduler",
    default="threads",
    help="threads, or the tcp:// or tls:// address of a Dask scheduler. Default: threads.",
)
@click.option("--workers", type=int, help="Number of threads. Default: one per processor.")
@click.option("--out", type=click.Path(), required=True, help="Parquet file to write.")
def pca(
    run: str,
    by: str,
    patterns: tuple[str, ...],
    components: int,
    scheduler: str,
    workers: int | None,
    out: str,
) -> None:
    """Find the principal components of the path of the weights.

    Prints how much each explains beside a random walk, which has large components too. The table
    has one row per group of tensors, component and saved step: the coordinate, and how far the
    path has come.
    """
    from analyze.groups import parse_groups
    from analyze.path_summary import path_summary
    from analyze.path_table import measure_path_table
    from analyze.tables import write_table
    from analyze.verdict import counted
    from capture.store.target import check_target

    check_target(out, [run])
    with _progress(run) as show:
        table = measure_path_table(
            run,
            by=parse_groups(patterns) if patterns else by,
            components=components,
            scheduler=scheduler,
            workers=workers,
            progress=show,
        )
    write_table(table, out)
    _print(path_summary(table))
    click.echo(f"{counted(table.num_rows)} in {out}", err=True)


@main.command(example="analyze schedule runs/first.zarr --out runs/rate.csv")
@click.argument("run", metavar="RUN", type=click.Path())
@click.option(
    "--reference",
    default="final",
    help="The point w* to be reached: final, step:N, mean:K, run:PATH[@STEP] or file:PATH. "
    "Default: final.",
)
@click.option(
    "--from",
    "source",
    type=click.Choice(["updates", "minibatch"]),
    help="Where the rate comes from; minibatch is for plain SGD. Default: updates where recorded.",
)
@click.option(
    "--smooth",
    type=int,
    help="Saved steps in a window, an odd number. Default: a tenth of them, at least 5.",
)
@click.option(
    "--factor", type=float, default=1.0, help="Multiply the rate, below 1 to damp it. Default: 1."
)
@click.option(
    "--by",
    type=click.Choice(["model", "layer", "tensor", "kind"]),
    default="layer",
    help="The tensors that share a row of the verdict. Default: layer.",
)
@click.option(
    "--cache",
    type=click.Path(),
    help="Folder for the moments that were summed before. Default: NAME.moments beside the run.",
)
@click.option("--no-cache", is_flag=True, help="Sum again, and keep nothing.")
@click.option("--out", type=click.Path(), required=True, help="CSV file to write.")
def schedule(
    run: str,
    reference: str,
    source: str | None,
    smooth: int | None,
    factor: float,
    by: str,
    cache: str | None,
    no_cache: bool,
    out: str,
) -> None:
    """Write the locally optimal learning rate, for a fresh training.

    RUN is a recorded run. The file has one row per saved step: η · lolr_update, the rate at which
    the step really taken would have ended nearest w*; with plain SGD it is η*. A window of steps
    shares the rate that is best for all of them. `capture train --lr-schedule FILE` follows it.

    Printed is how η compares with η*, and η* with that of orthogonal gradients.
    """
    from analyze.schedule import schedule_run, write_schedule
    from capture.store.target import check_target

    check_target(out, [reference.removeprefix("file:")] if reference.startswith("file:") else [])
    with _progress(run) as show:
        found, verdict = schedule_run(
            run,
            reference,
            source=source,
            smooth=smooth,
            factor=factor,
            by=by,
            progress=show,
            cache=False if no_cache else True if cache is None else cache,
        )
    write_schedule(found, out)
    _print(f"{verdict}\n\n{found.describe()}")
    click.echo(f"{len(found.steps)} rates in {out}; next:", err=True)
    click.echo(f"  capture train … --lr-schedule {shlex.quote(out)}", err=True)


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


@main.command(
    example="analyze compare runs/first.zarr runs/second.zarr --group-by optimizer,lr \\\n"
    "  --out runs/compare.csv"
)
@click.argument("inputs", nargs=-1, required=True, metavar="RUN|TABLE…", type=click.Path())
@click.option(
    "--group-by",
    required=True,
    metavar="KEYS",
    help="Settings that make a group, with commas between: optimizer, lr, batch_size, model, seed "
    "or any other key of the configuration, task_args.KEY too; or run.",
)
@click.option(
    "--align",
    default="both",
    help="Compare at equal steps, at equal epochs, or both. Default: both.",
)
@click.option(
    "--parts",
    default="early,middle,late",
    help="Parts of the way to w*, of early, middle, late, all (the three as one) and after (what "
    "follows w_N). Default: early,middle,late.",
)
@click.option("--level", type=float, default=0.95, help="Level of the intervals. Default: 0.95.")
@click.option("--seed", type=int, default=0, help="Seed of the bootstrap. Default: 0.")
@click.option(
    "--interpolates-below",
    type=float,
    default=0.01,
    help="Share of their values at w_0 below which loss and gradients at w_T count as "
    "interpolation. Default: 0.01.",
)
@click.option("--out", type=click.Path(), help="Table to write, .parquet or .csv.")
def compare(
    inputs: tuple[str, ...],
    group_by: str,
    align: str,
    parts: str,
    level: float,
    seed: int,
    interpolates_below: float,
    out: str | None,
) -> None:
    """Compare groups of runs, with intervals.

    A TABLE is what `analyze compute` wrote; a RUN is measured against final. Runs of one group
    should differ in their seeds only; what else differs is said. The table has one row per number.
    """
    from analyze.compare import compare_runs
    from analyze.comparison import check_format, write_comparison
    from analyze.comparison_text import comparison_text
    from analyze.verdict import counted
    from capture.store.target import check_target

    if out is not None:
        check_format(check_target(out, inputs))
    comparison = compare_runs(
        inputs,
        group_by.split(","),
        align=align,
        parts=parts.split(","),
        level=level,
        seed=seed,
        threshold=interpolates_below,
    )
    if out is not None:
        write_comparison(comparison, out)
    _print(comparison_text(comparison))
    if out is not None:
        rows = sum(len(block.rows) for block in comparison.blocks)
        click.echo(f"{counted(rows)} in {out}", err=True)


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


def _projected(run: str, references: tuple[str, ...], options: dict[str, Any]) -> str:
    """Say in one line what measuring a run will take."""
    from analyze.projection import project_run

    passes = project_run(run, references, **options)
    return f"{run}: {'; then '.join(map(str, passes)) or 'all was summed before, reads nothing'}"


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
