"""How far pictures that count as copies of one may in truth be apart.

Two samples x ± δ with one label send the gradient of two copies of x up to second order,
``2 (∂k/∂x δ) δᵀ``.  Where that is below the noise no equation sees it: repeated labels are no
defect of rank but of conditioning, ‖x_a − x_b‖·‖k_a − k_b‖.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.jacobian.batch_loss import BatchLoss
from rgap.network.chain import Chain
from rgap.precision import Estimate, Precision
from rgap.separation.errors import cotangents
from rgap.separation.mixture import Mixture

DRAWS = 4


def hidden_distance(
    chain: Chain,
    samples: Mixture,
    head: BatchLoss,
    features: Tensor,
    precision: Precision,
) -> Tensor:
    """Largest ‖δ‖ that the rank of G leaves unseen, [R]; 0 for pictures that occur once.

    For directions drawn at random; one that the layers above do not see at all is never seen.
    That each picture of an unstated batch size may stand for several is looked at in the data.
    """
    index = samples.stage.index
    k = cotangents(chain, index, features, head).flatten(1)
    size = features.flatten(1).norm(dim=1).clamp_min(1e-300)
    gain = torch.full_like(size, torch.inf)
    for _ in range(DRAWS):
        draw = precision.normal(torch.ones_like(features), samples=1)[0].flatten(1)
        draw = draw / draw.norm(dim=1, keepdim=True)
        step = (1e-6 * size)[:, None]
        moved = cotangents(chain, index, features + (step * draw).reshape(features.shape), head)
        change = (moved.flatten(1) - k) / step / head.copies[:, None]
        gain = gain.minimum(change.norm(dim=1))
    cutoff = max(samples.triplets.rank.cutoff, samples.noise * float(samples.values[0]))
    distance = (cutoff / (2.0 * gain.clamp_min(1e-300))).sqrt()
    return torch.where(head.copies > 1, distance, torch.zeros_like(distance))


def widened(known: Estimate, distance: Tensor, precision: Precision) -> Estimate:
    """The features with that distance as an error of their own."""
    entries = known.value[0].numel()
    std = (distance / entries**0.5).reshape(-1, *([1] * (known.value.ndim - 1)))
    return Estimate(known.value, known.error + precision.normal(std.expand_as(known.value)))


def remark(samples: Mixture, head: BatchLoss, distance: Tensor, features: Tensor) -> str:
    """What to tell a reader about pictures that may be several; empty where there are none."""
    if not bool((head.copies > 1).any()):
        return ""
    apart = float((distance / features.flatten(1).norm(dim=1).clamp_min(1e-300)).max())
    total, rank = int(head.copies.sum()), samples.rank
    beneath = samples.triplets.beneath
    ratio = float(beneath[0] / samples.values[0]) if len(beneath) else 0.0
    return (
        f"the gradient of '{samples.stage.name}' tells {rank} of {total} samples apart (the next "
        f"singular value is {ratio:.1e} of the largest, within its noise): the others are copies, "
        f"or differ from what is shown by less than {apart:.1e} of its norm"
    )
