"""The ranks of a chain's update alone: a few random open directions stand for all of them.

Below a layer that leaves many directions open, no more of them can be taken away than there are
equations.  Where the layers above left nothing open, what a layer's own two blocks leave open is
counted by the angles between their row spaces and drawn from by projection.  Directions in general
position, more of them than the layers below have equations, meet as many equations as all would.

A few samples of the batch are enough where every equation of the layers below takes a direction
away: no larger batch can take more.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod

import torch

from rgap.allowance import Ahead, freely
from rgap.analysis.joint_rank.elimination import (
    ChainNull,
    StageNull,
    chain_nullspace,
    require_invertible,
    through_tail,
)
from rgap.analysis.joint_rank.nullspace import Open, combined, orthonormalising
from rgap.analysis.joint_rank.stage import (
    WEIGHTS,
    Decision,
    Options,
    eliminate_stage,
    fits,
    weights_first,
)
from rgap.constraints import gradient_constraint, weight_constraint
from rgap.constraints.ranks import joint_rows, weight_row_spaces
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.node import Node, each
from rgap.progress import Watch, silent

SPARE = 64  # directions beyond the equations below
LEFT = 32  # that must be left of them at the end, or too few were drawn


class _UnclearError(Exception):
    """The sample cannot decide; the whole null space has to."""


@dataclass(frozen=True)
class _Draw:
    """Directions that are carried down, and what they stand for.

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


def chain_ranks(
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
    """What `chain_nullspace` finds, without the null directions.

    Draws only where every rank is decided in float64 by a wide gap; everything else goes through
    the whole null space.

    Args:
        linear: the update map at the batch, with the loss that gives κ.
        trained: names of the parameters that have a gradient.
        rcond: relative cutoff of every decision, None for the default.
        noise: relative error of the entries.
        dtype: precision in which the entries are known.
        memory: bytes for everything.
        watch: told of every layer.
        ahead: asked before every factorisation whether there is time.

    Raises:
        NotStructuredError: a step that has no inverse.
        TooLargeError: matrices beyond ``memory``.
    """
    require_invertible(linear)
    if rcond is None and noise == 0.0 and dtype == torch.float64:
        for part in (True, False):
            try:
                return _sampled(
                    linear, Options(None, 0.0, dtype, trained, memory, ahead), part, watch
                )
            except _UnclearError:
                continue
    found = chain_nullspace(
        linear,
        trained,
        rcond=rcond,
        noise=noise,
        dtype=dtype,
        memory=memory,
        watch=watch,
        ahead=ahead,
    )
    return replace(found, directions=None)


def _sampled(linear: Linearisation, options: Options, part: bool, watch: Watch) -> ChainNull:
    head = linear.nodes[-1]
    batch, outputs = head.z.shape[0], head.z[0].numel()
    z = torch.eye(batch * outputs, dtype=head.z.dtype, device=head.z.device)
    z = z.reshape(-1, *head.z.shape)
    draw = _Draw(Open(z, linear.bend(z)), len(z), batch)
    found: list[StageNull] = []
    for at in range(len(linear.nodes) - 1, -1, -1):
        start = time.perf_counter()
        node = linear.nodes[at].first(draw.samples)
        watch(node.stage.name, len(linear.nodes) - at, len(linear.nodes))
        if node.stage is not head.stage:
            draw = replace(draw, open=through_tail(node, draw.open))
        if draw.count == 0:
            decision, draw = _begin(linear, at, options, part)
        elif draw.whole:
            decision, left = eliminate_stage(node, draw.open, options)
            draw = _Draw(left, len(left.du), draw.samples)
        else:
            decision, draw = _continue(node, draw, batch, options)
        if not decision[0].clear:
            raise _UnclearError
        seconds = time.perf_counter() - start
        unknowns = linear.nodes[at].u.numel()
        found.insert(0, StageNull(node.stage.name, unknowns, draw.count, *decision, seconds))
        left = draw.open
        for op in reversed(node.stage.lead):
            left = Open(each(op.adjoint, left.du), each(op.adjoint, left.dk))
        draw = replace(draw, open=left)
    return ChainNull(tuple(found), None, options.onto)


def _begin(linear: Linearisation, at: int, options: Options, part: bool) -> tuple[Decision, _Draw]:
    """A stage with nothing open above: K du = 0 and W du = 0."""
    node = linear.nodes[at]
    affine, batch = node.stage.affine, len(node.u)
    none = node.u.new_zeros(0, *node.u.shape)
    nothing, no_values = Open(none, none), node.u.new_zeros(0)
    size = prod(affine.in_shape)
    if not options.trains(affine)[0]:
        decision, left = eliminate_stage(node, nothing, options)
        return decision, _Draw(left, len(left.du), batch)
    if prod(affine.out_shape) >= size and options.inverse(affine).rank.nullity == 0:
        rank = options.inverse(affine).rank
        return (rank, no_values, "nothing open"), _Draw(nothing, 0, batch)
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
        return decision, _Draw(nothing, count, batch)
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
    return decision, _Draw(Open(du, torch.zeros_like(du)), count, samples)


def _continue(node: Node, draw: _Draw, batch: int, options: Options) -> tuple[Decision, _Draw]:
    """A stage below the one that the directions were drawn from; its weights are injective."""
    before = len(draw.open.du)
    fits(before, max(node.z.numel(), node.u.numel()), options)
    weight, bias = options.trains(node.stage.affine)
    decision, left = weights_first(node, draw.open, weight, bias, options)
    met = before - len(left.du)
    all_met = met == _equations(node, options)
    if len(left.du) < LEFT or (draw.samples < batch and not all_met):
        raise _UnclearError
    return decision, _Draw(left, draw.count - met, draw.samples)


def _equations(node: Node, options: Options) -> int:
    """Entries of the stage's gradient."""
    affine = node.stage.affine
    weight, bias = options.trains(affine)
    return (affine.weight.numel() if weight else 0) + (affine.out_shape[0] if bias else 0)


def _excess(node: Node) -> int:
    """Equations of the forward pass beyond its unknowns: they can take directions away too."""
    affine = node.stage.affine
    return len(node.u) * max(0, prod(affine.out_shape) - prod(affine.in_shape))
