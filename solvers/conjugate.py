"""Least squares by conjugate gradients for many right-hand sides at once, on products alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Iterates:
    """Outcome of :func:`cgls`.

    Attributes:
        x: solutions [S, ...].
        iterations: done.
        converged: True if all of them reached the tolerance, or were enough.
    """

    x: Tensor
    iterations: int
    converged: bool


def cgls(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    rhs: Tensor,
    limit: int = 500,
    tolerance: float = 1e-8,
    balance: Tensor | None = None,
    enough: Callable[[Tensor], bool] | None = None,
) -> Iterates:
    """Least-squares solutions of least norm for S right-hand sides.

    Stopped early it has fitted the directions of large singular values and left the others at
    zero, so ``‖x‖`` grows with every iteration and ends at that of the solution.  With a balance D
    that is so of ``D^½ x``, as if the columns of A were divided by ``D^½``: with D near the squares
    of their lengths it takes fewer iterations.

    Args:
        apply: ``A x``, [S, ...] → [S, m].
        adjoint: ``Aᵀ y``, [S, m] → [S, ...].
        rhs: [S, m].
        limit: iterations at most.
        tolerance: of ``‖Aᵀ r‖`` over ``‖Aᵀ b‖``, at which it stops; with a balance of
            ``‖D^{-½} Aᵀ r‖``.
        balance: D > 0, of the shape of one x.
        enough: tells of the x so far that they will do.

    Returns:
        The :class:`Iterates`.

    Source: Hestenes and Stiefel (1952), in the form of Björck (1996).  Corresponds to
    ``scipy.sparse.linalg.lsqr``, one vector at a time.

    >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]).double()
    >>> b = torch.tensor([[1.0, 2.0, 3.0]]).double()
    >>> found = cgls(lambda x: x @ a.T, lambda y: y @ a, b)
    >>> bool(torch.allclose(found.x[0], torch.linalg.lstsq(a, b.T).solution[:, 0]))
    True
    """
    residual = rhs.clone()
    slope = adjoint(residual)
    x = torch.zeros_like(slope)
    descent = slope if balance is None else slope / balance
    direction, size = descent.clone(), dots(slope, descent)
    first = size.clone()
    for iteration in range(limit):
        if bool((size <= tolerance**2 * first).all()) or (enough is not None and enough(x)):
            return Iterates(x, iteration, True)
        image = apply(direction)
        step = size / dots(image, image).clamp_min(1e-300)
        x = x + times(step, direction)
        residual = residual - times(step, image)
        slope = adjoint(residual)
        descent = slope if balance is None else slope / balance
        fresh = dots(slope, descent)
        direction = descent + times(fresh / size.clamp_min(1e-300), direction)
        size = fresh
    return Iterates(x, limit, bool((size <= tolerance**2 * first).all()))


def dots(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each of S tensors, [S, ...] → [S]."""
    return (a.flatten(1) * b.flatten(1)).sum(1)


def times(factor: Tensor, x: Tensor) -> Tensor:
    """Each of S tensors times its own factor, [S] and [S, ...]."""
    return x * factor.reshape(-1, *([1] * (x.ndim - 1)))
