"""The update as a function of the data, linearised: Jacobian products for whole ensembles.

With the cotangent κ at the head fixed, ``g(x) = ∂⟨κ, f_θ(x)⟩/∂θ``.  One pass forward and one back
give J v for S directions at once, the transposed passes Jᵀ y; the Jacobian is never formed.  (The
client's κ, rounded as it was, is read off the head; taking it as given keeps the rounding of the
softmax out of all other equations.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rgap.activations import Activation
from rgap.affine import Affine
from rgap.network import Chain, Stage
from rgap.ops import Op
from rgap.precision import Precision
from rgap.systems import convnd, gradient_constraint, gradient_rows, weight_constraint

Rows = dict[str, Tensor]  # by parameter name, each [S, *parameter.shape]


@dataclass(frozen=True)
class _Node:
    """Everything that one stage needs to push directions through it."""

    stage: Stage
    u: Tensor
    z: Tensor
    k: Tensor  # cotangent at z
    lead_inputs: list[Tensor]
    tail_inputs: list[Tensor]
    tail_cotangents: list[Tensor]  # cotangent at the output of each tail op
    matrix: Tensor  # K, [groups, rows, P]
    patches: Tensor  # U, [groups, C/g·offsets, B·outputs]


class Linearisation:
    """The update map of a chain, linearised at a batch x with head cotangent κ.

    Args:
        chain: a complete chain.
        x: data [B, *input_shape], float64.
        kappa: cotangent at the head's pre-activation, [B, *head.out_shape].
    """

    def __init__(self, chain: Chain, x: Tensor, kappa: Tensor) -> None:
        self.chain, self.x, self.kappa = chain, x, kappa
        self.nodes: list[_Node] = []
        forward = []
        value = x
        for stage in chain.stages:
            lead_inputs = []
            for op in stage.lead:
                lead_inputs.append(value)
                value = op.forward(value)
            u = value
            z = value = stage.affine.forward(u)
            tail_inputs = []
            for op in stage.tail:
                tail_inputs.append(value)
                value = op.forward(value)
            forward.append((stage, u, z, lead_inputs, tail_inputs))
        k = kappa
        for stage, u, z, lead_inputs, tail_inputs in reversed(forward):
            cotangents: list[Tensor] = []
            if stage.index < len(chain.stages) - 1:
                for op, before in zip(reversed(stage.tail), reversed(tail_inputs), strict=True):
                    cotangents.insert(0, k)
                    k = op.pull(before, k)
            matrix = gradient_constraint(stage.affine, k).matrix
            node = _Node(
                stage,
                u,
                z,
                k,
                lead_inputs,
                tail_inputs,
                cotangents,
                matrix,
                _patches(stage.affine, u),
            )
            self.nodes.insert(0, node)
            k = stage.affine.adjoint(k)
            for op, before in zip(reversed(stage.lead), reversed(lead_inputs), strict=True):
                k = op.pull(before, k)

    def gradients(self) -> Rows:
        """g(x): the update's weight and bias gradients, by parameter name."""
        out: Rows = {}
        for node in self.nodes:
            out[node.stage.affine.weight_name] = node.stage.affine.weight_gradient(node.u, node.k)
            if node.stage.affine.bias_name is not None:
                out[node.stage.affine.bias_name] = node.stage.affine.bias_gradient(node.k)
        return out

    def jvp(
        self, dx: Tensor, dkappa: Tensor | None = None, inject: Precision | None = None
    ) -> Rows:
        """J dx for S directions [S, B, *input_shape].

        Args:
            dx: directions.
            dkappa: directions of κ, [S, B, *head.out_shape].
            inject: add the rounding of the client's own forward and backward pass at every
                step: the result is then a sample of what rounding does to the update.
        """
        du, dz = [], []
        value = dx
        for node in self.nodes:
            for op, before in zip(node.stage.lead, node.lead_inputs, strict=True):
                value = _push(op, before, value)
            du.append(value)
            value = _flat(node.stage.affine.linear, value)
            if inject is not None:
                squares = node.stage.affine.squared().linear(node.u.square())
                value = value + inject.normal(inject.sum_std(squares))
            dz.append(value)
            if node.stage.index == len(self.nodes) - 1:
                break
            for op, before in zip(node.stage.tail, node.tail_inputs, strict=True):
                value = _push(op, before, value)
                if inject is not None and isinstance(op, Activation):
                    value = value + inject.rounding(op.forward(before))
        dk = torch.zeros_like(dz[-1]) if dkappa is None else dkappa
        rows: Rows = {}
        for i in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[i]
            if i < len(self.nodes) - 1:
                dk = self._pull_tail(node, dz[i], dk)
                if inject is not None:
                    dk = dk + inject.rounding(node.k)
            rows |= self._rows(node, du[i], dk)
            if i:
                dk = _flat(node.stage.affine.adjoint, dk)
                for op, before in zip(
                    reversed(node.stage.lead), reversed(node.lead_inputs), strict=True
                ):
                    dk = _pull(op, before, dk)
        return rows

    def vjp(self, rows: Rows) -> Tensor:
        """Jᵀ y for S row vectors: the directions [S, B, *input_shape]."""
        last = len(self.nodes) - 1
        bar_z: list[Tensor | None] = [None] * len(self.nodes)
        bar_u = []
        bar_k: Tensor | None = None
        for i, node in enumerate(self.nodes):
            bar_u.append(self._rows_u(node, rows))
            own = self._rows_k(node, rows)
            if bar_k is not None:
                for op, before in zip(node.stage.lead, node.lead_inputs, strict=True):
                    bar_k = _push(op, before, bar_k)
                own = own + _flat(node.stage.affine.linear, bar_k)
            if i == last:
                break
            bar_k, bar_z[i] = self._push_tail(node, own)
        back: Tensor | None = None
        for i in range(last, -1, -1):
            node = self.nodes[i]
            total = bar_u[i]
            curved = bar_z[i]
            if back is not None:
                for op, before in zip(
                    reversed(node.stage.tail), reversed(node.tail_inputs), strict=True
                ):
                    back = _pull(op, before, back)
                curved = back if curved is None else curved + back
            if curved is not None:
                total = total + _flat(node.stage.affine.adjoint, curved)
            back = total
            for op, before in zip(
                reversed(node.stage.lead), reversed(node.lead_inputs), strict=True
            ):
                back = _pull(op, before, back)
        assert back is not None
        return back

    def squares(self) -> Rows:
        """Σ k²u² (and Σ k²) per gradient entry: what the rounding of its sum scales with."""
        out: Rows = {}
        for node in self.nodes:
            affine = node.stage.affine
            k2 = node.k.square()
            out[affine.weight_name] = affine.weight_gradient(node.u.square(), k2)
            if affine.bias_name is not None:
                out[affine.bias_name] = affine.bias_gradient(k2)
        return out

    @staticmethod
    def _pull_tail(node: _Node, dz: Tensor, dk: Tensor) -> Tensor:
        """d(k at z) from dz and d(k at the tail's output)."""
        directions = []
        value = dz
        for op, before in zip(node.stage.tail, node.tail_inputs, strict=True):
            directions.append(value)
            value = _push(op, before, value)
        steps = zip(
            reversed(node.stage.tail),
            reversed(node.tail_inputs),
            reversed(directions),
            reversed(node.tail_cotangents),
            strict=True,
        )
        for op, before, direction, above in steps:
            dk = _pull(op, before, dk)
            if isinstance(op, Activation):
                dk = dk + above * op.second_derivative(before) * direction
        return dk

    @staticmethod
    def _push_tail(node: _Node, bar: Tensor) -> tuple[Tensor, Tensor]:
        """Transpose of :meth:`_pull_tail`: (on k at the tail's output, on z)."""
        curved = []
        for op, before, above in zip(
            node.stage.tail, node.tail_inputs, node.tail_cotangents, strict=True
        ):
            curved.append(
                above * op.second_derivative(before) * bar if isinstance(op, Activation) else None
            )
            bar = _push(op, before, bar)
        on_z: Tensor | None = None
        for op, before, part in zip(
            reversed(node.stage.tail), reversed(node.tail_inputs), reversed(curved), strict=True
        ):
            if on_z is not None:
                on_z = _pull(op, before, on_z)
            if part is not None:
                on_z = part if on_z is None else on_z + part
        if on_z is None:
            on_z = torch.zeros_like(bar).reshape(bar.shape[0], *node.z.shape)
        return bar, on_z

    def _rows(self, node: _Node, du: Tensor, dk: Tensor) -> Rows:
        """DG = K du + U dk, and d∂b = Σ dk."""
        affine = node.stage.affine
        count = du.shape[0]
        table = weight_constraint(affine, self.x.shape[0]).unfold(du.flatten(0, 1), count)
        groups, _, size = node.matrix.shape
        first = torch.einsum("grp,sgcp->sgcr", node.matrix, table.reshape(count, groups, -1, size))
        k = _filters(dk, groups)  # [S, g, F/g, B·out]
        second = torch.einsum("gtp,sgfp->sgft", node.patches, k)
        shape = (count, *affine.weight.shape)
        out = {affine.weight_name: _unrows(affine, first, count) + second.reshape(shape)}
        if affine.bias_name is not None:
            out[affine.bias_name] = k.sum(-1).flatten(1)
        return out

    def _rows_u(self, node: _Node, rows: Rows) -> Tensor:
        affine = node.stage.affine
        y = gradient_rows(affine, rows[affine.weight_name])
        groups, count, _ = node.matrix.shape
        table = torch.einsum(
            "grp,sgcr->sgcp", node.matrix, y.reshape(y.shape[0], groups, -1, count)
        ).flatten(1, 2)
        return (
            weight_constraint(affine, self.x.shape[0])
            .fold(table)
            .reshape(y.shape[0], *node.u.shape)
        )

    def _rows_k(self, node: _Node, rows: Rows) -> Tensor:
        affine = node.stage.affine
        y = rows[affine.weight_name]
        groups = node.patches.shape[0]
        y = y.reshape(y.shape[0], groups, -1, node.patches.shape[1])
        k = torch.einsum("gtp,sgft->sgfp", node.patches, y).flatten(1, 2)
        if affine.bias_name is not None:
            k = k + rows[affine.bias_name][:, :, None]
        batch = self.x.shape[0]
        k = k.reshape(k.shape[0], k.shape[1], batch, -1).transpose(1, 2)
        return k.reshape(k.shape[0], *node.k.shape)


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


def _flat(function: Callable[[Tensor], Tensor], ensemble: Tensor) -> Tensor:
    out = function(ensemble.flatten(0, 1))
    return out.reshape(*ensemble.shape[:2], *out.shape[1:])


def _push(op: Op, before: Tensor, direction: Tensor) -> Tensor:
    """D op(before) applied to directions [S, B, ...]."""
    if isinstance(op, Activation):
        return op.derivative(before) * direction
    return _flat(op.linear, direction)


def _pull(op: Op, before: Tensor, cotangent: Tensor) -> Tensor:
    """D op(before)ᵀ applied to cotangents [S, B, ...]."""
    if isinstance(op, Activation):
        return op.derivative(before) * cotangent
    return _flat(op.adjoint, cotangent)
