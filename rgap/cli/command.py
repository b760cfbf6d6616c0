"""A command out of a function: its groups of options flattened, its errors in single lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo

from rgap.cli.console import clean
from rgap.cli.mending import Mending
from rgap.cli.usage import expected_of
from rgap.remedy import in_options

__all__ = ["command", "refuse_existing"]

LIMIT = "time_limit"  # the option whose infinity says that there is none
WRITTEN = ("output", "plot", "checkpoint")  # options whose file a command writes
KEPT = ("output", "plot")  # those whose file it replaces with --force alone


def command(run: Callable[..., int]) -> Callable[..., None]:
    """What typer registers for ``run``, whose result is the exit code.

    A parameter whose type is a dataclass is a group of options: each field becomes an option of
    the command, shown in the help under the group's ``panel``, and ``run`` gets the dataclass.
    Any other parameter is an option itself.

    Args:
        run: takes groups, options and, under the name ``context``, the command's context.

    >>> from rgap.cli.options import Seed, Sent
    >>> def run(sent: Sent, seed: Seed = 0) -> int:
    ...     return 0
    >>> list(signature(command(run)).parameters)
    ['context', 'model', 'weights', 'update', 'batch_size', 'input_shape', 'noise', 'seed']
    """
    hints = get_type_hints(run, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    own = signature(run).parameters

    @wraps(run)
    def called(context: typer.Context, **typed: Any) -> None:
        with clean(context), in_options(Mending in groups.values()):
            if "context" in own:
                typed["context"] = context
            for name, value in typed.items():
                _refuse_unbounded(parsed[name], name, value)
            _refuse_lost(context, typed)
            _refuse_replaced(context, typed)
            for name, group in groups.items():
                typed[name] = group(
                    **{field.name: typed.pop(field.name) for field in fields(group)}
                )
            code = run(**typed)
        raise typer.Exit(code)

    parameters = [_parameter("context", typer.Context, Parameter.empty)]
    for name, parameter in own.items():
        if name in groups:
            parameters += _flattened(groups[name])
        elif name != "context":
            parameters.append(_parameter(name, hints[name], parameter.default))
    parsed = {each.name: each for each in parameters}
    called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    return called


def _refuse_unbounded(declared: Parameter, name: str, value: Any) -> None:
    """Refuse NaN of any option, and infinity of all but a limit, where it is none."""
    if isinstance(value, float) and not (isfinite(value) or (name == LIMIT and value == inf)):
        flag, example = f"--{name.replace('_', '-')}", expected_of(declared)[1]
        raise ValueError(f"{flag}: expected a finite number, got {value}; write {flag} {example}")


def _refuse_lost(context: typer.Context, typed: dict[str, Any]) -> None:
    """Refuse an output that would replace a file that the command reads."""
    from rgap.report.results import mask_beside

    params = {param.name: param for param in context.command.params}
    for written in WRITTEN:
        output = typed.get(written)
        if output is None:
            continue
        if not output.name:
            flag = _flag(params[written])
            raise ValueError(f"{flag}: expected a name, got '{output}'; write {flag} found")
        made = [output, mask_beside(output)] if output.suffix else [output]
        for name, value in typed.items():
            for path in value if isinstance(value, list) else [value]:
                read = isinstance(path, Path) or name == "images"
                if name != written and read and any(_same(Path(path), one) for one in made):
                    flag, other = _flag(params[written]), _flag(params[name])
                    free = output.with_name(f"{output.stem}-output{output.suffix}")
                    raise ValueError(
                        f"{flag}: expected a file of its own, got {output}, which {other} reads "
                        f"and which would be lost; write {flag} {free}"
                    )


def _refuse_replaced(context: typer.Context, typed: dict[str, Any]) -> None:
    """Refuse an output that is there already, before any work; a folder is looked into later."""
    from rgap.report.results import mask_beside

    params = {param.name: param for param in context.command.params}
    for written in KEPT:
        output = typed.get(written)
        if output is not None and output.suffix and params[written].metavar != "FOLDER":
            made = [output, mask_beside(output)] if output.suffix == ".png" else [output]
            for one in made:
                free = output.with_name(f"{output.stem}-2{output.suffix}")
                refuse_existing(f"--{written}", one, free, bool(typed.get("force")))


def refuse_existing(flag: str, path: Path, free: Path, force: bool) -> None:
    """Refuse a file that is there already, unless it may be replaced.

    Args:
        flag: the option that names it, or its folder.
        path: of the file.
        free: another value of the option.
        force: it may be replaced.

    Raises:
        ValueError: it is there, and may not; or it is no file.
    """
    if not os.path.lexists(path) or path.is_dir():
        return
    if not path.is_file():
        raise ValueError(
            f"{flag}: expected the name of a file, got {path}, which is a link to nothing, a pipe "
            f"or a device; write {flag} {free}"
        )
    if not force:
        raise ValueError(
            f"{flag}: expected a place that is free, got {path}, which exists; write {flag} {free} "
            "or, to replace it, --force"
        )


def _same(path: Path, other: Path) -> bool:
    return path.is_file() and other.is_file() and path.samefile(other)


def _flag(param: Any) -> str:
    """An option as it is typed, an argument as the help shows it."""
    name: str = max(param.opts, key=len)
    return name if name.startswith("-") else name.upper()


@cache
def _flattened(group: Any) -> tuple[Parameter, ...]:
    """The fields of a group of options as parameters of a command."""
    parameters = []
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        hint = hints[field.name]
        (declared,) = hint.__metadata__
        if isinstance(declared, OptionInfo):
            declared = copy(declared)
            declared.rich_help_panel = group.panel
        default = Parameter.empty if field.default is MISSING else field.default
        parameters.append(_parameter(field.name, Annotated[hint.__origin__, declared], default))
    return tuple(parameters)


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
