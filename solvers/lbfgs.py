"""L-BFGS on a tensor for a stated number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf, isfinite

import torch
from torch import Tensor

__all__ = ["HISTORY", "lbfgs", "lowered", "stepped"]

HISTORY = 30  # pairs of steps that the curvature is known by


def lbfgs(x: Tensor, steps: int) -> torch.optim.LBFGS:
    """L-BFGS on x that ends after so many steps, not before."""
    return torch.optim.LBFGS(
        [x], max_iter=steps, history_size=HISTORY, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip


class _LeftError(Exception):
    """A step is left in the middle: the time is up, or the function is no number there."""


def lowered(
    x: Tensor, steps: int, function: Callable[[Tensor], Tensor], deadline: float = inf
) -> Tensor:
    """Where steps of L-BFGS on a function lead from x.

    Args:
        x: where they begin.
        steps: how many.
        function: of x, to one number, with its graph.
        deadline: of ``time.perf_counter``, after which the function is not called again; where it
            cuts a step, and where the function or its slope is not finite, the way ends at the
            lowest point so far.

    >>> x = torch.tensor([3.0, -2.0], dtype=torch.float64)
    >>> least = lowered(x, 20, lambda x: (x - 1.0).square().sum())
    >>> [f"{entry:.3f}" for entry in least.tolist()]
    ['1.000', '1.000']
    """
    x = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    best, lowest = x.detach().clone(), inf

    def closure() -> Tensor:
        nonlocal best, lowest
        with torch.enable_grad():
            value = function(x)
            (x.grad,) = torch.autograd.grad(value, x)
        value = value.detach()
        if not (isfinite(float(value)) and bool(torch.isfinite(x.grad).all())):
            raise _LeftError
        if float(value) < lowest:
            best, lowest = x.detach().clone(), float(value)
        return value

    ended = stepped(lbfgs(x, steps), closure, deadline)
    return x.detach() if ended else best


def stepped(optimiser: torch.optim.LBFGS, closure: Callable[[], Tensor], deadline: float) -> bool:
    """One call of an optimiser, which ends where it is once the time is up: False then.

    Args:
        optimiser: of :func:`lbfgs`.
        closure: the function, which leaves its gradient at x.
        deadline: of ``time.perf_counter``, after which the function is not called again.
    """

    def timely() -> Tensor:
        if time.perf_counter() > deadline:
            raise _LeftError
        return closure()

    try:
        optimiser.step(timely)  # type: ignore[no-untyped-call]
    except _LeftError:
        return False
    return True
