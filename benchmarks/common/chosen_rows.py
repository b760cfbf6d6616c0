"""What the scripts of several rows have in common: the names on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Collection


def chosen_rows(description: str, rows: Collection[str]) -> list[str]:
    """The rows named on the command line, all of them if none is.

    Args:
        description: docstring of the script, whose first line is shown by ``--help``.
        rows: the names that there are.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=list(rows), help=f"of {', '.join(rows)}")
    chosen: list[str] = parser.parse_args().rows
    unknown = set(chosen) - set(rows)
    if unknown:
        parser.error(f"expected rows among {list(rows)}, got {sorted(unknown)}")
    return chosen
