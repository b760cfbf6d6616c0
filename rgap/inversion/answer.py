"""From recovered data back up to the head: its cotangent, its target, its label; and one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from rgap.head.features import HeadCandidate
from rgap.head.target import Reading, logits_of, read_target, unseen_of
from rgap.inversion.batch_rows import (
    BatchRows,
    batch_of,
    error_of_targets,
    label_identity,
    multilabel,
    rows_of,
    snapped,
    tolerance_of,
)
from rgap.inversion.polish import Equations, Polished, polish
from rgap.inversion.problem import Problem
from rgap.inversion.top import head_cotangent, top_features
from rgap.jacobian.batch_loss import BatchLoss
from rgap.limits import NEAREST, PASSES, SAFETY
from rgap.network.chain import Chain
from rgap.network.pooling import LinearMap
from rgap.network.reshape import Rearrange, Reshape
from rgap.precision import OPEN, Estimate, Precision, paired
from rgap.recovery import Route
from rgap.recursion.reached import Descent
from rgap.separation.targets import read_from_head


@dataclass(frozen=True)
class Answer:
    """One candidate that reached the data."""

    descent: Descent
    polished: Polished
    reading: Reading
    rows: BatchRows | None = None  # of a batch; labels are theirs
    apart: bool = False  # True if the inputs do not depend on the loss and the targets
    gathered: float = 0.0  # norm of a sample, in units of the data, that rounding is relative to
    cast: float = 0.0  # unit roundoff of a format that the data may have been cast to on their way
    widened: float = 1.0  # times that the errors may be longer, for what few equations test them
    scaled: float = 0.0  # share of their size by which what was only replayed leaves the data open

    @property
    def labels(self) -> Tensor:
        """The targets, in the form that the loss takes them."""
        return self.reading.labels

    @property
    def inputs(self) -> Tensor:
        """The recovered batch, float64."""
        return self.polished.data.value

    @property
    def predicted(self) -> Tensor:
        """Rms error of every sample, [B], from its ensemble."""
        return self.polished.data.error.square().flatten(2).mean((0, 2)).sqrt()

    @property
    def bound(self) -> float:
        """Largest error of any entry: SAFETY standard errors, more if the misfit is larger.

        A batch comes out of an orthogonal decomposition in float64, whose rounding can gather in
        a few entries: eps times :attr:`gathered`.  Under autocast the first layer takes in data
        that were rounded once, for all rows of its gradient alike: :attr:`cast` times their size.
        """
        std = float(self.polished.data.std.max())
        if std > OPEN:
            return inf
        bound = self.widened * SAFETY * std * max(1.0, self.polished.misfit)
        bound += (self.cast + self.scaled) * float(self.inputs.abs().max())
        if self.rows is None:
            return bound
        return max(bound, PASSES * SAFETY * torch.finfo(torch.float64).eps * self.gathered)

    @property
    def targets_bound(self) -> float | None:
        """The same of targets that may be any numbers; None for classes and labels."""
        error = self.reading.error
        if not error:
            return None
        bound = self.widened * SAFETY * error * max(1.0, self.polished.misfit)
        return bound + self.reading.unseen


def cast_of(precision: Precision) -> float:
    """Unit roundoff of half precision, to which autocast takes the data; 0 for finer formats."""
    return precision.unit if precision.unit > torch.finfo(torch.float32).eps else 0.0


def scaled(answer: Answer, ratio: float, candidate: HeadCandidate) -> Answer:
    """The answer of a root that differs from another one by a positive scale c alone.

    ``x → c·x`` with the errors ``c·e + c·x ‖e_h‖/‖h‖``, h the features of the other root.

    Args:
        answer: of the root that was descended from, x [1, *input_shape].
        ratio: c.
        candidate: the other root.
    """
    data, h = paired(answer.polished.data, candidate.features)
    value = ratio * data.value
    sizes = h.error.norm(dim=-1, keepdim=True).reshape(-1, *([1] * value.ndim))
    wider = Estimate(value, ratio * data.error + value * sizes / h.value.norm())
    polished = replace(answer.polished, data=wider)
    return replace(answer, polished=polished, reading=candidate.reading)


def families(candidates: list[HeadCandidate], chain: Chain) -> list[list[HeadCandidate]]:
    """Candidates that one descent answers together.

    In a chain without biases whose activations are positively homogeneous, (c·x, k/c) satisfies
    every equation below the head that (x, k) does: roots of one sign differ by a scale alone.

    Args:
        candidates: solutions of the head equations.
        chain: the network.

    Returns:
        Lists of candidates, the first of each to descend from.
    """
    homogeneous = all(
        stage.affine.bias is None
        and all(isinstance(op, Reshape) or getattr(op, "homogeneous", False) for op in stage.tail)
        and all(isinstance(op, (Reshape, Rearrange, LinearMap)) for op in stage.lead)
        for stage in chain.stages
    )
    if not homogeneous:
        return [[candidate] for candidate in candidates]
    signs = (True, False)
    groups = [[c for c in candidates if (c.scale > 0) is positive] for positive in signs]
    return [group for group in groups if group]


def of_labels(candidates: list[HeadCandidate], labels: Tensor | None) -> list[HeadCandidate]:
    """The candidates whose labels are the stated ones."""
    if labels is None:
        return candidates
    wanted = labels.flatten().double()
    return [c for c in candidates if torch.equal(c.labels.flatten().double(), wanted)]


class Run(NamedTuple):
    """A descent and what it began with.

    Attributes:
        descent: as far as it got.
        kappa: cotangent at the head [B, m], the loss of a batch; None where the head had no part.
        family: roots at the head that differ by a scale, the first of which was descended from.
    """

    descent: Descent
    kappa: Estimate | BatchLoss | None
    family: Sequence[HeadCandidate] = ()


def answers_of(problem: Problem, run: Run) -> list[Answer]:
    """The answer of a descent to the data, and those that another root at the head scales it to."""
    descent, kappa, family = run
    if isinstance(kappa, BatchLoss):
        return [read_batch(problem, descent, kappa)]
    known = head_cotangent(problem, descent) if kappa is None else kappa
    answer = read_answer(problem, descent, known, apart=kappa is None)
    return [answer, *(scaled(answer, one.scale / family[0].scale, one) for one in family[1:])]


def read_answer(problem: Problem, descent: Descent, kappa: Estimate, apart: bool = False) -> Answer:
    """Polish what the recursion recovered and read its label at the head.

    Args:
        problem: the update.
        descent: that reached the data.
        kappa: cotangent at the head.
        apart: True if nothing of the loss went into what was recovered.
    """
    polished = polished_from(problem, descent, kappa)
    stage = problem.chain.stages[-1]
    features = top_features(problem.chain, polished.data)
    reading = read_target(stage, features, kappa, problem.update.loss, problem.precision)
    return Answer(descent, polished, reading, apart=apart, cast=cast_of(problem.precision))


def read_batch(problem: Problem, descent: Descent, head: BatchLoss) -> Answer:
    """Polish the pictures of a batch all together and check their labels by the identity.

    Args:
        problem: the update, one row a different picture.
        descent: that reached the data.
        head: loss, targets and copies of the batch, as it was separated with.
    """
    continuous, labels = head.continuous, multilabel(problem.update.loss, problem.chain)
    posed = head
    if labels:
        features, logits = _top(problem, descent.require_data())
        exact, distance, _ = snapped(problem, head, _flat(features), logits)
        posed = exact if distance < NEAREST else head
    polished = polished_from(problem, descent, posed)
    norm = gathered(problem.chain, polished)
    if continuous and not polished.eliminated:
        # They come from the head's gradient by its features, as well as these tell samples apart.
        table = _flat(_top(problem, polished.data)[0]).value
        values = torch.linalg.svdvals(torch.nn.functional.pad(table, (0, 1), value=1.0))
        norm *= float(values[0] / values[-1].clamp_min(1e-300))
    # The members carry the client's rounding; what ours gathers is the larger one in float64.
    own = PASSES * torch.finfo(torch.float64).eps * norm
    if continuous and not polished.eliminated:  # held, so what it gains on the descent is theirs
        own = max(own, float(descent.require_data().std.max()))
    wider = max(1.0, own / max(float(polished.data.std.max()), 1e-300))
    polished = replace(polished, data=_wider(polished.data, wider))
    features, logits = _top(problem, polished.data)
    if polished.eliminated and polished.head is not None:
        head = polished.head
    elif labels:  # they were read at features that the polish has moved since
        head = read_from_head(batch_of(problem), _flat(features).value, logits.value, head)
    if labels:
        head, distance, tolerance = snapped(problem, head, _flat(features), logits)
    elif continuous:
        distance, tolerance = 0.0, tolerance_of(problem, head, _flat(features), logits)
    else:
        _, distance, tolerance = label_identity(problem, head, logits)
    rows = rows_of(head, problem.labels)
    reading = Reading(
        head.targets,
        rows.labels,
        distance,
        tolerance,
        open=head.loss.open_at(logits.value),
        error=error_of_targets(problem, head, _flat(features), logits) if continuous else 0.0,
        unseen=unseen_of(head.loss),
    )
    return Answer(descent, polished, reading, rows, gathered=norm, cast=cast_of(problem.precision))


def _top(problem: Problem, data: Estimate) -> tuple[Estimate, Estimate]:
    """Inputs of the head and its logits, with their errors."""
    features = top_features(problem.chain, data)
    return features, logits_of(problem.chain.stages[-1], features)


def _flat(known: Estimate) -> Estimate:
    return Estimate(known.value.flatten(1), known.error.flatten(2))


def _wider(known: Estimate, times: float) -> Estimate:
    """The same with larger errors."""
    return Estimate(known.value, times * known.error)


def gathered(chain: Chain, polished: Polished) -> float:
    """Norm of the largest sample at the first affine map, as long as it is in units of the data.

    Steps on the data themselves, a sigmoid or a scale, lengthen an error on the way back by one
    over their slope: ``max_b ‖u_b‖ / min |du/dx|``, u = lead(x).

    Args:
        chain: the network.
        polished: the data, [B, *input_shape].
    """
    data = u = polished.data.value
    step = 1e-7 * float(data.abs().max().clamp_min(1e-300))
    moved = data + step
    for op in chain.stages[0].lead:
        u, moved = op.forward(u), op.forward(moved)
    slopes = (moved - u).abs() / step
    slope = float(slopes[slopes > 0].min()) if bool((slopes > 0).any()) else 1.0
    return float(torch.linalg.vector_norm(u.flatten(1), dim=1).max()) / slope


def polished_from(problem: Problem, descent: Descent, kappa: Estimate | BatchLoss) -> Polished:
    """The data of a descent, polished on all equations of the chain.

    Args:
        problem: the update, with the chain that the descent is of.
        descent: that reached the data.
        kappa: cotangent at the end of the chain, or the loss of a batch.
    """
    lowest = descent.solutions.get(0)
    return polish(
        Equations(problem.chain, problem.gradients, problem.precision, problem.width, problem.room),
        descent.require_data(),
        kappa,
        descent.preconditioner(problem.chain),
        settled=lowest is not None and lowest.solution.stats.route == Route.SEPARATION,
    )
