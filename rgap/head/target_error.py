"""How far off a target may be that is any numbers: what the errors of its logits and of κ leave.

A target of a class or a label is right or wrong.  A soft or real-valued one is read off
``k = κ(z, t)``, so with errors of z and k, and the rounding of the client's own κ,

    ``δt = ∂t/∂k (δk − ∂κ/∂z δz)``, z = W x + b with the errors of x.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rgap.precision import Estimate, Precision, paired
from rgap.update.losses import Loss

__all__ = ["rounding_of_cotangent", "standard_error"]


def standard_error(loss: Loss, z: Estimate, k: Estimate, precision: Precision) -> float:
    """Largest standard error of any entry of the dense targets whose cotangent at z is k.

    Args:
        loss: of one sample or of several, as the cotangents count them.
        z: logits, [B, C], with their errors.
        k: cotangents, [B, C], with theirs.
        precision: of the update.
    """
    target = loss.targets_from(z.value, k.value)
    z, k = paired(z, k)
    own = rounding_of_cotangent(loss, z.value, target, precision).abs()
    moved_k = k.error + precision.normal(own, len(k.error))
    moved = [
        loss.targets_from(z.value + dz, k.value + dk) - target
        for dz, dk in zip(z.error, moved_k, strict=True)
    ]
    std = torch.stack(moved).square().mean(0).sqrt()
    return float(std.max()) if bool(torch.isfinite(std).all()) else inf


def rounding_of_cotangent(loss: Loss, z: Tensor, target: Tensor, precision: Precision) -> Tensor:
    """Rounding of κ(z, t): of the logits, of its own product, and of a softmax beside 1."""
    slope, kappa = loss.cotangent_jvp(z, z, target), loss.cotangent(z, target)
    size = slope.abs() + kappa.abs() + loss.rounding(z, target).abs()
    return precision.unit * size + precision.floor
