"""One layer of a chain at a batch: its gradient, and directions through its steps.

The gradient is linear in the input u and in the cotangent k at the output,
``G(u, k) = K(k) u = U(u) k``: K is the matrix of the gradient constraint, U holds the patches of u.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rgap.constraints import convnd, gradient_constraint, gradient_rows, weight_constraint
from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.chain import Stage
from rgap.network.pooling import MaxPool
from rgap.network.reshape import Op
from rgap.precision import Precision

ParameterRows = dict[str, Tensor]  # by parameter name, each [S, *parameter.shape]


class Bilinear:
    """∂L/∂W and ∂L/∂b of an affine map at (u, k).

    Args:
        affine: the map.
        u: its input, [B, *affine.in_shape].
        k: the cotangent at its output, [B, *affine.out_shape].
    """

    def __init__(self, affine: Affine, u: Tensor, k: Tensor) -> None:
        self.affine, self.u_shape, self.k_shape = affine, u.shape, k.shape
        self.matrix = gradient_constraint(affine, k).matrix  # K, [groups, rows, P]
        self.cotangent = k
        self.patches = _patches(affine, u)  # U, [groups, C/g·offsets, B·outputs]

    def push(self, du: Tensor, dk: Tensor) -> ParameterRows:
        """DG = K du + U dk and d∂b = Σ dk, for S directions [S, B, ...]."""
        affine, count = self.affine, du.shape[0]
        if affine.geometry is None:
            dk, k = dk.flatten(2), self.cotangent.flatten(1)
            rows = torch.matmul(dk.mT, self.patches[0].T)
            out = {affine.weight_name: rows.add_(k.T @ du.flatten(2))}
            if affine.bias_name is not None:
                out[affine.bias_name] = dk.sum(1)
            return out
        table = weight_constraint(affine, self.u_shape[0]).unfold(du.flatten(0, 1), count)
        groups, _, size = self.matrix.shape
        first = torch.einsum("grp,sgcp->sgcr", self.matrix, table.reshape(count, groups, -1, size))
        k = _filters(dk, groups)  # [S, g, F/g, B·out]
        second = torch.einsum("gtp,sgfp->sgft", self.patches, k)
        shape = (count, *affine.weight.shape)
        out = {affine.weight_name: _unrows(affine, first, count) + second.reshape(shape)}
        if affine.bias_name is not None:
            out[affine.bias_name] = k.sum(-1).flatten(1)
        return out

    def power(self, du: Tensor, dk: Tensor) -> ParameterRows:
        """Mean square over each filter of what :meth:`push` gives, [S, filters].

        A row of a fully connected layer's is ``[dk k]ᵀ [u; du]``: its square is a form in the inner
        products of the samples, and the rows themselves are not needed.
        """
        affine = self.affine
        if affine.geometry is not None:
            return {n: pooled(row.square()) for n, row in self.push(du, dk).items()}
        count, batch = du.shape[:2]
        u, k = (x.expand(count, -1, -1) for x in (self.patches[0].T, self.cotangent.flatten(1)))
        inputs = torch.cat([u, du.reshape(count, batch, -1)], 1)
        cotangents = torch.cat([dk.reshape(count, batch, -1), k], 1)
        forms = (inputs @ inputs.mT) @ cotangents
        square = (forms * cotangents).sum(1).clamp_min(0.0) / inputs.shape[2]
        out = {affine.weight_name: square}
        if affine.bias_name is not None:
            out[affine.bias_name] = dk.reshape(count, batch, -1).sum(1).square()
        return out

    def pull_u(self, rows: ParameterRows) -> Tensor:
        """Kᵀ y, [S, *u.shape]."""
        y = rows[self.affine.weight_name]
        if self.affine.geometry is None:
            return (self.cotangent.flatten(1) @ y).reshape(y.shape[0], *self.u_shape)
        y = gradient_rows(self.affine, y)
        groups, count, _ = self.matrix.shape
        table = torch.einsum(
            "grp,sgcr->sgcp", self.matrix, y.reshape(y.shape[0], groups, -1, count)
        ).flatten(1, 2)
        folded = weight_constraint(self.affine, self.u_shape[0]).fold(table)
        return folded.reshape(y.shape[0], *self.u_shape)

    def pull_k(self, rows: ParameterRows) -> Tensor:
        """Uᵀ y, and the bias rows, [S, *k.shape]."""
        y = rows[self.affine.weight_name]
        if self.affine.geometry is None:
            k = (y @ self.patches[0]).mT
            if self.affine.bias_name is not None:
                k = k + rows[self.affine.bias_name][:, None]
            return k.reshape(k.shape[0], *self.k_shape)
        groups = self.patches.shape[0]
        y = y.reshape(y.shape[0], groups, -1, self.patches.shape[1])
        k = torch.einsum("gtp,sgft->sgfp", self.patches, y).flatten(1, 2)
        if self.affine.bias_name is not None:
            k = k + rows[self.affine.bias_name][:, :, None]
        k = k.reshape(k.shape[0], k.shape[1], self.u_shape[0], -1).transpose(1, 2)
        return k.reshape(k.shape[0], *self.k_shape)


@dataclass(frozen=True)
class Node:
    """Everything that one stage needs to push directions through it.

    Attributes:
        stage: the stage.
        u: its input, [B, *in_shape].
        z: its pre-activation, [B, *out_shape].
        k: the cotangent at z.
        lead_inputs: what went into each step before the affine map.
        tail_inputs: what went into each step after it.
        tail_cotangents: the cotangent at the output of each step after it.
        gradient: G(u, k).
    """

    stage: Stage
    u: Tensor
    z: Tensor
    k: Tensor
    lead_inputs: list[Tensor]
    tail_inputs: list[Tensor]
    tail_cotangents: list[Tensor]
    gradient: Bilinear

    def first(self, count: int) -> Node:
        """The same stage at the first ``count`` samples: what directions in them alone meet."""
        if count == len(self.u):
            return self
        u, k = self.u[:count], self.k[:count]
        return Node(
            self.stage,
            u,
            self.z[:count],
            k,
            [value[:count] for value in self.lead_inputs],
            [value[:count] for value in self.tail_inputs],
            [value[:count] for value in self.tail_cotangents],
            Bilinear(self.stage.affine, u, k),
        )

    def pull_tail(
        self, dz: Tensor, dk: Tensor, rounded: list[Tensor], inject: Precision | None
    ) -> Tensor:
        """Direction of the cotangent at z, ``d(φ'(z) κ) = φ'(z) dκ + φ''(z) κ dz`` step by step.

        Args:
            dz: direction of the pre-activation, [S, B, *out_shape].
            dk: direction dκ of the cotangent at the tail's output, [S, B, ...].
            rounded: error of each activation's output.
            inject: adds the client's rounding of every step; None for none.
        """
        rounded = list(rounded)
        directions = []
        value = dz
        for op, before in zip(self.stage.tail, self.tail_inputs, strict=True):
            directions.append(value)
            value = push(op, before, value)
        steps = zip(
            reversed(self.stage.tail),
            reversed(self.tail_inputs),
            reversed(directions),
            reversed(self.tail_cotangents),
            strict=True,
        )
        for op, before, direction, above in steps:
            dk = pull(op, before, dk)
            if isinstance(op, Activation):
                dk = dk + above * op.second_derivative(before) * direction
                terms = None if inject is None else op.slope_terms(before)
                if inject is not None and terms is not None:
                    dk = dk + inject.normal(2.0 * inject.unit * terms * above.abs())
                own = rounded.pop() if rounded else None
                if own is not None and op.slope_from_output:
                    # 1 − y² of a saturated y: all that is left of it may be the rounding of y.
                    dk = dk + above * op.slope_derivative(op.forward(before)) * own
        return dk

    def push_tail(self, bar: Tensor) -> tuple[Tensor, Tensor]:
        """Transpose of :meth:`pull_tail` at ``bar`` [S, B, *out_shape]: on dκ, and on dz."""
        curved = []
        for op, before, above in zip(
            self.stage.tail, self.tail_inputs, self.tail_cotangents, strict=True
        ):
            curved.append(
                above * op.second_derivative(before) * bar if isinstance(op, Activation) else None
            )
            bar = push(op, before, bar)
        on_z: Tensor | None = None
        for op, before, part in zip(
            reversed(self.stage.tail), reversed(self.tail_inputs), reversed(curved), strict=True
        ):
            if on_z is not None:
                on_z = pull(op, before, on_z)
            if part is not None:
                on_z = part if on_z is None else on_z + part
        if on_z is None:
            on_z = torch.zeros_like(bar).reshape(bar.shape[0], *self.z.shape)
        return bar, on_z


def each(function: Callable[[Tensor], Tensor], ensemble: Tensor) -> Tensor:
    """A map of samples [B, ...] applied to every direction of [S, B, ...]."""
    out = function(ensemble.flatten(0, 1))
    return out.reshape(*ensemble.shape[:2], *out.shape[1:])


def differentiable(op: Op) -> bool:
    """True of a step of which :func:`push` and :func:`pull` are all that its derivatives are.

    A max-pool is linear wherever no two entries of a window are equal, as a rectifier is away from
    0; how a softmax between two layers bends is not known here.
    """
    return op.affine or isinstance(op, (Activation, MaxPool))


def push(op: Op, before: Tensor, direction: Tensor) -> Tensor:
    """D op(before) applied to directions [S, B, ...]."""
    if isinstance(op, Activation):
        return op.derivative(before) * direction
    if isinstance(op, MaxPool):
        return op.taken(direction, op.winners(before))
    return each(op.linear, direction)


def pull(op: Op, before: Tensor, cotangent: Tensor) -> Tensor:
    """D op(before)ᵀ applied to cotangents [S, B, ...]."""
    if isinstance(op, Activation):
        return op.derivative(before) * cotangent
    if isinstance(op, MaxPool):
        return op.put(cotangent, op.winners(before))
    return each(op.adjoint, cotangent)


def pooled(variance: Tensor) -> Tensor:
    """Mean over everything but samples and filters, [S, F, ...] → [S, F]."""
    return variance if variance.ndim == 2 else variance.flatten(2).mean(2)


def _patches(affine: Affine, u: Tensor) -> Tensor:
    """U with G = U k: the inputs that meet each filter entry, [g, C/g·offsets, B·outputs]."""
    if affine.geometry is None:
        return u.T.unsqueeze(0)
    groups = affine.geometry.groups
    space, out = affine.in_shape[1:], affine.out_shape[1:]
    table = convnd.taps(affine.geometry, space, out).to(u.device)
    flat = u.flatten(2)
    padded = torch.cat([flat, flat.new_zeros(*flat.shape[:2], 1)], 2)  # −1 reads the zero
    picked = padded[:, :, table]  # [B, C, offsets, outputs]
    picked = picked.permute(1, 2, 0, 3)
    return picked.reshape(groups, -1, u.shape[0] * prod(out))


def _filters(dk: Tensor, groups: int) -> Tensor:
    """[S, B, F, *out] → [S, g, F/g, B·out]."""
    k = dk.reshape(dk.shape[0], dk.shape[1], dk.shape[2], -1).transpose(1, 2)
    return k.reshape(k.shape[0], groups, k.shape[1] // groups, -1)


def _unrows(affine: Affine, rows: Tensor, count: int) -> Tensor:
    """Inverse of ``gradient_rows``: [S, g, C/g, (F/g)·offsets] → [S, *weight.shape]."""
    if affine.geometry is None:
        return rows.reshape(count, rows.shape[2], -1).transpose(1, 2)
    groups = affine.geometry.groups
    offsets = prod(affine.geometry.kernel)
    split = rows.reshape(count, groups, rows.shape[2], -1, offsets).transpose(2, 3)
    return split.reshape(count, *affine.weight.shape)
