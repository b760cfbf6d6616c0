"""From the roots of a mixture to samples with errors, targets and multiplicities."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from rgap.precision import Known

from .batch import Batch, Separated, Unseparated
from .consistency import Consistency
from .identify import Identity, rise
from .joint import polish_jointly
from .mixture import Mixture
from .peeling import restricted
from .spread import cotangents_above, spread
from .targets import batch_loss


def finish(
    batch: Batch,
    consistency: Consistency,
    roots: Tensor,
    identities: Sequence[Identity],
    route: str,
    began: float,
) -> Separated | Unseparated:
    """Targets, then a polish root by root, then one of all roots together.

    Args:
        batch: the update.
        consistency: of the roots, row by row.
        roots: Q, [R, R].
        identities: their targets.
        route: which equations, in words.
        began: ``time.perf_counter()`` at the start.
    """
    samples = consistency.samples
    stage = samples.stage
    affine = stage.affine
    features = (roots @ samples.right.T).reshape(-1, *affine.in_shape)
    logits = rise(batch.chain, stage.index, affine.forward(features))
    head = batch_loss(batch, logits, identities)
    if isinstance(head, Unseparated):
        return head
    whole = restricted(consistency, samples.weights, samples.weights.new_zeros(0, samples.rank))
    result = spread(consistency, whole, roots, batch.chain, head, batch.precision)
    known, worst = result.features, result.worst / float(result.roots.norm(dim=1).mean())
    joint = polish_jointly(
        batch.chain, samples, batch.gradients, result.roots, head, result.across, batch.precision
    )
    if joint is not None and joint.errors is not None:
        known = _lifted(samples, joint.roots, joint.errors, result.across)
        worst = joint.worst / float(joint.roots.norm(dim=1).mean())
    elif joint is not None:
        inside = (result.features.error.flatten(2) - result.across) @ samples.right
        known = _lifted(samples, joint.roots, inside, result.across)
    return Separated(
        stage,
        known,
        cotangents_above(batch.chain, stage.index, known, head),
        head,
        samples,
        worst,
        route,
        time.perf_counter() - began,
    )


def _lifted(samples: Mixture, roots: Tensor, inside: Tensor, across: Tensor) -> Known:
    """X = Q Vᵀ with its errors inside and across the row space."""
    shape = samples.stage.affine.in_shape
    error = inside @ samples.right.T + across
    x = (roots @ samples.right.T).reshape(-1, *shape)
    return Known(x, error.reshape(*error.shape[:2], *shape))
