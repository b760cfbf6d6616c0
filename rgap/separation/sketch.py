"""Random combinations of the equations of a softmax head, and their slope where they hold.

A thousand classes give far more equations than a batch has unknowns: some combinations of them
are as good.  At a sample the probabilities are ``p = y + U a``, y the target, so that the slope of
the combinations is linear in a few numbers a, and its parts are computed once for all starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PER_UNKNOWN = 2  # combinations for each unknown
WORTH = 3  # equations for each unknown from which on combining them pays
HELD = 0.3  # ‖(I − UUᵀ)(p − y)‖/‖p‖ below which the slope is that of a sample
SEED = 2011


@dataclass(frozen=True)
class Sketch:
    """Ωᵀ(p − y) for orthonormal Ω beside the range of G.

    Attributes:
        rows: Ω, [C, r], scaled so that ``‖Ωᵀf‖² ≈ ‖(I − UUᵀ) f‖²``.
        basis: U, [C, R].
        matrix: M, [C, R].
        parts: ``Ωᵀ diag(u_i) M`` of every column u_i of U, [R, r·R].
        uniform: ``Ωᵀ M / C``, [r, R].
    """

    rows: Tensor
    basis: Tensor
    matrix: Tensor
    parts: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, basis: Tensor, matrix: Tensor) -> Sketch | None:
        """Of a head's U and M = W V, or None where all equations are hardly more."""
        classes, rank = basis.shape
        equations, count = classes - rank - 1, PER_UNKNOWN * rank
        if equations < WORTH * rank:
            return None
        generator = torch.Generator().manual_seed(SEED)
        draw = torch.randn(classes, count, generator=generator, dtype=torch.float64).to(basis)
        draw = draw - draw.mean(0)  # the entries of p − y sum to 0
        draw = torch.linalg.qr(draw - basis @ (basis.T @ draw)).Q
        draw = draw - basis @ (basis.T @ draw)
        rows = draw * (equations / count) ** 0.5
        parts = torch.stack([(rows.T * u) @ matrix for u in basis.T])
        return cls(rows, basis, matrix, parts.flatten(1), rows.T @ matrix / classes)

    def slope(self, p: Tensor, target: Tensor, along: Tensor) -> Tensor:
        """``Ωᵀ (diag p − ppᵀ) M along``, [S, r, n]; exact at a sample.

        Args:
            p: probabilities, [S, C].
            target: y, [S, C].
            along: [R, n].
        """
        gap = p - target
        share = gap @ self.basis
        missed = (gap - share @ self.basis.T).norm(dim=1)
        known = missed < HELD * p.norm(dim=1)
        count = self.rows.shape[1]
        out = p.new_empty(len(p), count, along.shape[1])
        inside = known.nonzero().flatten()
        if len(inside):
            turned = (share[inside] @ self.parts).reshape(len(inside), count, -1)
            turned += self._of_target(target[inside])
            out[inside] = turned @ along
        beside = (~known).nonzero().flatten()
        if len(beside):
            weighed = self.rows.T * p[beside][:, None, :]
            out[beside] = weighed @ (self.matrix @ along)
        out -= (p @ self.rows)[:, :, None] * (p @ (self.matrix @ along))[:, None, :]
        return out

    def _of_target(self, target: Tensor) -> Tensor:
        """``Ωᵀ diag(y) M``: a target is one entry above a constant, [S, r, R]."""
        classes = target.shape[1]
        top, label = target.max(1)
        rest = (1.0 - top) * classes / max(classes - 1, 1)  # C times the constant
        peak = (top - rest / classes)[:, None, None]
        own = self.rows[label][:, :, None] * self.matrix[label][:, None, :]
        found: Tensor = peak * own + rest[:, None, None] * self.uniform
        return found
