"""A batch told apart by two fully connected layers alone, without the loss and what is above them.

A sample's cotangent at the upper layer lies in the range of that layer's gradient, ``k₂ = U₂c``,
and at the lower one in the range of its gradient: ``(I − U₁U₁ᵀ) φ'(z) ⊙ W₂ᵀU₂c = 0`` fixes c up to
its scale, and ``xᵀG₁⁺k₁ = 1`` the scale.  So each root has its dual and its cotangents without any
target.  How often a picture occurs is in them too, and stays unknown.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.jacobian.batch_loss import BatchLoss
from rgap.limits import CERTAIN, SEPARABLE
from rgap.precision import Estimate, Precision
from rgap.separation.batch import Batch, Separated, Unseparated
from rgap.separation.errors import remark_restless, spread
from rgap.separation.identify import Identity, free, pullback
from rgap.separation.mixture import Mixture
from rgap.separation.pair import Between, between, lines, steps_between
from rgap.separation.peeling import GROWTH, STARTS, Collected, Starts, collect
from rgap.separation.route import unfit_pair
from rgap.separation.subspace import Consistency
from rgap.update.losses import Loss


@dataclass(frozen=True)
class Held(BatchLoss):
    """Cotangents at the upper layer's output, as found, in the place of a loss.

    ``targets`` are the cotangents, [R, m].
    """

    errors: Tensor | None = None

    @classmethod
    def of(cls, cotangents: Tensor, errors: Tensor | None = None) -> Held:
        """Hold the cotangents of R pictures."""
        return cls(Loss("unknown"), cotangents, cotangents.new_ones(len(cotangents)), errors)

    def cotangent(self, outputs: Tensor) -> Tensor:
        """The cotangents, whatever the outputs."""
        return self.targets.reshape(outputs.shape)

    def curvature(self, outputs: Tensor, directions: Tensor) -> Tensor:
        """Zero: they are held."""
        return torch.zeros_like(directions)

    def known(self, outputs: Tensor, precision: Precision) -> Estimate:
        """The cotangents with their errors."""
        value = self.cotangent(outputs)
        if self.errors is None:
            return Estimate(value, precision.rounding(value))
        return Estimate(value, self.errors + precision.rounding(value))


def separate_headless(
    batch: Batch, watch: Callable[[str], None] | None = None
) -> Separated | Unseparated:
    """The samples of a batch at the lower of the last two stages of a chain.

    Args:
        batch: its chain ends with two fully connected layers.
        watch: told of the progress.
    """
    began = time.perf_counter()
    index = len(batch.chain.stages) - 2
    steps = steps_between(batch.chain, index)
    if isinstance(steps, str):
        return Unseparated(steps)
    lower, upper = batch.mixture(index), batch.mixture(index + 1)
    why = unfit_pair(lower, upper, steps)
    if why is not None:
        return Unseparated(why)
    if batch.size is not None and lower.rank != batch.size:
        return Unseparated(
            f"the gradient of '{lower.stage.name}' tells {lower.rank} samples apart, the stated "
            f"batch size is {batch.size}: copies, or samples lost to rounding, which only the loss "
            "would tell"
        )
    consistency = Between.of(lower, upper, steps, batch.precision)

    def naming(roots: Tensor, _: Consistency) -> list[Identity]:
        return cotangents_of(batch, lower, upper, roots)[0]

    def admissible(identity: Identity, rough: bool) -> bool:
        return identity.accepted and identity.outside < CERTAIN

    count = batch.starts(lower.rank, STARTS, GROWTH)
    starts = Starts(batch.precision.seed, count, deadline=batch.deadline)
    collected = collect(consistency, naming, admissible, starts, watch)
    if not collected.complete:
        why = lines(consistency, collected.roots) or "no target helps here"
        tally = collected.tally(f"of '{lower.stage.name}'")
        return batch.short(f"{tally}; {why}")
    on_lines = lines(consistency, collected.roots) or between(consistency, collected.roots)
    if on_lines:
        return batch.short(on_lines)
    return _finished(batch, consistency, upper, collected, began)


def cotangents_of(
    batch: Batch, lower: Mixture, upper: Mixture, roots: Tensor
) -> tuple[list[Identity], Tensor, Tensor]:
    """Dual, k₁ [S, m₁] and k₂ [S, m₂] of every root.

    Args:
        batch: its chain ends with the upper layer.
        lower: mixture of the layer that the roots belong to.
        upper: mixture of the next one.
        roots: [S, R].
    """
    affine = lower.stage.affine
    if not len(roots):
        return [], roots.new_zeros(0, *affine.out_shape), roots.new_zeros(0, len(upper.left))
    z = affine.forward(lower.inputs(roots))
    outputs, pull = pullback(batch.chain, lower.stage.index, z)
    rows = [pull(u.expand_as(outputs)).flatten(1) for u in upper.left.T]
    table = torch.stack(rows, 1)  # [S, R, m₁]
    identities = [free(lower, q, own, False) for q, own in zip(roots, table, strict=True)]
    c = torch.stack([identity.kappa for identity in identities])
    return identities, torch.einsum("sr,srm->sm", c, table), c @ upper.left.T


def _finished(
    batch: Batch, consistency: Between, upper: Mixture, collected: Collected, began: float
) -> Separated | Unseparated:
    """Errors of the samples and of their cotangents."""
    lower = consistency.samples
    stage = lower.stage
    k2 = cotangents_of(batch, lower, upper, collected.roots)[2]
    result = spread(consistency, collected.roots, batch.chain, Held.of(k2), batch.precision)
    if result.restless:
        return Unseparated(remark_restless(lower, result.restless))
    worst = result.worst / float(result.roots.norm(dim=1).mean())
    if not worst < SEPARABLE:
        return Unseparated(
            f"the worst direction of a sample at '{stage.name}' is known to {worst:.1e} of its "
            f"norm only (σ_B/σ_1 {lower.ratio:.1e})"
        )
    _, k, k2 = cotangents_of(batch, lower, upper, result.roots)
    inside = result.features.error.flatten(2) @ lower.right
    size = float(inside.abs().max())
    step = 1e-6 * float(result.roots.abs().max()) / size if size > 0 else 0.0
    moved = [cotangents_of(batch, lower, upper, result.roots + step * e)[1:] for e in inside]
    errors = [
        torch.stack([(one[i] - held) / step for one in moved]) for i, held in ((0, k), (1, k2))
    ]
    shape = stage.affine.out_shape
    return Separated(
        stage,
        result.features,
        Estimate(k.reshape(-1, *shape), errors[0].reshape(len(moved), -1, *shape)),
        Held.of(k2, errors[1]),
        lower,
        worst,
        f"every sample of '{stage.name}' must map into the row space of '{upper.stage.name}', and "
        "its cotangent into both ranges; no loss was needed",
        "",
        time.perf_counter() - began,
    )
