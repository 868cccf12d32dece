"""What both command lines share: errors as one line and an exit code, options under headings.

Imports nothing but click, so that help is quick.

    0    done
    1    unexpected (a traceback), or the disk refused
    2    wrong usage
    3    bad or damaged input
    130  interrupted by Ctrl-C, 143 by SIGTERM
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 80}

# Headings, each with terms and what they mean.
Notes = Mapping[str, Sequence[tuple[str, str]]]


class Option(click.Option):
    """An option that help lists under the heading `section`."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command with an example at the end of its help, which a test runs.

    `notes` stand before it: what values of options mean, where one line of help does not hold it.
    """

    def __init__(
        self, *args: Any, example: str, notes: Notes = MappingProxyType({}), **kwargs: Any
    ) -> None:
        kwargs.setdefault("context_settings", CONTEXT)
        super().__init__(*args, **kwargs)
        self.example = example
        self.notes = notes

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings, in order of first appearance."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            # Newer click lists arguments too, without a word: the text above the options has it.
            if record is not None and record[1]:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the notes and the example."""
        for heading, terms in self.notes.items():
            formatter.write_paragraph()
            formatter.write_text(f"{heading}:")
            with formatter.indentation():
                formatter.write_dl(terms)
        with formatter.section("Example"):
            for line in self.example.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Group(click.Group):
    """A program with commands, where every error that a user can cause is one line on stderr."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", CONTEXT)
        super().__init__(*args, **kwargs)

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command and exit with its code; without `standalone_mode`, as click does."""
        run: Any = partial(super().main, *args, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except click.ClickException as error:
            if not extra.get("args", args or sys.argv[1:]):
                # Called with nothing at all: the whole help says more than one line.
                error.show()
                sys.exit(error.exit_code)
            _fail(_usage(error), error.exit_code)
        except click.Abort:
            _fail("interrupted", 130)
        except Exception as error:
            # Imported here because it brings the store along, which help can do without.
            from capture.store.errors import StraightwayError

            if not isinstance(error, StraightwayError):
                raise
            _fail(str(error), error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C becomes an error here, before click writes an empty line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; where there is none of that name, suggest the near one."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, n=1)
            known = ", ".join(self.list_commands(ctx))
            hint = f"did you mean {near[0]!r}?" if near else f"the commands are {known}"
            ctx.fail(f"no such command {name!r}: {hint}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of their definition, which is that of their use."""
        return list(self.commands)


def _usage(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split()).removesuffix(".")
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    joint = "" if message.endswith("?") else ";"
    return f"{message[:1].lower()}{message[1:]}{joint} see {context.command_path} --help"


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
