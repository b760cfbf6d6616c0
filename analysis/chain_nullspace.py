"""What the gradients of a chain leave open, eliminated from the head down.

Unknowns are the directions ``du_i`` at the input of a stage.  Let S_{i+1} be those that the layers
above leave open, each with the cotangent direction that it entails: columns ``dz = Z c`` at the
stage's output, ``dk = D c`` there.  The stage below sees

    W du = Z c                   the forward pass,
    K du + U D c = 0             its gradient did not move,

and its solutions are S_i.  The null space of the whole update is S_0: no Jacobian is formed.  Two
orders of elimination, whichever leaves fewer unknowns:

* *gradient first*: K is C copies of one small matrix, so its null space costs one small SVD;
* *weights first*: W is the same for every sample, and often injective.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from rgap.activations import Activation
from rgap.analysis.gradient_inverse import GradientInverse
from rgap.analysis.nullspace import Elimination, eliminate
from rgap.analysis.weight_inverse import WeightInverse
from rgap.bilinear import Rows
from rgap.jacobian import Linearisation, _Node
from rgap.ops import Op, Rearrange, Reshape
from rgap.solvers.rank import Rank
from rgap.systems import gradient_rows

NEARLY = 1e-6  # parallel: what is left of a direction after the others, lost in their Gram matrix


class NotStructuredError(ValueError):
    """This chain has a step that the elimination cannot go back through."""


class TooLargeError(ValueError):
    """A block would not fit the memory that was allowed."""


@dataclass(frozen=True)
class StageNull:
    """One stage of the elimination.

    Attributes:
        layer: its name.
        unknowns: entries of its input, B·n_i.
        nullity: dimension of S_i, in the space of its input.
        rank: of the equations that were left when its null space was decided, with the gap.
        values: their singular values.
        order: "gradient first", "weights first" or "nothing open".
        seconds: wall time.
    """

    layer: str
    unknowns: int
    nullity: int
    rank: Rank
    values: Tensor
    order: str
    seconds: float


@dataclass(frozen=True)
class ChainNull:
    """Result of :func:`chain_nullspace`: the stages in forward order and the open directions.

    Attributes:
        stages: one per stage.
        directions: basis of the null space [nullity, B, *input_shape], not orthonormal.
        inverses: the weights that were factored on the way, by layer.
    """

    stages: tuple[StageNull, ...]
    directions: Tensor
    inverses: dict[str, WeightInverse]


@dataclass(frozen=True)
class _Open:
    """Directions left open: at some place, with the cotangent direction each entails."""

    du: Tensor
    dk: Tensor


@dataclass(frozen=True)
class _Options:
    rcond: float | None
    noise: float
    dtype: torch.dtype
    trained: Collection[str]
    memory: float
    inverses: dict[str, WeightInverse]


def chain_nullspace(
    linear: Linearisation,
    trained: Collection[str],
    *,
    rcond: float | None = None,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float64,
    memory: float = 4e9,
) -> ChainNull:
    """Null space of the Jacobian of a chain's update, without the Jacobian.

    Args:
        linear: the update map at the batch, with the loss that gives κ.
        trained: names of the parameters that have a gradient; the others give no equation.
        rcond: relative cutoff of every decision, None for the default.
        noise: relative error of the entries.
        dtype: precision in which the entries are known.
        memory: bytes for one block.

    Raises:
        NotStructuredError: a step that has no inverse (a pool, a ReLU that is off, a step after the
            last layer).
        TooLargeError: a block beyond ``memory``.
    """
    options = _Options(rcond, noise, dtype, frozenset(trained), memory, {})
    _refuse(linear)
    head = linear.nodes[-1]
    batch, outputs = head.z.shape[0], head.z[0].numel()
    z = torch.eye(batch * outputs, dtype=torch.float64).reshape(-1, *head.z.shape)
    open_ = _Open(z, linear.bend(z))
    found: list[StageNull] = []
    for node in reversed(linear.nodes):
        start = time.perf_counter()
        if node is not head:
            open_ = _through_tail(node, open_)
        stage, open_ = _stage(node, open_, options)
        seconds = time.perf_counter() - start
        found.insert(0, StageNull(node.stage.name, node.u.numel(), len(open_.du), *stage, seconds))
        for op in reversed(node.stage.lead):
            open_ = _Open(_flat(op, open_.du), _flat(op, open_.dk))
    return ChainNull(tuple(found), open_.du, options.inverses)


def _stage(node: _Node, above: _Open, options: _Options) -> tuple[tuple[Rank, Tensor, str], _Open]:
    affine = node.stage.affine
    size, batch, count = prod(affine.in_shape), node.u.shape[0], len(above.du)
    weight = affine.weight_name in options.trained
    bias = affine.bias_name is not None and affine.bias_name in options.trained
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
        rank = Rank(0, 0, 0.0, float("inf"), 0.0, 0.0, 0)
        if kernel is not None:
            rank = kernel.rank
        return (rank, torch.zeros(0, dtype=torch.float64), "nothing open"), _Open(nothing, nothing)
    if kernel is not None and (by_gradient <= by_weights or count + kernel.free == count):
        _fits(by_gradient, max(node.z.numel(), node.u.numel()), options)
        return _gradient_first(node, kernel, above, bias, options)
    _fits(by_weights, max(node.z.numel(), node.u.numel()), options)
    return _weights_first(node, above, weight, bias, options)


def _gradient_first(
    node: _Node, kernel: GradientInverse, above: _Open, bias: bool, options: _Options
) -> tuple[tuple[Rank, Tensor, str], _Open]:
    """Du = N_K y − K⁺ U D c; then W du = Z c, and the rows of U D c outside the range of K."""
    affine, count = node.stage.affine, kernel.free
    forward = kernel.forward() / _size(node)
    if len(above.du) == 0:
        found = _decide(forward, options)
        du = kernel.combine(found.basis)
        still = above.dk.new_zeros(len(du), *node.u.shape)
        return (found.rank, found.values, "gradient first"), _Open(du, still)
    moved = _push(node, above.dk.new_zeros(len(above.dk), *node.u.shape), above.dk)
    inner = gradient_rows(affine, moved[affine.weight_name])
    reached, left = kernel.split(inner)
    scale = 1.0 / _norm(reached).maximum(_norm(above.du) / _size(node)).clamp_min(1e-300)
    reached, z, dk = (_times(scale, part) for part in (reached, above.du, above.dk))
    across = _flat_linear(node, reached) + z
    blocks = [torch.cat([forward, -across.flatten(1) / _size(node)])]
    natural = float(_norm(_times(scale, inner)).max())
    if bool(left.any()) and natural > 0:
        blocks.append(_padded(_times(scale, left) / natural, count))
    if bias and affine.bias_name is not None:
        rows = _times(scale, moved[affine.bias_name])
        blocks.append(_padded(rows / _bias_size(node, dk), count))
    found = _decide(torch.cat(blocks, 1), options)
    solved = kernel.combine(found.basis[:count]) - _apply(found.basis[count:], reached)
    return (found.rank, found.values, "gradient first"), _below(
        node, solved, _apply(found.basis[count:], dk)
    )


def _weights_first(
    node: _Node, above: _Open, weight: bool, bias: bool, options: _Options
) -> tuple[tuple[Rank, Tensor, str], _Open]:
    """Du = N_W w + W⁺ Z c; then what of Z c no W du can reach, and the gradient."""
    affine, batch = node.stage.affine, node.u.shape[0]
    inverse = WeightInverse(affine, options.rcond, options.noise, options.dtype)
    options.inverses[affine.name] = inverse
    free = _per_sample(inverse.null(), batch)
    reached, left = inverse.solve(above.du.flatten(0, 1))
    reached = reached.reshape(len(above.du), *node.u.shape)
    # Rows are taken of the directions as they are and combined to those of orthonormal ones: one
    # that comes through a saturated activation is as good as any other.
    first: Elimination | None = None
    if not inverse.onto and len(reached):
        # What no W du can reach goes first: W⁺ takes it to 0, so what is left of it has no length
        # that the next equations could be measured by.
        own = _orthonormalising(above.du)
        first = _decide(_apply(own, left.reshape(len(reached), -1)), options)
        kept = own @ first.basis
        above = _Open(_apply(kept, above.du), _apply(kept, above.dk))
        reached = _apply(kept, reached)
    change = _orthonormalising(reached)
    count = len(free)
    blocks = []
    if weight or bias:
        still = above.dk.new_zeros(count, *node.z.shape)
        rows = _push(node, torch.cat([free, reached]), torch.cat([still, above.dk]))
        if weight:
            blocks.append(rows[affine.weight_name].flatten(1) / _gradient_size(node))
        if bias and affine.bias_name is not None:
            scale = float(change.norm(dim=0).max()) if len(change) else 1.0
            blocks.append(rows[affine.bias_name] / (_bias_size(node, above.dk) * scale))
    if blocks and count + len(reached):
        raw = torch.cat(blocks, 1)
        found = _decide(torch.cat([raw[:count], change.T @ raw[count:]]), options)
        rank = found.rank
    else:
        found = eliminate(reached.new_zeros(0, count + len(reached)))
        rank = inverse.rank
    if first is not None and first.rank.gap < rank.gap:
        rank = first.rank
    final = change @ found.basis[count:]
    solved = _apply(final, reached) + _apply(found.basis[:count], free)
    below = _below(node, solved, _apply(final, above.dk))
    return (rank, found.values, "weights first"), below


def _per_sample(free: Tensor, batch: int) -> Tensor:
    """Directions of one sample → of every sample of a batch by itself."""
    each = free.new_zeros(batch, len(free), batch, *free.shape[1:])
    for b in range(batch):
        each[b, :, b] = free
    return each.flatten(0, 1)


def _gradient_size(node: _Node) -> float:
    return max(float(torch.linalg.matrix_norm(node.gradient.matrix, 2).max()), 1e-300)


def _bias_size(node: _Node, dk: Tensor) -> float:
    """Size of Σ dk if nothing cancels."""
    largest = float(_norm(dk).max()) if len(dk) else 0.0
    terms: int = node.k[0, 0].numel() * len(node.k)
    return max(largest * sqrt(terms), 1e-300)


def _below(node: _Node, du: Tensor, dk: Tensor) -> _Open:
    """Orthonormal directions at the stage's input, with the cotangent directions there."""
    change = _orthonormalising(du)
    basis, moved = _apply(change, du), _apply(change, dk)
    back = node.stage.affine.adjoint(moved.flatten(0, 1)).reshape(len(basis), *node.u.shape)
    return _Open(basis, back)


