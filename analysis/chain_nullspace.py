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
from math import prod

import torch
from torch import Tensor

from rgap.activations import Activation
from rgap.analysis.nullspace import Elimination, eliminate
from rgap.analysis.weight_inverse import WeightInverse
from rgap.bilinear import Rows
from rgap.jacobian import Linearisation, _Node
from rgap.ops import Op, Rearrange, Reshape
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.tall import tall_qr
from rgap.systems import gradient_rows


class NotStructured(ValueError):
    """This chain has a step that the elimination cannot go back through."""


class TooLarge(ValueError):
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
    """

    stages: tuple[StageNull, ...]
    directions: Tensor


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
        NotStructured: a step that has no inverse (a pool, a ReLU that is off, a step after the
            last layer).
        TooLarge: a block beyond ``memory``.
    """
    options = _Options(rcond, noise, dtype, frozenset(trained), memory)
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
    return ChainNull(tuple(found), open_.du)


def _stage(node: _Node, above: _Open, options: _Options) -> tuple[tuple[Rank, Tensor, str], _Open]:
    affine = node.stage.affine
    size, batch, count = prod(affine.in_shape), node.u.shape[0], len(above.du)
    weight = affine.weight_name in options.trained
    bias = affine.bias_name is not None and affine.bias_name in options.trained
    kernel = _GradientInverse(node, options) if weight else None
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


