"""From "this layer's input is determined" to "so much of the data is": ranks pulled back to x.

The layers i..L leave open the space S_i of directions at the input of layer i.  Of the data they
leave open ``{dx : T_i dx ∈ S_i}`` with T_i the derivative of the layers below.  Where T_i is onto,
its rank is that of layer i's own coordinates; where it is injective and S_i = 0, all of x is
determined; in between, only a bound is given.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from rgap.analysis.joint_rank.elimination import ChainNull
from rgap.analysis.joint_rank.inverses import WeightInverse
from rgap.jacobian.layer import Node, push
from rgap.jacobian.linearisation import Linearisation
from rgap.solvers.rank import numerical_rank, resolve_rcond
from rgap.solvers.subspace import full_column_rank


def cumulative_ranks(linear: Linearisation, null: ChainNull) -> list[tuple[int, bool]]:
    """(rank, exact) of the update of layers i..L as a function of the data, in forward order.

    Stage i's elimination gives ``rank ∂(update_i…L)/∂u_i`` at its own input u_i, which is that in
    the data where ∂u_i/∂x is onto, and at most ``rank ∂u_i/∂x`` otherwise.

    Args:
        linear: the update map of the chain at the batch.
        null: what every stage leaves open, of :func:`chain_nullspace` or :func:`chain_ranks`.

    Returns:
        One pair a stage; where ``exact`` is False the rank is an upper bound.
    """
    unknowns = linear.x.numel()
    ranks: list[tuple[int, bool]] = [(unknowns - null.stages[0].nullity, True)]
    onto = True
    tangents: list[Tensor] | None = None
    for below, stage in zip(linear.nodes, null.stages[1:], strict=False):
        own = stage.unknowns - stage.nullity
        onto = onto and _onto(below, null)
        if onto:
            ranks.append((own, True))
            continue
        if tangents is None:
            size = prod(linear.chain.input_shape)
            unit = torch.eye(size, dtype=linear.x.dtype, device=linear.x.device)
            unit = unit.reshape(size, 1, *linear.x.shape[1:])
            tangents = [unit for _ in linear.x]
            for node in linear.nodes[: below.stage.index]:
                tangents = _forward(node, tangents)
        tangents = _forward(below, tangents)
        forward = sum(_rank(t.flatten(1)) for t in tangents)
        if stage.nullity == 0:
            ranks.append((forward, True))
        elif forward == stage.unknowns:
            ranks.append((own, True))
        else:
            ranks.append((min(own, forward, ranks[0][0]), False))
    return ranks


def _onto(node: Node, null: ChainNull) -> bool:
    """The stage reaches every direction of its output (its tail is invertible)."""
    affine = node.stage.affine
    if prod(affine.out_shape) > prod(affine.in_shape):
        return False
    known = null.onto.get(affine.name)
    return WeightInverse(affine).onto if known is None else known


def _forward(node: Node, tangents: list[Tensor]) -> list[Tensor]:
    """Directions [S, 1, ...] of each sample through one stage."""
    images = []
    for b, value in enumerate(tangents):
        for op, before in zip(node.stage.lead, node.lead_inputs, strict=True):
            value = push(op, before[b : b + 1], value)
        value = node.stage.affine.linear(value.flatten(0, 1))[:, None]
        for op, before in zip(node.stage.tail, node.tail_inputs, strict=True):
            value = push(op, before[b : b + 1], value)
        images.append(value)
    return images


def _rank(matrix: Tensor) -> int:
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    if full_column_rank(gram) is not None:
        return len(gram)
    values = torch.linalg.svdvals(matrix)
    cutoff = resolve_rcond(None, (matrix.shape[0], matrix.shape[1]))
    return numerical_rank(values, min(matrix.shape), cutoff).rank
