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
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from rgap.analysis.joint_rank.nullspace import Open, RankOptions
from rgap.analysis.joint_rank.stage import ChainOptions, Decision, eliminate_stage
from rgap.jacobian.layer import Node, each
from rgap.jacobian.linearisation import Linearisation
from rgap.network.activations import Activation
from rgap.network.reshape import Rearrange, Reshape
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


@dataclass(frozen=True)
class Draw:
    """Directions that are carried down the chain, and what they stand for.

    Attributes:
        open: the directions, in the first ``samples`` samples of the batch.
        count: dimension of the space that they are drawn from, in the whole batch.
        samples: b.
    """

    open: Open
    count: int
    samples: int

    @property
    def whole(self) -> bool:
        """They are a basis."""
        return self.count == len(self.open.du)


Step = Callable[[int, Node, Draw], tuple[Decision, Draw]]
"""(number of the stage, the stage, what is open of its z) → the decision, what it leaves open."""


def chain_nullspace(
    linear: Linearisation, trained: Collection[str], options: RankOptions
) -> ChainNull:
    """Null space of the Jacobian of a chain's update, without the Jacobian.

    Args:
        linear: the update map at the batch, with the loss that gives κ.
        trained: names of the parameters that have a gradient; the others give no equation.
        options: of every decision.

    Raises:
        NotStructuredError: a step that has no inverse (a pool, a ReLU that is off, a step after the
            last layer).
        TooLargeError: matrices beyond ``options.memory``.
    """
    chain = ChainOptions(**vars(options), trained=frozenset(trained))
    require_invertible(linear)
    stages, left = descend(linear, chain, lambda _, node, above: eliminated(node, above, chain))
    return ChainNull(stages, left.open.du, chain.onto)


def eliminated(node: Node, above: Draw, options: ChainOptions) -> tuple[Decision, Draw]:
    """What a stage leaves open of a basis of all that is open above it.

    Args:
        node: the stage.
        above: a whole basis, of directions at the stage's pre-activation z.
        options: of the decision.
    """
    decision, left = eliminate_stage(node, above.open, options)
    return decision, Draw(left, len(left.du), above.samples)


def descend(
    linear: Linearisation, options: RankOptions, step: Step
) -> tuple[tuple[StageNull, ...], Draw]:
    """From every direction of the logits down to the data: the stages in forward order, the rest.

    Args:
        linear: the update map at the batch.
        options: whose ``watch`` is told of every layer.
        step: decides one stage.
    """
    head = linear.nodes[-1]
    batch, outputs = head.z.shape[0], head.z[0].numel()
    z = torch.eye(batch * outputs, dtype=head.z.dtype, device=head.z.device)
    z = z.reshape(-1, *head.z.shape)
    draw = Draw(Open(z, linear.bend(z)), len(z), batch)
    stages: list[StageNull] = []
    for at in range(len(linear.nodes) - 1, -1, -1):
        start = time.perf_counter()
        node = linear.nodes[at].first(draw.samples)
        name, unknowns = node.stage.name, linear.nodes[at].u.numel()
        options.watch(name, len(linear.nodes) - at, len(linear.nodes))
        if node.stage is not head.stage:
            draw = replace(draw, open=through_tail(node, draw.open))
        decision, draw = step(at, node, draw)
        seconds = time.perf_counter() - start
        stages.insert(0, StageNull(name, unknowns, draw.count, *decision, seconds))
        left = draw.open
        for op in reversed(node.stage.lead):
            left = Open(each(op.adjoint, left.du), each(op.adjoint, left.dk))
        draw = replace(draw, open=left)
    return tuple(stages), draw


def through_tail(node: Node, above: Open) -> Open:
    """Directions (dy, dk_y) at the output y = φ(z) of a stage → (dz, dk_z) at its pre-activation z.

    ::

        dz = dy / φ'(z),    dk_z = φ'(z) dk_y + k_y φ''(z) dz

    with k_y = ∂L/∂y; a rearrangement of entries is undone.

    Args:
        node: the stage, its tail invertible (:func:`require_invertible`).
        above: the directions [S, B, *out_shape].
    """
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
