"""The recursion: from the features of one stage down to the data, one linear system a stage.

``k_{i−1} = (W_iᵀ k_i) ⊙ φ'(z_{i−1})``, ``z_{i−1} = φ^{-1}(x_i)``, and x_{i−1} from the gradient and
weight constraints of stage i−1.  Every value travels with an ensemble of its errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import pi

import torch
from torch import Tensor

from rgap.halt import Halt, HaltKind
from rgap.limits import ON, REFUTED
from rgap.machine.allowance import Ahead, OutOfTime, freely
from rgap.network.activations import Activation
from rgap.network.chain import Chain, Stage
from rgap.network.reshape import Op
from rgap.precision import Estimate, Precision
from rgap.progress import Watch, silent
from rgap.recursion.reached import Descent, Reached
from rgap.recursion.stage import BUDGET, StageSolution, solve_stage
from rgap.recursion.steps import Unpool, down, lift, through
from rgap.recursion.unsettled import Above, settled

__all__ = ["Descent", "Reached", "Unpool", "descend"]


def descend(
    chain: Chain,
    gradients: Mapping[str, Tensor],
    start: Reached,
    precision: Precision,
    watch: Watch = silent,
    budget: float = BUDGET,
    unpool: Unpool | None = None,
    ahead: Ahead = freely,
) -> Descent:
    """Recover the inputs of the stages below one from its input and cotangent.

    Args:
        chain: the network as stages.
        gradients: ∂L/∂W and ∂L/∂b by parameter name, float64.
        start: the stage whose affine input u [B, *affine.in_shape] and cotangent k
            [B, *affine.out_shape] are known.
        precision: of the update; draws the error ensemble.
        watch: told the name of each stage before it is solved, the number of it and of how many.
        budget: bytes above which a stage is solved without forming a matrix.
        unpool: asked at a step that cannot be inverted, with the index of its stage, what is known
            of its output and the cotangent there; gives what is known of its input, or None.
        ahead: asked for time before equations are solved or their rank is counted; a layer for
            which there is none is not determined, and the recursion ends above it.

    Returns:
        The :class:`Descent`; ``data`` is None when ``halt`` says where it ended.
    """
    solutions = dict[int, StageSolution]()
    inputs, features, cotangents = (dict[int, Estimate]() for _ in range(3))

    def ended(
        halt: Halt | None, *, data: Estimate | None = None, left: Estimate | None = None
    ) -> Descent:
        return Descent(
            reached, solutions, inputs, features, cotangents, data, halt, partial=left,
            mistaken=mistaken,
        )  # fmt: skip

    assert start.u is not None
    reached, known, k, mistaken = start, start.u, start.k, 0.0
    over = None  # what is known above the tail of the stage
    for index in range(start.index, -1, -1):
        stage = chain.stages[index]
        if index < start.index:
            watch(stage.name, len(chain.stages) - index, len(chain.stages))
            parts = index == 0 and chain.complete
            solve = partial(
                _solved, stage, gradients, precision=precision, budget=budget, parts=parts,
                ahead=ahead,
            )  # fmt: skip
            step = solve(known, k)
            if isinstance(step, Halt):
                reached = Reached(index, k, None, known)
                return ended(step)
            if step.misfit > REFUTED and over is not None:
                mended = settled(stage, over, k, gradients, precision, solve, step)
                step, k = mended or (step, k)
            # Only the first factor is needed again; each is as large as the matrix of its layer.
            solutions[index] = step if index == 0 else replace(step, factor=None)
            if step.solution.value is None:
                reached = Reached(index, k, None, known)
                halt = _shortfall(stage, step, precision.sent(stage.affine.weight_name))
                left = None if step.partial is None else _data(stage, step.partial, precision)
                return ended(halt, left=left)
            above, known = known, step.solution.value
            whole = bool(known.known.all())
            reached = Reached(index, k, *((known, None) if whole else (None, above)))
            if step.misfit > REFUTED:
                return ended(Halt.contradiction(stage.name))
        cotangents[index], features[index] = k, known
        passed = lift(stage, known, down(stage.affine, k, precision), precision, unpool)
        if isinstance(passed, Halt):
            return ended(passed)
        known, cotangent = passed
        inputs[index] = known
        if index == 0:
            break
        tail = chain.stages[index - 1].tail
        mistaken += _mistaken(tail, known)
        over = Above(known, cotangent)
        below = through(tail, known, cotangent, precision)
        if isinstance(below, Halt):
            return ended(below)
        known, k = below
    if chain.barrier is not None:
        return ended(Halt(HaltKind.BARRIER, chain.barrier.node, chain.barrier.words))
    cut = _cut(chain.stages[0], features[0], known)
    return ended(None, data=known) if cut is None else ended(cut, left=known)


def _solved(
    stage: Stage,
    gradients: Mapping[str, Tensor],
    known: Estimate,
    k: Estimate,
    *,
    precision: Precision,
    budget: float,
    parts: bool,
    ahead: Ahead,
) -> StageSolution | Halt:
    """The input of a stage, or the halt where there is no time for its equations."""
    affine, heard = stage.affine, _heard(stage, gradients, k, precision)
    try:
        return solve_stage(
            affine,
            affine.sent(gradients),
            known,
            heard,
            precision,
            budget,
            parts=parts,
            ahead=ahead,
        )
    except OutOfTime as late:
        unknowns = len(known.value) * int(affine.reads.sum())
        return Halt.late(stage.name, unknowns, str(late))


def _heard(
    stage: Stage, gradients: Mapping[str, Tensor], k: Estimate, precision: Precision
) -> Estimate:
    """The cotangent, or 0, hence K = 0, at a gradient that says nothing."""
    if precision.sent(stage.affine.weight_name) and not _vanished(stage, gradients, k, precision):
        return k
    return Estimate(0.0 * k.value, 0.0 * k.error)


def _mistaken(tail: tuple[Op, ...], x: Estimate) -> float:
    """Units of a ReLU below x that are on by less than their error, and taken for off, on average.

    Those that are on are spread about evenly up to twice their mean.  So many are mistaken at most
    sizes of x; or more, where some are seen further above 0 than those that are off would be.
    """
    if not any(isinstance(op, Activation) and op.one_sided for op in tail):
        return 0.0
    value, std = x.value[x.known], x.std[x.known]
    on = value > ON * std
    if not bool(on.any()):
        return float(len(value))
    width: Tensor = std / (2.0 * value[on].mean())
    before = float((ON * width).clamp_max(1.0).mean() * on.sum())
    share = (value / std.clamp_min(1e-300))[~on]
    likely = float(on.sum()) * width[~on] * torch.special.ndtr(share)
    rival = float((~on).sum()) * torch.exp(-share.square() / 2) / (2 * pi) ** 0.5
    return max(before, float((likely / (likely + rival).clamp_min(1e-300)).sum()))


def _vanished(
    stage: Stage, gradients: Mapping[str, Tensor], k: Estimate, precision: Precision
) -> bool:
    """True if ∂b = k of one sample is 0 throughout, as above saturated units, and G with it.

    A cotangent that was carried down to there is its own error: it is not 0, and would give x = 0.
    """
    affine = stage.affine
    bias = affine.bias_name
    if len(k.value) > 1 or bias is None or not precision.sent(bias):
        return False
    return not bool(gradients[bias].any()) and not bool(gradients[affine.weight_name].any())


def _cut(stage: Stage, u: Estimate, data: Estimate) -> Halt | None:
    """What noise or a ReLU of the data leaves open, and what no kernel of the first layer reads."""
    missing = int((~data.known).sum())
    if not missing:
        return None
    for op in stage.lead:
        if isinstance(op, Activation) and op.one_sided:
            return Halt.cut(op.name, op.kind, data.known.numel(), missing)
    drowned = int((stage.affine.reads & ~u.known).sum())
    if drowned:
        return Halt.drowned(stage.name, u.known.numel(), drowned)
    return Halt.unread(stage.name, data.known.numel(), missing)


def _data(stage: Stage, u: Estimate, precision: Precision) -> Estimate | None:
    """Data of which u is the input of the first affine map, some entries marked as unknown."""
    k = Estimate(torch.zeros_like(u.value), torch.zeros_like(u.error))
    lifted = lift(stage, u, k, precision)
    return None if isinstance(lifted, Halt) else lifted[0]


def _shortfall(stage: Stage, step: StageSolution, sent: bool) -> Halt:
    stats = step.solution.stats
    if not sent and stats.joint is not None:
        return Halt.unsent(stage.name, stats.joint.rank, stats.unknowns)
    if stats.joint is None:
        return Halt.unsolved(stage.name, stats.unknowns)
    if stats.joint.nullity == 0:
        return Halt.ill_conditioned(stage.name, stats.unknowns)
    return Halt.deficient(stage.name, stats.joint.rank, stats.unknowns)
