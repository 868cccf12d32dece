"""What several commands share: options, each kind as one value, and how they show what they do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import click

from analyze.commands.stopping import Stopping
from capture.command_line import Command, Option

if TYPE_CHECKING:
    from analyze.groups import Grouping
    from analyze.schedulers import Cluster

_OTHER_FORMATS = (".csv", ".nc", ".zarr", ".tex", ".json", ".html", ".txt", ".xlsx")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

command = partial(click.command, cls=Command)

inputs_argument = click.argument(
    "inputs", nargs=-1, required=True, metavar="RUN|TABLE…", type=click.Path()
)
runs_argument = click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path())
run_argument = click.argument("run", metavar="RUN", type=click.Path())

streams_option = click.option(
    "--stream",
    "streams",
    metavar="NAME",
    multiple=True,
    help="What is measured, may be repeated: minibatch (the gradients that entered the steps), "
    "updates (the steps that were taken), fixed, heldout or any other stream of the run (`capture "
    "info RUN` lists them), or weights. Default: all but the weights.",
)
_REFERENCE_FORMS = (
    "final (w_T, the last iterate), step:N (w after N updates), mean:K (the mean of the last K "
    "saved iterates), run:PATH[@STEP] (the end, or that step, of another run of the same model, "
    "such as a branch) or file:PATH (a safetensors file). Default: final."
)


def references_option(what: str) -> Decorator:
    """Add `--reference`, which may be repeated, as `references`; `what` says what it is for."""
    return click.option(
        "--reference",
        "references",
        metavar="POINT",
        multiple=True,
        default=("final",),
        help=f"{what}, may be repeated: {_REFERENCE_FORMS}",
    )


def reference_option(what: str) -> Decorator:
    """Add `--reference`, given once at most; `what` says what it is for."""
    return click.option(
        "--reference", metavar="POINT", default="final", help=f"{what}: {_REFERENCE_FORMS}"
    )


def one_value(name: str, gather: Callable[..., Any], *options: Decorator) -> Decorator:
    """Make a decorator that adds options and hands the command what `gather` makes of them.

    The arguments of `gather` are the values of the options, by their names; its result is the
    argument `name` of the command.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def gathered(**given: Any) -> Any:
            own = {key: given.pop(key) for key in names}
            return function(**given, **{name: gather(**own)})

        before = len(_parameters(function))
        decorated: Callable[..., Any] = gathered
        for option in reversed(options):
            decorated = option(decorated)
        names = [str(parameter.name) for parameter in _parameters(decorated)[before:]]
        return decorated

    return decorate


def _parameters(function: Callable[..., Any]) -> list[click.Parameter]:
    """What click has noted on a function so far, the last option first."""
    return getattr(function, "__click_params__", [])


@dataclass(frozen=True)
class Running:
    """Where a measurement runs, and where it keeps what it summed.

    Each is the keyword argument of that name of the functions that measure.
    """

    scheduler: str | Cluster
    workers: int | None
    cache: bool | str

    @property
    def arguments(self) -> dict[str, Any]:
        """All of it, for a function that takes moments of rows."""
        return vars(self).copy()

    @property
    def scheduling(self) -> dict[str, Any]:
        """Where it runs alone, for a function that keeps nothing."""
        return {"scheduler": self.scheduler, "workers": self.workers}


def _running(
    scheduler: str,
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    workers: int | None,
    cache: str | None = None,
    no_cache: bool = False,
) -> Running:
    if cache is not None and (no_cache or not cache):
        raise click.UsageError("--cache names a folder, and goes without --no-cache")
    where = False if no_cache else True if cache is None else cache
    return Running(_cluster(scheduler, tls_ca, tls_cert, tls_key), workers, where)


def _cluster(
    scheduler: str, ca: str | None, certificate: str | None, key: str | None
) -> str | Cluster:
    """Return the scheduler that was chosen, with its certificates where there are any."""
    if not (ca or certificate or key):
        return scheduler
    from analyze.schedulers import Cluster

    return Cluster(scheduler, ca, certificate, key)


