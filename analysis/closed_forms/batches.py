"""The ranks of one layer for every batch size, proved at a few of them.

**Proposition.**  For generic k and W the ranks of K and of both blocks together are concave
functions of B = 0, 1, 2, …, and 0 at B = 0.

*Proof.*  Let V be the null space of one sample's W.  x is in the null space of both blocks if and
only if every x_b is in V and Σ_b K_b x_b = 0, so the joint rank is ``B·rank W + s(B)`` with s(B)
the dimension of S = Σ_b K_b V, where the K_b are drawn alike.  One more sample adds
``dim(S + K_b V) − dim S``, which can only fall as S grows.  With the whole space for V the same
holds of K. ∎

So an upper bound that is linear between a few batch sizes is the rank everywhere as soon as it is
the rank at those, and grows by rank W a sample beyond the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import sympy

from rgap.analysis.closed_forms.closed_form import closed_form
from rgap.analysis.closed_forms.layer import EFFORT
from rgap.analysis.closed_forms.pattern import reads
from rgap.analysis.closed_forms.residue_classes import bounds
from rgap.analysis.closed_forms.symbolic_lines import Line, lines_of, lowest, turns
from rgap.analysis.closed_forms.witness import Witness
from rgap.network.affine import Affine

__all__ = ["EveryBatch", "every_batch", "first_open"]

SMALL = 4000  # entries of one sample's pattern, up to which ranks are counted B by B
LONGEST = 12  # batch sizes counted
FARTHEST = 1 << 24  # batch size up to which a critical one is looked for
BOUND = "rows and pixels counted by residue classes of the stride"
SYMBOL = sympy.Symbol("B", positive=True, integer=True)
Lines = list[Line]


@dataclass(frozen=True)
class EveryBatch:
    """Ranks as expressions in B, and which of them are proved.

    Attributes:
        gradient: rank of the gradient constraints, or an upper bound.
        weight: rank of the weight constraints, or an upper bound.
        joint: rank of both, or an upper bound.
        gradient_exact: True if it is proved for every B.
        weight_exact: the same of the weight constraints.
        exact: the same of both together.
        critical: smallest B that leaves something open (an upper bound on it unless ``exact``);
            ∞ if there is none, None if the bound does not say.
        reason: why.
    """

    gradient: Any
    weight: Any
    joint: Any
    gradient_exact: bool
    weight_exact: bool
    exact: bool
    critical: Any
    reason: str


def every_batch(affine: Affine, batch: Any, effort: float = EFFORT) -> EveryBatch:
    """Ranks of a layer's constraints, all units on, for generic weights and cotangents.

    Args:
        affine: the layer; its weights are not looked at.
        batch: the symbol B.
        effort: multiplications that one elimination of a proof may take.

    >>> import torch
    >>> from rgap.network.affine import convolution
    >>> w = torch.ones(12, 12, 5, 5)
    >>> conv = convolution("c", w, None, ("w", None), (12, 16, 16), stride=2, padding=2)
    >>> found = every_batch(conv, sympy.Symbol("B", positive=True, integer=True))
    >>> found.joint, found.exact, found.critical
    (Min(3072*B, 768*B + 3456), True, 2)
    """
    bound = bounds(affine, batch)
    blocks = [lines_of(rank, batch) for rank in (bound.gradient, bound.weight, bound.joint)]
    if any(block is None for block in blocks):
        k, w, both = map(sympy.sympify, (bound.gradient, bound.weight, bound.joint))
        return EveryBatch(k, w, both, False, False, False, None, BOUND)
    gradient, weight, joint = (block for block in blocks if block is not None)

    seen, single = Witness(affine, effort), prod(affine.in_shape)
    per_sample = int(weight[0][1])
    weight_exact = seen.weight(per_sample) == per_sample
    gradient_exact = _reached(gradient, 0, lambda b, _: seen.gradient(b))
    if weight_exact and per_sample == single:
        joint, exact = [weight[0]], True
    else:
        exact = weight_exact and _reached(joint, per_sample, seen.joint)
    counted = _one_by_one(affine, per_sample) if weight_exact and not exact else None
    if counted is not None:
        joint, exact = counted, True
    critical = first_open(lambda b: b * single - min(a + s * b for a, s in joint))
    looked = ", ".join(map(str, _looked_at(joint)))
    reason = BOUND
    if exact and per_sample == single:
        reason = "the weight constraints alone determine every sample"
    elif counted is not None:
        reason = "counted by matchings batch size by batch size, and ranks are concave in B"
    elif exact:
        reason = (
            "rows and pixels counted by residue classes of the stride; ranks at a point reach the "
            f"count at B = {looked}, and ranks are concave in B"
        )
    return EveryBatch(
        lowest(gradient, batch),
        lowest(weight, batch),
        lowest(joint, batch),
        gradient_exact,
        weight_exact,
        exact,
        critical if exact or critical != sympy.oo else None,
        reason,
    )


def _looked_at(lines: Lines) -> list[int]:
    return sorted({1, *turns(lines)})


def _reached(lines: Lines, tail: int, rank: Callable[[int, int], int]) -> bool:
    """True if a concave rank that grows by ``tail`` in the end is the minimum of these lines."""
    if lines[-1][1] != tail:
        return False
    for b in _looked_at(lines):
        value = min(a + s * b for a, s in lines)
        if rank(b, int(value)) < value:
            return False
    return True


def _one_by_one(affine: Affine, tail: int) -> Lines | None:
    """Joint ranks at B = 1, 2, … until a sample adds only ``tail``; None without a proof."""
    again = affine.geometry is not None and affine.geometry.border != "zeros"
    entries = len(reads(affine).tap) * prod(affine.weight.shape[:2])
    if again or entries > SMALL:  # matchings do not see what a border shows again
        return None
    lines: Lines = []
    before = 0
    for b in range(1, LONGEST + 1):
        form = closed_form(affine, b)
        if not form.exact:
            return None
        slope = form.joint_rank - before
        lines.append((Fraction(before - (b - 1) * slope), Fraction(slope)))
        if slope == tail:
            return lines_of(lowest(lines, SYMBOL), SYMBOL)
        before = form.joint_rank
    return None


def first_open(nullity: Callable[[int], Any]) -> Any:
    """Smallest B with nullity(B) > 0; the nullity is convex in B and 0 at B = 0."""
    low, high = 0, 1
    while nullity(high) <= 0:
        low, high = high, 2 * high
        if high > FARTHEST:
            return sympy.oo
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if nullity(middle) > 0 else (middle, high)
    return sympy.Integer(high)
