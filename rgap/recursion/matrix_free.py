"""One stage's equations without any matrix: products through convolutions, LSMR, two starts.

The route for stages whose normal matrix would not fit the memory budget (a first layer at 224²
has 150,528 unknowns).  No rank is counted; that there is no null space shows in two runs from
different random starts that end at the same answer, since LSMR leaves the null space as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from rgap.limits import AGREE
from rgap.machine.allowance import LEAST_ASKED, Ahead, freely
from rgap.network.affine import Affine
from rgap.precision import Estimate, Precision
from rgap.solvers.linear import solve_lsmr

MEMBERS = 4  # members of the ensemble that are solved for; the others repeat them
LIMIT = 4000  # LSMR iterations of one run


def memory(affine: Affine, batch: int) -> float:
    """Bytes that the structured route would need for K, the normal matrix and its factor."""
    unknowns = batch * prod(affine.in_shape)
    positions = batch * prod(affine.in_shape[1:])
    offsets = 1 if affine.geometry is None else prod(affine.geometry.kernel)
    groups = 1 if affine.geometry is None else affine.geometry.groups
    return 8.0 * (2 * unknowns**2 / groups + affine.weight.shape[0] * offsets * positions)


@dataclass(frozen=True)
class MatrixFree:
    """A = [D_g K; D_w W] acting on u·s, with s the column scaling; u is [B, *in_shape]."""

    affine: Affine
    cotangent: Tensor
    gradient_weights: Tensor  # one over the standard error, broadcasts against the weight
    weight_weights: Tensor  # [B, *out_shape]
    scale: Tensor  # [B, *in_shape]
    ahead: Ahead = freely  # asked before every product

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of A."""
        return self.affine.weight.numel() + self.weight_weights.numel(), self.scale.numel()

    def rows(self, gradient: Tensor, target: Tensor) -> Tensor:
        """Right-hand sides of both blocks, weighted, as one vector."""
        first = gradient * self.gradient_weights
        return torch.cat([first.flatten(), (target * self.weight_weights).flatten()])

    def apply(self, x: Tensor) -> Tensor:
        """A x as one vector."""
        self.ahead(LEAST_ASKED)
        u = x.reshape(self.scale.shape) * self.scale
        return self.rows(self.affine.weight_gradient(u, self.cotangent), self.affine.linear(u))

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y as one vector; Kᵀ is the layer's own adjoint with the rows in place of W."""
        cut = self.affine.weight.numel()
        first = y[:cut].reshape(self.affine.weight.shape) * self.gradient_weights
        second = y[cut:].reshape(self.weight_weights.shape) * self.weight_weights
        out = replace(self.affine, weight=first).adjoint(self.cotangent)
        return ((out + self.affine.adjoint(second)) * self.scale).flatten()

    def scaled(self) -> MatrixFree:
        """The same system with columns of unit norm."""
        ones = self.gradient_weights.square().expand(self.affine.weight.shape)
        squares = replace(self.affine, weight=ones).adjoint(self.cotangent.square())
        squares = squares + self.affine.squared().adjoint(self.weight_weights.square())
        # A column that nothing reads stays 0, or no two starts would ever agree on it.
        return replace(self, scale=squares.clamp_min(1e-300).rsqrt() * self.affine.reads)


@dataclass(frozen=True)
class Outcome:
    """u with its ensemble, or None where two starts disagree."""

    value: Estimate | None
    iterations: int
    condition: float
    disagreement: float
    misfits: tuple[float, float]


