"""J v and Jᵀ y of a function whose graph is at hand, by reverse passes alone.

For ``r = r(x)`` a reverse pass is ``w(y) = Jᵀ y``; w is linear in y, so a reverse pass through the
graph of w is ``J v = ∂⟨w(y), v⟩/∂y`` (double backward; no forward derivative is needed).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLUMN = 2  # what a column of the Jacobian costs, in rows
FORMED = 320  # unknowns up to which the Jacobian is formed: one batched pass costs less than CG


class GraphProducts:
    """The value and the Jacobian products of a function at one x.

    Args:
        function: r(x) [m], as part of the graph of x.
        x: where; any shape of n entries.

    >>> at = GraphProducts(lambda x: torch.stack([x[0] * x[1], x[0].square()]), torch.ones(2))
    >>> at.residual, at.pull(torch.ones(2)), at.push(torch.tensor([1.0, 0.0]))
    (tensor([1., 1.]), tensor([3., 1.]), tensor([1., 2.]))
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.enable_grad():
            self._x = x.detach().clone().requires_grad_()
            self._rows = function(self._x)
        self._y = torch.zeros_like(self._rows, requires_grad=True)
        self._pulled: Tensor | None = None

    @property
    def residual(self) -> Tensor:
        """r(x), [m]."""
        return self._rows.detach()

    def pull(self, y: Tensor) -> Tensor:
        """Jᵀ y for y [m], in the shape of x."""
        return _reverse(self._rows, self._x, y)

    def pulls(self, ys: Tensor) -> Tensor:
        """Jᵀ y for every y of ys [S, m], [S, *x.shape]."""
        if not self._rows.requires_grad:
            return ys.new_zeros(len(ys), *self._x.shape)
        return _batched(self._rows, self._x, ys)

    def push(self, v: Tensor) -> Tensor:
        """J v for v in the shape of x, [m]."""
        transposed = self._transposed()
        if not transposed.requires_grad:  # J does not depend on y: it is zero
            return torch.zeros_like(self._rows)
        return _reverse(transposed, self._y, v)

    def jacobian(self) -> Tensor | None:
        """J [m, n], in one batched pass over its rows or its columns; None where it is large."""
        rows, unknowns = len(self._rows), self._x.numel()
        if unknowns > FORMED or rows * unknowns > FORMED * FORMED * 10:
            return None
        narrow = COLUMN * unknowns < rows and self._transposed().requires_grad
        size = unknowns if narrow else rows
        eye = torch.eye(size, dtype=self._rows.dtype, device=self._rows.device)
        if narrow:
            directions = eye.reshape(unknowns, *self._x.shape)
            return _batched(self._transposed(), self._y, directions).T
        return _batched(self._rows, self._x, eye).flatten(1)

    def _transposed(self) -> Tensor:
        """Jᵀ y as part of the graph of y, in which it is linear."""
        if self._pulled is None:
            if not self._rows.requires_grad:
                return torch.zeros_like(self._x)
            self._pulled = torch.autograd.grad(
                self._rows, self._x, self._y, create_graph=True, materialize_grads=True
            )[0]
        return self._pulled


def _reverse(output: Tensor, of: Tensor, direction: Tensor, batched: bool = False) -> Tensor:
    """One reverse pass, or one for every direction at once."""
    answer: Tensor = torch.autograd.grad(
        output, of, direction,
        retain_graph=True, materialize_grads=True, is_grads_batched=batched,
    )[0]  # fmt: skip
    return answer


def _batched(output: Tensor, of: Tensor, directions: Tensor) -> Tensor:
    """A reverse pass for every direction, all at once where every kernel can."""
    try:
        return _reverse(output, of, directions, batched=True)
    except RuntimeError:  # a kernel without a batching rule, such as group norm's second derivative
        return torch.stack([_reverse(output, of, d) for d in directions])
