"""How much memory there is, and one budget that every large allocation is held against.

``budget`` bytes may be taken on top of what the model and the update occupy already.  Where they
do not suffice, a smaller route is taken if there is one; else :class:`OutOfMemory` says which
layer needs how much, and what to write, before anything is allocated.
"""

from __future__ import annotations

import os
import re
from math import inf
from numbers import Real
from pathlib import Path

import torch
from torch import nn

from rgap import validation

__all__ = [
    "LEAST",
    "OutOfMemory",
    "budget_of",
    "bytes_of",
    "free",
    "require",
    "require_copies",
    "shown",
]

SHARE = 0.5  # of what is free: other processes grow, and an allocator keeps what it gave back
LEAST = 64e6  # bytes that no budget goes below: less than PyTorch takes by itself
FALLBACK = 4e9  # bytes, where the machine does not say what it has

_UNITS = {
    "": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40,
    "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12,
}  # fmt: skip
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


class OutOfMemory(ValueError):  # noqa: N818  (the name that PyTorch gives the same thing)
    """What was asked for needs more than the budget; nothing was allocated for it."""


def bytes_of(text: str, option: str = "--memory-limit") -> float:
    """``4GB``, ``500MB``, ``2GiB`` or a number of bytes.

    Raises:
        ValueError: anything else.

    >>> bytes_of("500MB"), bytes_of("2GiB") == 2 * 2**30
    (500000000.0, True)
    """
    parts = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = None if parts is None else _UNITS.get(parts[2])
    size = 0.0 if parts is None or unit is None else float(parts[1]) * unit
    if not 0 < size < inf:
        raise ValueError(f"{option}: expected a size such as 4GB, 500MB or 2GiB, got {text!r}")
    return size


def shown(size: float) -> str:
    """A size for a sentence.

    >>> shown(1.1e9), shown(6.4e7)
    ('1.1 GB', '64 MB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            amount = size / scale
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{size:.0f} bytes"


def budget_of(memory_budget: float | None, device: torch.device | str = "cpu") -> float:
    """The bytes that may be taken: those stated, else half of what ``device`` has free.

    Args:
        memory_budget: as given by the caller, or None.
        device: whose memory it is.

    Raises:
        TypeError: no number.
        ValueError: below :data:`LEAST`, or not finite.

    >>> budget_of(2e9)
    2000000000.0
    """
    if memory_budget is None:
        return SHARE * free(device)
    given: object = memory_budget  # whatever the caller gave
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(
            f"memory_budget: expected a number of bytes, got {memory_budget!r}; write "
            "memory_budget=4e9, or memory_budget=None for half of what the machine has free"
        )
    if not LEAST <= memory_budget < inf:
        raise ValueError(
            f"memory_budget: expected a finite number of bytes, at least the {shown(LEAST)} that "
            f"PyTorch takes by itself, got {memory_budget:g} bytes; write memory_budget=4e9, or "
            "memory_budget=None for half of what the machine has free"
        )
    return float(memory_budget)


def require(what: str, need: float, budget: float, instead: str = "") -> None:
    """Refuse what does not fit.

    Args:
        what: needs the memory, with the layer's name; the subject of the sentence.
        need: bytes.
        budget: bytes.
        instead: another way out, or "".

    Raises:
        OutOfMemory: ``need`` is more than the budget and more than :data:`LEAST`.

    >>> require("the audit of 'conv1'", 3e9, 1e9)
    Traceback (most recent call last):
    ...
    rgap.machine.memory.OutOfMemory: the audit of 'conv1' needs 3.0 GB, and the budget is ...
    """
    if need <= max(budget, LEAST):
        return
    ask = 1.1 * need
    other = f", or {instead}" if instead else ""
    raise OutOfMemory(
        f"{what} needs {shown(need)}, and the budget is {shown(max(budget, LEAST))}; write "
        f"memory_budget={ask:.1e} where the machine has it{other}"
    )


def require_copies(model: nn.Module, copies: int, budget: float, instead: str = "") -> None:
    """Refuse a model of which so many copies in float64 do not fit.

    Args:
        model: whose parameters are counted.
        copies: that are held at a time.
        budget: bytes.
        instead: as for :func:`require`.

    Raises:
        OutOfMemory: they need more.

    >>> require_copies(nn.Linear(3, 2), 2, 1e9)
    """
    validation.refuse_broken(model)  # a lazy layer has no count
    parameters = sum(p.numel() for p in model.parameters())
    what = "a float64 copy" if copies == 1 else f"{copies} float64 copies"
    words = f"{what} of the {parameters:,} parameters of {type(model).__name__}"
    require(words, 8.0 * copies * parameters, budget, instead)


def free(device: torch.device | str = "cpu") -> float:
    """Bytes that can be taken on ``device`` without anything being killed.

    On the CPU the least of what the kernel calls available and what the limits of every control
    group around this process leave; elsewhere what the driver says.

    >>> free() > 0
    True
    """
    place = torch.device(device)
    if place.type == "cuda":
        return float(torch.cuda.mem_get_info(place)[0])
    limits = [size for size in (_available(), *_control_groups()) if size is not None]
    return max(min(limits), 0.0) if limits else FALLBACK


def _available(path: str = "/proc/meminfo") -> float | None:
    """What the system has free, or half of what it has where it does not say."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _control_groups(membership: str = "/proc/self/cgroup", root: str = "") -> list[float]:
    """What each limit around this process leaves, of either version of control groups."""
    try:
        lines = Path(membership).read_text().splitlines()
    except OSError:
        lines = []
    paths = {"0": "/", "memory": "/"}
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            paths["0"] = path
        elif "memory" in controllers.split(","):
            paths["memory"] = path
    left = []
    for (mount, limit, used), path in zip(_CGROUPS, (paths["0"], paths["memory"]), strict=True):
        own = Path(root + mount) / path.strip("/")
        for folder in (own, *own.parents):
            if len(folder.parts) < len(Path(root + mount).parts):
                break
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                cache = _reclaimable(folder / "memory.stat")
                left.append(most - max(taken - cache, 0.0))
    return left


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _reclaimable(path: Path) -> float:
    """Cache of files, which the kernel gives up before it kills."""
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        sizes = {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2}
    except (OSError, ValueError):
        return 0.0
    return sizes.get("total_inactive_file", sizes.get("inactive_file", 0.0))
