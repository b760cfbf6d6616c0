"""Layers whose equations are about one unknown, or whose gradients come as one sum.

* **Branches** read one tensor: its equations are those of all of them, [K_1; W_1; K_2; W_2; …].
  A 1×1 convolution on a skip looks as if it discarded three quarters of what the 3×3 convolution
  beside it determines.
* **A shared weight** sends one gradient, Σ K_c u_c = G over its calls: a call is like one
  more sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor

from rgap.analysis.probe import Probe
from rgap.constraints import dense_weights, gradient_constraint
from rgap.constraints.ranks import stage_joint_rank
from rgap.network.affine import Affine
from rgap.solvers.kronecker import Kronecker
from rgap.solvers.rank import Rank
from rgap.solvers.subspace import row_space

__all__ = ["Together", "as_samples", "branch_rank", "gather", "together"]

Key = tuple[object, ...]


@dataclass(frozen=True)
class Together:
    """Uses of weights that are counted together.

    Attributes:
        members: numbers of the uses.
        kind: "alone", "branches", "shared" (one weight, called several times), or "mixed" where
            both meet, which is counted use by use, as bounds.
    """

    members: tuple[int, ...]
    kind: str


def gather(reads: Sequence[Key], weights: Sequence[Key]) -> list[Together]:
    """Sort uses of weights into those that are counted together.

    Args:
        reads: the tensor that each use reads, with its shape; equal for branches.
        weights: the weight of each use with its geometry; equal for calls of one layer.

    >>> gather([(0,), (0,), (1,)], [("a",), ("b",), ("c",)])
    [Together(members=(0, 1), kind='branches'), Together(members=(2,), kind='alone')]
    """
    again = Counter(weight[0] for weight in weights)
    beside = Counter(reads)
    groups: list[Together] = []
    done: set[int] = set()
    for i, (read, weight) in enumerate(zip(reads, weights, strict=True)):
        if i in done:
            continue
        branch = tuple(j for j, other in enumerate(reads) if other == read)
        calls = tuple(j for j, other in enumerate(weights) if other == weight)
        if again[weight[0]] == 1 and all(again[weights[j][0]] == 1 for j in branch):
            made = Together(branch, "branches" if len(branch) > 1 else "alone")
        elif len(calls) == again[weight[0]] and all(beside[reads[j]] == 1 for j in calls):
            made = Together(calls, "shared")
        else:
            made = Together((i,), "mixed")
        done |= set(made.members)
        groups.append(made)
    return groups


def together(probes: Sequence[Probe]) -> list[Together]:
    """:func:`gather` for the layers of a probe batch."""
    reads: list[Key] = [(p.read, tuple(p.inputs.shape)) for p in probes]
    weights: list[Key] = [
        (p.affine.weight_name, p.affine.geometry, p.affine.in_shape) for p in probes
    ]
    return gather(reads, weights)


def as_samples(probes: Sequence[Probe]) -> Probe:
    """The calls of one layer as the samples of one call."""
    return replace(
        probes[0],
        inputs=torch.cat([p.inputs for p in probes]),
        cotangents=torch.cat([p.cotangents for p in probes]),
    )


def branch_rank(probes: Sequence[Probe]) -> Rank:
    """Rank of the gradient and weight constraints of all branches at once.

    Args:
        probes: layers that read one input.
    """
    gradient = stacked_gradient([p.affine for p in probes], [p.sent for p in probes])
    dense = [dense_weights(p.affine) for p in probes]
    spaces = []
    for b in range(len(probes[0].inputs)):
        masks = [p.active[b].flatten() for p in probes]
        rows = [matrix[mask] for matrix, mask in zip(dense, masks, strict=True)]
        spaces.append(row_space(torch.cat(rows)))
    return stage_joint_rank(probes[0].affine, gradient, spaces)


def stacked_gradient(affines: Sequence[Affine], cotangents: Sequence[Tensor]) -> Kronecker:
    """``[K_1; K_2; …]``, the gradient constraints of layers that read one input, as one block.

    Args:
        affines: the layers.
        cotangents: k of each, [B, *out_shape]; each K_i is scaled to norm one.
    """
    parts = [gradient_constraint(a, k) for a, k in zip(affines, cotangents, strict=True)]
    groups = lcm(*(len(part.matrix) for part in parts))
    rows = []
    for part in parts:
        matrix = part.matrix.repeat_interleave(groups // len(part.matrix), 0)
        scale = float(matrix.norm())
        rows.append(matrix / scale if scale > 0 else matrix)
    return Kronecker(torch.cat(rows, 1), parts[0].channels)
