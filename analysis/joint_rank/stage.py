"""One stage's equations, eliminated: what they leave open of its input.

The stage's forward pass says ``W du = Z c`` and its gradient ``K du + U D c = 0``, for the
directions (Z c, D c) that the stages above leave open.  Two orders, whichever leaves fewer
unknowns:

* *gradient first*: K is C copies of one small matrix, so its null space costs one small SVD;
* *weights first*: W is the same for every sample, and often injective.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from math import prod, sqrt

import torch
from torch import Tensor

from rgap.analysis.joint_rank.inverses import GradientInverse, WeightInverse
from rgap.analysis.joint_rank.nullspace import (
    Elimination,
    Open,
    RankOptions,
    combined,
    doubted,
    eliminate,
    lengths,
    orthonormalising,
    padded,
)
from rgap.constraints import gradient_rows
from rgap.jacobian.layer import Node, ParameterRows, each
from rgap.machine.allowance import PLAIN, factorisation
from rgap.machine.memory import shown
from rgap.network.affine import Affine
from rgap.solvers.conjugate import times
from rgap.solvers.rank import Rank

Decision = tuple[Rank, Tensor, str]  # a rank, the singular values behind it, the order


HELD = 6  # copies of one block of equations at a time
ROUNDINGS = 16.0  # of a direction that W⁺ and W take to itself
WEIGHTS = 3  # of a layer's weights as a matrix, while they are factored
FACTORS = 2  # of it that stay


class TooLargeError(ValueError):
    """A block would not fit the memory that was allowed."""


@dataclass(frozen=True)
class ChainOptions(RankOptions):
    """How the ranks of a chain are decided, and what is known of its layers already.

    Attributes:
        trained: names of the parameters that have a gradient.
        inverses: weights that were factored, by layer; added to.
        onto: whether the weights reach every output, by layer; added to.
    """

    trained: Collection[str] = frozenset()
    inverses: dict[str, WeightInverse] = field(default_factory=dict)
    onto: dict[str, bool] = field(default_factory=dict)

    def inverse(self, affine: Affine) -> WeightInverse:
        """The weights of a layer, factored once."""
        if affine.name not in self.inverses:
            fits(prod(affine.out_shape), prod(affine.in_shape), self, WEIGHTS)
            made = WeightInverse(affine, self.rcond, self.noise, self.dtype)
            self.inverses[affine.name] = made
            self.onto[affine.name] = made.onto
        return self.inverses[affine.name]

    @property
    def kept(self) -> float:
        """Bytes of the factors that were kept."""
        layers = [inverse.affine for inverse in self.inverses.values()]
        return 8.0 * FACTORS * sum(prod(one.out_shape) * prod(one.in_shape) for one in layers)

    def trains(self, affine: Affine) -> tuple[bool, bool]:
        """Whether the weights and the bias of a layer have a gradient."""
        bias = affine.bias_name is not None and affine.bias_name in self.trained
        return affine.weight_name in self.trained, bias


def eliminate_stage(node: Node, above: Open, options: ChainOptions) -> tuple[Decision, Open]:
    """What the equations of one stage leave open of its input.

    Args:
        node: the stage.
        above: what the stages above leave open of its pre-activation.
        options: of every decision.

    Raises:
        TooLargeError: a block beyond ``options.memory``.
    """
    affine = node.stage.affine
    size, batch, count = prod(affine.in_shape), node.u.shape[0], len(above.du)
    weight, bias = options.trains(affine)
    groups, rows, places = node.gradient.matrix.shape
    fits(groups, rows * rows + places * places + 2 * rows * places, options, 1)
    options.ahead(groups * factorisation(rows, places))
    kernel = (
        GradientInverse(
            affine, batch, node.gradient.matrix, options.rcond, options.noise, options.dtype
        )
        if weight
        else None
    )
    by_gradient = kernel.free + count if kernel is not None else batch * size + count
    by_weights = batch * max(0, size - prod(affine.out_shape)) + count
    if by_gradient == 0:
        nothing = above.du.new_zeros(0, *node.u.shape)
        rank = Rank.none(0)
        if kernel is not None:
            rank = kernel.rank
        return (rank, node.u.new_zeros(0), "nothing open"), Open(nothing, nothing)
    if kernel is not None and (by_gradient <= by_weights or count + kernel.free == count):
        fits(by_gradient, max(node.z.numel(), node.u.numel()), options)
        fits(prod(affine.out_shape), size, options, WEIGHTS)
        return _gradient_first(node, kernel, above, bias, options)
    fits(by_weights, max(node.z.numel(), node.u.numel()), options)
    return weights_first(node, above, weight, bias, options)


def _gradient_first(
    node: Node, kernel: GradientInverse, above: Open, bias: bool, options: ChainOptions
) -> tuple[Decision, Open]:
    """Directions ``(du, c)`` of a stage: ``K du + U D c = 0`` and ``W du = Z c``.

    c are coordinates of the directions open above, Z c = dz and D c = dk.  The first equation is
    solved by ``du = N_K y − K⁺ U D c``; the second, and the rows of U D c outside the range of K,
    decide y and c.
    """
    affine, count = node.stage.affine, kernel.free
    forward = kernel.forward() / _size(node)
    if len(above.du) == 0:
        left_open = _decide(forward, options)
        du = kernel.combine(left_open.basis)
        still = above.dk.new_zeros(len(du), *node.u.shape)
        return (left_open.rank, left_open.values, "gradient first"), Open(du, still)
    moved = push_rows(node, above.dk.new_zeros(len(above.dk), *node.u.shape), above.dk)
    inner = gradient_rows(affine, moved[affine.weight_name])
    reached, left = kernel.split(inner)
    scale = 1.0 / lengths(reached).maximum(lengths(above.du) / _size(node)).clamp_min(1e-300)
    reached, z, dk = (times(scale, part) for part in (reached, above.du, above.dk))
    across = each(affine.linear, reached) + z
    blocks = [torch.cat([forward, -across.flatten(1) / _size(node)])]
    natural = float(lengths(times(scale, inner)).max())
    if natural > 0:  # where no dk is larger than its rounding, as for the bias
        of_k = float(node.k.norm() * (scale * lengths(above.du)).max()) / _size(node)
        natural = max(natural, of_k)
    if bool(left.any()) and natural > 0:
        blocks.append(padded(times(scale, left) / natural, count))
    if bias and affine.bias_name is not None:
        rows = times(scale, moved[affine.bias_name])
        blocks.append(padded(rows / _bias_size(node, dk), count))
    left_open = _decide(torch.cat(blocks, 1), options)
    solved = kernel.combine(left_open.basis[:count]) - combined(left_open.basis[count:], reached)
    return (left_open.rank, left_open.values, "gradient first"), _below(
        node, solved, combined(left_open.basis[count:], dk)
    )


def weights_first(
    node: Node, above: Open, weight: bool, bias: bool, options: ChainOptions
) -> tuple[Decision, Open]:
    """What a stage leaves open, its forward pass solved first.

    ``W du = Z c`` says that ``du = N_W w + W⁺ Z c`` with free w, for those c that some W du can
    reach; the gradient ``K du + U D c = 0`` then decides what is left of (w, c).

    Args:
        node: the stage.
        above: directions that are open at its z, (Z, D).
        weight: whether the gradient of W was sent.
        bias: whether that of the bias was.
        options: of every decision.

    Returns:
        The decision, and the directions (du, dk) that are open at the stage's input.
    """
    affine, batch = node.stage.affine, node.u.shape[0]
    inverse = options.inverse(affine)
    free = _per_sample(inverse.null(), batch)
    reached, left = inverse.solve(above.du.flatten(0, 1))
    reached = reached.reshape(len(above.du), *node.u.shape)
    # Rows are taken of the directions as they are and combined to those of orthonormal ones: one
    # that comes through a saturated activation is as good as any other.
    first: Elimination | None = None
    if not inverse.onto and len(reached):
        # What no W du can reach goes first: W⁺ takes it to 0, so what is left of it has no length
        # that the next equations could be measured by.
        own = orthonormalising(above.du)
        # Orthonormal combinations of directions that are nearly parallel carry their rounding.
        longest = float((own.abs().T @ lengths(above.du)).max())
        rounding = ROUNDINGS * torch.finfo(own.dtype).eps * longest
        first = _decide(combined(own, left.reshape(len(reached), -1)), options, rounding)
        kept = own @ first.basis
        above = Open(combined(kept, above.du), combined(kept, above.dk))
        reached = combined(kept, reached)
    change = orthonormalising(reached)
    count = len(free)
    blocks = []
    if weight or bias:
        du, dk = reached, above.dk
        if count:
            du = torch.cat([free, du])
            dk = torch.cat([dk.new_zeros(count, *node.z.shape), dk])
        rows = push_rows(node, du, dk)
        if weight:
            blocks.append(rows[affine.weight_name].flatten(1) / _gradient_size(node))
        if bias and affine.bias_name is not None:
            scale = float(change.norm(dim=0).max()) if len(change) else 1.0
            blocks.append(rows[affine.bias_name] / (_bias_size(node, above.dk) * scale))
    if blocks and count + len(reached):
        raw = torch.cat(blocks, 1)
        carried = _residual(node, inverse, change, reached, above.du)
        left_open = _decide(torch.cat([raw[:count], change.T @ raw[count:]]), options, carried)
        rank = left_open.rank
    else:
        left_open = eliminate(reached.new_zeros(0, count + len(reached)))
        rank = inverse.rank
    if first is not None and first.rank.gap < rank.gap:
        rank = first.rank
    final = change @ left_open.basis[count:]
    solved = combined(final, reached) + combined(left_open.basis[:count], free)
    below = _below(node, solved, combined(final, above.dk))
    return (rank, left_open.values, "weights first"), below


def _residual(
    node: Node, inverse: WeightInverse, change: Tensor, reached: Tensor, z: Tensor
) -> float:
    """‖W du − Z c‖/σ_1(W) of orthonormal du: what the next equations carry as error.

    An ill-conditioned W, or directions that are nearly parallel, leave far more than one rounding.
    """
    if not len(reached):
        return 0.0
    image = each(node.stage.affine.linear, combined(change, reached))
    return float((image - combined(change, z)).norm()) / max(inverse.rank.largest, 1e-300)


def _per_sample(free: Tensor, batch: int) -> Tensor:
    """Directions of one sample → of every sample of a batch by itself."""
    each = free.new_zeros(batch, len(free), batch, *free.shape[1:])
    for b in range(batch):
        each[b, :, b] = free
    return each.flatten(0, 1)


def _gradient_size(node: Node) -> float:
    return max(float(torch.linalg.matrix_norm(node.gradient.matrix, 2).max()), 1e-300)


def _bias_size(node: Node, dk: Tensor) -> float:
    """Size of Σ dk if nothing cancels; of a unit du at least that of k over that of u.

    Where no dk is any larger than its rounding, its own size would make that count.
    """
    largest = float(lengths(dk).max()) if len(dk) else 0.0
    largest = max(largest, float(node.k.norm() / node.u.norm().clamp_min(1e-300)))
    terms: int = node.k[0, 0].numel() * len(node.k)
    return max(largest * sqrt(terms), 1e-300)


def _size(node: Node) -> float:
    """Size of W on a typical direction: what makes its rows comparable with those of K."""
    return max(float(node.stage.affine.weight.norm()), 1e-300)


def _below(node: Node, du: Tensor, dk: Tensor) -> Open:
    """Orthonormal directions at the stage's input, with the cotangent directions there."""
    change = orthonormalising(du)
    basis, moved = combined(change, du), combined(change, dk)
    back = node.stage.affine.adjoint(moved.flatten(0, 1)).reshape(len(basis), *node.u.shape)
    return Open(basis, back)


