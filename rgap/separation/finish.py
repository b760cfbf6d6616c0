"""From the roots of a mixture to samples with errors, targets and multiplicities."""

from __future__ import annotations

import time

from torch import Tensor

from rgap.jacobian.batch_loss import BatchLoss
from rgap.limits import REFUTED, SEPARABLE
from rgap.machine import memory
from rgap.precision import Estimate
from rgap.separation.batch import HELD, Batch, Separated, Unseparated
from rgap.separation.errors import (
    Spread,
    across_errors,
    cotangents,
    cotangents_above,
    hidden_distance,
    remark,
    remark_restless,
    spread,
    widened,
)
from rgap.separation.identify import Identity, rise, top
from rgap.separation.mixture import Mixture
from rgap.separation.peeling import Collected, Identify
from rgap.separation.polish import Joint, polish_jointly
from rgap.separation.subspace import Consistency
from rgap.separation.targets import (
    batch_loss,
    common_factor,
    confirmed,
    near_copies,
    read_from_head,
    refuting,
)
from rgap.separation.weights import weighed

TOGETHER = 100  # samples up to which a batch that only fits as a whole is polished
DENSE = 2**23  # entries of J up to which such a batch is polished by QR


def finish(
    batch: Batch,
    consistency: Consistency,
    collected: Collected,
    naming: Identify,
    route: str,
    began: float,
) -> Separated | Unseparated:
    """Targets, then a polish root by root, then one of all roots together.

    Args:
        batch: the update.
        consistency: of the roots, row by row.
        collected: all roots.
        naming: targets of roots.
        route: which equations, in words.
        began: ``time.perf_counter()`` at the start.
    """
    samples = consistency.samples
    stage = samples.stage
    head = _targets(batch, consistency, collected)
    if isinstance(head, Unseparated):
        return head
    head = _reread(batch, samples, collected.roots, head)
    result = spread(consistency, collected.roots, batch.chain, head, batch.precision)
    if result.restless:
        return Unseparated(remark_restless(samples, result.restless))
    known, worst = result.features, result.worst / float(result.roots.norm(dim=1).mean())
    joint = polish_jointly(batch, samples, result.roots, head, result.across)
    kappa: Tensor | None = None
    # Targets that it held were read at these roots, and err as they do; a misfit is no optimum.
    held = batch.loss.targets != "index" and joint is not None and not joint.free
    fits = joint is not None and joint.misfit <= REFUTED
    if joint is not None and not held and not fits and not worst < SEPARABLE:
        # Where a softmax is flat to the last bit a root may be anywhere: it contradicts nothing.
        return _missed(samples, joint.misfit)
    if joint is not None and not held and fits:
        together = _together(samples, result, joint)
        # All rows at once also see what the client's backward pass rounds; one root does not.
        # Free targets move with the samples; the errors of a root alone are those at known ones.
        lost = joint.errors is None
        if joint.free or lost or float(together.error.norm()) < float(known.error.norm()):
            known, kappa = together, joint.kappa
            if joint.free or not lost:
                worst = joint.worst / float(joint.roots.norm(dim=1).mean())
            head = joint.head if joint.free else _reread(batch, samples, joint.roots, head)
    doubt = confirmed(batch, head, naming(known.value.flatten(1) @ samples.right, consistency))
    if doubt is not None:
        own = weighed(batch, consistency, collected.roots, collected.identities)
        near = near_copies(samples, own)
        return Unseparated(f"{doubt} (σ_B/σ_1 {samples.ratio:.1e} at '{stage.name}'){near}")
    return _separated(batch, samples, known, head, worst, route, began, kappa)


