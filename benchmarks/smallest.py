"""The smallest case of every script, a row each; exit status 1 if one fails.

    python -m benchmarks.smallest                             all of them
    python -m benchmarks.smallest studies timing.dense        a folder, and a script

Each runs as ``python -m benchmarks.NAME --smallest`` in a process of its own, with one thread.
``cpu s``: processor time of it and of what it started; ``GiB``: the largest resident memory of any
of these processes.  What a failed script said last is printed below its row.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common.arguments import Arguments
from benchmarks.common.measuring import GIB, ROOT

HERE = Path(__file__).resolve().parent
LIMIT = 900  # seconds by the clock
SAID = 15  # last lines of a failed script


def scripts() -> list[str]:
    """Names of all scripts but this one, without ``benchmarks.``: files that can be run.

    >>> "studies.batches" in scripts()
    True
    """
    files = (file for file in HERE.glob("**/*.py") if file.name != "smallest.py")
    return sorted(
        ".".join(file.relative_to(HERE).with_suffix("").parts)
        for file in files
        if '\nif __name__ == "__main__":' in file.read_text(encoding="utf-8")
    )


def chosen(words: Iterable[str]) -> list[str]:
    """Scripts of these names or in these folders, all without a name."""
    wanted = tuple(words)
    return [s for s in scripts() if not wanted or s in wanted or s.split(".")[0] in wanted]


def run(name: str, limit: float) -> tuple[int, float, float, str]:
    """Exit status, CPU seconds, GiB and the output of the smallest case of a script."""
    words = [sys.executable, "-m", f"benchmarks.{name}", "--smallest"]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, cwd=ROOT, env=one, stdout=said, stderr=subprocess.STDOUT)
        late = threading.Timer(limit, process.kill)
        late.start()
        _, status, used = os.wait4(process.pid, 0)
        late.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        process.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss * unit / GIB, text
    )  # fmt: skip


def main() -> int:
    """Run them, print the table."""
    parser = Arguments(__doc__, names=["cut_photographs"])
    parser.add_argument("names", nargs="*", help="scripts and folders, all of them without")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that one may take")
    options = parser.parse_args()
    names = chosen(options.names)
    if not names:
        parser.error(f"expected names among {', '.join(scripts())}, got {options.names}")
    failed = []
    print("| script | ends with | cpu s | GiB |\n|---|---|---|---|", flush=True)
    for name in names:
        status, seconds, memory, text = run(name, options.limit)
        print(f"| {name} | {status} | {seconds:.1f} | {memory:.2f} |", flush=True)
        if status:
            failed.append(name)
            print("\n".join(text.splitlines()[-SAID:]), flush=True)
    print(f"\n{len(names)} scripts, {len(failed)} failed{': ' * bool(failed)}{', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
