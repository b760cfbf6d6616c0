"""Scripts that measure, each run as ``python -m benchmarks.FOLDER.NAME``; README.md lists them."""

from __future__ import annotations

import sys
from pathlib import Path

# What a sweep runs at length, the tests run in part: layers, steps and idioms are drawn there.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/support"))
