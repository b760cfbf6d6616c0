"""Random combinations of the equations of a softmax head, and their slope where they hold.

A thousand classes give far more equations than a batch has unknowns: some combinations of them
are as good.  At a sample the probabilities are ``p = y + U a``, y the target, so that the slope of
the combinations is linear in a few numbers a, and its parts are computed once for all starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PER_UNKNOWN = 1.5  # combinations for each unknown
FEWEST = 12  # combinations at least
WORTH = 3  # equations for each unknown from which on combining them pays
HELD = 0.3  # ‖(I − UUᵀ)(p − y)‖/‖p‖ below which the slope is that of a sample
SEED = 2011


@dataclass(frozen=True)
class Sketch:
    """Ωᵀ(p − y) for orthonormal Ω beside the range of G, and its slope along some directions N.

    Attributes:
        rows: Ω, [C, r], scaled so that ``‖Ωᵀf‖² ≈ ‖(I − UUᵀ) f‖²``.
        basis: U, [C, R].
        matrix: M N, [C, n].
        parts: ``Ωᵀ diag(u_i) M N`` of every column u_i of U, [R, r, n].
        uniform: ``Ωᵀ M N / C``, [r, n].
        directions: N, [R, n].
    """

    rows: Tensor
    basis: Tensor
    matrix: Tensor
    parts: Tensor
    uniform: Tensor
    directions: Tensor

    @classmethod
    def of(cls, basis: Tensor, matrix: Tensor) -> Sketch | None:
        """Of a head's U and M = W V, or None where all equations are hardly more; N = I."""
        classes, rank = basis.shape
        equations, count = classes - rank - 1, int(PER_UNKNOWN * rank)
        if equations < WORTH * rank:
            return None
        generator = torch.Generator().manual_seed(SEED)
        draw = torch.randn(classes, count, generator=generator, dtype=torch.float64).to(basis)
        draw = draw - draw.mean(0)  # the entries of p − y sum to 0
        draw = torch.linalg.qr(draw - basis @ (basis.T @ draw)).Q
        draw = draw - basis @ (basis.T @ draw)
        rows = draw * (equations / count) ** 0.5
        parts = torch.stack([(rows.T * u) @ matrix for u in basis.T])
        return cls(
            rows,
            basis,
            matrix,
            parts,
            rows.T @ matrix / classes,
            torch.eye(rank, dtype=basis.dtype, device=basis.device),
        )

    def within(self, directions: Tensor) -> Sketch:
        """The same along fewer directions N, [R, n], with as many fewer combinations."""
        full, few = self.rows.shape[1], int(PER_UNKNOWN * (directions.shape[1] + 1))
        few = min(full, max(few, FEWEST))
        scale = (full / few) ** 0.5
        return replace(
            self,
            rows=scale * self.rows[:, :few],
            matrix=self.matrix @ directions,
            parts=(scale * self.parts[:, :few]) @ directions,
            uniform=scale * self.uniform[:few] @ directions,
            directions=directions,
        )

    def slope(self, p: Tensor, target: Tensor) -> Tensor:
        """``Ωᵀ (diag p − ppᵀ) M N``, [S, r, n]; exact at a sample.

        Args:
            p: probabilities, [S, C].
            target: y, [S, C].
        """
        gap = p - target
        share = gap @ self.basis
        missed = (gap - share @ self.basis.T).norm(dim=1)
        out = (share @ self.parts.flatten(1)).reshape(len(p), *self.uniform.shape)
        self._add_target(out, target)
        for start in (missed >= HELD * p.norm(dim=1)).nonzero().flatten().tolist():
            out[start] = (self.rows * p[start, :, None]).T @ self.matrix
        return out.baddbmm_(-(p @ self.rows)[:, :, None], (p @ self.matrix)[:, None, :])

    def _add_target(self, turned: Tensor, target: Tensor) -> None:
        """Add ``Ωᵀ diag(y) M N``: a target is one entry above a constant, [S, r, n]."""
        classes = target.shape[1]
        top, label = target.max(1)
        rest = (1.0 - top) * classes / max(classes - 1, 1)  # C times the constant
        peak = top - rest / classes
        turned.baddbmm_((peak[:, None] * self.rows[label])[:, :, None], self.matrix[label][:, None])
        if bool((rest != 0).any()):
            turned += rest[:, None, None] * self.uniform
