"""Every run of the suite draws the same examples, and a failing one prints how to repeat it.

A test marked ``cases(n)`` runs n of its parameter sets, always the same ones, and one marked
``long`` none; ``make everycase``, or a test named by its id, runs all of them.
"""

from __future__ import annotations

from collections import defaultdict
from zlib import crc32

import pytest
from hypothesis import settings

settings.register_profile("rgap", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("rgap")

EVERY = "--every-case"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(EVERY, action="store_true", help="run every case of every test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption(EVERY) or any("::" in arg for arg in config.args):
        return
    left_out = {item.nodeid for item in items if item.get_closest_marker("long")}
    drawn = defaultdict[tuple[str, int], list[str]](list)
    for item in items:
        if mark := item.get_closest_marker("cases"):
            drawn[item.nodeid.partition("[")[0], mark.args[0]].append(item.nodeid)
    for (_, count), cases in drawn.items():
        # By a digest of the name: a stride would keep one value of a parameter throughout.
        left_out.update(sorted(cases, key=lambda name: crc32(name.encode()))[count:])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]
