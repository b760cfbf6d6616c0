"""The head's cotangents as unknowns that every step is solved for: variable projection.

Targets that may be any real numbers leave κ free.  At fixed x every gradient is linear in it,
``g = U κ``, so that κ can be eliminated: of an error r of the update, x has to explain only what
``P r = r − U (UᵀΣ⁻¹U)⁻¹ UᵀΣ⁻¹ r`` leaves.

Source: the derivative by projection is that of Golub and Pereyra 1973 without its second term
(Kaufman 1975), which is Gauss–Newton on x and κ together.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

import torch
from torch import Tensor

from rgap.jacobian.layer import ParameterRows
from rgap.jacobian.linearisation import Linearisation
from rgap.solvers.limits import SQUARED
from rgap.solvers.positive import backsolve, cholesky_in_place, smallest_scaled

LARGEST = 4096  # entries of κ up to which UᵀΣ⁻¹U is formed
COLUMNS = 16  # formed at once
GAIN, LEAST = 0.1, 2  # what a pass may leave, and passes at least


@dataclass(frozen=True)
class Eliminated:
    """U at a point, and the factor of its weighted normal matrix.

    Attributes:
        point: the update linearised at a κ that is held.
        weights: 1/σ of the entries of the update, by parameter name, broadcast over each filter.
        lower: Cholesky factor of UᵀΣ⁻¹U, [B·C, B·C].
        passes: of the solve with it: forming it squares the condition, and each gains a factor of
            what is then left, until what U explains is gone to rounding.
    """

    point: Linearisation
    weights: ParameterRows
    lower: Tensor
    passes: int

    @classmethod
    def of(cls, point: Linearisation, weights: ParameterRows) -> Eliminated | None:
        """None where κ has too many entries, or the features do not tell them apart to rounding."""
        kappa = point.kappa
        size = kappa.numel()
        if size > LARGEST:
            return None
        eye = torch.eye(size, dtype=kappa.dtype, device=kappa.device).reshape(size, *kappa.shape)
        parts = [
            _on_kappa(point, weights, point.jvp(None, part)) for part in torch.split(eye, COLUMNS)
        ]
        matrix = torch.cat(parts).flatten(1)
        matrix = (matrix + matrix.T) / 2
        lower = cholesky_in_place(matrix.clone())
        if lower is None:
            return None
        eps = torch.finfo(matrix.dtype).eps
        gain = SQUARED * size**0.5 * eps / smallest_scaled(matrix, lower)
        passes = ceil(log(eps) / log(gain)) if gain < GAIN else 0
        return cls(point, weights, lower, max(passes, LEAST)) if passes else None

    def explained(self, rows: ParameterRows) -> tuple[Tensor, ParameterRows]:
        """The κ that explains most of S updates [S, B, C], and what it leaves of them, P r."""
        kappa, left = torch.zeros_like(self.point.kappa)[None], rows
        for _ in range(self.passes):
            rhs = _on_kappa(self.point, self.weights, left)
            step = backsolve(self.lower, rhs.flatten(1).T).T.reshape(rhs.shape)
            kappa = kappa + step
            sent = self.point.jvp(None, step)
            left = {name: left[name] - sent[name] for name in left}
        return kappa, left


def _on_kappa(point: Linearisation, weights: ParameterRows, rows: ParameterRows) -> Tensor:
    return point.pulls({n: rows[n] * weights[n].square() for n in rows})[1]
