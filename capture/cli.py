"""The command `capture`. Each command is: parse, one call, print; what is heavy loads when used."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click

from capture import __version__
from capture.command_line import Group, Option

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _options(section: str, *options: tuple[str, Any, str]) -> Callable[[Decorated], Decorated]:
    """Make a decorator for the options ``(declaration, type, help)`` of one section."""

    def decorate(function: Decorated) -> Decorated:
        for name, kind, text in reversed(options):
            add = partial(click.option, name, cls=Option, section=section, help=text)
            function = add(is_flag=True)(function) if kind is bool else add(type=kind)(function)
        return function

    return decorate


def training_options(function: Decorated) -> Decorated:
    """Add the options that decide a training; all but `out` and `force` are in `TrainConfig`."""
    decorators = [
        _options(
            "What is trained",
            (
                "--task",
                str,
                "digits, stdlib-text, cifar10, fashion-mnist, imagenet, wikitext2, vaihingen, "
                "camvid, or module:factory.",
            ),
            (
                "--model",
                str,
                "mlp, resnet, resnet18, resnet50, resnet152, transformer, unet, segnet, or "
                "module:factory. Default: the task's.",
            ),
            ("--width", float, "Factor on the model's width. Default: 1."),
            ("--data-root", click.Path(), "Folder that holds the data files."),
            ("--seed", int, "Initialisation. Default: 0."),
            ("--data-seed", int, "Order of the data. Default: as --seed."),
            (
                "--branch",
                str,
                "RUN@STEP: go on from there as a new run, with the settings of RUN where none "
                "are given here.",
            ),
            ("--exclude-batch", int, "Leave out the samples of this update of RUN."),
        ),
        _options(
            "How",
            ("--optimizer", str, "sgd, momentum, nesterov, adam or adamw. Default: momentum."),
            ("--lr", float, "Learning rate. Default: 0.01; sgd 0.1, adam and adamw 0.001."),
            ("--momentum", float, "For momentum and nesterov. Default: 0.9."),
            ("--weight-decay", float, "Coupled, but for adamw. Default: 0."),
            (
                "--lr-schedule",
                str,
                "constant, warmup-cosine[:EPOCHS], multistep[:E1,E2,…[:FACTOR]] or a CSV file "
                "with the columns step,lr. Default: constant.",
            ),
            ("--batch-size", int, "Default: the task's, 64 for digits."),
            ("--epochs", int, "Default: the task's, 20 for digits."),
            ("--max-steps", int, "End after so many updates."),
            ("--device", str, "auto, cpu or cuda. Default: auto."),
            ("--threads", int, "Threads of torch. Default: its own choice."),
            ("--workers", int, "Processes that load data. Default: 0."),
        ),
        _options(
            "What is recorded",
            (
                "--every",
                str,
                "Steps that are saved: K, log:N, epoch, bursts:P:1,2,5,… or several joined "
                "by +. Default: 10.",
            ),
            (
                "--gradients",
                str,
                "Streams beside the weights: minibatch, updates, fixed:K, heldout:K, "
                "shuffled-labels:K, full, full:eval, with commas, or none; each with its own "
                "@SCHEDULE if wanted. Default: minibatch.",
            ),
            ("--checkpoint-every", int, "Save a resume state every K steps. Default: per epoch."),
            (
                "--keep-state",
                str,
                "Keep resume states, for branches and for Adam's metric: every:N, or as --every.",
            ),
        ),
    ]
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def config_option(function: Decorated) -> Decorated:
    """Add ``--config``."""
    text = (
        "TOML file with any option of the groups above, and tables task_args and model_args; "
        "out, resume and force are not in it. Flags win."
    )
    return _options("Run", ("--config", click.Path(dir_okay=False), text))(function)


@click.group(cls=Group)
@click.version_option(__version__, message="straightway %(version)s")
def main() -> None:
    """Record where a training run went. (Measure it afterwards with `analyze`.)"""


@main.command(
    example="capture train --task digits --epochs 4 --out runs/first.zarr",
)
@training_options
@config_option
@_options(
    "Run",
    ("--resume", bool, "Continue the run at --out, bit for bit; starts it where there is none."),
    ("--force", bool, "Start although the disk seems too small."),
)
@click.option(
    "--out",
    cls=Option,
    section="Run",
    type=click.Path(),
    required=True,
    help="RUN.zarr to write, or s3://BUCKET/RUN.zarr.",
)
def train(config: str | None, out: str, resume: bool, force: bool, **flags: Any) -> None:
    """Train, and record weights and gradients into a run store."""
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


@main.command(example="capture plan --task digits --epochs 4 --every log:50 --out runs/first.zarr")
@training_options
@config_option
@_options(
    "Run",
    ("--force", bool, "Exit with 0 although the disk is too small."),
    ("--json", bool, "Print JSON: bytes and seconds."),
    ("--out", click.Path(), "Where the run would be written. Default: here."),
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


@main.command(example="capture probe runs/first.zarr --gradients fixed:4,full")
@click.argument("run", type=click.Path())
@_options(
    "Options",
    ("--steps", str, "Measure at these saved steps only: 0,100,200."),
    ("--replace", bool, "Drop streams of these names first."),
    ("--data-root", click.Path(), "Folder that holds the data files. Default: as in training."),
    ("--task", str, "For a run of your own loop: module:factory."),
    ("--model", str, "For a run of your own loop: module:factory."),
    ("--batch-size", int, "For a run of your own loop. Default: the task's."),
    ("--data-seed", int, "For a run of your own loop: seed of the batches. Default: 0."),
    ("--threads", int, "Threads of torch. Default: as in training."),
)
@click.option(
    "--gradients",
    required=True,
    help="fixed:K, heldout:K, shuffled-labels:K, full, full:eval, with commas; each with its own "
    "@SCHEDULE if wanted.",
)
def probe(run: str, gradients: str, steps: str | None, replace: bool, **flags: Any) -> None:
    """Add gradients of other batches to a recorded run, without training again.

    RUN is the folder that `capture train --out` or a Recorder wrote. They are taken at its saved
    weights, w_T included. What an interrupted call has added stays: the same call goes on.
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
@_options(
    "Which step",
    ("--steps", str, "Of each checkpoint, in the natural order of their names: 0,100,200."),
    (
        "--step-pattern",
        str,
        "Regular expression whose group is the step in a name. Names that it does not fit are "
        "left out.",
    ),
    ("--steps-per-epoch", int, "For names that tell an epoch alone."),
)
@_options(
    "Which tensors",
    ("--key", str, "Where the weights lie in a file of torch: model_ema, app/model."),
    ("--prefix", str, "Names must begin with it and lose it: model."),
    ("--trainable", str, "Regular expression: floating tensors that it does not fit are frozen."),
    ("--buffers", str, "Regular expression: tensors that it fits are buffers."),
)
@_options(
    "Which model",
    ("--task", str, "As in `capture train`: with it, the run can be probed."),
    ("--model", str, "As in `capture train`: it tells names, order, ties and what is trained."),
    ("--data-root", click.Path(), "Folder that holds the data files of the task."),
    ("--config", click.Path(dir_okay=False), "TOML file, as for `capture train`."),
)
@_options(
    "Run",
    ("--dry-run", bool, "Print what would be imported, and write nothing."),
    ("--out", click.Path(), "RUN.zarr to write, or s3://BUCKET/RUN.zarr."),
)
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
    read off the names. No code in a checkpoint is ever run. Without a model, floating tensors are
    trainable unless their name is that of a well-known buffer.
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
@click.option("--json", is_flag=True, help="Print JSON, with every recorded step.")
def info(run: str, json: bool) -> None:
    """Tell what a run is and what it holds.

    RUN is the folder that `capture train --out` or a Recorder wrote.
    """
    from capture.info import describe_run, format_description

    description = describe_run(run)
    _print_json(description) if json else click.echo(format_description(description))


@main.command(example="capture verify runs/first.zarr")
@click.argument("run", type=click.Path())
@click.pass_context
def verify(context: click.Context, run: str) -> None:
    """Check every committed byte of a run against its checksum.

    RUN is the folder that `capture train --out` or a Recorder wrote. Exits with 0 where all is
    sound, with 3 where anything is not, naming each file, row and remedy.
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
@click.option("--step", type=int, required=True, help="A recorded step; capture info lists them.")
def export(run: str, out: str, step: int) -> None:
    """Write the model at a recorded step as a plain safetensors file.

    RUN is the folder that `capture train --out` or a Recorder wrote, OUT the file to write. It
    holds the whole state_dict, each tensor in its own dtype, and no reserved names.
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
