"""The command line: ``rgap demo | capture | import | check | audit | invert | match`` and others.

Nothing here imports torch until a command needs it, so that ``rgap --help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rgap._version import __version__
from rgap.cli.audit import audit
from rgap.cli.capture import capture
from rgap.cli.check import check
from rgap.cli.console import say, unbroken
from rgap.cli.demo import demo
from rgap.cli.harden import harden
from rgap.cli.importing import import_
from rgap.cli.invert import invert
from rgap.cli.labels import labels
from rgap.cli.match import match
from rgap.cli.report import report
from rgap.cli.usage import OneLine

__all__ = ["app", "main"]

EXIT_CODES = """Exit codes:

- 0: success; for invert, EXACT: recovered and certified; for match, the update is reproduced
- 1: not recovered exactly: COMPLETED, UNDERDETERMINED or AMBIGUOUS; for check, something is wrong
- 2: wrong usage or bad input
- 3: INCONSISTENT: the update does not fit the model as declared
- 4: UNSUPPORTED: a step of the network cannot be inverted"""

app = typer.Typer(
    name="rgap",
    cls=OneLine,
    help="What a client's gradient gives away about its data: counted, recovered, certified.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rgap {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_version, metavar=""
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors.", metavar="")
    ] = False,
) -> None:
    """What a client's gradient gives away about its data: counted, recovered, certified."""
    context.obj = debug


for _command in (demo, capture):
    app.command()(_command)
app.command("import")(import_)
for _command in (audit, check):
    app.command()(_command)
app.command(epilog=EXIT_CODES)(invert)
for _command in (report, match, labels, harden):
    app.command()(_command)


def main() -> None:
    """Entry point of the ``rgap`` command."""
    sys.stdout, sys.stderr = unbroken(sys.stdout), unbroken(sys.stderr)
    try:
        app(prog_name="rgap")
    except OSError as error:  # of --help and --version: a command says its own
        say(f"error: {error}")
        sys.exit(2)
