"""The update as a function of the data, linearised: Jacobian products for whole ensembles.

With the cotangent κ at the head fixed, ``g(x) = ∂⟨κ, f_θ(x)⟩/∂θ``.  One pass forward and one back
give J v for S directions at once, the transposed passes Jᵀ y; the Jacobian is never formed.  (At
B = 1 the client's κ, rounded as it was, is read off the head; taking it as given keeps the rounding
of the softmax out of all other equations.  In a batch κ follows from the loss, and its derivative
is part of J.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.layer import Bilinear, Node, ParameterRows, each, pull, push
from rgap.network.activations import Activation
from rgap.network.chain import Chain
from rgap.precision import Precision


class Linearisation:
    """The update map of a chain, linearised at a batch x with head cotangent κ.

    Args:
        chain: a complete chain.
        x: data [B, *input_shape], float64.
        kappa: cotangent at the head's pre-activation, [B, *head.out_shape], held fixed; or the
            loss that gives it.
    """

    def __init__(self, chain: Chain, x: Tensor, kappa: Tensor | BatchLoss) -> None:
        self.chain, self.x, self.source = chain, x, kappa
        self.nodes: list[Node] = []
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
        self.outputs = value
        k = self.kappa = kappa.cotangent(value) if isinstance(kappa, BatchLoss) else kappa
        for stage, u, z, lead_inputs, tail_inputs in reversed(forward):
            cotangents: list[Tensor] = []
            if stage.index < len(chain.stages) - 1:
                for op, before in zip(reversed(stage.tail), reversed(tail_inputs), strict=True):
                    cotangents.insert(0, k)
                    k = op.pull(before, k)
            gradient = Bilinear(stage.affine, u, k)
            self.nodes.insert(
                0, Node(stage, u, z, k, lead_inputs, tail_inputs, cotangents, gradient)
            )
            k = stage.affine.adjoint(k)
            for op, before in zip(reversed(stage.lead), reversed(lead_inputs), strict=True):
                k = op.pull(before, k)

    def moved(self, x: Tensor, kappa: Tensor | None = None) -> Linearisation:
        """The same update map linearised at another batch, and at another κ where one is given."""
        return Linearisation(self.chain, x, self.source if kappa is None else kappa)

    def bend(self, dz: Tensor) -> Tensor:
        """(∂κ/∂z) dz at the head for directions [S, B, ...]; symmetric, 0 where κ is held."""
        if not isinstance(self.source, BatchLoss):
            return torch.zeros_like(dz)
        return self.source.curvature(self.outputs, dz)

    def gradients(self) -> ParameterRows:
        """g(x): the update's weight and bias gradients, by parameter name."""
        out: ParameterRows = {}
        for node in self.nodes:
            out[node.stage.affine.weight_name] = node.stage.affine.weight_gradient(node.u, node.k)
            if node.stage.affine.bias_name is not None:
                out[node.stage.affine.bias_name] = node.stage.affine.bias_gradient(node.k)
        return out

    def jvp(
        self,
        dx: Tensor | None,
        dkappa: Tensor | None = None,
        inject: Precision | None = None,
        dz_first: Tensor | None = None,
    ) -> ParameterRows:
        """J dx for S directions [S, B, *input_shape].

        Args:
            dx: directions; None for none but those of κ.
            dkappa: directions of κ, [S, B, *head.out_shape].
            inject: add the rounding of the client's own forward and backward pass at every
                step: the result is then a sample of what rounding does to the update.
            dz_first: added to the direction of the first stage's pre-activation.
        """
        rows: ParameterRows = {}
        tangents = self.tangents(dx, dkappa, inject, dz_first)
        for node, (du, dk) in zip(self.nodes, tangents, strict=True):
            rows |= node.gradient.push(du, dk)
        return rows

    def power(
        self, dx: Tensor | None, dkappa: Tensor | None = None, inject: Precision | None = None
    ) -> ParameterRows:
        """Mean over each filter of ``(J dx)²``, by parameter name [S, filters]; as :meth:`jvp`."""
        rows: ParameterRows = {}
        for node, (du, dk) in zip(self.nodes, self.tangents(dx, dkappa, inject), strict=True):
            rows |= node.gradient.power(du, dk)
        return rows

    def tangents(
        self,
        dx: Tensor | None,
        dkappa: Tensor | None = None,
        inject: Precision | None = None,
        dz_first: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Directions (du, dk) of every stage, sample by sample; arguments as for :meth:`jvp`."""
        du: list[Tensor] = []
        dz: list[Tensor] = []
        rounded: list[list[Tensor]] = []  # error of each activation's output
        still = next(t for t in (dx, dkappa, dz_first) if t is not None)
        value = self.x.new_zeros(len(still), *self.x.shape) if dx is None else dx
        for node in self.nodes:
            for op, before in zip(node.stage.lead, node.lead_inputs, strict=True):
                value = push(op, before, value)
            du.append(value)
            if dx is None and not dz:
                value = node.z.new_zeros(len(still), *node.z.shape)
            else:
                value = each(node.stage.affine.linear, value)
            if dz_first is not None and not dz:
                value = value + dz_first
            if inject is not None:
                squares = node.stage.affine.squared().linear(node.u.square())
                value = value + inject.normal(inject.sum_std(squares))
            dz.append(value)
            if node.stage.index == len(self.nodes) - 1:
                break
            rounded.append([])
            for op, before in zip(node.stage.tail, node.tail_inputs, strict=True):
                value = push(op, before, value)
                summed = None if inject is None else op.terms(before)
                if inject is not None and summed is not None:
                    value = value + inject.normal(inject.sum_std(summed))
                if inject is not None and isinstance(op, Activation):
                    rounded[-1].append(inject.rounding(op.forward(before)))
                    value = value + rounded[-1][-1]
        dk = self.bend(dz[-1])
        if dkappa is not None:
            dk = dk + dkappa
        directions: list[tuple[Tensor, Tensor]] = []
        for i in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[i]
            if i < len(self.nodes) - 1:
                dk = node.pull_tail(dz[i], dk, rounded[i], inject)
                if inject is not None:
                    dk = dk + inject.rounding(node.k)
            directions.insert(0, (du[i], dk))
            if i:
                dk = each(node.stage.affine.adjoint, dk)
                if inject is not None:
                    terms = node.stage.affine.squared().adjoint(node.k.square())
                    dk = dk + inject.normal(inject.sum_std(terms))
                for op, before in zip(
                    reversed(node.stage.lead), reversed(node.lead_inputs), strict=True
                ):
                    dk = pull(op, before, dk)
        return directions

    def vjp(self, rows: ParameterRows) -> Tensor:
        """Jᵀ y for S row vectors: the directions [S, B, *input_shape]."""
        return self.pulls(rows)[0]

    def pulls(self, rows: ParameterRows) -> tuple[Tensor, Tensor]:
        """Transpose of :meth:`jvp` in both arguments: on x, and on κ [S, B, *head.out_shape]."""
        last = len(self.nodes) - 1
        bar_z: list[Tensor | None] = [None] * len(self.nodes)
        bar_u = []
        bar_k: Tensor | None = None
        for i, node in enumerate(self.nodes):
            bar_u.append(node.gradient.pull_u(rows))
            own = node.gradient.pull_k(rows)
            if bar_k is not None:
                for op, before in zip(node.stage.lead, node.lead_inputs, strict=True):
                    bar_k = push(op, before, bar_k)
                own = own + each(node.stage.affine.linear, bar_k)
            if i == last:
                bar_z[i] = self.bend(own)
                break
            bar_k, bar_z[i] = node.push_tail(own)
        back: Tensor | None = None
        for i in range(last, -1, -1):
            node = self.nodes[i]
            total = bar_u[i]
            curved = bar_z[i]
            if back is not None:
                for op, before in zip(
                    reversed(node.stage.tail), reversed(node.tail_inputs), strict=True
                ):
                    back = pull(op, before, back)
                curved = back if curved is None else curved + back
            if curved is not None:
                total = total + each(node.stage.affine.adjoint, curved)
            back = total
            for op, before in zip(
                reversed(node.stage.lead), reversed(node.lead_inputs), strict=True
            ):
                back = pull(op, before, back)
        assert back is not None
        return back, own

    def squares(self, precision: Precision | None = None) -> ParameterRows:
        """Σ k²u² (and Σ k²) per gradient entry: what the rounding of its sum scales with.

        Args:
            precision: with which the inputs u were recovered; None where they are exact.
        """
        out: ParameterRows = {}
        for node in self.nodes:
            affine = node.stage.affine
            k2 = node.k.square()
            u2 = node.u.square() if precision is None else precision.squares(node.u)
            out[affine.weight_name] = affine.weight_gradient(u2, k2)
            if affine.bias_name is not None:
                out[affine.bias_name] = affine.bias_gradient(k2)
        return out
