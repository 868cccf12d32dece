"""Commands that tell what was measured: `compare`, `report`, `export`, `methods`."""

from __future__ import annotations

import click

from analyze.commands.options import (
    Running,
    command,
    inputs_argument,
    output_option,
    plan_option,
    planned_output,
    running_options,
    show,
)


@command(
    example="analyze compare runs/first.zarr runs/second.zarr --group-by optimizer,lr \\\n"
    "  --out runs/compare.csv"
)
@inputs_argument
@click.option(
    "--group-by",
    required=True,
    metavar="KEYS",
    help="Settings that make a group, with commas between: optimizer, lr, batch_size, model, seed "
    "or any other key of the configuration, task_args.KEY too; or run.",
)
@click.option(
    "--align",
    metavar="WHAT",
    default="both",
    help="Compare at equal steps, at equal epochs, or both. Default: both.",
)
@click.option(
    "--parts",
    metavar="NAMES",
    default="early,middle,late",
    help="Parts of the way to w*: early, middle and late are its thirds without the last tenth, "
    "where γ tends to γ⁰ anyway; all is the three as one, and after is what follows w_N in a table "
    "against step:N. Default: early,middle,late.",
)
@click.option(
    "--level",
    metavar="P",
    type=float,
    default=0.95,
    help="Level of the confidence intervals. Default: 0.95.",
)
@click.option(
    "--seed",
    metavar="N",
    type=int,
    default=0,
    help="Seed of the bootstrap, which gives the intervals within a single run. Default: 0.",
)
@click.option(
    "--interpolates-below",
    metavar="SHARE",
    type=float,
    default=0.01,
    help="Share of their values at w_0 below which loss and gradients at w_T count as "
    "interpolation. Default: 0.01.",
)
@plan_option
@output_option("Table to write, .parquet or .csv.")
@running_options
def compare(
    inputs: tuple[str, ...],
    group_by: str,
    align: str,
    parts: str,
    level: float,
    seed: int,
    interpolates_below: float,
    plan: bool,
    out: str | None,
    running: Running,
) -> None:
    """Compare groups of runs, with intervals.

    A TABLE is what `analyze compute` wrote; a RUN is measured against final. Runs of one group
    should differ in their seeds only; what else differs is said. The table has one row per number;
    as Parquet, `analyze report` draws it.
    """
    from analyze.compare import compare_runs
    from analyze.comparison import check_format, write_comparison
    from analyze.comparison_text import comparison_text
    from analyze.plans import plan_inputs
    from analyze.verdict import counted
    from capture.store.target import check_target

    if plan:
        show(plan_inputs(inputs, **running.arguments))
        return
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
        **running.arguments,
    )
    text = comparison_text(comparison)
    if out is not None:
        write_comparison(comparison, out)
    show(text)
    if out is not None:
        rows = sum(len(block.rows) for block in comparison.blocks)
        click.echo(f"{counted(rows)} in {out}", err=True)


@command(example="analyze report runs/first.zarr --out runs/first.html")
@inputs_argument
@click.option(
    "--figures",
    metavar="DIR",
    type=click.Path(),
    help="Folder to which each figure goes as a file.",
)
@click.option(
    "--format",
    "formats",
    metavar="KINDS",
    help="Of these files: png, svg, pdf or several, as in png,pdf. Default: pdf.",
)
@click.option(
    "--width",
    metavar="INCHES",
    type=click.FloatRange(1.5, 20),
    default=3.25,
    help="Of these files: 3.25 for one column of a paper, 6.75 for two. Default: 3.25.",
)
@planned_output("HTML page to write.")
@running_options
def report(
    inputs: tuple[str, ...],
    figures: str | None,
    formats: str | None,
    width: float,
    out: str | None,
    running: Running,
) -> None:
    """Make one HTML page of figures and exact values.

    The page needs no network. A TABLE is what `analyze compute`, `pairs` (or its --noise), `pca`,
    `coverage` or `compare` wrote as Parquet; a RUN is measured against final. Coverage is counts
    alone, and has no figure.
    """
    from analyze.plans import plan_inputs
    from analyze.report import write_report
    from capture.store.errors import UsageError
    from capture.store.target import check_target

    if out is None:
        show(plan_inputs(inputs, **running.arguments))
        return
    if formats is not None and figures is None:
        raise UsageError("--format is for files of figures", fix="say where with --figures DIR")
    check_target(out, inputs)
    chosen = [] if figures is None else ("pdf" if formats is None else formats).split(",")
    written = write_report(
        inputs, out, figures_dir=figures, formats=chosen, width=width, **running.arguments
    )
    for path in written:
        click.echo(str(path), err=True)


@command(example="analyze export runs/first.zarr --out runs/first.csv")
@inputs_argument
@planned_output(
    "File to write, or the folder of a Zarr store; its suffix names the format: .csv, .parquet, "
    ".nc (NetCDF), .zarr or .tex (LaTeX)."
)
@running_options
def export(inputs: tuple[str, ...], out: str | None, running: Running) -> None:
    """Write a table for other programs and for papers.

    A TABLE is what `analyze compute`, `pairs` (or its --noise), `pca`, `coverage` or `compare`
    wrote as Parquet; a RUN is measured against final, as a whole and by layer. CSV has every float
    in full, an empty field where it is NaN, and no units. NetCDF and Zarr have a group for each
    stream; LaTeX has the numbers of the verdict, of groups of tensors too.
    """
    from analyze.export import export_inputs
    from analyze.plans import plan_inputs

    if out is None:
        show(plan_inputs(inputs, **running.arguments))
        return
    click.echo(str(export_inputs(inputs, out, **running.arguments)), err=True)


@command(example="analyze methods runs/first.zarr --out runs/methods.tex")
@inputs_argument
@output_option("File to write too, .md or .tex.")
def methods(inputs: tuple[str, ...], out: str | None) -> None:
    """Print a methods paragraph, made of what runs hold.

    Definitions, reference, seeds, optimizer, clipping, mode of BatchNorm, null and versions; what
    is not recorded is said to be so. A TABLE of `analyze compute` holds less than its RUN.
    """
    from analyze.methods import describe_methods, write_methods

    text = describe_methods(inputs) if out is None else write_methods(inputs, out)
    show(text.rstrip("\n"))