def _decide(matrix: Tensor, options: _Options) -> Elimination:
    return eliminate(
        matrix.T.contiguous(),
        rcond=options.rcond,
        noise=options.noise,
        dtype=options.dtype,
        scale=1.0,  # of every block, in its own units
    )


def _push(node: _Node, du: Tensor, dk: Tensor) -> Rows:
    """K du + U dk and Σ dk by parameter name; of no direction too."""
    if len(du):
        return node.gradient.push(du, dk)
    affine = node.stage.affine
    empty = {affine.weight_name: du.new_zeros(0, *affine.weight.shape)}
    if affine.bias_name is not None:
        empty[affine.bias_name] = du.new_zeros(0, affine.out_shape[0])
    return empty


def _through_tail(node: _Node, above: _Open) -> _Open:
    """Directions at the stage's output → at its pre-activation z."""
    du, dk = above.du, above.dk
    steps = zip(node.stage.tail, node.tail_inputs, node.tail_cotangents, strict=True)
    for op, before, cotangent in reversed(list(steps)):
        if isinstance(op, Activation):
            slope = op.derivative(before)
            du = du / slope
            dk = dk * slope + cotangent * op.second_derivative(before) * du
        else:
            du, dk = _flat(op, du), _flat(op, dk)
    return _Open(du, dk)


