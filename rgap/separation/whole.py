"""Samples and cotangents beside the whole gradient of their layer, ``Kᵀ X = G``."""

from __future__ import annotations

import torch

from rgap.limits import SAFETY
from rgap.precision import Precision
from rgap.separation.batch import Separated

DIRECTIONS = 8  # along which the two are compared


def short_of(separated: Separated, precision: Precision) -> str:
    """Why samples and their cotangents do not make the gradient; "" if they do.

    Compared along a few random directions, with what their errors and the client's rounding
    explain.  A cotangent that is small beside the others satisfies its own equations, within their
    errors, with a share of the others in it; the sum shows what is missing.  A factor on the whole
    loss is told elsewhere.

    Args:
        separated: the samples, told apart by what the loss says of each of them.
        precision: of the update.
    """
    samples, known, above = separated.mixture, separated.features, separated.cotangents
    k, x = above.value.flatten(1), known.value.flatten(1)
    draw = torch.Generator().manual_seed(precision.seed)
    some = torch.randn(x.shape[1], DIRECTIONS, generator=draw, dtype=torch.float64).to(x)
    own, sent = k.T @ (x @ some), samples.gradient @ some
    factor = (own * sent).sum() / own.square().sum().clamp_min(1e-300)  # on the whole loss
    gap = own - sent / factor if factor > 0 else own - sent
    moved = above.error.flatten(2).mT @ (x @ some) + k.T @ (known.error.flatten(2) @ some)
    name = samples.stage.affine.weight_name
    std = precision.update_std(name, k.square().T @ x.square(), samples.gradient)
    rounded = (std.square() @ some.square()).sum()
    explained = float((moved.square().mean(0).sum() + rounded).sqrt())
    missed = float(gap.norm())
    if missed <= SAFETY * explained:
        return ""
    return (
        f"the {samples.rank} samples at '{samples.stage.name}' and their cotangents miss its "
        f"gradient by {missed / float(own.norm()):.1e} of it, {missed / explained:.1e} times what "
        f"their errors explain: one is a mixture (σ_B/σ_1 {samples.ratio:.1e})"
    )
