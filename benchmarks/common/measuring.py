"""Time and memory of this process; imports nothing that would show in either."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def peak() -> int:
    """Highest resident memory of this process so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Stopwatch:
    """Seconds of a block: ``wall`` by a clock, ``cpu`` of all threads of this process.

    >>> with Stopwatch() as watch:
    ...     total = sum(range(1000))
    >>> watch.wall > 0 and watch.cpu >= 0
    True
    """

    def __enter__(self) -> Stopwatch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._wall
        self.cpu = time.process_time() - self._cpu


def run_script(
    name: str, words: Sequence[object], **options: object
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m NAME WORDS`` in a process of its own, from the root of the repository.

    Args:
        name: of the script's module.
        words: on its command line.
        **options: of :func:`subprocess.run`.
    """
    command = [sys.executable, "-m", name, *map(str, words)]
    return subprocess.run(command, **({"cwd": ROOT, "check": False, "text": True} | options))  # type: ignore[call-overload]
