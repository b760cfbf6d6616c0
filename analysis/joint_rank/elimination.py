"""What the gradients of a chain leave open, eliminated from the head down.

Unknowns are the directions ``du_i`` at the input of a stage.  Let S_{i+1} be those that the layers
above leave open, each with the cotangent direction that it entails: columns ``dz = Z c`` at the
stage's output, ``dk = D c`` there.  The stage below sees

    W du = Z c                   the forward pass,
    K du + U D c = 0             its gradient did not move,

and its solutions are S_i (`rgap.analysis.joint_rank.stage`).  The null space of the whole update
is S_0: no Jacobian is formed.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rgap.allowance import Ahead, freely
from rgap.analysis.joint_rank.nullspace import Open
from rgap.analysis.joint_rank.stage import Options, eliminate_stage
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.node import Node, each
from rgap.network.activations import Activation
from rgap.network.reshape import Rearrange, Reshape
from rgap.progress import Watch, silent
from rgap.solvers.rank import Rank


class NotStructuredError(ValueError):
    """This chain has a step that the elimination cannot go back through."""


@dataclass(frozen=True)
class StageNull:
    """One stage of the elimination.

    Attributes:
        layer: its name.
        unknowns: entries of its input, B·n_i.
        nullity: dimension of S_i, in the space of its input.
        rank: of the equations that were left when its null space was decided, with the gap.
        values: their singular values.
        order: "gradient first", "weights first", "angles" or "nothing open".
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
        directions: basis of the null space [nullity, B, *input_shape], not orthonormal; None where
            only ranks were asked for.
        onto: whether a layer's weights reach every output, where that was found on the way.
    """

    stages: tuple[StageNull, ...]
    directions: Tensor | None
    onto: dict[str, bool]


def chain_nullspace(
    linear: Linearisation,
    trained: Collection[str],
    *,
    rcond: float | None = None,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float64,
    memory: float = 4e9,
    watch: Watch = silent,
    ahead: Ahead = freely,
) -> ChainNull:
    """Null space of the Jacobian of a chain's update, without the Jacobian.

    Args:
        linear: the update map at the batch, with the loss that gives κ.
        trained: names of the parameters that have a gradient; the others give no equation.
        rcond: relative cutoff of every decision, None for the default.
        noise: relative error of the entries.
        dtype: precision in which the entries are known.
        memory: bytes for everything.
        watch: told of every layer.
        ahead: asked before every factorisation whether there is time.

    Raises:
        NotStructuredError: a step that has no inverse (a pool, a ReLU that is off, a step after the
            last layer).
        TooLargeError: matrices beyond ``memory``.
    """
    options = Options(rcond, noise, dtype, frozenset(trained), memory, ahead)
    require_invertible(linear)
    head = linear.nodes[-1]
    batch, outputs = head.z.shape[0], head.z[0].numel()
    z = torch.eye(batch * outputs, dtype=head.z.dtype, device=head.z.device)
    z = z.reshape(-1, *head.z.shape)
    open_ = Open(z, linear.bend(z))
    found: list[StageNull] = []
    for number, node in enumerate(reversed(linear.nodes), 1):
        watch(node.stage.name, number, len(linear.nodes))
        start = time.perf_counter()
        if node is not head:
            open_ = through_tail(node, open_)
        stage, open_ = eliminate_stage(node, open_, options)
        seconds = time.perf_counter() - start
        found.insert(0, StageNull(node.stage.name, node.u.numel(), len(open_.du), *stage, seconds))
        for op in reversed(node.stage.lead):
            open_ = Open(each(op.adjoint, open_.du), each(op.adjoint, open_.dk))
    return ChainNull(tuple(found), open_.du, options.onto)


def through_tail(node: Node, above: Open) -> Open:
    """Directions at the stage's output → at its pre-activation z."""
    du, dk = above.du, above.dk
    steps = zip(node.stage.tail, node.tail_inputs, node.tail_cotangents, strict=True)
    for op, before, cotangent in reversed(list(steps)):
        if isinstance(op, Activation):
            slope = op.derivative(before)
            du = du / slope
            dk = dk * slope + cotangent * op.second_derivative(before) * du
        else:
            du, dk = each(op.adjoint, du), each(op.adjoint, dk)
    return Open(du, dk)


def require_invertible(linear: Linearisation) -> None:
    """Raise :class:`NotStructuredError` for a step that the elimination cannot go back through."""
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
