"""Runs of a study on file, one JSON object a line."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path


def append(path: Path | None, runs: Iterable[dict]) -> None:
    """Add runs at the end of a file; nothing without one."""
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps(run) + "\n" for run in runs)


def read(paths: Iterable[Path]) -> list[dict]:
    """All runs of some files.

    Raises:
        SystemExit: no such file, or one that holds no runs.
    """
    try:
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--read: {error}; write a file that --output of a run has made"
        ) from error


def grouped(runs: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Runs with the same values of some keys together, in the order of their first."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for run in runs:
        groups[tuple(run.get(key) for key in keys)].append(run)
    return groups
