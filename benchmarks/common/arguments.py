"""The command line of a script: help from its docstring, its smallest case, common options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any


class Arguments(argparse.ArgumentParser):
    """Arguments of one script.

    ``--smallest`` stands for the options of its smallest case, which ``--help`` writes out; options
    that are given beside it win.

    Args:
        doc: docstring of the script, shown whole.
        **smallest: values of options in the smallest case.
    """

    def __init__(self, doc: str | None, **smallest: Any) -> None:
        name = getattr(sys.modules["__main__"].__spec__, "name", None)
        super().__init__(
            prog=f"python -m {name}" if name else None,
            description=(doc or "").strip(),
            formatter_class=_Help,
        )
        self.smallest, self._result = smallest, ""
        self._flag = self.add_argument("--smallest", action="store_true")

    def several(
        self, option: str, names: Collection[Any], what: str, default: Sequence[Any] | None = None
    ) -> None:
        """An option that takes some of several names; all of them where nothing else is said.

        Args:
            option: such as ``--networks``.
            names: what it may be given, all of one type.
            what: they are, for the help.
            default: of them.
        """
        self.add_argument(
            option, nargs="+", type=type(next(iter(names))), choices=list(names), metavar="NAME",
            default=list(default or names), help=f"{what}: {', '.join(map(str, names))}",
        )  # fmt: skip

    def rows(self, names: Collection[Any], default: Sequence[Any] | None = None) -> None:
        """``--rows``: of the table."""
        self.several("--rows", names, "of the table", default)

    def dtypes(self, *default: str) -> None:
        """``--dtypes``: in which the client computes."""
        self.several("--dtypes", ("float64", "float32"), "in which the client computes", default)

    def output(self) -> None:
        """``--output``: where runs are added, a JSON line each."""
        self.add_argument("--output", type=Path, help="append every run as a JSON line")

    def result(self, what: str) -> None:
        """``--output``: the file that the script is run for; the smallest case may leave it out."""
        self._result = f"--output FILE, of {what}"
        self.add_argument("--output", type=Path, metavar="FILE", help=f"of {what}")

    def read(self) -> None:
        """``--read``: runs of earlier calls instead of new ones."""
        self.add_argument(
            "--read", nargs="+", type=Path, metavar="FILE",
            help="runs of earlier calls (their --output); nothing is run",
        )  # fmt: skip

    def figure(self, what: str) -> None:
        """``--figure``: where to draw."""
        self.add_argument("--figure", type=Path, help=f"draw {what} to this file")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Options, with those of the smallest case where it is asked for."""
        actions = {action.dest: action for action in self._actions}
        if unknown := self.smallest.keys() - actions.keys():
            raise ValueError(f"smallest: expected options of the script, got {sorted(unknown)}")
        words = " ".join(_written(actions[name], value) for name, value in self.smallest.items())
        self._flag.help = f"the smallest case: {words}"
        told = super().parse_args(args)
        if told.smallest:
            self.set_defaults(**self.smallest)
            told = super().parse_args(args)
        elif self._result and told.output is None:
            self.error(f"expected {self._result}; without it what is learned would be lost")
        return told


def _written(action: argparse.Action, value: object) -> str:
    """An option as on the command line."""
    values = [] if value is True else value if isinstance(value, list) else [value]
    quoted = (f'"{v}"' if " " in str(v) else str(v) for v in values)
    return " ".join([*action.option_strings[:1], *quoted])


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are, and defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        several = isinstance(action.default, list | tuple | range)
        said = action.default in (None, "", list(action.choices or ()))
        if said or action.nargs in (0, "*") or (several and len(action.default) > 8):
            return action.help
        shown = " ".join(map(str, action.default)) if several else action.default
        return f"{action.help or ''} (default: {shown})"
