"""Directions of a stage's input that neither its gradient nor its weights see."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.constraints import gradient_constraint, weight_constraint
from rgap.network.affine import Affine
from rgap.solvers.linear import Stacked, null_projection


def null_directions(
    affine: Affine,
    cotangent: Tensor,
    active: Tensor,
    nullity: int,
    count: int,
    seed: int = 0,
) -> Tensor:
    """Up to ``count`` orthonormal random null directions, [count, B, *in_shape].

    Args:
        affine: the stage's affine map.
        cotangent: k at its output, [B, *out_shape].
        active: True where z is known, [B, *out_shape].
        nullity: dimension of the null space.
        count: how many directions to draw.
        seed: of the private generator.
    """
    batch = cotangent.shape[0]
    gradient = gradient_constraint(affine, cotangent)
    scale = float(gradient.spectra.max())
    weights = gradient.matrix.new_full(gradient.matrix.shape[:2], 1 / max(scale, 1e-300))
    gradient = gradient.scaled(weights)
    coupling = weight_constraint(affine, batch)
    weights = active.flatten().double() / affine.weight.norm()
    stacked = Stacked(gradient, coupling, weights)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(
        min(count, nullity), stacked.shape[1], generator=generator, dtype=torch.float64
    )
    directions = null_projection(stacked, draws.to(cotangent))
    table = directions.reshape(len(directions), affine.in_shape[0], -1)
    return coupling.fold(table).reshape(len(directions), batch, *affine.in_shape)
