"""Solve one stage: from its gradient, its pre-activation z and its cotangent k to its input u.

The rows are weighed by what is known of their error (generalised least squares): gradient rows
by the update's precision and the error of k, weight rows by the error of z.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from rgap.arithmetic.rounding import ABSENT
from rgap.constraints import WeightConstraint, gradient_constraint, gradient_rows, weight_constraint
from rgap.constraints.known_input import matrix_noise
from rgap.constraints.partial import MOST, Kept, kept, marked
from rgap.constraints.ranks import joint_rank_work, stage_joint_rank, weight_row_spaces
from rgap.jacobian.layer import each
from rgap.limits import AGREE, DETERMINED, FITS, HOPELESS, SHARP, TRUSTED
from rgap.machine.allowance import CHOLESKY, Ahead, factorisation, freely
from rgap.network.affine import Affine
from rgap.precision import UNKNOWN, Estimate, Precision
from rgap.recursion.matrix_free import memory, solve_matrix_free
from rgap.solvers.kronecker import Factor, factor
from rgap.solvers.rank import Evidence, EvidenceKind, Rank
from rgap.solvers.solution import Result, Solution, Stats

log = logging.getLogger(__name__)

BUDGET = 4e9  # bytes; 11,000 unknowns
DEAR = 5e10  # operations of a joint factor up to which it is always made: a few seconds


@dataclass(frozen=True)
class StageSolution:
    """The input of a stage with its error, and how it was found.

    Entries of the input that no kernel reads are no unknowns of its equations: the statistics do
    not count them, and the solution marks them as unknown.  ``partial`` is what is determined of
    an input that is not determined as a whole.
    """

    solution: Solution[Estimate | None]
    factor: Factor | None
    cotangent: Tensor
    active: Tensor  # True where z is known, [B, *out_shape]
    gradient_misfit: float  # rms of the weighted gradient residuals; about 1 when consistent
    weight_misfit: float  # the same for the weight rows
    seconds: float
    partial: Estimate | None = None

    @property
    def misfit(self) -> float:
        """The larger of the two misfits."""
        return max(self.gradient_misfit, self.weight_misfit)


def solve_stage(
    affine: Affine,
    gradient: Tensor,
    z: Estimate,
    k: Estimate,
    precision: Precision,
    budget: float = BUDGET,
    *,
    parts: bool = False,
    ahead: Ahead = freely,
) -> StageSolution:
    """Solve ``K u = G`` and ``W u = z − b`` for u [B, *in_shape] with errors.

    Args:
        affine: the stage's affine map.
        gradient: ∂L/∂W as sent, shape of the weight, float64.
        z: pre-activation [B, *out_shape] with its ensemble.
        k: cotangent at z with its ensemble.
        precision: of the update.
        budget: bytes above which the equations are solved without forming a matrix.
        parts: where the equations fall short, find the entries that they fix all the same.
        ahead: asked before every factorisation and rank, and at every product of an iteration.

    Raises:
        OutOfTime: ``ahead`` says that there is no time.
    """
    start = time.perf_counter()
    gradient, k = _heard(gradient, k)
    if memory(affine, len(z.value)) > budget:
        return _without_matrix(affine, gradient, z, k, precision, start, ahead)
    stage = _Stage(affine, gradient, z, k, precision, ahead)
    solution, made = stage.solve()
    partial: Estimate | None = None
    misfits = (0.0, 0.0)
    if solution.value is not None:
        misfits = stage.misfits(solution.value.value)
        solution = replace(solution, value=_unread(affine, solution.value, precision))
    elif parts:
        partial, misfits = stage.partial()
    seconds = time.perf_counter() - start
    return StageSolution(solution, made, k.value, z.known, *misfits, seconds, partial)


def _heard(gradient: Tensor, k: Estimate) -> tuple[Tensor, Estimate]:
    """Both without the filters whose cotangent is its own error: 0 = 0 is what these say.

    At u = 0 the error of k carries nothing into ``K u``, so that such a row would fix u = 0 as if
    it were certain, or contradict a gradient that is not 0.
    """
    silent = k.silent
    if not bool(silent.any()):
        return gradient, k
    outputs = silent.reshape(-1, *[1] * (k.value.ndim - 2))
    zeros = Estimate(k.value.masked_fill(outputs, 0.0), k.error.masked_fill(outputs, 0.0))
    return gradient.masked_fill(silent.reshape(-1, *[1] * (gradient.ndim - 1)), 0.0), zeros


def _unread(affine: Affine, known: Estimate, precision: Precision) -> Estimate:
    """The input of a layer with what no kernel reads marked as unknown."""
    if bool(affine.reads.all()):
        return known
    # Signs at random: what a step above mixes of two unknown entries must not cancel.
    signs = precision.signs(known.error.shape).to(known.error)
    return Estimate(known.value, torch.where(affine.reads, known.error, UNKNOWN * signs))


def _without_matrix(
    affine: Affine,
    gradient: Tensor,
    z: Estimate,
    k: Estimate,
    precision: Precision,
    start: float,
    ahead: Ahead,
) -> StageSolution:
    iterated = solve_matrix_free(affine, gradient, z, k, precision, ahead)
    if iterated.value is not None:
        iterated = replace(iterated, value=_unread(affine, iterated.value, precision))
    unknowns = len(z.value) * int(affine.reads.sum())
    solved = iterated.value is not None
    seen = Evidence(EvidenceKind.AGREEMENT, iterated.disagreement, AGREE, unknowns)
    residual = _residual(affine, gradient, iterated.value.value, k) if iterated.value else inf
    stats = Stats(
        "lsmr", unknowns, None, seen if solved else None, iterated.condition, residual,
        iterated.iterations,
    )  # fmt: skip
    result = Result.SOLVED if solved else Result.DEFICIENT
    seconds = time.perf_counter() - start
    return StageSolution(
        Solution(iterated.value, result, stats), None, k.value, z.known, *iterated.misfits, seconds
    )


def _residual(affine: Affine, gradient: Tensor, u: Tensor, k: Estimate) -> float:
    """‖K u − G‖/‖G‖."""
    gap = affine.weight_gradient(u, k.value) - gradient
    return float(gap.norm() / gradient.norm().clamp_min(1e-300))


class _Stage:
    def __init__(
        self,
        affine: Affine,
        gradient: Tensor,
        z: Estimate,
        k: Estimate,
        precision: Precision,
        ahead: Ahead,
    ) -> None:
        self.affine, self.k, self.z, self.precision = affine, k, z, precision
        self.ahead = ahead
        self.batch = z.value.shape[0]
        self.gradient = gradient
        self.rows = gradient_rows(affine, gradient)
        self.kronecker = gradient_constraint(affine, k.value, read_only=True)
        self.unknowns = self.kronecker.channels * self.kronecker.matrix.shape[2]
        self.coupling: WeightConstraint = weight_constraint(affine, self.batch, read_only=True)
        bias = affine.forward(z.value.new_zeros(1, *affine.in_shape))
        self.target = (z.value - bias).flatten()
        self.gradient_weights = self.target.new_ones(self.kronecker.matrix.shape[:2])
        self.weight_weights = torch.ones_like(self.target)

    def solve(self) -> tuple[Solution[Estimate | None], Factor | None]:
        groups, rows, columns = self.kronecker.matrix.shape
        self.ahead(groups * factorisation(rows, columns))
        own = self.kronecker.rank(noise=matrix_noise(self.kronecker, self.k, self.precision))
        self.weigh(self.ridge())
        made, route = None, "gradient"
        if own.nullity == 0:
            made = factor(self.kronecker, self.gradient_weights, None, None)
        if made is None or (not self.suffices(made) and self.weight_rows_help(made)):
            ceiling = self.kronecker.rank().rank + int(self.z.known.sum())
            stacked = None
            if ceiling >= self.unknowns:
                self.ahead(factorisation(self.unknowns, self.unknowns, CHOLESKY) / groups**2)
                stacked = self.joined(apart=True)
            if stacked is not None and self.determined(stacked):
                made, route = stacked, "cholesky"
        if made is None:
            joint = self.joint_rank()
            stats = Stats("rank only", self.unknowns, own.rank, joint, joint.condition, 0.0)
            return Solution(None, Result.DEFICIENT, stats), None
        known, iterations = self.compute(made)
        if not bool(self.kronecker.spectra.any()):  # no gradient rows: u is known only now
            self.weigh(self.coupling.unfold(known.value)[0])
            if (again := self.joined()) is not None:
                made = again
                known, iterations = self.compute(made)
        if route == "gradient":  # which the weight rows have to meet to its own error
            carried = each(self.affine.linear, known.error).square().mean(0).flatten()
            self.weight_weights = (self.weight_weights.pow(-2) + carried).rsqrt()
        error = 1.0 / max(made.smallest, 1e-300)
        seen = Evidence(EvidenceKind.ERROR, error, DETERMINED, self.unknowns)
        left = _residual(self.affine, self.gradient, known.value, self.k)
        stats = Stats(route, self.unknowns, own.rank, seen, made.condition, left, iterations)
        return Solution(known, Result.SOLVED, stats), made

    def joined(self, apart: bool = False) -> Factor | None:
        """Of both blocks, as they are weighed."""
        blocks = self.kronecker, self.gradient_weights, self.coupling, self.weight_weights
        return factor(*blocks, apart=apart)

    def determined(self, made: Factor) -> bool:
        """True if every direction is known to ``DETERMINED``.

        A Cholesky factor exists for singular matrices too, once rounding lifts the zero: beyond
        ``TRUSTED`` its smallest singular value says nothing, and the ranks decide.
        """
        if made.smallest * DETERMINED <= 1.0:
            return False
        if made.condition <= TRUSTED:
            return True
        joint = self.joint_rank()
        return made.condition <= HOPELESS and joint.nullity == 0 and joint.clear

    def joint_rank(self) -> Rank:
        """Rank of both blocks, of the rows that are known at all."""
        self.ahead(joint_rank_work(self.affine, self.batch))
        spaces = weight_row_spaces(self.affine, self.z.known)
        every = gradient_constraint(self.affine, self.k.value)
        noise = matrix_noise(self.kronecker, self.k, self.precision)
        rank = stage_joint_rank(self.affine, every, spaces, noise, self.k.value)
        return replace(rank, size=self.unknowns)

    def fixed(self) -> Kept | None:
        """The directions of the input that the equations fix, where they leave others open."""
        channels, size = self.kronecker.channels, self.kronecker.matrix.shape[2]
        if channels * size > MOST:
            return None
        weighted = self.kronecker.scaled(self.gradient_weights)
        blocks = weighted.matrix.transpose(1, 2) @ weighted.matrix
        matrix = blocks.new_zeros(channels, size, channels, size)
        for c in range(channels):
            matrix[c, :, c, :] = blocks[c // (channels // len(blocks))]
        self.coupling.add_gram(self.weight_weights.square(), matrix)
        whole = Factor(weighted, self.coupling, self.weight_weights, blocks[:0])
        return kept(whole, matrix.reshape(channels * size, -1), DETERMINED)

    def partial(self) -> tuple[Estimate | None, tuple[float, float]]:
        """What the equations fix of an input that they do not fix as a whole, and the misfits.

        Nothing where they contradict each other.
        """
        made = self.fixed()
        if made is None or not bool(made.determined().any()):
            return None, (0.0, 0.0)
        known, _ = self.compute(made)
        misfits = self.misfits(known.value)
        if max(misfits) > FITS:
            return None, (0.0, 0.0)
        shape = (1, self.affine.in_shape[0], -1)
        inside = self.coupling.fold(made.determined().double().reshape(shape)) > 0.5
        rows = self.coupling.fold(made.rows.reshape(shape))
        signs = self.precision.signs(known.error.shape).to(rows)
        return marked(known, inside, rows, signs), misfits

    def ridge(self) -> Tensor:
        """A first look at u from the gradient block alone, to weigh rows with; [C, P]."""
        matrix = self.kronecker.matrix
        groups, rows, size = matrix.shape
        rhs = self.rows.reshape(groups, -1, rows).transpose(1, 2)
        wide = rows < size
        gram = matrix @ matrix.transpose(1, 2) if wide else matrix.transpose(1, 2) @ matrix
        damp = 1e-6 * gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-300)
        gram = gram + damp[:, None, None] * torch.eye(
            gram.shape[-1], dtype=gram.dtype, device=gram.device
        )
        if not wide:
            rhs = matrix.transpose(1, 2) @ rhs
        x: Tensor = torch.linalg.solve(gram, rhs)
        if wide:
            x = matrix.transpose(1, 2) @ x
        return x.transpose(1, 2).reshape(-1, size)

    def weigh(self, table: Tensor) -> None:
        """Set the weights of both blocks from an estimate of u."""
        u = self.coupling.fold(table[None])
        std = self.precision.update_std(self.affine.weight_name, self.squares(u))
        carried = torch.zeros_like(std)
        for error in self.k.error:
            carried += self.affine.weight_gradient(u, error).square_()
        variance = gradient_rows(self.affine, std.square() + carried / len(self.k.error))
        groups, rows, _ = self.kronecker.matrix.shape
        filters = self.affine.weight.shape[0] // groups
        per_filter = variance.reshape(groups, -1, filters, rows // filters).mean((1, 3))
        std_rows = per_filter.sqrt().repeat_interleave(rows // filters, 1)
        self.gradient_weights = 1.0 / std_rows.clamp_min(1e-300)
        forward = self.affine_squares(u)
        variance = self.z.std.square() + self.precision.sum_std(forward).square()
        self.weight_weights = 1.0 / variance.flatten().sqrt().clamp_min(1e-300)
        self._level()

    def _level(self) -> None:
        """Believe the weight rows to no more than a factor can hold beside the gradient rows.

        Where these alone are noisy, rows that are known to the last bit outweigh them by more than
        the digits of a Cholesky factor.  Off by 1/``TRUSTED`` of what that noise makes of them, the
        weight rows say the same.
        """
        heard = self.gradient_weights * (self.gradient_weights > 1.0 / ABSENT)
        own = float(self.kronecker.scaled(heard).matrix.square().mean())
        other = float(self.affine.weight.square().mean())
        if own > 0.0 and other > 0.0:
            most = TRUSTED * (own / other) ** 0.5
            self.weight_weights = self.weight_weights.clamp_max(most)

    def squares(self, u: Tensor) -> Tensor:
        """Σ k² u², the squared terms of each gradient entry."""
        return self.affine.weight_gradient(self.precision.squares(u), self.k.value.square())

    def affine_squares(self, u: Tensor) -> Tensor:
        """Σ w² u², the squared terms of each pre-activation."""
        return self.affine.squared().linear(self.precision.squares(u))

    def suffices(self, made: Factor) -> bool:
        """True if the gradient block is sharp enough, and the joint factor too dear.

        What the weight rows would add is not lost: the polish hears every equation of the update.
        """
        groups = len(self.kronecker.matrix)
        operations = groups * (self.unknowns / groups) ** 3 / 3
        return operations > DEAR and made.condition <= TRUSTED and made.smallest * SHARP >= 1.0

    def weight_rows_help(self, made: Factor) -> bool:
        """True if the weight rows add information worth a factorisation to a full gradient block.

        Compares the information per unknown of the two blocks; the weight rows are skipped where
        the gradient rows already give all but a few per cent of the accuracy.
        """
        inverse = torch.cholesky_inverse(made.cholesky).diagonal(dim1=-2, dim2=-1)
        per_channel = self.kronecker.channels // inverse.shape[0]
        own = inverse.repeat_interleave(per_channel, 0)  # variance by the gradient rows, [C, P]
        shape = (self.batch, *self.affine.out_shape)
        extra = self.affine.squared().adjoint(self.weight_weights.square().reshape(shape))
        information = self.coupling.unfold(extra)[0]
        gain = own * information  # relative gain in information, an upper bound
        return bool(gain.median() > 0.5)

    def compute(self, made: Factor) -> tuple[Estimate, int]:
        """Solve for u, then once more for every member of the ensemble."""
        main = self.weighted(made, self.rows[None], self.target[None])
        table, iterations = made.solve(main, tolerance=self.precision.solved)
        u = self.coupling.fold(table)
        std = self.precision.update_std(self.affine.weight_name, self.squares(u))
        forward = self.precision.normal(self.precision.sum_std(self.affine_squares(u)))
        coupled = (self.z.error + forward).flatten(1)
        # One member at a time: each has as many rows as the layer has weights.
        members = (
            self.weighted(made, self.perturbed(std, u, error), target[None])
            for error, target in zip(self.k.error, coupled, strict=True)
        )
        if made.condition <= TRUSTED:
            errors = made.precondition(torch.cat([made.adjoint(member) for member in members]))
        else:
            errors = torch.cat([made.solve(member, 30, tolerance=1e-2)[0] for member in members])
        folded = self.coupling.fold(errors)
        return Estimate(u, folded.reshape(len(errors), *u.shape)), iterations

    def perturbed(self, std: Tensor, u: Tensor, error: Tensor) -> Tensor:
        """What one draw of the update's own error and one error of k do to the gradient rows."""
        noise = self.precision.normal(std, samples=1)
        noise -= self.affine.weight_gradient(u, error)
        return gradient_rows(self.affine, noise)

    def weighted(self, made: Factor, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        groups, count, _ = self.kronecker.matrix.shape
        scaled = rows.reshape(rows.shape[0], groups, -1, count) * self.gradient_weights[:, None, :]
        first = scaled.reshape(rows.shape)
        return first, None if made.coupling is None else target * self.weight_weights

    def misfits(self, u: Tensor) -> tuple[float, float]:
        """Weighted rms residuals of the gradient and of the weight rows."""
        gap = gradient_rows(
            self.affine, self.affine.weight_gradient(u, self.k.value) - self.gradient
        )
        groups, count, _ = self.kronecker.matrix.shape
        scaled = gap.reshape(groups, -1, count) * self.gradient_weights[:, None, :]
        weight = (self.affine.linear(u).flatten() - self.target) * self.weight_weights
        return float(scaled.square().mean().sqrt()), float(weight.square().mean().sqrt())
