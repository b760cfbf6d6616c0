"""A mode that names every tensor which the library makes without saying on which device.

On a machine without an accelerator a tensor that lands on the CPU by default does no harm, so no
other test sees it.  Inside :class:`Devices` every call of a factory (``torch.zeros``, ``eye``,
``arange``, ``tensor``, …) from a file of the library is looked at: one without ``device=`` is noted
with its file and line.  Allowed are only

- draws from a generator of the CPU, which give the same numbers on every machine and are moved at
  once (``generator=`` is what says so);
- the lines of :data:`ALLOWED`, each with its reason.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[2]
ROOMS = tuple(str(ROOT / room) + "/" for room in ("rgap", "analysis", "solvers"))

FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace", "tensor",
        "as_tensor", "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices",
    )
)  # fmt: skip

READ = "a network is read on the CPU, its chain is moved as a whole afterwards"
ALLOWED: dict[tuple[str, str], str] = {
    ("rgap/network/probing.py", "rearrangement"): READ,
    ("rgap/network/probing.py", "fitting"): READ,
    ("rgap/network/probing.py", "linear_function"): READ,
    ("rgap/network/pooling.py", "Opaque.__init__"): READ,
    ("rgap/network/pooling.py", "LinearMap.__init__"): READ,
    ("rgap/network/pooling.py", "LinearMap._pseudo_inverse"): READ,
    ("rgap/network/activations/piecewise.py", "LeakyReLU.__init__"): READ,
}
"""(file, function) → why a tensor is made on the CPU there."""


class Devices(TorchFunctionMode):
    """Notes factories that are called without a device.

    Attributes:
        found: ``file:line (function)`` of each, with the factory.
        looked: factories that were called from the library in all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.looked = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The call itself, looked at on the way."""
        kwargs = kwargs or {}
        if func in FACTORIES:
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frame = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(str(ROOT)):
            if "/torch/" not in frame.f_code.co_filename:
                return  # called by another library
            frame = frame.f_back  # type: ignore[assignment]
        if frame is None or not frame.f_code.co_filename.startswith(ROOMS):
            return
        self.looked += 1
        stated = kwargs.get("device") is not None or kwargs.get("generator") is not None
        if stated or (func is torch.as_tensor and args and isinstance(args[0], torch.Tensor)):
            return
        place = frame.f_code.co_filename.removeprefix(str(ROOT) + "/")
        name = frame.f_code.co_qualname.replace("<locals>.", "")
        if (place, name) not in ALLOWED:
            self.found.add(f"{place}:{frame.f_lineno} ({name}): torch.{func.__name__}")
