"""L-BFGS on a tensor for a stated number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from math import inf

import torch
from torch import Tensor

__all__ = ["HISTORY", "lbfgs", "lowered"]

HISTORY = 30  # pairs of steps that the curvature is known by


def lbfgs(x: Tensor, steps: int) -> torch.optim.LBFGS:
    """L-BFGS on x that ends after so many steps, not before."""
    return torch.optim.LBFGS(
        [x], max_iter=steps, history_size=HISTORY, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip


class _LateError(Exception):
    """The time is up in the middle of a step."""


def lowered(
    x: Tensor, steps: int, function: Callable[[Tensor], Tensor], deadline: float = inf
) -> Tensor:
    """Where steps of L-BFGS on a function lead from x.

    Args:
        x: where they begin.
        steps: how many.
        function: of x, to one number, with its graph.
        deadline: of ``time.perf_counter``, after which the function is not called again.

    >>> x = torch.tensor([3.0, -2.0], dtype=torch.float64)
    >>> least = lowered(x, 20, lambda x: (x - 1.0).square().sum())
    >>> [f"{entry:.3f}" for entry in least.tolist()]
    ['1.000', '1.000']
    """
    x = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    optimiser = lbfgs(x, steps)

    def closure() -> Tensor:
        if time.perf_counter() > deadline:
            raise _LateError
        with torch.enable_grad():
            value = function(x)
            (x.grad,) = torch.autograd.grad(value, x)
        return value.detach()

    with suppress(_LateError):
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return x.detach()
