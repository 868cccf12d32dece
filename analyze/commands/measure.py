"""Commands that measure a run: `compute`, `pairs`, `pca`, `schedule`."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import click

from analyze.commands.options import (
    by_option,
    cache_option,
    cache_place,
    cluster,
    command,
    group_option,
    grouping,
    no_cache_option,
    parquet_target,
    progress_of,
    run_argument,
    runs_argument,
    scheduler_option,
    show,
    streams_option,
    tls_ca_option,
    tls_cert_option,
    tls_key_option,
    workers_option,
)


@command(
    example="analyze compute runs/first.zarr --reference final --reference step:0 \\\n"
    "  --out runs/first.parquet"
)
@runs_argument
@click.option(
    "--reference",
    "references",
    multiple=True,
    default=("final",),
    help="The point w* to measure against, may be repeated: final, step:N, mean:K, "
    "run:PATH[@STEP] or file:PATH. Default: final.",
)
@streams_option
@by_option
@group_option
@click.option(
    "--weight-decay",
    type=float,
    help="λ in the columns _wd, of g + λw, instead of that of the training.",
)
@scheduler_option
@tls_ca_option
@tls_cert_option
@tls_key_option
@workers_option
@cache_option
@no_cache_option
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
    by: str | None,
    patterns: tuple[str, ...],
    weight_decay: float | None,
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
    from analyze.tables import concatenate, measure_into, writing_table
    from analyze.verdict import COLUMNS, counted
    from analyze.verdict_text import group_verdict, verdict

    place = cache_place(cache, no_cache)
    options: dict[str, Any] = {
        "streams": streams,
        "scheduler": cluster(scheduler, tls_ca, tls_cert, tls_key),
        "workers": workers,
        "cache": place,
    }
    if plan:
        for run in dict.fromkeys(runs):
            show(projected(run, references, options))
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.", context)
    files = [text.removeprefix("file:") for text in references if text.startswith("file:")]
    parquet_target(out, [*runs, *files])
    chosen, models = grouping(patterns, by), []
    with writing_table(out) as table:
        for run in dict.fromkeys(runs):
            if sys.stderr.isatty():
                click.echo(projected(run, references, options), err=True)
            with progress_of(run) as report:
                model = measure_into(
                    table,
                    run,
                    references,
                    keep=COLUMNS,
                    by=chosen,
                    progress=report,
                    weight_decay=weight_decay,
                    **options,
                )
            models.append(model)
        found = verdict(concatenate(models))
    show(found)
    if chosen != "model":
        show(f"\n{group_verdict(out)}")
    click.echo(f"{counted(table.num_rows)} in {out}; next:", err=True)
    page = shlex.quote(f"{out.removesuffix('.parquet')}.html")
    click.echo(f"  analyze report {shlex.quote(out)} --out {page}", err=True)


@command(
    example="analyze pairs runs/first.zarr --stream minibatch --lags 1,2,5 \\\n"
    "  --out runs/first-pairs.parquet"
)
@runs_argument
@streams_option
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
@by_option
@group_option
@scheduler_option
@tls_ca_option
@tls_cert_option
@tls_key_option
@workers_option
@cache_option
@no_cache_option
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
    by: str | None,
    patterns: tuple[str, ...],
    scheduler: str,
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
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
    from analyze.groups import name_of
    from analyze.pair_blocks import parse_lags
    from analyze.pair_summary import pair_summary
    from analyze.pair_table import concatenate_pairs
    from analyze.pairs_of_run import measure_pairs
    from analyze.tables import write_table
    from analyze.verdict import counted

    files = [text.removeprefix("file:") for text in references if text.startswith("file:")]
    wanted = parse_lags(lags)
    if noise is not None and os.path.abspath(noise) == os.path.abspath(out):
        raise click.UsageError("--noise and --out are two files")
    for path in (out, noise):
        if path is not None:
            parquet_target(path, [*runs, *files])
    chosen = grouping(patterns, by)
    groupings = ["model"] if chosen == "model" else ["model", chosen]
    place = cache_place(cache, no_cache)
    measured = []
    for run in dict.fromkeys(runs):
        with progress_of(run) as report:
            tables = measure_pairs(
                run,
                references,
                streams=streams,
                lags=wanted,
                by=groupings,
                scheduler=cluster(scheduler, tls_ca, tls_cert, tls_key),
                workers=workers,
                progress=report,
                cache=place,
            )
        measured.append(tables)
    found = concatenate_pairs([tables[name_of(chosen)] for tables in measured])
    write_table(found.pairs, out)
    if noise is not None:
        write_table(found.noise, noise)
    show(pair_summary(concatenate_pairs([tables["model"] for tables in measured])))
    click.echo(f"{counted(found.pairs.num_rows)} in {out}", err=True)


@command(example="analyze pca runs/first.zarr --out runs/first-path.parquet")
@run_argument
@by_option
@click.option(
    "--components",
    type=click.IntRange(1),
    default=10,
    help="Components in the table. Default: 10.",
)
@group_option
@scheduler_option
@tls_ca_option
@tls_cert_option
@tls_key_option
@workers_option
@click.option("--out", type=click.Path(), required=True, help="Parquet file to write.")
def pca(
    run: str,
    by: str | None,
    patterns: tuple[str, ...],
    components: int,
    scheduler: str,
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    workers: int | None,
    out: str,
) -> None:
    """Find the principal components of the path of the weights.

    Prints how much each explains beside a random walk, which has large components too. The table
    has one row per group of tensors, component and saved step: the coordinate, and how far the
    path has come.
    """
    from analyze.path_summary import path_summary
    from analyze.path_table import measure_path_table
    from analyze.tables import write_table
    from analyze.verdict import counted

    parquet_target(out, [run])
    with progress_of(run) as report:
        table = measure_path_table(
            run,
            by=grouping(patterns, by),
            components=components,
            scheduler=cluster(scheduler, tls_ca, tls_cert, tls_key),
            workers=workers,
            progress=report,
        )
    write_table(table, out)
    show(path_summary(table))
    click.echo(f"{counted(table.num_rows)} in {out}", err=True)


@command(example="analyze schedule runs/first.zarr --out runs/rate.csv")
@run_argument
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
@cache_option
@no_cache_option
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
    with progress_of(run) as report:
        found, verdict = schedule_run(
            run,
            reference,
            source=source,
            smooth=smooth,
            factor=factor,
            by=by,
            progress=report,
            cache=cache_place(cache, no_cache),
        )
    write_schedule(found, out)
    show(f"{verdict}\n\n{found.describe()}")
    click.echo(f"{len(found.steps)} rates in {out}; next:", err=True)
    click.echo(f"  capture train … --lr-schedule {shlex.quote(out)}", err=True)
    if factor == 1:
        click.echo("  (followed as it is, it is often too bold: --factor 0.25 damps it)", err=True)


def projected(run: str, references: tuple[str, ...], options: dict[str, Any]) -> str:
    """Say in one line what measuring a run will take."""
    from analyze.projection import project_metric, project_run

    passes = [str(each) for each in project_run(run, references, **options)]
    passes += project_metric(run, references, streams=options["streams"], cache=options["cache"])
    return f"{run}: {'; then '.join(passes) or 'all was summed before, reads nothing'}"