def solve_matrix_free(
    affine: Affine,
    gradient: Tensor,
    z: Estimate,
    k: Estimate,
    precision: Precision,
    ahead: Ahead = freely,
) -> Outcome:
    """Weighted least squares for u by LSMR; arguments as for ``solve_stage``."""
    bias = affine.forward(z.value.new_zeros(1, *affine.in_shape))
    target = torch.where(z.known, z.value - bias, 0.0)
    guess = z.value.new_ones(len(z.value), *affine.in_shape)
    system = _weighted(affine, z, k, guess, precision)
    first = solve_lsmr(replace(system, ahead=ahead), system.rows(gradient, target), None, 60)
    guess = first.x.reshape(guess.shape) * system.scale
    system = replace(_weighted(affine, z, k, guess, precision), ahead=ahead)
    rows = system.rows(gradient, target)
    generator = torch.Generator().manual_seed(precision.seed)
    size = guess.square().mean().sqrt()
    size = torch.where(size > 0, size, 1.0) / system.scale.mean()  # two starts at 0 are one
    scaled = torch.where(affine.reads, guess / system.scale, 0.0)
    draws = [torch.randn(guess.shape, generator=generator, dtype=guess.dtype) for _ in range(2)]
    starts = [scaled + draw.to(guess) * size for draw in draws]
    runs = [solve_lsmr(system, rows, start.flatten(), LIMIT) for start in starts]
    # Of the scaled unknowns, in which the difference of the starts has no preferred direction.
    apart = float(((starts[0] - starts[1]) * affine.reads).norm())
    gap = (runs[0].x - runs[1].x).reshape(guess.shape) * affine.reads
    disagreement = float(gap.norm()) / max(apart, 1e-300)
    count, condition = sum(run.iterations for run in runs), runs[0].condition
    if not disagreement < AGREE:
        return Outcome(None, count, condition, disagreement, (0.0, 0.0))
    # The tolerance of a run is relative to how far it started from the answer: go on from there.
    refined = solve_lsmr(system, rows, runs[0].x, LIMIT)
    count += refined.iterations
    u = refined.x.reshape(guess.shape) * system.scale
    errors = []
    own = _update_std(affine, u, k, precision)
    forward = precision.normal(precision.sum_std(affine.squared().linear(precision.squares(u))))
    members = min(MEMBERS, len(k.error))
    for member in range(members):
        noise = precision.normal(own, samples=1)[0] - affine.weight_gradient(u, k.error[member])
        shift = torch.where(z.known, z.error[member] + forward[member], 0.0)
        run = solve_lsmr(system, system.rows(noise, shift), None, LIMIT, 1e-4)
        errors.append(run.x.reshape(u.shape) * system.scale)
    repeat = -(-len(k.error) // members)
    ensemble = torch.stack(errors).repeat(repeat, *([1] * u.ndim))[: len(k.error)]
    gap = system.rows(affine.weight_gradient(u, k.value) - gradient, affine.linear(u) - target)
    cut = affine.weight.numel()
    misfits = (float(gap[:cut].square().mean().sqrt()), float(gap[cut:].square().mean().sqrt()))
    return Outcome(Estimate(u, ensemble), count, condition, disagreement, misfits)


def _weighted(
    affine: Affine, z: Estimate, k: Estimate, guess: Tensor, precision: Precision
) -> MatrixFree:
    std = _update_std(affine, guess, k, precision)
    variance = std.square_()
    members = k.error[:MEMBERS]
    for error in members:
        variance += affine.weight_gradient(guess, error).square_() / len(members)
    variance = variance.flatten(1).mean(1)
    forward = precision.sum_std(affine.squared().linear(precision.squares(guess)))
    weight = (z.std.square() + forward.square()).sqrt().clamp_min(1e-300).reciprocal()
    return MatrixFree(
        affine,
        k.value,
        variance.sqrt().clamp_min(1e-300).reciprocal().reshape(-1, *[1] * (affine.weight.ndim - 1)),
        torch.where(z.known, weight, 0.0),
        torch.ones_like(guess),
    ).scaled()


def _update_std(affine: Affine, u: Tensor, k: Estimate, precision: Precision) -> Tensor:
    squares = affine.weight_gradient(precision.squares(u), k.value.square())
    return precision.update_std(affine.weight_name, squares)
