"""The command `analyze`. Each command is: parse, one call, print; what is heavy loads when used."""

from __future__ import annotations

import logging

import click

from analyze.commands.measure import compute, coverage, pairs, pca, schedule
from analyze.commands.stopping import Stopping
from analyze.commands.tell import compare, export, methods, report
from capture import __version__
from capture.command_line import Group


@click.group(cls=Group)
@click.version_option(__version__, message="straightway %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Measure recorded runs, as often as you like. (Record them first with `capture`.)

    Measured is the path of the weights w towards a point w*, by default where the run ended:
    with e = w - w*, γ is the cosine between a gradient g and e. Beside it stands γ⁰, what it would
    be if the run's gradients were orthogonal to each other.
    """
    logging.basicConfig(format="warning: %(message)s")
    context.obj = context.with_resource(Stopping())


# In the order in which help lists them.
for each in (compute, report, compare, pairs, pca, coverage, schedule, export, methods):
    main.add_command(each)
