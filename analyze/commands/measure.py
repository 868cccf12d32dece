"""Commands that measure a run: `compute`, `pairs`, `pca`, `coverage`, `schedule`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from analyze.commands.options import (
    Running,
    command,
    grouping_options,
    output_option,
    parquet_target,
    planned_output,
    progress_of,
    reference_option,
    references_option,
    run_argument,
    running_options,
    runs_argument,
    scheduling_options,
    show,
    streams_option,
    with_model,
)

if TYPE_CHECKING:
    from analyze.groups import Grouping


@command(
    example="analyze compute runs/first.zarr --reference final --reference step:0 \\\n"
    "  --out runs/first.parquet"
)
@runs_argument
@references_option("The point w* to measure against")
@streams_option
@grouping_options
@click.option(
    "--weight-decay",
    metavar="LAMBDA",
    type=float,
    help="λ in the columns _wd, which are of g + λw: instead of that of the training.",
)
@planned_output("Parquet file to write.")
@running_options
def compute(
    runs: tuple[str, ...],
    references: tuple[str, ...],
    streams: tuple[str, ...],
    grouping: Grouping,
    weight_decay: float | None,
    out: str | None,
    running: Running,
) -> None:
    """Measure runs into a table, and print the verdict.

    RUN is a folder that `capture train --out` or a Recorder wrote. The table has one row per run,
    stream, step, batch, group of tensors and reference. Every byte that leads to a number is
    verified when it is first read; what was summed from it is kept, so that the next question
    about the same gradients and references reads none of them again. A reference mean:K, and
    references on object stores, lie in the folder for temporary files (TMPDIR) meanwhile.
    """
    from analyze.references import files_of
    from analyze.repeats import without_repeats
    from analyze.tables import concatenate, measure_into, writing_table
    from analyze.verdict import COLUMNS, counted
    from analyze.verdict_text import group_verdict, verdict

    question = {"streams": streams, **running.arguments}
    if out is None:
        return _show_plans(runs, references, question)
    parquet_target(out, [*runs, *files_of(references)])
    models = []
    with writing_table(out) as table:
        for run in without_repeats(runs):
            if sys.stderr.isatty():
                _show_plans([run], references, question, err=True)
            with progress_of(run) as report:
                model = measure_into(
                    table,
                    run,
                    references,
                    keep=COLUMNS,
                    by=grouping,
                    progress=report,
                    weight_decay=weight_decay,
                    **question,
                )
            models.append(model)
        found = verdict(concatenate(models))
    show(found)
    if grouping != "model":
        show(f"\n{group_verdict(out)}")
    click.echo(f"{counted(table.num_rows)} in {out}; next:", err=True)
    page = shlex.quote(f"{out.removesuffix('.parquet')}.html")
    click.echo(f"  analyze report {shlex.quote(out)} --out {page}", err=True)


def _show_plans(
    runs: Sequence[str],
    references: Sequence[str],
    question: Mapping[str, Any],
    *,
    err: bool = False,
) -> None:
    from analyze.plans import plan_run
    from analyze.repeats import without_repeats

    for run in without_repeats(runs):
        show(plan_run(run, references, **question), err=err)


@command(
    example="analyze pairs runs/first.zarr --stream minibatch --lags 1,2,5 \\\n"
    "  --out runs/first-pairs.parquet"
)
@runs_argument
@streams_option
@references_option("The point w* that sim and cosine_dist refer to")
@click.option(
    "--lags",
    metavar="LAGS",
    help="Updates between the two steps of a pair: all, or numbers such as 1,2,5,10,20,50. Only "
    "saved steps make pairs: `capture train --every bursts:51:1,2,5,10,20,50` saves every 51st "
    "step, and those 1, 2, 5, … after it. Default: all, of up to 200 rows.",
)
@grouping_options
@output_option(
    "Second Parquet file: of streams with batches, the gradient's norm without noise.",
    name="--noise",
)
@planned_output("Parquet file to write.")
@running_options
def pairs(
    runs: tuple[str, ...],
    streams: tuple[str, ...],
    references: tuple[str, ...],
    lags: str | None,
    grouping: Grouping,
    noise: str | None,
    out: str | None,
    running: Running,
) -> None:
    """Compare saved steps with each other.

    The table has one row per run, stream, pair of steps, batch, group of tensors and reference:
    distances between weights, cosines between gradients, and the cosine between the gradient at
    one step and the way to another. Every byte that leads to a number is verified.
    """
    from analyze.groups import name_of
    from analyze.pair_blocks import parse_lags
    from analyze.pair_summary import pair_summary
    from analyze.pair_table import concatenate_pairs
    from analyze.pairs_of_run import measure_pairs
    from analyze.plans import project_pairs, told
    from analyze.references import files_of
    from analyze.repeats import without_repeats
    from analyze.tables import write_table
    from analyze.verdict import counted

    question = {
        "streams": streams,
        "lags": parse_lags(lags),
        "by": with_model(grouping),
        **running.arguments,
    }
    places = without_repeats(runs)
    if out is None:
        for run in places:
            show(told(run, project_pairs(run, references, **question)))
        return
    if noise is not None and os.path.abspath(noise) == os.path.abspath(out):
        raise click.UsageError("--noise and --out are two files")
    for path in (out, noise):
        if path is not None:
            parquet_target(path, [*runs, *files_of(references)])
    measured = []
    for run in places:
        with progress_of(run) as report:
            measured.append(measure_pairs(run, references, progress=report, **question))
    found = concatenate_pairs([tables[name_of(grouping)] for tables in measured])
    text = pair_summary(concatenate_pairs([tables["model"] for tables in measured]))
    write_table(found.pairs, out)
    if noise is not None:
        write_table(found.noise, noise)
    show(text)
    click.echo(f"{counted(found.pairs.num_rows)} in {out}", err=True)


@command(example="analyze pca runs/first.zarr --out runs/first-path.parquet")
@run_argument
@click.option(
    "--components",
    metavar="K",
    type=click.IntRange(1),
    default=10,
    help="Components in the table, those that explain most of the path. Default: 10.",
)
@grouping_options
@planned_output("Parquet file to write.")
@scheduling_options
def pca(run: str, components: int, grouping: Grouping, out: str | None, running: Running) -> None:
    """Find the principal components of the path of the weights.

    Prints how much each explains beside a random walk, which has large components too. The table
    has one row per group of tensors, component and saved step: the coordinate, and how far the
    path has come. It follows from distances between all saved weights, which are read every time.
    """
    from analyze.path_summary import path_summary
    from analyze.path_table import measure_path_table
    from analyze.plans import project_path, told
    from analyze.tables import write_table
    from analyze.verdict import counted

    if out is None:
        show(told(run, [project_path(run, by=grouping, **running.scheduling)]))
        return
    parquet_target(out, [run])
    with progress_of(run) as report:
        table = measure_path_table(
            run, by=grouping, components=components, progress=report, **running.scheduling
        )
    text = path_summary(table)
    write_table(table, out)
    show(text)
    click.echo(f"{counted(table.num_rows)} in {out}", err=True)


@command(example="analyze coverage runs/first.zarr --by layer --out runs/first-coverage.parquet")
@run_argument
@click.option(
    "--stream",
    "streams",
    metavar="NAME",
    multiple=True,
    help="Where to count, may be repeated: minibatch, updates, weights or any other stream of the "
    "run. Default: all.",
)
@grouping_options
@planned_output("Parquet file to write.")
@scheduling_options
def coverage(
    run: str, streams: tuple[str, ...], grouping: Grouping, out: str | None, running: Running
) -> None:
    """Count the coordinates that received no gradient in any saved row.

    Those that are 0 in every saved row of a stream: words that never occur, units that never fire,
    tensors that nothing reads. Of the weights, those that never moved, though weight decay moves
    them without a gradient. Steps that were not saved are not seen. Every byte that leads to a
    number is verified.
    """
    from analyze.coverage_table import coverage_summary, measure_coverage_table
    from analyze.plans import told
    from analyze.tables import write_table
    from analyze.verdict import counted

    if out is None:
        from analyze.coverage import project_coverage

        show(told(run, [project_coverage(run, streams, **running.scheduling)]))
        return
    parquet_target(out, [run])
    with progress_of(run) as report:
        table = measure_coverage_table(
            run, streams, by=grouping, progress=report, **running.scheduling
        )
    write_table(table, out)
    show(coverage_summary(table))
    click.echo(f"{counted(table.num_rows)} in {out}", err=True)


@command(example="analyze schedule runs/first.zarr --out runs/rate.csv")
@run_argument
@reference_option("The point w* to be reached")
@click.option(
    "--from",
    "source",
    type=click.Choice(["updates", "minibatch"]),
    help="Where the rate comes from: the updates that were taken, or the minibatch gradients of "
    "plain SGD. Default: updates where recorded.",
)
@click.option(
    "--smooth",
    metavar="N",
    type=int,
    help="Saved steps in a window, an odd number. Default: a tenth of them, at least 5.",
)
@click.option(
    "--factor",
    metavar="F",
    type=float,
    default=1.0,
    help="Multiply the rate, below 1 to damp it. Default: 1.",
)
@click.option(
    "--by",
    type=click.Choice(["model", "layer", "tensor", "kind"]),
    default="layer",
    help="The tensors that share a row of the verdict, as in `analyze compute`. Default: layer.",
)
@planned_output("CSV file to write.")
@running_options
def schedule(
    run: str,
    reference: str,
    source: str | None,
    smooth: int | None,
    factor: float,
    by: str,
    out: str | None,
    running: Running,
) -> None:
    """Write the locally optimal learning rate, for a fresh training.

    RUN is a recorded run. The file has one row per saved step: η · lolr_update, the rate at which
    the step really taken would have ended nearest w*; with plain SGD it is η*. A window of steps
    shares the rate that is best for all of them. `capture train --lr-schedule FILE` follows it.

    Printed is how η, the rate of the training, compares with η*, the best one, and η* with that of
    orthogonal gradients.
    """
    from analyze.plans import plan_schedule
    from analyze.references import files_of
    from analyze.schedule import schedule_run, write_schedule
    from capture.store.target import check_target

    if out is None:
        show(plan_schedule(run, reference, **running.arguments))
        return
    check_target(out, files_of([reference]))
    with progress_of(run) as report:
        found, verdict = schedule_run(
            run,
            reference,
            source=source,
            smooth=smooth,
            factor=factor,
            by=by,
            progress=report,
            **running.arguments,
        )
    write_schedule(found, out)
    show(f"{verdict}\n\n{found.describe()}")
    click.echo(f"{len(found.steps)} rates in {out}; next:", err=True)
    click.echo(f"  capture train … --lr-schedule {shlex.quote(out)}", err=True)
    if factor == 1:
        click.echo("  (followed as it is, it is often too bold: --factor 0.25 damps it)", err=True)