def _decide(matrix: Tensor, options: ChainOptions, carried: float = 0.0) -> Elimination:
    made = eliminate(
        matrix.T.contiguous(),
        rcond=options.rcond,
        noise=max(options.noise, carried),
        dtype=options.dtype,
        scale=1.0,  # of every block, in its own units
    )
    return doubted(made, 1.0)


def push_rows(node: Node, du: Tensor, dk: Tensor) -> ParameterRows:
    """Change of a stage's gradient along directions, by parameter name.

    ``K du + U dk`` for the weight, ``[S, *weight.shape]``, and ``Σ dk`` over samples and positions
    for the bias, [S, F].

    Args:
        node: the stage, with u and k there.
        du: directions of its input, [S, B, *in_shape]; S may be 0.
        dk: of its cotangent, [S, B, *out_shape].
    """
    if len(du):
        return node.gradient.push(du, dk)
    affine = node.stage.affine
    empty = {affine.weight_name: du.new_zeros(0, *affine.weight.shape)}
    if affine.bias_name is not None:
        empty[affine.bias_name] = du.new_zeros(0, affine.out_shape[0])
    return empty


def fits(unknowns: int, entries: int, options: ChainOptions, copies: int = HELD) -> None:
    """Refuse matrices [unknowns, entries] that are beyond the memory or the time.

    Args:
        unknowns: their rows.
        entries: their columns.
        options: with the bytes and the clock.
        copies: that are held at a time; 1 asks for no time, its factorisation was asked for.

    Raises:
        TooLargeError: so many copies do not fit.
        OutOfTime: its factorisation would end after the limit.
    """
    if copies > 1:
        options.ahead(factorisation(unknowns, entries, PLAIN if copies == WEIGHTS else 1.0))
    need = 8.0 * copies * unknowns * entries + options.kept
    if need > options.memory:
        raise TooLargeError(
            f"its matrices take {shown(need)}, and {shown(options.memory)} are free"
        )
