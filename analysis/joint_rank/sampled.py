"""The ranks of a chain's update alone: a few random open directions stand for all of them.

Below a layer that leaves many directions open, no more of them can be taken away than there are
equations.  Where the layers above left nothing open, what a layer's own two blocks leave open is
counted by the angles between their row spaces and drawn from by projection.  Directions in general
position, more of them than the layers below have equations, meet as many equations as all would.

A few samples of the batch are enough where every equation of the layers below takes a direction
away: no larger batch can take more.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import prod

import torch

from rgap.analysis.joint_rank.elimination import (
    ChainNull,
    Draw,
    chain_nullspace,
    descend,
    eliminated,
    require_invertible,
)
from rgap.analysis.joint_rank.nullspace import Open, RankOptions, combined, orthonormalising
from rgap.analysis.joint_rank.stage import (
    WEIGHTS,
    ChainOptions,
    Decision,
    fits,
    weights_first,
)
from rgap.constraints import gradient_constraint, weight_constraint
from rgap.constraints.ranks import joint_rows, weight_row_spaces
from rgap.jacobian.layer import Node
from rgap.jacobian.linearisation import Linearisation

SPARE = 64  # directions beyond the equations below
LEFT = 32  # that must be left of them at the end, or too few were drawn


class _UnclearError(Exception):
    """The sample cannot decide; the whole null space has to."""


def chain_ranks(linear: Linearisation, trained: Collection[str], options: RankOptions) -> ChainNull:
    """What `chain_nullspace` finds, without the null directions.

    Draws only where every rank is decided in float64 by a wide gap; everything else goes through
    the whole null space.

    Args:
        linear: the update map at the batch, with the loss that gives κ.
        trained: names of the parameters that have a gradient.
        options: of every decision.

    Raises:
        NotStructuredError: a step that has no inverse.
        TooLargeError: matrices beyond ``options.memory``.
    """
    require_invertible(linear)
    if options.rcond is None and options.noise == 0.0 and options.dtype == torch.float64:
        for part in (True, False):
            try:
                return _sampled(linear, ChainOptions(**vars(options), trained=trained), part)
            except _UnclearError:
                continue
    return replace(chain_nullspace(linear, trained, options), directions=None)


def _sampled(linear: Linearisation, options: ChainOptions, part: bool) -> ChainNull:
    batch = len(linear.nodes[-1].z)

    def step(at: int, node: Node, above: Draw) -> tuple[Decision, Draw]:
        if above.count == 0:
            decision, left = _begin(linear, at, options, part)
        elif above.whole:
            decision, left = eliminated(node, above, options)
        else:
            decision, left = _continue(node, above, batch, options)
        if not decision[0].clear:
            raise _UnclearError
        return decision, left

    return ChainNull(descend(linear, options, step)[0], None, options.onto)


def _begin(
    linear: Linearisation, at: int, options: ChainOptions, part: bool
) -> tuple[Decision, Draw]:
    """A stage with nothing open above: K du = 0 and W du = 0."""
    node = linear.nodes[at]
    affine, batch = node.stage.affine, len(node.u)
    none = node.u.new_zeros(0, *node.u.shape)
    nothing, no_values = Open(none, none), node.u.new_zeros(0)
    size = prod(affine.in_shape)
    if not options.trains(affine)[0]:
        return eliminated(node, Draw(nothing, 0, batch), options)
    if prod(affine.out_shape) >= size and options.inverse(affine).rank.nullity == 0:
        rank = options.inverse(affine).rank
        return (rank, no_values, "nothing open"), Draw(nothing, 0, batch)
    fits(prod(affine.out_shape), size, options, WEIGHTS)
    gradient = gradient_constraint(affine, node.k)
    own = gradient.rank()
    spaces = weight_row_spaces(affine, torch.ones_like(node.k, dtype=torch.bool))
    weight = spaces[0].rank.rank
    options.onto[affine.name] = weight == prod(affine.out_shape)
    fits(own.rank, batch * weight, options)
    rows = joint_rows(affine, gradient, spaces, cotangent=node.k)
    if not own.clear:
        raise _UnclearError
    count = rows.rank.nullity
    decision = (rows.rank, no_values, "angles")
    below = linear.nodes[:at]
    if count == 0 or not below:
        return decision, Draw(nothing, count, batch)
    wanted = sum(_equations(n, options) + _excess(n) for n in below) + SPARE
    samples = batch
    if count > wanted:
        inverses = [options.inverse(n.stage.affine) for n in below]
        if any(inverse.rank.nullity for inverse in inverses):
            raise _UnclearError  # what is open there in other samples would go uncounted
        if part and all(inverse.onto for inverse in inverses):
            enough = -(-(wanted + own.rank) // (size - weight))
            samples = min(enough, batch)
    if samples < batch:
        k = node.k[:samples]
        rows = joint_rows(affine, gradient_constraint(affine, k), spaces[:samples], cotangent=k)
    drawn = min(wanted, count)
    fits(drawn, samples * size, options)
    table = rows.open_directions(drawn, torch.Generator().manual_seed(0))
    if table is None:
        raise _UnclearError
    du = weight_constraint(affine, samples).fold(table).reshape(drawn, samples, *affine.in_shape)
    if drawn == count:
        du = combined(orthonormalising(du), du)
    return decision, Draw(Open(du, torch.zeros_like(du)), count, samples)


def _continue(node: Node, draw: Draw, batch: int, options: ChainOptions) -> tuple[Decision, Draw]:
    """A stage below the one that the directions were drawn from; its weights are injective."""
    before = len(draw.open.du)
    fits(before, max(node.z.numel(), node.u.numel()), options)
    weight, bias = options.trains(node.stage.affine)
    decision, left = weights_first(node, draw.open, weight, bias, options)
    met = before - len(left.du)
    all_met = met == _equations(node, options)
    if len(left.du) < LEFT or (draw.samples < batch and not all_met):
        raise _UnclearError
    return decision, Draw(left, draw.count - met, draw.samples)


def _equations(node: Node, options: ChainOptions) -> int:
    """Entries of the stage's gradient."""
    affine = node.stage.affine
    weight, bias = options.trains(affine)
    return (affine.weight.numel() if weight else 0) + (affine.out_shape[0] if bias else 0)


def _excess(node: Node) -> int:
    """Equations of the forward pass beyond its unknowns: they can take directions away too."""
    affine = node.stage.affine
    return len(node.u) * max(0, prod(affine.out_shape) - prod(affine.in_shape))
