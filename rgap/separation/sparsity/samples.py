"""Samples from sparse directions, and what the signs of the forward pass say of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from rgap.separation.sparsity.coordinates import Layer
from rgap.separation.sparsity.search import Directions

__all__ = ["Answer", "assemble"]

EXCHANGES = 64  # of one direction for another, in one pass
UNDECIDED = 0.05  # largest share of pre-activations too close to zero to know their sign


@dataclass(frozen=True)
class Answer:
    """Samples from B directions, and what the forward pass says of them."""

    inputs: Tensor
    cotangents: Tensor
    agreement: float
    undecided: float
    error: float

    @property
    def certified(self) -> bool:
        """Every sign is explained, and few were too close to zero to ask."""
        return self.agreement == 1.0 and self.undecided <= UNDECIDED


def assemble(layer: Layer, directions: Directions) -> Answer:
    """The B directions that explain the signs best: the sparsest, improved by exchanges."""
    rank = len(layer.weights)
    kept = torch.nonzero(directions.kept).flatten()
    order = kept[directions.zeros[kept].sum(1).argsort(descending=True, stable=True)]
    last = rank + max(2, EXCHANGES // rank)
    chosen, spare = order[:rank].tolist(), order[rank:last].tolist()
    best = _answer(layer, directions, chosen)
    improved = True
    while improved and not best.certified:
        improved = False
        for place in range(rank):
            for new in [c for c in spare if c not in chosen]:
                trial = [*chosen[:place], new, *chosen[place + 1 :]]
                answer = _answer(layer, directions, trial)
                if answer.agreement > best.agreement:
                    best, chosen, improved = answer, trial, True
        spare = [c for c in order[:last].tolist() if c not in chosen]
    return best


def _answer(layer: Layer, directions: Directions, chosen: list[int]) -> Answer:
    """X = D⁻¹ Vᵀ, K = (L D)ᵀ, and the share λ of signs that fit."""
    unscaled = directions.vectors[chosen].T  # columns
    nothing = Answer(layer.basis, layer.basis, 0.0, 1.0, inf)
    inverse, singular = torch.linalg.inv_ex(unscaled)
    if bool(singular) or not bool(inverse.isfinite().all()):
        return nothing
    scales = inverse @ layer.weights
    if not bool((scales.abs() > 1e-12 * scales.abs().max()).all()):
        return nothing
    q = inverse / scales[:, None]  # rows of D⁻¹
    k = (layer.mixed @ unscaled * scales).T
    z = q @ layer.forward.T
    # Errors: of the directions (δq_b = −Σ_c (q_b·δd_c) q_c) and of the scales.
    shift = directions.errors[chosen] * scales.abs()
    unknown = layer.noise / float(layer.sigma[-1]) * float(layer.weights.norm() * layer.sigma[0])
    scaling = inverse.norm(dim=1) * unknown / scales.abs()
    vague = q.norm(dim=1)[:, None] * (shift @ z.abs()) + scaling[:, None] * z.abs()
    z = z + layer.bias
    slack = 4 * vague + 1e-14 * (z.abs() + layer.bias.abs())
    dull = layer.noise * layer.sizes * scales.abs()[:, None]
    dull = dull + 4 * shift[:, None] * layer.mixed.norm(dim=1)
    zero = (k.abs() <= dull) | (layer.sizes <= 0)
    on, off = z > slack, z < -slack
    wrong = (off & ~zero).sum(1) + _excess(k, on, zero, dull)
    undecided = float((~on & ~off).double().mean())
    error = float((q.norm(dim=1) @ shift + scaling).max())
    agreement = 1.0 - float(wrong.sum()) / z.numel()
    if undecided > UNDECIDED:
        agreement = max(0.0, agreement - undecided)
    return Answer(q @ layer.basis.T, k * layer.scale, agreement, undecided, error)


def _excess(k: Tensor, on: Tensor, zero: Tensor, dull: Tensor) -> Tensor:
    """Units that are on and yet have k = 0, beyond those whose k is small by chance, [B]."""
    loud = on & ~zero
    rms = (k.square() * loud).sum(1).div(loud.sum(1).clamp_min(1)).sqrt()
    chance = (dull * on).sum(1) / rms.clamp_min(1e-300)  # density of k/rms near 0: below 1/2 a side
    allowed = torch.where(chance > 1e-3, (4 * chance).ceil(), torch.zeros_like(chance))
    return ((on & zero).sum(1) - allowed).clamp_min(0)
