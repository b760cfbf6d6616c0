"""How a command speaks: results on standard output, all else in single lines on standard error."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from rgap.cli.spoken import options_of, spoken

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["clean", "print_json", "say", "stderr", "stdout", "unbroken"]


class _Pipe(io.FileIO):
    """A file that takes and drops what nobody reads any more, as behind ``| head -1``."""

    _ended = False

    def write(self, data: Any) -> int:
        """Write; a closed pipe drops everything, any other error is raised once."""
        if not self._ended:
            try:
                return super().write(data)
            except BrokenPipeError:
                self._ended = True
            except OSError:
                self._ended = True
                raise
        return len(data)


def unbroken(stream: TextIO | None) -> TextIO:
    """Standard output or error such that a closed pipe changes nothing of a command's end.

    The exit code says what the answer is, and files are written; only the words have no reader.

    Args:
        stream: ``sys.stdout`` or ``sys.stderr``; None, as Python has it where it was closed.

    Returns:
        The same where it is a terminal or has no file.
    """
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if stream.isatty():
        return stream
    try:
        stream.flush()
        raw = _Pipe(os.dup(stream.fileno()), "w")
    except (OSError, ValueError):  # put there by whoever calls: no file of the system
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream is sys.stderr,
    )


@contextmanager
def clean(context: typer.Context) -> Iterator[None]:
    """Bad input ends in one line on standard error and exit code 2; warnings are one line too.

    The line names the command's options where the library names arguments.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        if context.obj:
            yield
            return
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError) as error:
            say(f"error: {spoken(str(error), options_of(context))}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None


def say(text: str) -> None:
    """One line on standard error."""
    typer.echo(f"rgap: {' '.join(text.split())}", err=True)


def stdout() -> Console:
    """Where results go."""
    from rich.console import Console

    # A pipe has no width of its own; 80 columns would fold tables that a file can hold.
    told = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console() if told else Console(width=120)


def stderr() -> Console:
    """Where everything else goes."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document; null for what is not finite."""
    from rgap.recovery import plain

    typer.echo(json.dumps(plain(document), indent=2, allow_nan=False))
