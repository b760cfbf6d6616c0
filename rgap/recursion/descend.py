"""The recursion: from the features of one stage down to the data, one linear system a stage.

``k_{i−1} = (W_iᵀ k_i) ⊙ φ'(z_{i−1})``, ``z_{i−1} = φ^{-1}(x_i)``, and x_{i−1} from the gradient and
weight constraints of stage i−1.  Every value travels with an ensemble of its errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from rgap.constraints import weight_constraint
from rgap.halt import Halt, HaltKind
from rgap.jacobian.layer import each
from rgap.limits import MISTAKEN, ON, REFUTED
from rgap.network.activations import Activation
from rgap.network.chain import Chain, Stage
from rgap.network.pooling import LinearMap, Pool
from rgap.network.reshape import Op, Reshape
from rgap.precision import UNKNOWN, Estimate, Precision
from rgap.progress import Watch, silent
from rgap.recursion.stage import BUDGET, StageSolution, solve_stage

log = logging.getLogger(__name__)

Unpool = Callable[[int, Op, Estimate, Estimate], tuple[Estimate, Estimate] | None]


@dataclass(frozen=True)
class Reached:
    """The lowest stage of which something is known.

    Attributes:
        index: of the stage.
        k: cotangent at its output.
        u: its input; None where its equations leave some of it open.
        z: its pre-activation where they do.
    """

    index: int
    k: Estimate
    u: Estimate | None
    z: Estimate | None


@dataclass(frozen=True)
class Descent:
    """What the recursion recovered, from the top down, and the data if it got there.

    Attributes:
        reached: the lowest stage of which something is known.
        solutions: by stage index.
        data: the input of stage 0 with its ensemble, or None.
        halt: why it ended early, or None.
        inputs: recovered inputs x_i by stage index.
        features: recovered inputs u_i of the affine maps by stage index.
        cotangents: k_i at the outputs of the affine maps by stage index.
        completed: the data come from a completion, not from the equations of every stage.
        mistaken: units of a ReLU, on average, that are on but within their error of off.
        partial: the data where only some of their entries are determined; the others are marked
            as unknown (see :class:`Estimate`).
    """

    reached: Reached
    solutions: Mapping[int, StageSolution] = field(default_factory=dict)
    inputs: Mapping[int, Estimate] = field(default_factory=dict)
    features: Mapping[int, Estimate] = field(default_factory=dict)
    cotangents: Mapping[int, Estimate] = field(default_factory=dict)
    data: Estimate | None = None
    halt: Halt | None = None
    completed: bool = False
    mistaken: float = 0.0
    partial: Estimate | None = None

    def require_data(self) -> Estimate:
        """The recovered data.

        Raises:
            ValueError: the recursion ended before it.
        """
        if self.data is None:
            raise ValueError(f"the recursion ended at '{self.require_halt().stage}'")
        return self.data

    def require_halt(self) -> Halt:
        """Why the recursion ended early.

        Raises:
            ValueError: it did not.
        """
        if self.halt is None:
            raise ValueError("the recursion reached the data")
        return self.halt

    def preconditioner(self, chain: Chain) -> Callable[[Tensor], Tensor] | None:
        """The data stage's factored equations as an approximate inverse of the whole update's.

        ``(Kᵀ Σ⁻¹ K + Wᵀ Ω⁻¹ W)⁻¹`` of stage 0, pulled through its lead.

        Args:
            chain: the network.

        Returns:
            A map of directions [S, B, *input_shape]; None if the data came straight from a bias.
        """
        if self.completed:
            return lambda v: v
        step, stage = self.solutions.get(0), chain.stages[0]
        simple = all(op.elementwise or isinstance(op, Reshape) for op in stage.lead)
        if step is None or step.factor is None or not simple:
            return None
        made = step.factor

        def inverse(v: Tensor) -> Tensor:
            coupling = weight_constraint(stage.affine, v.shape[1], read_only=True)
            u = v
            for op in stage.lead:  # (L⁻¹)ᵀ: a reshape is orthogonal, a scaling its own transpose
                u = each(op.forward, u) if isinstance(op, Reshape) else _affine_error(op, u)
            table = coupling.unfold(u.flatten(0, 1), u.shape[0])
            solved = coupling.fold(made.precondition(table)).reshape(u.shape)
            for op in reversed(stage.lead):
                solved = _affine_error(op, solved)
            return solved

        return inverse

    @property
    def worst(self) -> tuple[int, float]:
        """Stage whose equations contradict each other most, with its weighted rms residual."""
        misfits = [(step.misfit, index) for index, step in self.solutions.items()]
        misfit, index = max(misfits, default=(0.0, -1))
        return index, misfit

    @property
    def doubt(self) -> str:
        """Why equations that contradict each other refute nothing, or "".

        What is above a ReLU tells a small value from none only up to its error, and a cotangent
        that was taken for 0 contradicts the layers below as another model would.
        """
        if self.mistaken < MISTAKEN:
            return ""
        return (
            f"about {self.mistaken:.1g} units of a ReLU are on by less than the error of this "
            "update and were taken for off, which contradicts like another model does"
        )

    @property
    def refuted(self) -> bool:
        """True if the equations of some stage contradict the features it started from."""
        return self.worst[1] > REFUTED


def _mistaken(tail: tuple[Op, ...], x: Estimate) -> float:
    """Units of a ReLU below x that are on by less than their error, on average.

    Those that are on are spread about evenly up to twice their mean.
    """
    if not any(isinstance(op, Activation) and op.one_sided for op in tail):
        return 0.0
    value, std = x.value[x.known], x.std[x.known]
    on = value > ON * std
    if not bool(on.any()):
        return float(len(value))
    share: Tensor = (ON * std / (2.0 * value[on].mean())).clamp_max(1.0)
    return float(share.mean() * on.sum())


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


def descend(
    chain: Chain,
    gradients: Mapping[str, Tensor],
    start: Reached,
    precision: Precision,
    watch: Watch = silent,
    budget: float = BUDGET,
    unpool: Unpool | None = None,
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

    Returns:
        The :class:`Descent`; ``data`` is None when ``halt`` says where it ended.
    """
    solutions = dict[int, StageSolution]()
    inputs, features, cotangents = (dict[int, Estimate]() for _ in range(3))

    def ended(
        halt: Halt | None, *, data: Estimate | None = None, partial: Estimate | None = None
    ) -> Descent:
        return Descent(
            reached, solutions, inputs, features, cotangents, data, halt, partial=partial,
            mistaken=mistaken,
        )  # fmt: skip

    assert start.u is not None
    reached, known, k, mistaken = start, start.u, start.k, 0.0
    for index in range(start.index, -1, -1):
        stage = chain.stages[index]
        if index < start.index:
            watch(stage.name, start.index - index, start.index)
            parts = index == 0 and chain.complete
            step = _solve(stage, gradients, known, k, precision, budget, parts)
            # Only the first factor is needed again; each is as large as the matrix of its layer.
            solutions[index] = step if index == 0 else replace(step, factor=None)
            if step.solution.value is None:
                reached = Reached(index, k, None, known)
                halt = _shortfall(stage, step, precision.sent(stage.affine.weight_name))
                left = step.partial
                partial = None if left is None else _data(stage, left, precision)
                return ended(halt, partial=partial)
            above, known = known, step.solution.value
            whole = bool(known.known.all())
            reached = Reached(index, k, *((known, None) if whole else (None, above)))
            if step.misfit > REFUTED:
                return ended(Halt.contradiction(stage.name))
        cotangents[index], features[index] = k, known
        passed = _lift(stage, known, _carried(stage, k, precision), precision, unpool)
        if isinstance(passed, Halt):
            return ended(passed)
        known, cotangent = passed
        inputs[index] = known
        if index == 0:
            break
        tail = chain.stages[index - 1].tail
        mistaken += _mistaken(tail, known)
        through = _through(tail, known, cotangent, precision)
        if isinstance(through, Halt):
            return ended(through)
        known, k = through
    if chain.complete:
        cut = _cut(chain.stages[0], known)
        return ended(None, data=known) if cut is None else ended(cut, partial=known)
    barrier = chain.barrier
    assert barrier is not None
    return ended(Halt(HaltKind.BARRIER, barrier.node, barrier.words))


