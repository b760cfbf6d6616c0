"""How large cotangents are that are known up to a factor a sample: gradients of biases say it.

The gradient of a bias is a sum over samples and positions of the cotangent there,

    ∂b = Σ_b α_b Σ_p k_bp,

linear in the factors α_b: as many equations as the bias has entries, for every bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.limits import FITS
from rgap.precision import Estimate, Precision
from rgap.solvers.rank import numerical_rank, resolve_rcond

__all__ = ["BiasSum", "factors"]


@dataclass(frozen=True)
class BiasSum:
    """What each sample, of a factor 1, sends to a bias.

    Attributes:
        name: of the bias.
        value: Σ_p k_bp, [B, F].
        error: its ensemble, [S, B, F].
    """

    name: str
    value: Tensor
    error: Tensor

    @classmethod
    def of(cls, name: str, k: Tensor, error: Tensor) -> BiasSum:
        """Of the cotangent [B, F, ...] that the bias is added to, and its ensemble."""
        batch, outputs = k.shape[:2]
        value = k.reshape(batch, outputs, -1).sum(2)
        return cls(name, value, error.reshape(len(error), batch, outputs, -1).sum(3))


def factors(
    sums: Sequence[BiasSum], gradients: Mapping[str, Tensor], precision: Precision
) -> Estimate | str:
    """α [B] by least squares, or why biases do not say it.

    Args:
        sums: of the biases above the place where the cotangents are known.
        gradients: by parameter name, float64.
        precision: of the update.
    """
    sent = [one for one in sums if precision.sent(one.name)]
    if not sent:
        return "no gradient of a bias above it says how much a sample weighs"
    table = torch.cat([one.value for one in sent], 1).T
    tables = torch.cat([one.error for one in sent], 2).transpose(1, 2)
    rows, batch = table.shape
    if rows <= batch:
        return f"{rows} gradients of biases above it say how much each of {batch} samples weighs"
    wanted = torch.cat([gradients[one.name] for one in sent])
    alpha = _least(table, wanted, torch.ones_like(wanted))
    terms = [(one.name, (alpha[:, None] * one.value).square().sum(0)) for one in sent]
    own = torch.cat([precision.update_std(n, s, gradients[n]) for n, s in terms])
    spread = (tables * alpha).sum(2).square().mean(0)  # of what the table gives, by its own error
    weights = (own.square() + spread).sqrt()
    values = torch.linalg.svdvals(table / weights[:, None])
    rank = numerical_rank(values, batch, resolve_rcond(None, (rows, batch))).rank
    if rank < batch:
        return f"gradients of biases above it tell {rank} of {batch} samples apart"
    alpha = _least(table, wanted, weights)
    left = ((wanted - table @ alpha) / weights).square()
    parts = torch.split(left, [one.value.shape[1] for one in sent])
    gap = max(float(part.mean().sqrt()) for part in parts)  # of every bias by itself
    if not gap <= FITS:
        return f"gradients of biases above it miss the samples told apart by {gap:.1e} errors"
    members = _least(table + tables, wanted + precision.normal(own), weights)
    return Estimate(alpha, members - alpha)


def _least(table: Tensor, sums: Tensor, weights: Tensor) -> Tensor:
    """Weighted least squares of one table [n, B], or of an ensemble [S, n, B]."""
    scaled = table / weights[:, None]
    solved: Tensor = torch.linalg.lstsq(scaled, (sums / weights)[..., None]).solution[..., 0]
    return solved
