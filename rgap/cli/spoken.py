"""Advice in Python as the words of a command: ``batch_size=4`` is ``--batch-size 4`` there.

The library speaks to whoever calls it from Python.  A command knows its own options, and says what
they are called where an argument of the same name is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import typer

__all__ = ["options_of", "spoken", "worded"]

T = TypeVar("T")

_VALUE = r"torch\.tensor\(\[[^\[\]]*\]\)|\([^()]*\)|\"[^\"]*\"|'[^']*'|[^\s,;()]*[^\s,;().]|"
_CALL = re.compile(r"rgap\.(\w+)\(model, update((?:, \w+=(?:\([^()]*\)|[^,()]+))*)\)")
_REPLACED = re.compile(r"dataclasses\.replace\(update((?:, \w+=(?:\([^()]*\)|[^,()]+))+)\)")


def options_of(context: typer.Context) -> dict[str, str]:
    """What a command calls its parameters, by their names in Python."""
    names = {}
    for parameter in context.command.params:
        name = parameter.name or ""
        if parameter.param_type_name == "argument":
            names[name] = name.upper()
        else:
            names[name] = max(parameter.opts, key=len)
    if "memory_limit" in names:
        names["memory_budget"] = names["memory_limit"]
    return names


def spoken(text: str, options: Mapping[str, str]) -> str:
    """A sentence with the names of a command's options in the place of arguments.

    Args:
        text: of an error or a reason.
        options: of the command, by the names of arguments; others stay as they are.

    >>> options = {"batch_size": "--batch-size", "input_shape": "--input-shape", "noise": "--noise"}
    >>> spoken("batch_size: unknown; pass batch_size=", options)
    '--batch-size: unknown; pass --batch-size'
    >>> spoken("write input_shape=(3, 32, 32).", options)
    'write --input-shape 3,32,32.'
    >>> spoken("write rgap.invert(model, update, noise=0.01)", options)
    'write rgap invert MODEL UPDATE --noise 0.01'
    >>> spoken("write dataclasses.replace(update, batch_size=4)", options)
    'write --batch-size 4'
    >>> spoken("write noise=None to have it found", options)
    'leave --noise out to have it found'
    """
    from rgap.machine.memory import shown

    def flag(match: re.Match[str]) -> str:
        name, value = match.group(1), match.group(2)
        if name not in options:
            return match.group(0)
        plain = re.sub(r"torch\.tensor|[()\[\]\"']", "", value).replace(", ", ",").rstrip(",")
        if name == "memory_budget" and plain != "None":
            plain = shown(float(plain)).replace(".0 ", "").replace(" ", "")
        plain = f'"{plain}"' if " " in plain else plain
        return f"{options[name]} {plain}".rstrip()

    def named(match: re.Match[str]) -> str:
        return options.get(match.group(0), match.group(0))

    def known(listed: str) -> bool:
        return all(name in options for name in re.findall(r"(\w+)=", listed))

    def listed(match: re.Match[str]) -> str:
        arguments = match.group(match.lastindex or 0) if match.lastindex else ""
        if not known(arguments):
            return match.group(0)
        flags = re.sub(rf", (\w+)=({_VALUE})", lambda m: " " + flag(m), arguments)
        command = f"rgap {match.group(1)} MODEL UPDATE" if match.re is _CALL else ""
        return f"{command}{flags}".strip()

    text = _CALL.sub(listed, _REPLACED.sub(listed, text))
    kept: list[str] = []
    calls: list[bool] = []  # of every open bracket, whether it belongs to a call in Python
    for part in re.split(rf"(\b\w+=(?:{_VALUE}))", text):
        pair = re.fullmatch(rf"(\w+)=({_VALUE})", part)
        kept.append(flag(pair) if pair and not any(calls) else part)
        for bracket in () if pair else re.finditer(r"\w\(|\(|\)", part):
            if bracket.group() == ")":
                calls[-1:] = []
            else:
                calls.append(len(bracket.group()) == 2)
    # A name with an underscore is no word of a sentence: "a smaller input_shape".
    text = re.sub(r"(?<![\w.'\"-])\w+_\w+(?![\w(='\"]|\.\w)", named, "".join(kept))
    text = re.sub(r"(?:write )?(--[\w-]+) None", r"leave \1 out", text)
    start = re.match(r"(?:Loss\.)?(\w+):", text)
    if start and start.group(1) in options:
        text = options[start.group(1)] + text[start.end(1) :]
    return text


def worded(result: T, context: typer.Context, *fields: str) -> T:
    """A dataclass whose words name the options of a command.

    Args:
        result: what the library returned.
        context: of the command.
        fields: of the result, each a sentence or several.
    """
    options = options_of(context)
    words: dict[str, Any] = {}
    for name in fields:
        said = getattr(result, name)
        single = isinstance(said, str)
        words[name] = spoken(said, options) if single else tuple(spoken(s, options) for s in said)
    told: Any = result
    return cast("T", replace(told, **words))
