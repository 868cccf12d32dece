"""The command `capture`. Each command is: parse, one call, print; what is heavy loads when used."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from typing import Any

import click

from capture import __version__
from capture.command_line import Group, Option
from capture.options import (
    OWN,
    PROBES,
    SCHEDULES,
    STREAMS,
    config_option,
    import_options,
    options,
    training_options,
)


@click.group(cls=Group)
@click.version_option(__version__, message="straightway %(version)s")
def main() -> None:
    """Record where a training run went. (Measure it afterwards with `analyze`.)"""


@main.command(
    example="capture train --task digits --epochs 4 --out runs/first.zarr",
    notes={**SCHEDULES, **STREAMS, **OWN},
)
@training_options
@config_option
@options(
    "Run",
    ("--resume", bool, "Continue the run at --out, bit for bit; starts it where there is none."),
    ("--force", bool, "Start although the disk seems too small for what will be saved."),
)
@click.option(
    "--out",
    cls=Option,
    section="Run",
    type=click.Path(),
    required=True,
    help="The run to write: a new folder RUN.zarr, or s3://BUCKET/RUN.zarr.",
)
def train(config: str | None, out: str, resume: bool, force: bool, **flags: Any) -> None:
    """Train, and record weights and gradients into a run store.

    At the steps that --every names it saves the weights w_t and, in the streams that --gradients
    names, gradients at w_t. Ctrl-C ends after the step under way; --resume goes on.
    """
    from capture.config import read_config

    settings = read_config(config, flags)
    logging.basicConfig(format="warning: %(message)s")

    from capture.progress import format_bytes
    from capture.train import train as run_training

    summary = run_training(settings, out, resume=resume, force=force)
    if summary.already_complete:
        click.echo(f"{out} is complete already: {summary.steps} steps", err=True)
        return
    measured = {"loss": summary.loss}
    measured |= {f"held-out {name}": value for name, value in summary.heldout.items()}
    results = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
    written = format_bytes(summary.bytes_written)
    click.echo(f"{summary.steps} steps in {summary.seconds:.1f} s: {results}", err=True)
    click.echo(f"{written} in {out}; next:", err=True)
    _suggest_compute(out)


@main.command(
    example="capture plan --task digits --epochs 4 --every log:50 --out runs/first.zarr",
    notes={**SCHEDULES, **STREAMS},
)
@training_options
@config_option
@options(
    "Run",
    ("--force", bool, "Exit with 0 although the disk is too small, and not with 1."),
    ("--json", bool, "Print JSON, with bytes and seconds."),
    (
        "--out",
        click.Path(),
        "Where the run would be written: the disk that is tested. Default: the working directory.",
    ),
)
def plan(config: str | None, out: str | None, force: bool, json: bool, **flags: Any) -> None:
    """Predict bytes, files and time of a training before it runs.

    Takes the options of `capture train`. Bytes and files of the streams are exact; the time comes
    from a few steps of the training and a short test of the disk, and is an estimate.
    """
    from capture.config import read_config

    settings = read_config(config, flags)

    from capture.plan import plan as make_plan
    from capture.storage import require_space
    from capture.store.place import place_of

    target = place_of(out or "run.zarr")
    prediction = make_plan(settings, target)
    _print_json(prediction.to_dict()) if json else click.echo(prediction.to_text())
    if not force:
        require_space(target, prediction.storage)


@main.command(
    example="capture probe runs/first.zarr --gradients fixed:4,full", notes={**PROBES, **OWN}
)
@click.argument("run", type=click.Path())
@options(
    "What is measured",
    ("--steps", "T1,T2,…", "At these saved steps only, as in 0,100,200. Default: at all of them."),
    ("--replace", bool, "Drop streams of the same names first. Default: add what they lack."),
    ("--data-root", click.Path(), "Folder that holds the data files. Default: as in training."),
    ("--threads", int, "Threads of torch on the CPU. Default: as in training."),
)
@options(
    "For a run of your own loop, or imported without a task",
    ("--task", "NAME", "Its data and loss, your own as module:factory, see below."),
    ("--model", "NAME", "The model that was trained, as module:factory. Default: the task's."),
    ("--batch-size", int, "Samples in each batch. Default: the task's, else 64."),
    ("--data-seed", int, "Seed by which batches are drawn. Default: 0."),
)
@click.option(
    "--gradients",
    cls=Option,
    section="What is measured",
    metavar="STREAMS",
    required=True,
    help="Gradients of other batches, see below.",
)
def probe(run: str, gradients: str, steps: str | None, replace: bool, **flags: Any) -> None:
    """Add gradients of other batches to a recorded run, without training again.

    RUN is the folder that `capture train --out`, a Recorder or `capture import` wrote; it must be
    complete. The gradients are taken at its saved weights, w_T included. What an interrupted call
    has added stays: the same call goes on. Settings that `Recorder(config={"task": …, "model": …,
    "batch_size": …})` kept count as given.
    """
    logging.basicConfig(format="warning: %(message)s")

    from capture.arguments import parse_steps
    from capture.probe import probe_run

    changes = {key: value for key, value in flags.items() if value is not None}
    found = probe_run(
        run, gradients, steps=parse_steps(steps), replace_streams=replace, changes=changes
    )
    added = ", ".join(f"{rows} rows of {name}" for name, rows in found.rows.items())
    click.echo(f"added {added} to {run}", err=True)


@main.command("import", example="capture import checkpoints --out runs/imported.zarr")
@click.argument("sources", nargs=-1, required=True, metavar="FOLDER…", type=click.Path())
@import_options
def import_(
    sources: tuple[str, ...],
    steps: str | None,
    task: str | None,
    model: str | None,
    data_root: str | None,
    config: str | None,
    dry_run: bool,
    out: str | None,
    **choices: Any,
) -> None:
    """Turn checkpoints of a training that was not recorded into a run of weights.

    FOLDER holds them: files .safetensors, .pt, .pth, .bin or .ckpt, folders checkpoint-N of Hugging
    Face, folders of torch.distributed.checkpoint. It may be such a folder or file itself. Steps are
    read off the names, as in step_500.pt. No code in a checkpoint is ever run. Without a model,
    floating tensors are trainable unless their name is that of a well-known buffer. Weights that
    are NaN or infinite are imported, with a warning for each checkpoint that has some.
    """
    if out is None and not dry_run:
        raise click.UsageError("missing option '--out'", click.get_current_context())
    logging.basicConfig(format="warning: %(message)s")

    from capture.arguments import parse_steps
    from capture.config import read_given
    from capture.import_plan import plan_import
    from capture.importing import import_checkpoints

    settings = read_given(config, {"task": task, "model": model, "data_root": data_root})
    choices |= {"steps": parse_steps(steps), "settings": settings}
    if out is None or dry_run:
        click.echo(plan_import(sources, **choices).to_text())
        return
    imported = import_checkpoints(sources, out, **choices)
    from capture.progress import format_bytes

    first, last = imported.steps[0], imported.steps[-1]
    count = f"{len(imported.steps)} checkpoint{'s' if len(imported.steps) > 1 else ''}"
    span = f"steps {first} to {last}" if len(imported.steps) > 1 else f"step {last}"
    size = format_bytes(imported.bytes_written)
    click.echo(f"{count}, {span}, {size} in {out}; next:", err=True)
    _suggest_compute(out, "--stream weights ")


@main.command(example="capture info runs/first.zarr")
@click.argument("run", type=click.Path())
@click.option("--json", is_flag=True, help="Print JSON: all of it, with every recorded step.")
def info(run: str, json: bool) -> None:
    """Tell what a run is and what it holds.

    RUN is the folder that `capture train --out`, a Recorder or `capture import` wrote. Its
    status comes first, then how it was made, then each stream with its rows and steps. What is not
    finite (NaN, infinities) is told where there is any.
    """
    from capture.info import describe_run, format_description

    description = describe_run(run)
    _print_json(description) if json else click.echo(format_description(description))


@main.command(example="capture verify runs/first.zarr")
@click.argument("run", type=click.Path())
@click.pass_context
def verify(context: click.Context, run: str) -> None:
    """Check every committed byte of a run against its checksum.

    RUN is the folder that `capture train --out`, a Recorder or `capture import` wrote.
    Exits with 0 where all is sound, with 3 where anything is not, naming each file, row and remedy.
    """
    from capture.progress import format_bytes
    from capture.store.verify import verify_run

    found = verify_run(run)
    for problem in found.problems:
        click.echo(f"error: {problem}", err=True)
    if not found.sound:
        context.exit(3)
    click.echo(
        f"sound: {found.shards} shards and {found.scalars} arrays of scalars, "
        f"{format_bytes(found.bytes)} read"
    )


@main.command(example="capture export runs/first.zarr --step 20 first-20.safetensors")
@click.argument("run", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--step",
    type=int,
    required=True,
    help="A step whose weights were saved; `capture info --json` lists them.",
)
def export(run: str, out: str, step: int) -> None:
    """Write the model at a recorded step as a plain safetensors file.

    RUN is the folder that `capture train --out`, a Recorder or `capture import` wrote,
    OUT the file to write. It holds the whole state_dict, each tensor in its own dtype.
    """
    from capture.store import export_state_dict

    names = export_state_dict(run, step, out)
    click.echo(f"{len(names)} tensors at step {step} in {out}", err=True)


def _suggest_compute(out: str, options: str = "") -> None:
    # Tables are files: that of a run on an object store lies in the working directory.
    name = out.rstrip("/").rpartition("/")[2] if "://" in out else out.rstrip("/")
    target = shlex.quote(f"{name.removesuffix('.zarr')}.parquet")
    click.echo(f"  analyze compute {shlex.quote(out)} {options}--out {target}", err=True)


def _print_json(document: Any) -> None:
    json.dump(document, sys.stdout, indent=2)
    click.echo()
