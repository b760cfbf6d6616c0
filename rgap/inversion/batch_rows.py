"""A batch that was told apart: where its recursion starts, and what its head says of the labels."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import inf, prod

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap.constraints import gradient_constraint
from rgap.head.target_error import standard_error
from rgap.inversion.problem import Problem
from rgap.inversion.top import rounded_features
from rgap.jacobian.batch_loss import BatchLoss, loss_scale
from rgap.limits import DETERMINED, ENSEMBLE, PROBABILITY, SAFETY, USEFUL
from rgap.network.chain import Chain
from rgap.precision import Estimate
from rgap.progress import Watch, silent
from rgap.recursion.reached import Descent
from rgap.recursion.stage import StageSolution
from rgap.separation.batch import Batch, Separated
from rgap.separation.route import undetermined
from rgap.solvers.kronecker import factor
from rgap.solvers.rank import Evidence, EvidenceKind
from rgap.solvers.solution import Result, Solution, Stats
from rgap.update.losses import Loss
from rgap.update.targets import BINARY, CROSS_ENTROPY

HANDED_OUT = (
    USEFUL / SAFETY
)  # standard error, in parts of the largest value, of features handed out


def batch_of(problem: Problem) -> Batch:
    """What separating needs to know of a problem.

    Several labels a sample are told apart like any dense targets: see :func:`snapped`.
    """
    loss = problem.update.loss
    if multilabel(loss, problem.chain):
        loss = replace(loss, targets="probability")
    return Batch(
        problem.chain, problem.gradients, loss, problem.precision, problem.stated, problem.room,
        deadline=time.perf_counter() + problem.left,
    )  # fmt: skip


def multilabel(loss: Loss, chain: Chain) -> bool:
    """True if a sample may have several labels, or none: 0/1 for each of several logits."""
    return loss.name == BINARY and loss.targets == "index" and prod(chain.output_shape) > 1


def snapped(
    problem: Problem, head: BatchLoss, features: Estimate, logits: Estimate
) -> tuple[BatchLoss, float, float]:
    """The labels nearest to dense targets, how far they are, and what errors explain of it.

    ``t = σ(z) − κ/s``: what is left of the error of z and of the update's own.

    Args:
        problem: the update.
        head: dense targets, read off the head's gradient.
        features: u, [R, d], that they were read off with, with their errors.
        logits: z, [R, C], with their errors.
    """
    nearest = (head.targets > 0.5).to(head.targets)
    distance = float((head.targets - nearest).abs().max())
    exact = replace(head, loss=replace(head.loss, targets="index"), targets=nearest)
    if not head.loss.plain:
        rounded = ENSEMBLE * PROBABILITY * problem.precision.unit
        return exact, distance, rounded + tolerance_of(problem, head, features, logits)
    p = torch.sigmoid(logits.value)
    carried = _carried(features, (p - head.targets) * head.scale) / head.scale
    moved = (p * (1.0 - p) * logits.error - carried).square().mean(0).sqrt()
    added = errors_of_targets(problem, features.value) / head.scale
    own = PROBABILITY * problem.precision.unit + added
    return exact, distance, ENSEMBLE * float((moved + own).max())


def error_of_targets(
    problem: Problem, head: BatchLoss, features: Estimate, logits: Estimate
) -> float:
    """Largest standard error of dense targets that were read off the head's own gradient.

    Args:
        problem: the update.
        head: the targets.
        features: u, [R, d], with their errors.
        logits: z, [R, C], with theirs.
    """
    kappa = head.cotangent(logits.value)
    if len(kappa) > features.value.shape[1] + 1:
        return inf  # more samples than numbers at the head: its gradient leaves some of κ open
    own = problem.precision.normal(errors_of_targets(problem, features.value), len(logits.error))
    k = Estimate(kappa / head.scale, (_carried(features, kappa) + own) / head.scale)
    return standard_error(replace(head.loss, reduction="sum"), logits, k, problem.precision)


def _carried(features: Estimate, kappa: Tensor) -> Tensor:
    """Error of κ [R, C] for every error of the features it was read by, ``δκ = −(uᵀ)⁺ δuᵀ κ``."""
    table = torch.nn.functional.pad(features.value, (0, 1), value=1.0)
    moved = torch.nn.functional.pad(features.error, (0, 1))
    carried: Tensor = -torch.linalg.pinv(table.T) @ (moved.mT @ kappa)
    return carried


def tolerance_of(problem: Problem, head: BatchLoss, features: Estimate, logits: Estimate) -> float:
    """How far dense targets may be off by the errors of features and logits and of the update.

    Args:
        problem: the update.
        head: with the targets.
        features: u, [R, d], with their errors.
        logits: z, [R, C], with their errors.
    """
    kappa = head.cotangent(logits.value)
    own = errors_of_targets(problem, features.value)
    moved = _carried(features, kappa) + problem.precision.normal(own, len(logits.error))
    off = [
        head.explained(logits.value + dz, kappa + dk).targets - head.targets
        for dz, dk in zip(logits.error, moved, strict=True)
    ]
    return ENSEMBLE * float(torch.stack(off).abs().max())


def errors_of_targets(problem: Problem, features: Tensor) -> Tensor:
    """Standard error of κ under rounding and noise of the head's own ``[G | ∂b] = κᵀ [u | 1]``.

    Features that are nearly alike, as behind a sigmoid, pass on the rounding of the gradient many
    times over.

    Args:
        problem: the update.
        features: u, [R, d].

    Returns:
        Of every sample and logit, [R, C].
    """
    affine, precision = problem.chain.stages[-1].affine, problem.precision
    columns, names = [features], [affine.weight_name]
    parts = [affine.sent(problem.gradients).to(features)]
    if affine.bias_name is not None:
        columns.append(torch.ones_like(features[:, :1]))
        names.append(affine.bias_name)
        parts.append(problem.gradients[affine.bias_name][:, None].to(features))
    table = torch.cat(columns, 1)
    back = torch.linalg.pinv(table.T)
    kappa = back @ torch.cat(parts, 1).T
    std = []
    for name, column, part in zip(names, columns, parts, strict=True):
        squares = kappa.square().T @ column.square()
        like = squares.reshape(part.shape if name == affine.weight_name else (-1,))
        std.append(precision.update_std(name, like, part.reshape(like.shape)).reshape(part.shape))
    out: Tensor = (back.square() @ torch.cat(std, 1).T.square()).sqrt()
    return out


def separated_stage(problem: Problem, separated: Separated) -> StageSolution:
    """The separated stage as the recursion reports its own: ranks, errors, a factor to polish with.

    The factor is that of the gradient rows alone, ``Kᵀ Σ⁻¹ K``, the same for every input feature.

    Args:
        problem: the update, one row a different picture.
        separated: features [B, n] and cotangents [B, m] of the stage, with their errors.
    """
    affine = separated.stage.affine
    unknowns = separated.features.value.numel()
    k, x = separated.cotangents.value.flatten(1), separated.features.value.flatten(1)
    std = problem.precision.update_std(affine.weight_name, k.square().T @ x.square(), k.T @ x)
    weights = std.square().mean(1).sqrt().clamp_min(1e-300).reciprocal()
    made = factor(gradient_constraint(affine, k), weights[None], None, None)
    gradient = separated.mixture.gradient
    residual = float((k.T @ x - gradient).norm() / gradient.norm())
    seen = Evidence(EvidenceKind.ERROR, separated.worst, DETERMINED, unknowns)
    condition = 1.0 / separated.mixture.ratio
    stats = Stats("separation", unknowns, unknowns, seen, condition, residual)
    return StageSolution(
        Solution(separated.features, Result.SOLVED, stats),
        made,
        separated.cotangents.value,
        x.new_ones(len(x), *affine.out_shape, dtype=torch.bool),
        0.0,
        0.0,
        separated.seconds,
    )


@dataclass(frozen=True)
class BatchRows:
    """What is reported of a batch: a row for every picture and label that it occurs with.

    Attributes:
        picture: index of the recovered picture, [rows].
        labels: [rows], or dense targets [rows, C].
        copies: how often the row occurs, [rows].
    """

    picture: Tensor
    labels: Tensor
    copies: Tensor

    def expanded(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The batch as the client had it, up to its order: every copy a row of its own."""
        index = self.picture.repeat_interleave(self.copies)
        return inputs[index], self.labels.repeat_interleave(self.copies, 0)


