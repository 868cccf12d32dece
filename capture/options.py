"""The options that commands share, and the notes that their help explains them by.

Imports nothing but click, so that help is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click

from capture.command_line import Notes, Option

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

SCHEDULES: Notes = {
    "SCHEDULE, the steps that are saved (step t is the state before update t)": (
        ("10", "steps 0, 10, 20, …; also written every:10"),
        ("log:50", "50 steps of the whole run: each one at first, then ever further apart"),
        ("epoch", "the first step of every epoch"),
        (
            "bursts:51:1,2,5",
            "0, 1, 2, 5, then 51, 52, 53, 56, then 102, …: every 51 steps one, and those 1, 2 and "
            "5 after it, so that `analyze pairs --lags 1,2,5` can compare them",
        ),
        ("10+log:50", "both"),
    )
}

_FORM = "NAME[:K][@SCHEDULE], several with commas"
_PROBES = (
    ("fixed:4", "gradients of 4 batches of training samples, drawn once; 10 without a number"),
    ("heldout:4", "gradients of 4 batches of samples that never drive the training"),
    ("shuffled-labels:4", "gradients of 4 training batches whose labels were permuted once"),
    ("full", "the gradient of all training samples, the model in training mode"),
    ("full:eval", "the same, the model in evaluation mode"),
)

STREAMS: Notes = {
    f"STREAMS, what is saved beside the weights w_t: {_FORM}": (
        ("minibatch", "the gradient that entered update t"),
        ("updates", "w_{t+1} - w_t, the update itself"),
        *_PROBES,
        ("minibatch,full@epoch", "the first when --every says, the second once per epoch"),
        ("none", "nothing"),
    )
}

PROBES: Notes = {
    f"STREAMS, what is measured at saved weights w_t: {_FORM}": (
        *_PROBES,
        ("fixed:4@100,full", "the first at steps 0, 100, 200, …, the second at all saved steps"),
    )
}

OWN: Notes = {
    "module:factory, a function in a Python module of the working directory": (
        (
            "of a model",
            "returns a torch.nn.Module; it is given those of input_shape, num_classes, width, … "
            "that its signature names, and the table model_args of --config",
        ),
        (
            "of a task",
            "is called as factory(data_root, **task_args) and returns an object with train and "
            "heldout (sequences of samples), defaults and model_args (dicts), loss(model, batch), "
            "the mean loss to differentiate, and metrics(model, batch), means by name; "
            "`python -m pydoc capture.tasks` shows a whole one",
        ),
    )
}


def options(section: str, *entries: tuple[str, Any, str]) -> Callable[[Decorated], Decorated]:
    """Make a decorator for the options ``(declaration, type, help)`` of one section.

    In the place of a type may stand the word by which help calls a text, such as ``"SCHEDULE"``.
    """

    def decorate(function: Decorated) -> Decorated:
        for name, kind, text in reversed(entries):
            add = partial(click.option, name, cls=Option, section=section, help=text)
            if kind is bool:
                function = add(is_flag=True)(function)
            elif isinstance(kind, str):
                function = add(type=str, metavar=kind)(function)
            else:
                function = add(type=kind)(function)
        return function

    return decorate


_TRAINED = options(
    "What is trained",
    (
        "--task",
        "NAME",
        "The data and the loss: digits and stdlib-text, which need no files; cifar10, "
        "fashion-mnist, imagenet, wikitext2, vaihingen, camvid; or your own as module:factory. "
        "Needed, unless --config or --branch tells it.",
    ),
    (
        "--model",
        "NAME",
        "mlp, resnet, resnet18, resnet50, resnet152, transformer, unet, segnet, or your own as "
        "module:factory. Default: the task's.",
    ),
    ("--width", float, "Scales the model's width: 2 doubles its channels. Default: 1."),
    ("--data-root", click.Path(), "Folder that holds the data files of the task."),
    ("--seed", int, "Seed of the initial weights. Default: 0."),
    ("--data-seed", int, "Seed of the order of the data. Default: as --seed."),
    (
        "--branch",
        "RUN@STEP",
        "Go on from the weights of another run after so many updates, as a new run, with its "
        "settings where none are given here. But for step 0 and plain sgd, --keep-state must have "
        "kept a state there.",
    ),
    (
        "--exclude-batch",
        int,
        "With --branch: leave out the samples of the batch that this update of RUN used.",
    ),
)

_HOW = options(
    "How",
    (
        "--optimizer",
        "NAME",
        "sgd, momentum, nesterov, adam or adamw. Default: momentum.",
    ),
    ("--lr", float, "Learning rate. Default: 0.01; for sgd 0.1, for adam and adamw 0.001."),
    ("--momentum", float, "Momentum, of momentum and nesterov alone. Default: 0.9."),
    (
        "--weight-decay",
        float,
        "Weight decay; enters the gradient (coupled), but for adamw. Default: 0.",
    ),
    (
        "--lr-schedule",
        "NAME|FILE",
        "constant; warmup-cosine[:EPOCHS], so many epochs of warm-up (1) and a cosine to 0; "
        "multistep[:E1,E2,…[:FACTOR]], times FACTOR (0.1) after these epochs (½ and ¾ of all); or "
        "a CSV file with the columns step,lr, as `analyze schedule` writes. Default: constant.",
    ),
    ("--batch-size", int, "Samples in each batch. Default: the task's, 64 for digits."),
    (
        "--epochs",
        int,
        "Passes over the training samples. Default: the task's, 20 for digits; no limit where "
        "--max-steps is given.",
    ),
    ("--max-steps", int, "End after so many updates, if the epochs have not ended before."),
    ("--device", "NAME", "auto, cpu or cuda. Default: auto, which takes cuda where there is one."),
    (
        "--threads",
        int,
        "Threads of torch on the CPU. Default: 1 for digits and stdlib-text, whose steps are so "
        "short that more threads wait for each other, several times slower on a busy machine; "
        "else torch's own choice, usually one per core. On a shared machine try 1 for any small "
        "model.",
    ),
    ("--workers", int, "Processes that load data beside the training. Default: 0."),
)

_RECORDED = options(
    "What is recorded",
    (
        "--every",
        "SCHEDULE",
        "Steps at which weights and gradients are saved, see below. Default: 10.",
    ),
    (
        "--gradients",
        "STREAMS",
        "What is saved beside the weights, see below. Default: minibatch.",
    ),
    (
        "--checkpoint-every",
        int,
        "After every so many steps save a state, from which --resume goes on. Default: once per "
        "epoch.",
    ),
    (
        "--keep-state",
        "SCHEDULE",
        "Keep states of these steps for good, for --branch and for the quantities in Adam's "
        "metric, as in every:100. Default: none is kept.",
    ),
)


def training_options(function: Decorated) -> Decorated:
    """Add the options that decide a training; all of them are in `TrainConfig`."""
    return _TRAINED(_HOW(_RECORDED(function)))


def config_option(function: Decorated) -> Decorated:
    """Add ``--config``."""
    text = (
        "TOML file with any option of the groups above, written as batch_size = 64, and with "
        "tables task_args and model_args; out, resume and force are not in it. Flags win."
    )
    return options("Run", ("--config", click.Path(dir_okay=False), text))(function)


_STEP = options(
    "Which step",
    (
        "--steps",
        "T1,T2,…",
        "The step of each checkpoint, in the natural order of their names, as in 0,100,200. "
        "Default: read off the names.",
    ),
    (
        "--step-pattern",
        "REGEX",
        "Where in a name the step stands, as in 'ep-([0-9]+)-final': the step is what the group "
        "matches. Names that it does not fit are left out.",
    ),
    (
        "--steps-per-epoch",
        int,
        "Updates in an epoch: for names that tell the epoch and no step, as epoch_3 does.",
    ),
)

_TENSORS = options(
    "Which tensors",
    (
        "--key",
        str,
        "Under which key of a file of torch the weights lie, as in model_ema or app/model. "
        "Default: found by the usual names.",
    ),
    (
        "--prefix",
        str,
        "Take only tensors whose names begin so, and take it off: by model. the tensor "
        "model.fc.weight becomes fc.weight.",
    ),
    (
        "--trainable",
        "REGEX",
        "Which tensors were trained; other floating ones are frozen. Default: all but buffers.",
    ),
    (
        "--buffers",
        "REGEX",
        "Which tensors are buffers, saved beside the weights and not measured, as in 'mask$'. "
        "Default: those with names such as running_mean.",
    ),
)

_MODEL = options(
    "Which model",
    (
        "--task",
        "NAME",
        "As in `capture train`: its model is taken, and `capture probe` knows the data.",
    ),
    (
        "--model",
        "NAME",
        "As in `capture train`: it tells names, order, ties and what is trained, in the place of "
        "--trainable and --buffers.",
    ),
    ("--data-root", click.Path(), "Folder that holds the data files of the task."),
    (
        "--config",
        click.Path(dir_okay=False),
        "TOML file as for `capture train`, with task, model and the like.",
    ),
)

_IMPORT = options(
    "Run",
    ("--dry-run", bool, "Print which checkpoints would be imported as which steps; write nothing."),
    ("--out", click.Path(), "The run to write: a new folder RUN.zarr, or s3://BUCKET/RUN.zarr."),
)


def import_options(function: Decorated) -> Decorated:
    """Add the options of `capture import`: which steps, tensors and model, and where to."""
    return _STEP(_TENSORS(_MODEL(_IMPORT(function))))
