"""One stage of a chain at a batch, and directions through its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rgap.jacobian.layer import Bilinear
from rgap.network.activations import Activation
from rgap.network.chain import Stage
from rgap.network.reshape import Op


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


def each(function: Callable[[Tensor], Tensor], ensemble: Tensor) -> Tensor:
    """A map of samples [B, ...] applied to every direction of [S, B, ...]."""
    out = function(ensemble.flatten(0, 1))
    return out.reshape(*ensemble.shape[:2], *out.shape[1:])


def push(op: Op, before: Tensor, direction: Tensor) -> Tensor:
    """D op(before) applied to directions [S, B, ...]."""
    if isinstance(op, Activation):
        return op.derivative(before) * direction
    return each(op.linear, direction)


def pull(op: Op, before: Tensor, cotangent: Tensor) -> Tensor:
    """D op(before)ᵀ applied to cotangents [S, B, ...]."""
    if isinstance(op, Activation):
        return op.derivative(before) * cotangent
    return each(op.adjoint, cotangent)