def in_order(targets: Tensor, stated: Tensor) -> Tensor | None:
    """The rows of ``targets`` in the order of the stated ones that is nearest to these in all.

    Equal rows, and rows that errors bring to another one, are each taken once.  None where there
    are more or fewer.

    >>> in_order(torch.tensor([2, 0, 1]), torch.tensor([0, 1, 2])).tolist()
    [1, 2, 0]
    """
    own, wanted = targets.reshape(len(targets), -1), stated.reshape(len(stated), -1)
    if own.shape != wanted.shape:
        return None
    gaps = torch.cdist(wanted.double().cpu(), own.double().cpu())
    return torch.as_tensor(linear_sum_assignment(gaps.numpy())[1], device=targets.device)


def rows_of(head: BatchLoss, stated: Tensor | None) -> BatchRows:
    """The reported rows, by label; in the order of the stated labels where they agree.

    Args:
        head: targets [R, C] and copies [R] of the pictures.
        stated: labels of the caller, [B], or None.
    """
    dense = head.loss.targets != "index"
    if dense or (head.loss.name == BINARY and head.targets.shape[1] > 1):
        order = torch.arange(len(head.targets), device=head.targets.device)
        targets = head.targets if dense else head.targets.long()
        near = None if stated is None else in_order(targets, stated)
        order = order if near is None else near
        return BatchRows(order, targets[order], head.copies[order].long())
    counts = head.targets * head.copies[:, None]
    if head.targets.shape[1] == 1:  # one logit: label 1 as often as its target says
        counts = torch.cat([head.copies[:, None] - counts, counts], 1)
    counts = counts.round().long()
    label, picture = counts.T.nonzero(as_tuple=True)
    copies = counts[picture, label]
    if stated is not None and bool((copies == 1).all()) and len(stated.flatten()) == len(label):
        order = stated.flatten().long().argsort(stable=True)
        if torch.equal(stated.flatten().long()[order], label):
            back = order.argsort()
            label, picture, copies = label[back], picture[back], copies[back]
    return BatchRows(picture, label, copies)