def finish_together(
    batch: Batch, consistency: Consistency, collected: Collected, route: str, began: float
) -> Separated | Unseparated:
    """The same where one sample's own equations do not determine it: errors from all together."""
    samples = consistency.samples
    stage = samples.stage
    head = _targets(batch, consistency, collected)
    if isinstance(head, Unseparated):
        return head
    k = cotangents(batch.chain, stage.index, samples.inputs(collected.roots), head).flatten(1)
    across = across_errors(samples, collected.roots, k, batch.precision)
    memory.require(
        f"polishing {samples.rank} samples at '{stage.name}' together",
        8.0 * HELD * min(samples.rank, TOGETHER) ** 4,
        batch.room,
    )
    joint = polish_jointly(
        batch, samples, collected.roots, head, across, largest=TOGETHER, dense=DENSE
    )
    if joint is not None and joint.misfit > REFUTED:
        return _missed(samples, joint.misfit)
    if joint is None or joint.errors is None:
        return Unseparated(
            f"the equations of the {samples.rank} samples at '{stage.name}' are singular to "
            f"working precision (σ_B/σ_1 {samples.ratio:.1e})"
        )
    excess = max(1.0, joint.misfit)  # of our own arithmetic, which the ensemble knows nothing of
    worst = excess * joint.worst / float(joint.roots.norm(dim=1).mean())
    if not worst < SEPARABLE:
        return Unseparated(
            f"the worst direction of the {samples.rank} samples at '{stage.name}' is known to "
            f"{worst:.1e} of their norm only (σ_B/σ_1 {samples.ratio:.1e})"
        )
    known = _lifted(samples, joint.roots, excess * joint.errors, across)
    kappa = None if joint.kappa is None else excess * joint.kappa
    return _separated(batch, samples, known, joint.head, worst, route, began, kappa)


def _missed(samples: Mixture, misfit: float) -> Unseparated:
    return Unseparated(
        f"all {samples.rank} samples at '{samples.stage.name}' together miss its gradient by "
        f"{misfit:.1e} standard errors (σ_B/σ_1 {samples.ratio:.1e})"
    )


def _targets(
    batch: Batch, consistency: Consistency, collected: Collected
) -> BatchLoss | Unseparated:
    """Targets and multiplicities, or why there are none."""
    samples, stage = consistency.samples, consistency.samples.stage
    logits = rise(batch.chain, stage.index, stage.affine.forward(samples.inputs(collected.roots)))
    certain = refuting(batch, samples)

    def read(identities: list[Identity]) -> BatchLoss | Unseparated:
        common = common_factor(batch, samples.rank, identities)
        return common or batch_loss(batch, logits, identities, certain)

    head = read(collected.identities)
    if isinstance(head, BatchLoss) or head.consistent:
        return head
    return read(weighed(batch, consistency, collected.roots, collected.identities))


def _reread(batch: Batch, samples: Mixture, roots: Tensor, head: BatchLoss) -> BatchLoss:
    """Dense targets for the samples as they are known now."""
    features, logits = top(batch.chain, samples.stage.index, samples.inputs(roots))
    return read_from_head(batch, features.flatten(1), logits, head)


def _separated(
    batch: Batch,
    samples: Mixture,
    known: Estimate,
    head: BatchLoss,
    worst: float,
    route: str,
    began: float,
    kappa: Tensor | None = None,
) -> Separated:
    """With what copies may differ by, and the cotangents."""
    stage = samples.stage
    distance = hidden_distance(batch.chain, samples, head, known.value, batch.precision)
    note = remark(samples, head, distance, known.value)
    if note:
        known = widened(known, distance, batch.precision)
    return Separated(
        stage,
        known,
        cotangents_above(batch.chain, stage.index, known, head, kappa),
        head,
        samples,
        worst,
        route,
        note,
        time.perf_counter() - began,
    )


def _together(samples: Mixture, alone: Spread, joint: Joint) -> Estimate:
    """The samples of a joint polish.

    One that lost a direction knows no errors: those of the roots alone, and as far as it went.
    """
    if joint.errors is not None:
        return _lifted(samples, joint.roots, joint.errors, alone.across)
    error = alone.features.error
    way = (joint.roots - alone.roots).norm(dim=1)
    length = error.flatten(2).square().sum(2).mean(0).sqrt().clamp_min(1e-300)
    wider = (way / length).clamp_min(1.0).reshape(-1, *[1] * (error.ndim - 2))
    return Estimate(samples.inputs(joint.roots), wider * error)


def _lifted(samples: Mixture, roots: Tensor, inside: Tensor, across: Tensor) -> Estimate:
    """X = Q Vᵀ with its errors inside and across the row space."""
    error = inside @ samples.right.T + across
    x = samples.inputs(roots)
    return Estimate(x, error.reshape(*error.shape[:2], *x.shape[1:]))