def _refuse(linear: Linearisation) -> None:
    last = len(linear.nodes) - 1
    for i, node in enumerate(linear.nodes):
        for op in (*node.stage.lead, *node.stage.tail):
            if isinstance(op, Activation):
                continue
            if not isinstance(op, Reshape | Rearrange) or prod(op.in_shape) != prod(op.out_shape):
                raise NotStructuredError(f"'{op.name}' ({op.kind}) has no inverse")
        if any(isinstance(op, Activation) for op in node.stage.lead):
            raise NotStructuredError(f"an activation leads into '{node.stage.name}'")
        if i == last and any(isinstance(op, Activation) for op in node.stage.tail):
            raise NotStructuredError(f"'{node.stage.name}' is followed by an activation")
        for op, before in zip(node.stage.tail, node.tail_inputs, strict=True):
            if isinstance(op, Activation) and bool((op.derivative(before) == 0).any()):
                raise NotStructuredError(f"'{op.name}' ({op.kind}) is off in places")


def _fits(unknowns: int, entries: int, options: _Options) -> None:
    need = 8.0 * unknowns * entries
    if need > options.memory:
        raise TooLargeError(f"{unknowns} open directions take {need / 1e9:.1f} GB a copy")


def _orthonormalising(directions: Tensor) -> Tensor:
    """Change C with orthonormal Cᵀ du: by the Cholesky factor where that is accurate enough."""
    if len(directions) == 0:
        return directions.new_zeros(0, 0)
    scale = 1.0 / _norm(directions).clamp_min(1e-300)
    flat = directions.flatten(1)
    lower, info = torch.linalg.cholesky_ex((flat @ flat.T) * scale[:, None] * scale)
    upper = lower.T
    diagonal = upper.diagonal().abs()
    if bool(info) or float(diagonal.min()) < NEARLY * float(diagonal.max()):
        upper = torch.linalg.qr(flat.T * scale, mode="r").R
    eye = torch.eye(len(upper), dtype=upper.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return scale[:, None] * inverse


def _apply(change: Tensor, directions: Tensor) -> Tensor:
    """changeᵀ directions, [a, b] and [a, *shape] → [b, *shape]."""
    return (change.T @ directions.flatten(1)).reshape(change.shape[1], *directions.shape[1:])


def _padded(rows: Tensor, before: int) -> Tensor:
    return torch.cat([rows.new_zeros(before, rows.shape[1]), rows])


def _norm(directions: Tensor) -> Tensor:
    length: Tensor = directions.flatten(1).norm(dim=1)  # norm() is untyped
    return length


def _times(scale: Tensor, directions: Tensor) -> Tensor:
    return directions * scale.reshape(-1, *(1 for _ in directions.shape[1:]))


def _size(node: _Node) -> float:
    """Size of W on a typical direction: what makes its rows comparable with those of K."""
    return max(float(node.stage.affine.weight.norm()), 1e-300)


def _flat(op: Op, ensemble: Tensor) -> Tensor:
    out = op.adjoint(ensemble.flatten(0, 1))
    return out.reshape(*ensemble.shape[:2], *out.shape[1:])


def _flat_linear(node: _Node, ensemble: Tensor) -> Tensor:
    out = node.stage.affine.linear(ensemble.flatten(0, 1))
    return out.reshape(*ensemble.shape[:2], *out.shape[1:])