def label_identity(
    problem: Problem, head: BatchLoss, logits: Estimate
) -> tuple[Tensor | None, float, float]:
    """Class counts by the identity, their distance from those that were found, and the tolerance.

    Under cross-entropy with label smoothing ε, m copies a row and C classes

        n_j = (Σ m p_j − ∂b_j/s − Σ m · ε/C) / (1 − ε);

    None where the head has no bias or the loss has no such identity.

    Args:
        problem: the update.
        head: the loss of the batch with targets and copies, [R, C] and [R].
        logits: z [R, C], with their errors.

    Returns:
        n [C], the largest distance from the counts that were found, what errors explain of it.
    """
    stage, loss = problem.chain.stages[-1], head.loss
    name = stage.affine.bias_name
    plain = loss.name == CROSS_ENTROPY and loss.plain
    if name is None or not plain or not problem.precision.sent(name):
        return None, 0.0, 0.0  # nothing to miss
    bias = problem.gradients[name]
    total = float(head.copies.sum())
    s = loss_scale(loss, total, len(bias))
    p = torch.softmax(logits.value, 1)
    smoothing = loss.label_smoothing
    expected = (head.copies[:, None] * p).sum(0)
    counts = (expected - bias / s - total * smoothing / len(bias)) / (1.0 - smoothing)
    met = (head.copies[:, None] * head.targets).sum(0)
    dp = p * (logits.error - (p * logits.error).sum(-1, keepdim=True))
    moved = (head.copies[:, None] * dp).sum(1).square().mean(0).sqrt()
    precision = problem.precision
    own = total * (PROBABILITY * precision.unit) + precision.noise_std(name, bias) / s
    tolerance = ENSEMBLE * float((moved + own).max()) / (1.0 - smoothing)
    return counts, float((counts - met).abs().max()), tolerance


def descended(
    problem: Problem, separated: Separated, watch: Watch = silent
) -> tuple[Problem, Descent]:
    """The recursion from the stage at which a batch was told apart.

    Args:
        problem: the update.
        separated: its samples, those that are copies of one picture only once.
        watch: told the name of each stage.

    Returns:
        The problem with one row a different picture, and the descent with the stage it began at.
    """
    own = replace(problem, batch=len(separated.features.value))
    index = separated.stage.index
    descent = own.descend(index, separated.features, separated.cotangents, watch)
    solutions = {**descent.solutions, index: separated_stage(own, separated)}
    return own, replace(descent, solutions=solutions)


def certified_rows(problem: Problem, separated: Separated, descent: Descent) -> dict[str, Estimate]:
    """Inputs of layers [B, *in_shape] of a batch whose recursion ended early, from the lowest up.

    The last layer's is that of the samples, carried up.
    Only of samples that each occur once and whose own equations outnumber their unknowns, a point
    that a mixture of them does not satisfy; {} otherwise.

    Args:
        problem: with one row a different picture.
        separated: where the samples were told apart.
        descent: from there.
    """
    samples, rows = separated.mixture, len(separated.features.value)
    if descent.data is not None or descent.partial is not None or descent.refuted:
        return {}
    if problem.stated != rows or bool((separated.head.copies > 1).any()):
        return {}
    at_head = separated.stage is problem.chain.stages[-1]
    if samples.spare(int(at_head)) <= 0:  # κ sums to 0 at a head
        return {}
    if undetermined(batch_of(problem), separated):
        return {}
    stages = problem.chain.stages
    index, precision = separated.stage.index, problem.precision
    top = rounded_features(problem.chain, separated.features, index, precision)
    own = precision.unit * top.value.abs()
    top = replace(top, error=top.error + precision.normal(own, len(top.error)))
    features = {len(stages) - 1: top, **descent.features}
    return {
        stages[index].name: u
        for index, u in sorted(features.items())
        if bool(u.known.all()) and float(u.std.max()) <= HANDED_OUT * float(u.value.abs().max())
    }