class _GradientInverse:
    """Null space and pseudo-inverse of K, group by group."""

    def __init__(self, node: _Node, options: _Options) -> None:
        self.node = node
        matrix = node.gradient.matrix
        u, s, vh = torch.linalg.svd(matrix, full_matrices=True)
        cutoff = resolve_rcond(
            options.rcond, (matrix.shape[1], matrix.shape[2]), options.dtype, options.noise
        )
        ranks = [numerical_rank(values, matrix.shape[2], cutoff) for values in s]
        self.channels = node.stage.affine.in_shape[0] // len(ranks)
        self.ranks = [rank.rank for rank in ranks]
        self.rank = min(ranks, key=lambda rank: rank.gap)
        self._u = [part[:, :r] for part, r in zip(u, self.ranks, strict=True)]
        self._s = [part[:r] for part, r in zip(s, self.ranks, strict=True)]
        self._v = [part[:r] for part, r in zip(vh, self.ranks, strict=True)]
        self._null = [part[r:] for part, r in zip(vh, self.ranks, strict=True)]
        self.free = self.channels * sum(len(part) for part in self._null)

    def null(self) -> Tensor:
        """Orthonormal directions with K du = 0, [free, B, *in_shape]."""
        groups, size = len(self._null), self._null[0].shape[1]
        table = torch.zeros(self.free, groups * self.channels, size, dtype=torch.float64)
        at = 0
        for g, part in enumerate(self._null):
            for c in range(self.channels):
                table[at : at + len(part), g * self.channels + c] = part
                at += len(part)
        return self._fold(table)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(K⁺ y as directions, what of y no K du can reach) for y as `gradient_rows`."""
        y = rows.unflatten(1, (len(self._s), self.channels))
        parts, left = [], []
        for g, (u, s, v) in enumerate(zip(self._u, self._s, self._v, strict=True)):
            inside = y[:, g] @ u
            parts.append((inside / s) @ v)
            left.append(y[:, g] - inside @ u.T)
        return self._fold(torch.cat(parts, 1)), torch.stack(left, 1).flatten(1)

    def _fold(self, table: Tensor) -> Tensor:
        """[S, C, B·positions] → [S, B, *in_shape]."""
        batch = self.node.u.shape[0]
        positions = table.shape[2] // batch
        split = table.reshape(*table.shape[:2], batch, positions).transpose(1, 2)
        return split.reshape(len(table), *self.node.u.shape)


def _gradient_first(
    node: _Node, kernel: _GradientInverse, above: _Open, bias: bool, options: _Options
) -> tuple[tuple[Rank, Tensor, str], _Open]:
    """du = N_K y − K⁺ U D c; then W du = Z c, and the rows of U D c outside the range of K."""
    affine = node.stage.affine
    free = kernel.null()
    if len(above.du) == 0:
        found = _decide(_flat_linear(node, free).flatten(1) / _size(node), options)
        return _solution(found, free, above.dk, len(free), node, "gradient first")
    still = above.dk.new_zeros(len(above.dk), *node.u.shape)
    moved = _push(node, still, above.dk)
    inner = gradient_rows(affine, moved[affine.weight_name])
    reached, left = kernel.split(inner)
    scale = 1.0 / _norm(reached).maximum(_norm(above.du) / _size(node)).clamp_min(1e-300)
    reached, z, dk = (_times(scale, part) for part in (reached, above.du, above.dk))
    du = torch.cat([free, -reached])
    forward = _flat_linear(node, du)
    forward[len(free) :] -= z
    blocks = [forward.flatten(1) / _size(node)]
    if len(z):
        rows = _times(scale, left)
        natural = float(_norm(_times(scale, inner)).max())
        if bool(left.any()) and natural > 0:
            blocks.append(_padded(rows / natural, len(free)))
        if bias and affine.bias_name is not None:
            rows = _times(scale, moved[affine.bias_name])
            natural = float(_norm(dk).max()) * (node.k[0, 0].numel() * len(node.k)) ** 0.5
            if natural > 0:
                blocks.append(_padded(rows / natural, len(free)))
    found = _decide(torch.cat(blocks, 1), options)
    return _solution(found, du, dk, len(free), node, "gradient first")


def _weights_first(
    node: _Node, above: _Open, weight: bool, bias: bool, options: _Options
) -> tuple[tuple[Rank, Tensor, str], _Open]:
    """du = N_W w + W⁺ Z c; then what of Z c no W du can reach, and the gradient."""
    affine, batch = node.stage.affine, node.u.shape[0]
    inverse = WeightInverse(affine, options.rcond, options.noise, options.dtype)
    free = inverse.null()
    each = above.du.new_zeros(batch, len(free), *node.u.shape)
    for b in range(batch):
        each[b, :, b] = free
    reached, left = inverse.solve(above.du.flatten(0, 1))
    reached = reached.reshape(len(above.du), *node.u.shape)
    # Orthonormal columns: a direction through a saturated activation is as good as any other.
    basis, change = _orthonormal(reached)
    dk, rest = _apply(change, above.dk), _apply(change, left.reshape(above.du.shape))
    du = torch.cat([each.flatten(0, 1), basis])
    count = batch * len(free)
    blocks = []
    if not inverse.onto and len(basis):
        blocks.append(_padded(rest.flatten(1) / _size(node), count))
    if weight or bias:
        blocks += _gradient_blocks(node, du, dk, count, weight, bias)
    matrix = torch.cat(blocks, 1) if blocks else du.new_zeros(len(du), 0)
    if not blocks or not len(du):
        found = eliminate(matrix.T.contiguous())
        rank = inverse.rank
    else:
        found = _decide(matrix, options)
        rank = found.rank
    (_, values, order), open_ = _solution(found, du, dk, count, node, "weights first")
    return (rank, values, order), open_


def _gradient_blocks(
    node: _Node, du: Tensor, dk: Tensor, count: int, weight: bool, bias: bool
) -> list[Tensor]:
    """K du + U dk and Σ dk of every direction, each in its own units."""
    affine = node.stage.affine
    padded = torch.cat([dk.new_zeros(count, *dk.shape[1:]), dk])
    rows = _push(node, du, padded)
    blocks = []
    if weight:
        natural = float(torch.linalg.matrix_norm(node.gradient.matrix, 2).max())
        blocks.append(rows[affine.weight_name].flatten(1) / max(natural, 1e-300))
    if bias and affine.bias_name is not None and len(dk):
        natural = float(_norm(dk).max()) * (node.k[0, 0].numel() * len(node.k)) ** 0.5
        blocks.append(rows[affine.bias_name] / max(natural, 1e-300))
    return blocks


def _solution(
    found: Elimination, du: Tensor, dk: Tensor, free: int, node: _Node, order: str
) -> tuple[tuple[Rank, Tensor, str], _Open]:
    solved = _apply(found.basis, du)
    moved = _apply(found.basis[free:], dk)
    basis, change = _orthonormal(solved)
    below = _apply(change, moved)
    back = node.stage.affine.adjoint(below.flatten(0, 1)).reshape(len(basis), *node.u.shape)
    return (found.rank, found.values, order), _Open(basis, back)


def _push(node: _Node, du: Tensor, dk: Tensor) -> Rows:
    """K du + U dk and Σ dk by parameter name; of no direction too."""
    if len(du):
        return node.gradient.push(du, dk)
    affine = node.stage.affine
    empty = {affine.weight_name: du.new_zeros(0, *affine.weight.shape)}
    if affine.bias_name is not None:
        empty[affine.bias_name] = du.new_zeros(0, affine.out_shape[0])
    return empty


def _decide(matrix: Tensor, options: _Options) -> Elimination:
    return eliminate(
        matrix.T.contiguous(), rcond=options.rcond, noise=options.noise, dtype=options.dtype
    )


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
                raise NotStructured(f"'{op.name}' ({op.kind}) has no inverse")
        if any(isinstance(op, Activation) for op in node.stage.lead):
            raise NotStructured(f"an activation leads into '{node.stage.name}'")
        if i == last and any(isinstance(op, Activation) for op in node.stage.tail):
            raise NotStructured(f"'{node.stage.name}' is followed by an activation")
        for op, before in zip(node.stage.tail, node.tail_inputs, strict=True):
            if isinstance(op, Activation) and bool((op.derivative(before) == 0).any()):
                raise NotStructured(f"'{op.name}' ({op.kind}) is off in places")


def _fits(unknowns: int, entries: int, options: _Options) -> None:
    need = 8.0 * unknowns * entries
    if need > options.memory:
        raise TooLarge(f"{unknowns} open directions take {need / 1e9:.1f} GB a copy")


def _orthonormal(directions: Tensor) -> tuple[Tensor, Tensor]:
    """(orthonormal directions, change) with new = changeᵀ old, in the order of the old ones."""
    if len(directions) == 0:
        return directions, directions.new_zeros(0, 0)
    scale = 1.0 / _norm(directions).clamp_min(1e-300)
    flat = directions.flatten(1).T * scale
    q, r = tall_qr(flat)
    eye = torch.eye(len(r), dtype=r.dtype)
    change = scale[:, None] * torch.linalg.solve_triangular(r, eye, upper=True)
    return q.T.reshape(directions.shape).contiguous(), change


def _apply(change: Tensor, directions: Tensor) -> Tensor:
    """changeᵀ directions, [a, b] and [a, *shape] → [b, *shape]."""
    return (change.T @ directions.flatten(1)).reshape(change.shape[1], *directions.shape[1:])


def _padded(rows: Tensor, before: int) -> Tensor:
    return torch.cat([rows.new_zeros(before, rows.shape[1]), rows])


def _norm(directions: Tensor) -> Tensor:
    return directions.flatten(1).norm(dim=1)


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
