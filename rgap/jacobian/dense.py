"""Σ^{-1/2} J as a table, by QR: what the normal equations would lose half the digits of.

The columns of free cotangents come first, so that the last block R₂₂ of the triangle is what fixes
x once they are eliminated.  Every column is brought to length one, which no QR minds and which
makes σ_min say what is lost: entries of J round by eps each, relative to their column.
"""

from __future__ import annotations

from functools import cached_property
from math import inf
from typing import TypeVar

import torch
from torch import Tensor

from rgap.jacobian.layer import ParameterRows
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.weights import Fit
from rgap.limits import CANCELLED
from rgap.solvers.tall import tall_qr

F = TypeVar("F", bound=Fit)


class Dense:
    """Σ^{-1/2} J = Q R.

    Args:
        point: the update linearised.
        weights: Σ^{-1/2}, by parameter name.
        free: the entries of κ [R, C] are unknowns too.
        held: entries of x that are no unknowns, as no layer reads them; bool, of the shape of x.
    """

    def __init__(
        self,
        point: Linearisation,
        weights: ParameterRows,
        free: bool = False,
        held: Tensor | None = None,
    ) -> None:
        self.point, self.weights = point, weights
        self.first = point.kappa.numel() if free else 0
        parts = [self._table(point.jvp(_eye(point.x)))]
        if free:
            parts.insert(0, self._table(point.jvp(None, _eye(point.kappa))))
        table = torch.cat(parts, 1)
        size = torch.linalg.vector_norm(table, dim=0)
        self.sought = torch.ones_like(size, dtype=torch.bool)
        if held is not None:
            self.sought[self.first :] = ~held.flatten() | (size[self.first :] > 0)
        self.size = size[self.sought].clamp_min(1e-300)
        self.basis, self.upper = tall_qr(table[:, self.sought] / self.size)

    @staticmethod
    def entries(point: Linearisation, free: bool = False) -> int:
        """Of J: a row for every number of the update."""
        rows = sum(node.stage.affine.weight.numel() for node in point.nodes)
        return rows * (point.x.numel() + (point.kappa.numel() if free else 0))

    def _table(self, rows: ParameterRows) -> Tensor:
        """Weighed updates as columns, [rows, S]."""
        return torch.cat([(rows[n] * self.weights[n]).flatten(1) for n in sorted(rows)], 1).T

    @cached_property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular triplets of R whose direction rounding does not empty: U, values, Vᵀ."""
        if not bool(self.upper.isfinite().all()):
            return self.upper[:, :0], self.upper[0, :0], self.upper[:0]
        u, values, vt = torch.linalg.svd(self.upper)
        rounding = torch.finfo(values.dtype).eps * len(values) ** 0.5
        above = values > CANCELLED * rounding * values[0]
        return u[:, above], values[above], vt[above]

    def stepped(self, at: F) -> tuple[F, float, Tensor]:
        """One Gauss–Newton step; without its weakest directions where with them none descends.

        A direction that rounding all but empties takes a step longer than its slope is good for.

        Returns:
            The point, the share of the whole step that was taken, and that step of x.
        """
        solved = self.solve(at.left)
        moved, share = at.shortened(*solved)
        if not share:
            floor = torch.finfo(self.upper.dtype).eps ** 0.5  # what normal equations would lose
            moved = at.shortened(*self.solve(at.left, floor))[0]
        return moved, share, solved[0]

    @property
    def lost(self) -> bool:
        """Rounding empties a direction: nothing says how well it is known, nor how far to go."""
        return len(self.kept[1]) < len(self.upper)

    def solve(self, rows: ParameterRows, floor: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """J⁺ r of S updates, on x and, where they are free, on κ.

        Args:
            rows: by parameter name, [S, *parameter.shape].
            floor: σ/σ₁ of directions that stay where they are, beside those that are lost.
        """
        rhs = self.basis.T @ self._table(rows)
        if self.lost or floor:
            u, values, vt = self.kept
            above = values > floor * values[:1]
            u, values, vt = u[:, above], values[above], vt[above]
            out = (vt.T @ (u.T @ rhs / values[:, None])).T
        else:
            out = torch.linalg.solve_triangular(self.upper, rhs, upper=True).T
        found, out = out / self.size, rhs.new_zeros(rhs.shape[1], len(self.sought))
        out[:, self.sought] = found
        x = out[:, self.first :].reshape(-1, *self.point.x.shape)
        if not self.first:
            return x, None
        return x, out[:, : self.first].reshape(-1, *self.point.kappa.shape)

    def worst(self) -> float:
        """Standard error of the direction of x that is fixed least; infinite where one is lost."""
        if self.lost:
            return inf
        last = self.upper[self.first :, self.first :] * self.size[self.first :]
        return 1.0 / float(torch.linalg.svdvals(last)[-1])


def _eye(like: Tensor) -> Tensor:
    """Every entry's own direction, [n, *like.shape]."""
    size = like.numel()
    return torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *like.shape)
