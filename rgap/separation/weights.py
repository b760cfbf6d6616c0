"""How well the weight of a root is known: the error that its share xᵀG⁺k carries.

A root moves by what its equations are blurred by, and its cotangent and dual with it.  Where two
samples nearly coincide, at a distance d, blurred by ε/d, its equations change by d only along the
line between them, and its share by 1/d: it is off by ε/d³ of their scale, far sooner than the rank
of G is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from rgap.separation.batch import Batch
from rgap.separation.identify import Identity, pullback
from rgap.separation.mixture import Mixture
from rgap.separation.peeling import Collected
from rgap.separation.subspace import Consistency, Restricted, restricted
from rgap.solvers.tall import tall_qr

STEP = 1e-6  # of a difference, as a share of the root


def weighed(
    batch: Batch, consistency: Consistency, roots: Tensor, identities: Sequence[Identity]
) -> list[Identity]:
    """The targets of roots with the standard errors of their shares.

    Args:
        batch: the update.
        consistency: f, P and the mixture.
        roots: Q, [F, R].
        identities: target of each; one that is continuous has no share, and keeps its error.
    """
    named = [row for row, identity in enumerate(identities) if identity.label is not None]
    held = list(identities)
    if not named:
        return held
    labels = torch.tensor([held[row].label for row in named], device=roots.device)
    whole = restricted(consistency.labelled(labels))
    for place, row in enumerate(named):
        alone = whole.some(torch.tensor([place], device=roots.device))
        held[row] = replace(held[row], error=_error(batch, alone, roots[row], held[row]))
    return held


def all_weighed(batch: Batch, consistency: Consistency, collected: Collected) -> Collected:
    """What was collected, with the standard errors of the shares of all roots, refused ones too."""
    found = weighed(batch, consistency, collected.roots, collected.identities)
    refused = collected.refused
    if collected.turned is not None:
        refused = tuple(weighed(batch, consistency, collected.turned, refused))
    return replace(collected, identities=found, refused=refused)


def _error(batch: Batch, alone: Restricted, q: Tensor, identity: Identity) -> float:
    samples = alone.consistency.samples
    back = q / samples.values
    sent = samples.entry_noise * float(identity.dual.norm() * back.norm()) * abs(identity.share)
    t = alone.coordinates(q[None])
    if t.shape[1] == 0:
        return sent
    jacobian = alone.linear(t)[1][0]
    if len(jacobian) < jacobian.shape[1]:
        return inf  # equations that leave a direction open
    basis, upper = tall_qr(jacobian)
    f = alone.consistency.value(q[None])
    moved = alone.consistency.project(_blurs(batch, alone.consistency, q, f)) / f.norm()
    steps = torch.linalg.solve_triangular(upper, (moved @ basis).T, upper=True).T
    steps = steps @ alone.directions.T
    length = float(steps.norm(dim=1).amax())
    if not 0.0 < length < inf:
        return inf if length else sent
    step = STEP * float(q.norm()) / length
    assert identity.label is not None
    shares = _shares(batch, samples, torch.cat([q[None], q + step * steps]), identity.label)
    carried = float(((shares[1:] - shares[0]) / step).square().mean().sqrt())
    return float((carried**2 + sent**2) ** 0.5)


def _blurs(batch: Batch, consistency: Consistency, q: Tensor, f: Tensor) -> Tensor:
    """Draws of the error of f at a root q, beside P, [S, m]."""
    samples, precision = consistency.samples, batch.precision
    x = q[None] @ samples.right.T
    std = torch.linalg.vector_norm(f @ consistency.basis * consistency.blur)
    std = (consistency.rounding(x, precision).square() + std.square()).sqrt()
    across = samples.entry_noise * float((q / samples.values).norm())
    moved = precision.normal(torch.full_like(x, across))[:, 0]
    moved = moved - (moved @ samples.right) @ samples.right.T
    push = consistency.pusher(x.expand(len(moved), -1))
    return precision.normal(std)[:, 0] + push(moved)


def _shares(batch: Batch, samples: Mixture, q: Tensor, label: int) -> Tensor:
    """xᵀG⁺k of points q [S, R] with one label, [S]."""
    affine = samples.stage.affine
    z = affine.forward(samples.inputs(q))
    logits, pull = pullback(batch.chain, samples.stage.index, z)
    labels = torch.full((len(q),), label, device=q.device)
    k = pull(replace(batch.loss, reduction="sum").cotangent(logits, labels)).flatten(1)
    return (samples.dual(k) * q).sum(1)