def _solve(
    stage: Stage,
    gradients: Mapping[str, Tensor],
    z: Estimate,
    k: Estimate,
    precision: Precision,
    budget: float,
    parts: bool,
) -> StageSolution:
    """The equations of a stage; those of a gradient that says nothing are left out: K = 0."""
    affine = stage.affine
    heard = precision.sent(affine.weight_name) and not _vanished(stage, gradients, k, precision)
    k = k if heard else Estimate(0.0 * k.value, 0.0 * k.error)
    return solve_stage(affine, affine.sent(gradients), z, k, precision, budget, parts=parts)


def _carried(stage: Stage, k: Estimate, precision: Precision) -> Estimate:
    """The cotangent at the input of an affine map, ``Wᵀ k``, with its errors."""
    adjoint = stage.affine.adjoint
    # The terms of the client's sum rounded, however small a result they cancel to.
    terms = stage.affine.adjoint_of_squares(k.value.square())
    rounded = precision.normal(precision.sum_std(terms))
    return Estimate(adjoint(k.value), each(adjoint, k.error) + rounded)


def _cut(stage: Stage, data: Estimate) -> Halt | None:
    """What a ReLU of the data leaves open, and what no kernel of the first layer reads."""
    missing = int((~data.known).sum())
    if not missing:
        return None
    for op in stage.lead:
        if isinstance(op, Activation) and op.one_sided:
            return Halt.cut(op.name, op.kind, data.known.numel(), missing)
    return Halt.unread(stage.name, data.known.numel(), missing)


