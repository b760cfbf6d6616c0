"""Mistakes on a command line in the form of all others: what was expected, got, and to write.

The parser below says in its own words, and in a frame, that a value is none of its type.  Here a
group of commands says them in one line, from what the commands declare.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from inspect import Parameter
from typing import Any, get_args

from typer.core import TyperGroup

from rgap.cli.console import say

__all__ = ["OneLine", "expected_of"]

_NUMBERS = {int: "a whole number", float: "a number"}


class OneLine(TyperGroup):
    """Commands whose wrong usage is one line on standard error, and exit code 2."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Run a command; arguments as for any group of commands."""
        if not options.get("standalone_mode", True):
            return super().main(args, *more, **options)
        typed = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(typed, *more, **{**options, "standalone_mode": False})
        except Exception as error:
            if not hasattr(error, "format_message"):  # what the parser refuses, of any version
                raise
            if words := str(error.format_message()):
                say(f"error: {_told(self, error, typed, words)}")
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)


def expected_of(declared: Parameter) -> tuple[str, str]:
    """What an option takes, in words, and a value to write.

    >>> from typing import Annotated
    >>> from rgap.cli.options import Reduction, Seed
    >>> def parameter(hint, default):
    ...     return Parameter("x", Parameter.KEYWORD_ONLY, default=default, annotation=hint)
    >>> expected_of(parameter(Seed, 0))
    ('a whole number of at least 0', '0')
    >>> expected_of(parameter(Annotated[Reduction | None, ...], None))
    ('mean or sum', 'mean')
    """
    hint, info = get_args(declared.annotation)[:2]
    kind = next(k for k in (*get_args(hint), hint) if isinstance(k, type) and k is not type(None))
    default = None if declared.default is Parameter.empty else declared.default
    if issubclass(kind, StrEnum):
        *values, last = kind
        return f"{', '.join(values)} or {last}", str(default or values[0])
    least = getattr(info, "min", None)
    if kind in _NUMBERS:
        bound = "" if least is None else f" of at least {least:g}"
        example = default if default is not None else least if least else 1
        return f"{_NUMBERS[kind]}{bound}", f"{example:g}"
    metavar = getattr(info, "metavar", None) or "VALUE"
    return metavar, metavar


def _told(group: TyperGroup, error: Exception, typed: Sequence[str], words: str) -> str:
    """The sentence for an error of the parser; its own words where it is of another kind."""
    first = next((word for word in typed if not word.startswith("-")), "")
    command = group.commands.get(first, group)
    option = getattr(error, "option_name", None)
    if command is group and option is None:
        return _no_command(list(group.commands), first)
    declared = getattr(command.callback, "__signature__", None)
    known: Mapping[str, Parameter] = {} if declared is None else declared.parameters
    named = {name: p for p in command.params for name in p.opts}
    param: Any = getattr(error, "param", None)
    if param is None and option not in named:
        asked = "rgap" if command is group else f"rgap {command.name}"
        return _no_option(asked, option, list(named), words)
    param = param or named[str(option)]
    name = max(param.opts, key=len)
    flag = name if name.startswith("-") else param.name.upper()
    wanted, example = expected_of(known[param.name]) if param.name in known else ("a value",) * 2
    value = _value(param.opts, typed)
    if getattr(param, "is_flag", False):
        return f"{flag}: expected no value, got {value!r}; write {flag} alone"
    if flag == param.name.upper():
        return f"{flag}: expected one, got none; see rgap {command.name} -h"
    got = "nothing" if value is None else repr(value)
    return f"{flag}: expected {wanted}, got {got}; write {flag} {example}"


def _value(names: Sequence[str], typed: Sequence[str]) -> str | None:
    """What was typed for an option, the last time that it was."""
    value = None
    for place, word in enumerate(typed):
        start, equals, rest = word.partition("=")
        if start in names:
            value = rest if equals else next(iter(typed[place + 1 :]), None)
    return value


def _no_command(commands: list[str], got: str) -> str:
    near = get_close_matches(got, commands, 1) or ["COMMAND -h"]
    *others, last = commands
    return f"COMMAND: expected {', '.join(others)} or {last}, got {got!r}; write rgap {near[0]}"


def _no_option(command: str, option: str | None, known: list[str], words: str) -> str:
    """An option that a command does not have, or more arguments than it takes."""
    if option is None:
        lists = " (a list is one word, as in 1,2)" if "extra argument" in words else ""
        return f"{command}: {words[:1].lower()}{words[1:]}{lists}; see {command} -h"
    near = get_close_matches(option, [name for name in known if name.startswith("--")], 1)
    write = f"write {near[0]}" if near else f"see {command} -h"
    return f"{option}: expected an option of {command}, which has none of this name; {write}"
