"""Custom autograd functions: what their forward computes is not what their backward differentiates.

A gradient-reversal layer is the identity forwards and −λ backwards.  A graph of the forward alone
would show the identity, so calls of such a function are kept whole: no equation follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function

__all__ = ["CustomFunction", "kept_whole"]

REASON = "is a custom autograd function: its derivative is its own, not that of its forward"


@dataclass(frozen=True)
class CustomFunction:
    """A call of ``function.apply`` as a graph names it."""

    function: type[Function]

    @property
    def __name__(self) -> str:
        """Name of the class."""
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forwards and backwards as the class says."""
        return self.function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def kept_whole(call: Callable[[CustomFunction, Any, Any], Any]) -> Iterator[None]:
    """Hand every call of a custom function to ``call(function, args, kwargs)``.

    PyTorch's own are left alone: of a checkpoint the derivative is that of its forward.  Caught is
    what ``Function.apply`` calls, for ``reverse = Reversal.apply`` may have been bound before.
    """
    beneath: Any = Function.__mro__[1]  # where ``super()`` of ``Function.apply`` looks first

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.split(".")[0] == torch.__name__:
            return super(beneath, cls).apply(*args, **kwargs)
        del beneath.apply
        try:
            return call(CustomFunction(cls), args, kwargs)
        finally:
            beneath.apply = patched

    patched = classmethod(apply)
    beneath.apply = patched
    try:
        yield
    finally:
        del beneath.apply
