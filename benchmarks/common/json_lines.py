"""Runs of a study on file, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def append(path: Path | None, runs: Iterable[dict]) -> None:
    """Add runs at the end of a file; nothing without one."""
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps(run) + "\n" for run in runs)


def read(path: Path) -> list[dict]:
    """All runs of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