def _data(stage: Stage, u: Estimate, precision: Precision) -> Estimate | None:
    """Data of which u is the input of the first affine map, some entries marked as unknown."""
    k = Estimate(torch.zeros_like(u.value), torch.zeros_like(u.error))
    lifted = _lift(stage, u, k, precision)
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


def _no_inverse(op: Op) -> Halt:
    """The halt at a step that has a barrier, by what kind of step it is."""
    kind = HaltKind.STEP
    if isinstance(op, Pool):
        kind = HaltKind.POOL
    elif isinstance(op, LinearMap):
        kind = HaltKind.AVERAGE
    elif isinstance(op, Activation):
        kind = HaltKind.ACTIVATION
    assert op.barrier is not None
    return Halt(kind, op.name, op.barrier)


def _lift(
    stage: Stage, u: Estimate, k: Estimate, precision: Precision, unpool: Unpool | None = None
) -> tuple[Estimate, Estimate] | Halt:
    """From the affine map's input u to the stage's input x, through the lead; k alike."""

    def passed(op: Op, u: Estimate, k: Estimate) -> tuple[Estimate, Estimate] | None:
        return None if unpool is None else unpool(stage.index, op, u, k)

    return _through(stage.lead, u, k, precision, passed)


def _through(
    ops: tuple[Op, ...],
    x: Estimate,
    k: Estimate,
    precision: Precision,
    passed: Callable[[Op, Estimate, Estimate], tuple[Estimate, Estimate] | None] | None = None,
) -> tuple[Estimate, Estimate] | Halt:
    """From what comes out of some steps and the cotangent there to what goes in and its own.

    Args:
        ops: the steps, in forward order: a lead, or a tail.
        x: their output, [B, ...].
        k: the cotangent at it.
        precision: of the update.
        passed: asked at a step that has no inverse.
    """
    for op in reversed(ops):
        taken, given = prod(op.in_shape), prod(op.out_shape)
        if op.barrier is not None:
            both = None if passed is None else passed(op, x, k)
            if both is None:
                return _no_inverse(op)
            x, k = both
        elif taken > given:
            return Halt.narrowing(op.name, op.kind, x.value.shape[0], taken, given)
        elif isinstance(op, Activation):  # in a lead: of the data, or above a pooling
            x, k = _invert_activation(op, x, k, precision)
        else:
            x = Estimate(op.inverse(x.value), _affine_error(op, x.error))
            k = Estimate(op.adjoint(k.value), each(op.adjoint, k.error))
    return x, k


def _invert_activation(
    op: Activation, x: Estimate, k: Estimate, precision: Precision
) -> tuple[Estimate, Estimate]:
    """The pre-activation φ^{-1}(x) and k ⊙ φ'(z), with the errors of both.

    A unit of a piecewise linear φ whose sign the error leaves open shows up in the ensemble: its
    slope is taken at each perturbed value.  One-sided units (ReLU at 0) carry no equation: their
    z gets an infinite error, hence weight 0, and their k is 0.
    """
    known = x.known
    if not bool(known.all()):  # of entries that nothing read: any value will do, none is known
        value = torch.where(known, x.value, op.forward(torch.zeros_like(x.value)))
        z, below = _invert_activation(
            op, Estimate(value, torch.where(known, x.error, 0.0)), k, precision
        )
        error = torch.where(known, z.error, x.error)
        return Estimate(torch.where(known, z.value, 0.0), error), below
    # The client's own φ rounded its result, so even an exact x fixes z only to that precision.
    error = x.error + precision.rounding(x.value)
    value = x.value
    if op.one_sided:
        std = error.square().mean(0).sqrt()
        active = value > ON * std
        zero = torch.zeros_like(value)
        z = Estimate(
            torch.where(active, value, zero),
            torch.where(active, error, torch.full_like(error, UNKNOWN)),
        )
        mask = active.to(value)
        return z, Estimate(k.value * mask, k.error * mask)
    slope = op.slope(value)
    curved = op.slope_derivative(value) * error
    bend = op.slope(value + error) - slope if op.homogeneous else curved
    z = Estimate(op.inverse(value), (error / slope.clamp_min(1e-300)).clamp(-UNKNOWN, UNKNOWN))
    product = k.value * slope
    spread = k.error * slope + k.value * bend + precision.rounding(product)
    return z, Estimate(product, spread)


def _affine_error(op: Op, error: Tensor) -> Tensor:
    """D(op^{-1}) error for an affine op: op^{-1}(e) − op^{-1}(0)."""
    zero = op.inverse(torch.zeros_like(error[0]))
    return each(op.inverse, error) - zero
