"""Ranks of one layer's equations by counting: a bound, and a proof where the bound is the rank.

The upper bound is a matching in the pattern of zeros after the rows that the two blocks share are
left out; the lower bound is a term of a minor that nothing cancels.  Neither computes with values
of k or W, and where they meet, the number is the rank for generic k and W, proved.  Layers too
large for matchings are counted by residue classes of the stride, and a rank at one point proves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from torch import Tensor

from rgap.analysis.closed_forms.matching import STYLES, degrees, leading_term, structural
from rgap.analysis.closed_forms.pattern import (
    Entries,
    Ints,
    Mask,
    Reads,
    entries,
    left_out,
    pieces,
    reads,
    relations,
)
from rgap.analysis.closed_forms.residue_classes import bounds
from rgap.analysis.closed_forms.witness import Witness
from rgap.analysis.generic_rank.layout import require_affine
from rgap.network.affine import Affine

__all__ = ["ClosedForm", "closed_form"]

LARGEST = 120_000  # entries of a pattern; larger layers are counted by residue classes
CHOICES = 4  # of the rows left out


@dataclass(frozen=True)
class ClosedForm:
    """Counted ranks of one layer's equations.

    Attributes:
        unknowns: inputs of the layer, B·n.
        gradient_rank: rank of the gradient constraints, or an upper bound on it.
        weight_rank: rank of the weight constraints, or an upper bound on it.
        joint_rank: rank of both together, or an upper bound on it.
        exact: True if ``joint_rank`` is proved to be the rank for generic cotangents and weights.
        gradient_exact: the same of ``gradient_rank``.
        weight_exact: the same of ``weight_rank``.
        reason: why it is exact, or why only a bound.

    >>> ClosedForm(6144, 3600, 1536, 4992, True, True, True, "counted").overlap
    144
    """

    unknowns: int
    gradient_rank: int
    weight_rank: int
    joint_rank: int
    exact: bool
    gradient_exact: bool
    weight_exact: bool
    reason: str

    @property
    def overlap(self) -> int:
        """Equations that both blocks contain: dimension of the common part of the row spaces."""
        return self.gradient_rank + self.weight_rank - self.joint_rank

    @property
    def nullity(self) -> int:
        """Unknowns that the equations leave open; a lower bound where ``exact`` is False."""
        return self.unknowns - self.joint_rank


@dataclass(frozen=True)
class _Count:
    rank: int
    proved: int

    @property
    def exact(self) -> bool:
        return self.rank == self.proved


def closed_form(affine: Affine, batch: int, active: Tensor | None = None) -> ClosedForm:
    """Ranks of a layer's gradient and weight constraints for generic cotangents and weights.

    Args:
        affine: the layer; its weights are not looked at.
        batch: number of samples B.
        active: True where a unit is on, its z known and its cotangent not zero,
            ``[B, *out_shape]``; everywhere if None.

    Returns:
        The counted ranks, never below the rank for generic k and W, with ``exact`` where proved.

    Raises:
        ValueError: if ``batch`` is below 1 or ``active`` has another shape.

    >>> import torch
    >>> from rgap.network.affine import linear
    >>> layer = linear("fc", torch.ones(3, 5), None, ("w", None), (5,))
    >>> found = closed_form(layer, 4)
    >>> found.unknowns, found.gradient_rank, found.weight_rank, found.overlap, found.nullity
    (20, 15, 12, 9, 2)
    """
    require_affine(affine)
    if batch < 1:
        raise ValueError(f"expected batch >= 1, got {batch}; write batch=1")
    shape = (batch, *affine.out_shape)
    if active is not None and tuple(active.shape) != shape:
        raise ValueError(
            f"'{affine.name}' ({affine.kind}): expected active of shape {list(shape)}, got "
            f"{list(active.shape)}; write active=None for a layer without units that are off"
        )
    groups = 1 if affine.geometry is None else affine.geometry.groups
    filters, channels = affine.out_shape[0] // groups, affine.in_shape[0] // groups
    unknowns = batch * prod(affine.in_shape)
    triples = reads(affine)
    if affine.geometry is None and (active is None or bool(active.all())):
        return _product(batch, filters, channels)
    again = affine.geometry is not None and affine.geometry.border != "zeros"
    if again or len(triples.tap) * filters * channels * batch > LARGEST:
        return _by_classes(affine, batch, active)
    if active is None or bool(active.all()):
        masks = [np.ones((batch, filters, triples.sizes[1]), dtype=bool)]
        times = groups
    else:
        flat = active.detach().cpu().numpy().reshape(batch, groups, filters, -1)
        masks = [flat[:, group] for group in range(groups)]
        times = 1
    parts = [_group(triples, mask, channels) for mask in masks]
    gradient, weight, joint = (
        _Count(times * sum(c.rank for c in counts), times * sum(c.proved for c in counts))
        for counts in zip(*parts, strict=True)
    )
    reason = (
        "a term of a largest minor stands alone, so the count is the rank for generic k and W"
        if joint.exact
        else "upper bound: rows counted by matching, without a proof that none depends on others"
    )
    return ClosedForm(
        unknowns,
        gradient.rank,
        weight.rank,
        joint.rank,
        joint.exact,
        gradient.exact,
        weight.exact,
        reason,
    )


def _group(triples: Reads, active: Mask, channels: int) -> tuple[_Count, _Count, _Count]:
    """Ranks of the gradient block, the weight block and both, of one group."""
    batch, filters, _ = active.shape
    taps = triples.sizes[0]
    rng = np.random.default_rng(0)  # one answer for one pattern
    lead = np.zeros(filters, dtype=np.int64)
    one, _ = entries(triples, active, 1)
    gradient = _proved(one, triples, (batch, filters, 1), lead, rng)
    gradient = _Count(channels * gradient.rank, channels * gradient.proved)
    samples: dict[bytes, _Count] = {}
    for mask in active:
        if mask.tobytes() not in samples:
            _, own = entries(triples, mask[None], channels)
            samples[mask.tobytes()] = _proved(own, triples, (1, filters, channels), lead, rng)
    counts = [samples[mask.tobytes()] for mask in active]
    weight = _Count(sum(c.rank for c in counts), sum(c.proved for c in counts))
    unknowns = batch * channels * triples.sizes[2]
    for block in (gradient, weight):
        if block.proved == unknowns:
            return gradient, weight, _Count(unknowns, unknowns)

    upper, lower = entries(triples, active, channels)
    parts = pieces(triples, active)
    carried = relations(triples, active, parts)
    best, proved = min(unknowns, gradient.rank + weight.rank), max(gradient.proved, weight.proved)
    ranked = _tap_order(triples, filters, batch)
    pairs = np.arange(channels)[None, :] * taps + ranked[:, None]
    fixed = (pairs.ravel(), pairs.T.ravel())
    for choice in range(CHOICES):
        order = fixed[choice] if choice < len(fixed) else rng.permutation(pairs.size)
        out, lead = left_out(parts, carried, (filters, channels, taps), order)
        reduced = lower.below(upper.rows(~out))
        found_proof = _proved(reduced, triples, (batch, filters, channels), lead, rng, best)
        best, proved = min(best, found_proof.rank), max(proved, found_proof.proved)
        if best == proved:
            break
    return gradient, weight, _Count(best, proved)


def _proved(
    matrix: Entries,
    triples: Reads,
    size: tuple[int, int, int],
    lead: Ints,
    rng: np.random.Generator,
    bound: int | None = None,
) -> _Count:
    """Matching number of a pattern, and the part of it that a leading term proves."""
    rank = structural(matrix)
    if bound is not None and rank > bound:
        return _Count(rank, 0)
    proved = 0
    for style in STYLES:
        if proved == rank:
            break
        proved = max(proved, leading_term(matrix, degrees(triples, size, lead, style, rng)))
    return _Count(rank, proved)


def _tap_order(triples: Reads, filters: int, batch: int) -> Ints:
    """Taps by how far their residue class is from filling its pixels, the emptiest first."""
    place = np.stack(np.unravel_index(np.arange(triples.sizes[0]), triples.taps), axis=1)
    residue = place * np.array(triples.dilation) % np.array(triples.stride)
    _, own = np.unique(residue, axis=0, return_inverse=True)
    own = own.reshape(-1)
    rows = filters * np.bincount(own)
    columns = np.zeros(len(rows))
    pairs = np.unique(np.stack([own[triples.tap], triples.pixel]), axis=1)
    np.add.at(columns, pairs[0], batch)
    return np.argsort((rows / np.maximum(columns, 0.5))[own], kind="stable")


def _product(batch: int, filters: int, channels: int) -> ClosedForm:
    """I_C ⊗ k and I_B ⊗ W have the nullity (B − rank k)(C − rank W): a theorem."""
    rank_k, rank_w = min(batch, filters), min(filters, channels)
    unknowns = batch * channels
    nullity = (batch - rank_k) * (channels - rank_w)
    return ClosedForm(
        unknowns,
        channels * rank_k,
        batch * rank_w,
        unknowns - nullity,
        True,
        True,
        True,
        "fully connected: the null space is the product of those of k and W",
    )


def _by_classes(affine: Affine, batch: int, active: Tensor | None) -> ClosedForm:
    """Sums of minima over residue classes, for layers too large for matchings."""
    ranks = bounds(affine, batch)
    unknowns = batch * prod(affine.in_shape)
    known = batch * prod(affine.out_shape) if active is None else int(active.sum())
    weight = min(ranks.weight, known)
    joint = min(ranks.joint, ranks.gradient + weight)
    exact = (False, False, False)
    if active is None or bool(active.all()):
        seen = Witness(affine)
        alone = seen.weight(weight // batch) * batch == weight
        both = alone and weight == unknowns  # then nothing is left to look at
        exact = (
            both or seen.joint(batch, joint) == joint,
            seen.gradient(batch) == ranks.gradient,
            alone,
        )
    reason = "upper bound: counted by residue classes of the stride, too large for a proof"
    if exact[0]:
        reason = "counted by residue classes of the stride, and reached at a point modulo a prime"
    return ClosedForm(unknowns, ranks.gradient, weight, joint, *exact, reason)
