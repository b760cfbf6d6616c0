"""Positions of a convolution told apart by shifts alone: K and X up to one B×B matrix.

No search, no start, no label, no activation, nothing of the layers above: a null space for each
axis, and a walk from the corners.  (Array processing knows rotational invariance as ESPRIT, Roy and
Kailath 1989; chains of a linear relation are those of Kronecker's canonical form of a pencil.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import frexp, inf

import torch
from torch import Tensor

from rgap.constraints import gradient_constraint, gradient_rows, weight_constraint
from rgap.constraints.convnd import taps
from rgap.limits import FITS
from rgap.network.affine import Affine
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.arrangement import Arrangement, Place, arrangements
from rgap.separation.shifts.relations import Relation, corners, relation
from rgap.solvers.limits import ABOVE, SMALL_GAP
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.svd import right_singular_vectors, singular_values
from rgap.solvers.tall import tall_qr

log = logging.getLogger(__name__)

__all__ = ["Positions", "range_of", "shown", "tell_positions_apart"]


@dataclass(frozen=True)
class Positions:
    """Cotangents and inputs of a convolution, up to one invertible matrix Γ [B, B].

    The true ones are ``Σ_a Γ[a, b] cotangents[a]`` and ``Σ_a (Γ⁻¹)[b, a] inputs[a]``, with the same
    Γ for every position, filter and channel.

    Attributes:
        cotangents: [B, F, *out].
        inputs: [B, C, *space]; 0 where no tap reads.
        rank: of the gradient, B times the positions of a sample.
        relations: of the equations of one step, by axis.
        condition: of the basis that is walked, ‖A‖‖A⁻¹‖.
        gap: the weakest of the gaps that decided a dimension.
        misfit: rms of G − Kᵀ S X over the standard error of an entry.
        arrangement: of the taps.
    """

    cotangents: Tensor
    inputs: Tensor
    rank: Rank
    relations: dict[int, Rank]
    condition: float
    gap: float
    misfit: float
    arrangement: Arrangement

    @property
    def batch(self) -> int:
        """B: samples that the gradient tells apart, from the dimension of the corners."""
        return len(self.cotangents)


def tell_positions_apart(
    affine: Affine, gradient: Tensor, noise: float = 0.0
) -> Positions | Unseparated:
    """K and X of ``G_u = Kᵀ S_u X`` up to Γ, or why not.

    Claim: let every position read something through the taps of an arrangement, L have full column
    rank, and what the positions and their neighbours along each axis read full row rank.  Then K
    and X are unique up to Γ, and B follows from the rank of the gradient.

    Args:
        affine: the convolution, without groups.
        gradient: G, [F, C, *kernel], float64.
        noise: standard error of an entry of G, beside the rounding of float64.

    Returns:
        The :class:`Positions`, or an :class:`Unseparated` that names the condition and its numbers.

    Raises:
        ValueError: the layer is no convolution, or has groups.

    >>> from rgap.network.affine import convolution
    >>> from rgap.network.geometry import Geometry
    >>> pads = Geometry.of((3,), padding=1)
    >>> w = torch.ones(9, 8, 3, dtype=torch.float64)
    >>> conv = convolution("conv", w, None, ("w", None), (8, 4), pads)
    >>> generator = torch.Generator().manual_seed(0)
    >>> x, k = torch.randn(2, 2, 9, 4, generator=generator, dtype=torch.float64)
    >>> told = tell_positions_apart(conv, conv.weight_gradient(x[:, :8], k))
    >>> told.batch, told.rank.rank
    (2, 8)
    """
    geometry = affine.geometry
    if geometry is None or geometry.groups != 1:
        raise ValueError(
            f"'{affine.name}': expected a convolution with groups=1, got {affine.kind}; write one "
            "call for each group"
        )
    # in units of a power of two, which is exact: squares of entries stay within the numbers
    unit = 2.0 ** frexp(float(gradient.abs().max()))[1]
    gradient, noise = gradient / unit, noise / unit
    filters, channels = gradient.shape[:2]
    why = few = ""
    rms = float(gradient.square().mean().sqrt())
    noise = max(noise, torch.finfo(gradient.dtype).eps * rms)
    for arrangement in arrangements(geometry, affine.in_shape[1:]):
        most = arrangement.largest_batch(filters, channels)
        if most < 1:
            few = few or f"{filters} filters and {channels} channels are too few for one sample"
            continue
        told = _told(affine, gradient, arrangement, most, noise)
        if isinstance(told, Positions):
            return replace(told, cotangents=unit * told.cotangents)
        log.debug("'%s', stack %s: %s", affine.name, arrangement.stack, told)
        why = why or told
    why = why or few or "no two taps are one step of the output apart along every axis"
    return Unseparated(f"positions of '{affine.name}' are not told apart by shifts: {why}")


def _told(
    affine: Affine, gradient: Tensor, arrangement: Arrangement, most: int, noise: float
) -> Positions | str:
    """K and X of up to ``most`` samples by one arrangement, or which of its conditions fails."""
    blocks = arrangement.blocks(gradient)
    basis, rank = range_of(torch.cat(list(blocks.values()), 1), noise)
    batch, rest = divmod(rank.rank, arrangement.size)
    if rest or not batch or not rank.clear:
        return (
            f"the gradient has rank {rank.rank} (gap {rank.gap:.1f}), expected B times its "
            f"{arrangement.size} positions"
        )
    if batch > most:
        return f"the gradient has the rank of {batch} samples or more, its taps bear {most}"
    inner = {u: basis.T @ block for u, block in blocks.items()}
    steps: dict[int, Relation] = {}
    for axis in arrangement.axes:
        steps[axis] = one = relation(inner, arrangement, axis, noise)
        wanted = rank.rank - rank.rank // arrangement.grid[axis]
        if one.rank.nullity != wanted or not one.rank.clear:
            return (
                f"a step along axis {axis} relates {one.rank.nullity} of {rank.rank} positions "
                f"(gap {one.rank.gap:.1f}), expected {wanted}"
            )
    rows, gap = _walked(steps, arrangement, basis.new_zeros(rank.rank, batch))
    if gap < SMALL_GAP:
        return f"the corners of {batch} samples are not clear (gap {gap:.1f})"
    values = singular_values(rows)
    if not float(values[-1]) > torch.finfo(rows.dtype).eps * float(values[0]):
        return f"the positions of {batch} samples are not independent"
    condition = float(values[0] / values[-1])
    left = basis @ torch.linalg.inv(rows.T)
    sizes = (affine.in_shape if arrangement.exchanged else affine.out_shape)[1:]
    first = arrangement.cotangents(left, sizes)
    k = _cotangents(affine, gradient, first) if arrangement.exchanged else first
    x = _inputs(affine, gradient, k)
    k = _cotangents(affine, gradient, x)  # all taps at once, where the stack saw some
    x = _inputs(affine, gradient, k)
    rest_of = gradient - affine.weight_gradient(x, k)
    misfit = float(rest_of.square().mean().sqrt()) / noise
    if not misfit <= FITS * condition:
        return f"K and X of {batch} samples miss the gradient by {misfit:.1e} standard errors"
    relations = {axis: one.rank for axis, one in steps.items()}
    return Positions(k, x, rank, relations, condition, gap, misfit, arrangement)


def range_of(table: Tensor, noise: float) -> tuple[Tensor, Rank]:
    """Left singular vectors above the noise, [rows, r].

    Rounding is largest where entries are: its norm is that of the longest row and the longest
    column (Bandeira and van Handel 2016), noise in units of the rms of the entries.
    """
    rows, columns = table.shape
    values, vh = right_singular_vectors(table.T)
    squares = table.square()
    longest = squares.sum(1).max().sqrt() + squares.sum(0).max().sqrt()
    longest = longest / squares.mean().sqrt().clamp_min(1e-300)
    expected = noise * float(longest) / max(float(values[0]), 1e-300)
    rank = numerical_rank(
        values, rows, resolve_rcond(None, (rows, columns), noise=ABOVE * expected)
    )
    return vh[: rank.rank].T, rank


def _walked(
    steps: Mapping[int, Relation], arrangement: Arrangement, like: Tensor
) -> tuple[Tensor, float]:
    """Rows v of every position, [r, |grid|·B], from the corners on; the weakest gap they took.

    Args:
        steps: by axis.
        arrangement: of the positions.
        like: zeros [r, B].
    """
    begun = [one.first(arrangement.grid[axis]) for axis, one in steps.items()]
    size, count = like.shape
    if not begun:  # a kernel over its whole input: there is one position
        return torch.eye(size, dtype=like.dtype, device=like.device), inf
    corner, gap = corners([first for first, _ in begun], count)
    at: dict[Place, Tensor] = {(0,) * len(arrangement.grid): corner}
    for axis, one in steps.items():
        for place in list(at):
            v = at[place]
            for number in range(1, arrangement.grid[axis]):
                v = one.step(v)
                at[(*place[:axis], number, *place[axis + 1 :])] = v
    ordered = [at[place] for place in product(*map(range, arrangement.grid))]
    return torch.cat(ordered, 1), min(gap, *(weakest for _, weakest in begun))


def _inputs(affine: Affine, gradient: Tensor, k: Tensor) -> Tensor:
    """X [B, C, *space] from the gradient constraint of K."""
    block = gradient_constraint(affine, k, read_only=True)
    solved = _least_squares(block.matrix[0], gradient_rows(affine, gradient).T).T
    coupling = weight_constraint(affine, len(k), read_only=True)
    return coupling.fold(solved[None]).reshape(len(k), *affine.in_shape)


def _cotangents(affine: Affine, gradient: Tensor, x: Tensor) -> Tensor:
    """K [B, F, *out] from what X shows to each tap."""
    solved = _least_squares(shown(affine, x), gradient.flatten(1).T)  # [B·outputs, F]
    out = affine.out_shape[1:]
    return solved.reshape(len(x), -1, len(gradient)).transpose(1, 2).reshape(len(x), -1, *out)


def shown(affine: Affine, x: Tensor) -> Tensor:
    """What each output of a convolution without groups reads, [C·taps, B·outputs]."""
    assert affine.geometry is not None
    table = taps(affine.geometry, affine.in_shape[1:], affine.out_shape[1:], x.device)
    seen = x.flatten(2)[:, :, table.clamp_min(0)] * (table >= 0)  # [B, C, taps, outputs]
    return seen.permute(1, 2, 0, 3).reshape(-1, len(x) * table.shape[1])


def _least_squares(matrix: Tensor, rhs: Tensor) -> Tensor:
    basis, upper = tall_qr(matrix)
    solved: Tensor = torch.linalg.solve_triangular(upper, basis.T @ rhs, upper=True)
    return solved