_where = partial(click.option, cls=Option, section="Where it runs")

_scheduling_options: Sequence[Decorator] = (
    _where(
        "--scheduler",
        metavar="ADDRESS",
        default="threads",
        help="threads of this process, or the tcp:// or tls:// address of a running Dask "
        "scheduler, whose workers see RUN under the same path. Default: threads.",
    ),
    _where(
        "--tls-ca",
        type=click.Path(),
        help="For tls://, the certificate of the authority, a PEM file.",
    ),
    _where("--tls-cert", type=click.Path(), help="For tls://, your own certificate."),
    _where("--tls-key", type=click.Path(), help="For tls://, the key of your certificate."),
    _where(
        "--workers",
        metavar="N",
        type=click.IntRange(1),
        help="Number of threads. Default: one per processor.",
    ),
)
_caching_options: Sequence[Decorator] = (
    _where(
        "--cache",
        metavar="DIR",
        type=click.Path(),
        help="Folder for the sums over each tensor, from which every table is made: the next "
        "question about the same gradients and references reads no weights. Default: "
        "NAME.moments beside the run.",
    ),
    _where("--no-cache", is_flag=True, help="Sum again, and keep nothing."),
)

# Hands the command a `Running`.
running_options = one_value("running", _running, *_scheduling_options, *_caching_options)
# The same where nothing is kept.
scheduling_options = one_value("running", _running, *_scheduling_options)


def _grouping(patterns: tuple[str, ...], by: str | None) -> Grouping:
    from analyze.groups import parse_groups

    if patterns and by is not None:
        raise click.UsageError("--group stands instead of --by: give one of them")
    return parse_groups(patterns) if patterns else by or "model"


# Hands the command a `Grouping`.
grouping_options = one_value(
    "grouping",
    _grouping,
    click.option(
        "--by",
        type=click.Choice(["model", "layer", "tensor", "kind"]),
        help="The tensors that share a row: all of the model, those of a layer (names that are "
        "equal up to the last dot), each by itself, or those of a kind (convolution, matrix, "
        "embedding, norm, bias, scalar). Default: model.",
    ),
    click.option(
        "--group",
        "patterns",
        multiple=True,
        metavar="LABEL=REGEX",
        help="Instead of --by: a row for the tensors in whose names REGEX is found, may be "
        "repeated; the first that fits counts, and what fits none is the group rest.",
    ),
)


def with_model(grouping: Grouping) -> list[Grouping]:
    """The groupings to measure: the chosen one, and the whole model, of which the verdict is."""
    return ["model"] if grouping == "model" else ["model", grouping]


plan_option = click.option(
    "--plan",
    is_flag=True,
    is_eager=True,
    help="Say what would be read, and the memory, space and time that takes; measure nothing.",
)


def output_option(what: str, *, name: str = "--out", required: bool = False) -> Decorator:
    """Add an option for a file to write; from when it is in place, the command succeeds.

    One that is required may be left out with `--plan`.
    """

    def check(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
        if value is None and required and not context.params.get("plan"):
            raise click.MissingParameter(ctx=context, param=parameter)
        stopping = context.find_object(Stopping)
        if value is not None and stopping is not None:
            stopping.watch(value)
        return value

    note = "  [required]" if required else ""
    return click.option(name, type=click.Path(), callback=check, help=f"{what}{note}")


def planned_output(what: str) -> Decorator:
    """Add `--out` and `--plan`; `out` is `None` where the command only plans."""
    return one_value(
        "out",
        lambda plan, out: None if plan else out,
        plan_option,
        output_option(what, required=True),
    )


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


def show(text: str, *, err: bool = False) -> None:
    """Print, with question marks for what the terminal's encoding cannot show."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), err=err)
