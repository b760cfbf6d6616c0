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
        self.smallest = smallest
        words = " ".join(_written(*pair) for pair in smallest.items()) or "all of it"
        self.add_argument("--smallest", action="store_true", help=f"the smallest case: {words}")

    def rows(self, names: Collection[Any], default: Collection[Any] | None = None) -> None:
        """``--rows``: of the table, all of them where nothing else is said."""
        self.add_argument(
            "--rows", nargs="+", type=type(next(iter(names))), choices=list(names),
            default=list(names if default is None else default), metavar="ROW",
            help=f"of {', '.join(map(str, names))}",
        )  # fmt: skip

    def dtypes(self, *default: str) -> None:
        """``--dtypes``: in which the client computes."""
        known = ("float64", "float32")
        self.add_argument(
            "--dtypes", nargs="+", default=default or known, choices=known,
            help="in which the client computes",
        )  # fmt: skip

    def output(self) -> None:
        """``--output``: where runs are added, a JSON line each."""
        self.add_argument("--output", type=Path, help="append every run as a JSON line")

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
        unknown = self.smallest.keys() - {action.dest for action in self._actions}
        if unknown:
            raise ValueError(f"smallest: expected options of the script, got {sorted(unknown)}")
        told = super().parse_args(args)
        if told.smallest:
            self.set_defaults(**self.smallest)
            told = super().parse_args(args)
        return told


def _written(name: str, value: object) -> str:
    """An option as on the command line."""
    option = "--" + name.replace("_", "-")
    if value is True:
        return option
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join([option, *(f'"{v}"' if " " in str(v) else str(v) for v in values)])


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are, and defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.option_strings and action.nargs != 0 and action.default is not None
        several = isinstance(action.default, list | tuple)
        if not plain or "default" in (action.help or "") or (several and len(action.default) > 4):
            return action.help
        shown = " ".join(map(str, action.default)) if several else action.default
        return f"{action.help or ''} (default: {shown})".strip().replace("%", "%%")
