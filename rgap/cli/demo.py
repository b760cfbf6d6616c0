"""``rgap demo``: photographs recovered, and where that stops."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rgap.cli.command import command, refuse_existing
from rgap.cli.console import print_json, stderr, stdout
from rgap.cli.options import Force, Json, Seed

__all__ = ["demo"]


@command
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the figures.", metavar="FOLDER")] = Path(
        "demo"
    ),
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
) -> int:
    """See it work: recover photographs, see where it stops and why (two minutes).

    Exits with 1 if a picture that was attacked alone is not certified.
    """
    from rgap.report.demo import FILES, run
    from rgap.report.story import tell

    for name in FILES:
        refuse_existing("--output", output / name, output.with_name(f"{output.name}-2"), force)
    result = run(output, seed=seed, console=stderr())
    if as_json:
        print_json(result.summary())
    else:
        stdout().print(tell(result))
    return 0 if result.certified else 1
