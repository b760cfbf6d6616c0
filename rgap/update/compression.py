"""What an update looks like where it was compressed: signs only, or its largest entries."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from rgap.arithmetic.doubles import BLOCK
from rgap.network.chain import Chain
from rgap.update.pruning import pruned

ROWS = (2, 3)  # biases of zero beside weights that are not: of one product, and of sums of them
GONE = 0.2  # of the median, below which a gradient has entries
FILLED = 8  # entries that have a median
FEWEST = 32  # entries: below that, equal magnitudes happen by chance


def compression(
    gradients: Mapping[str, Tensor],
    terms: Mapping[str, int],
    noise: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """What the update looks like if it was compressed, in words; None for a plain gradient.

    - Signs: in every tensor all entries that are not zero have one magnitude.
    - Pruned: the zeros of a weight's gradient are not those of a sum of as few outer products as
      the batch has samples and positions (:mod:`rgap.update.pruning`).  Dead units, dark pixels and
      padding leave none of that kind.

    Args:
        gradients: by parameter name.
        terms: outer products that the gradient of a weight is a sum of, samples times positions;
            other tensors are not looked at for zeros.
        noise: standard deviation of the noise of entries, by parameter name.
        dtype: in which values underflowed, where it is not that of the tensors.

    Returns:
        A clause that names the compression, or None.

    >>> g = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    >>> compression({"weight": g}, {"weight": 1}) is None
    True
    >>> compression({"weight": 0.01 * g.sign()}, {})
    'every tensor has entries of one magnitude only, as sign compression leaves them'
    """
    if _one_magnitude(gradients):
        return "every tensor has entries of one magnitude only, as sign compression leaves them"
    if not noise:
        single, sums = _bared(gradients, terms)
        exact = dtype is None or all(g.dtype == dtype for g in gradients.values())
        if (exact and single >= ROWS[0]) or (single + sums >= ROWS[1] and _truncated(gradients)):
            return (
                f"{single + sums} entries of biases are exactly zero though the rows of their "
                "weights are not, as pruning to the largest entries leaves them"
            )
    for name, count in terms.items():
        gradient = gradients.get(name)
        if gradient is None or gradient.ndim < 2:
            continue
        own = (noise or {}).get(name)
        lost = 0.0 if dtype is None else float(torch.finfo(dtype).smallest_normal)
        if pruned(gradient, count, lost if own is None else max(lost, float(own.max()))):
            share = float((gradient == 0).double().mean())
            products = "one outer product" if count == 1 else f"{count} outer products"
            return (
                f"{100 * share:.0f} % of the entries of '{name}' are exactly zero, not in whole "
                f"rows and columns of {products} but as pruning to the largest entries leaves them"
            )
    return None


def _bared(gradients: Mapping[str, Tensor], terms: Mapping[str, int]) -> tuple[int, int]:
    """Rows with ``G_f ≠ 0`` and ``∂b_f = 0``, of one outer product and of sums of several.

    ``∂b_f = Σ_t k_tf`` is no zero of one product whose row ``k_f x`` is not, and hardly of a sum.
    """
    rows = [0, 0]
    for name, count in terms.items():
        weight = gradients.get(name)
        bias = gradients.get(f"{name.removesuffix('weight')}bias")
        if weight is None or bias is None or bias.shape != weight.shape[:1] or not bias.any():
            continue
        rows[count > 1] += int(((bias == 0) & (weight != 0).flatten(1).any(1)).sum())
    return rows[0], rows[1]


def _truncated(gradients: Mapping[str, Tensor]) -> bool:
    """True if the small values are missing: in every tensor, or below one level in all."""
    sizes = [g[g != 0].abs().double() for g in gradients.values() if g.ndim > 1]
    sizes = [s for s in sizes if len(s) >= FILLED]
    if not sizes:
        return False
    return any(
        all(float(s.min()) > GONE * float(s.median()) for s in parts)
        for parts in (sizes, [torch.cat(sizes)])
    )


def terms_of(chain: Chain, batch: int | None) -> dict[str, int]:
    """Outer products that the gradient of each stage's weight is a sum of; {} of an unknown batch.

    Positions are those of the layer's output: windows of a convolution, tokens.
    """
    if batch is None:
        return {}
    terms = {}
    for stage in chain.stages:
        affine = stage.affine
        groups = 1 if affine.geometry is None else affine.geometry.groups
        terms[affine.weight_name] = batch * groups * prod(affine.out_shape[1:])
    return terms


def _one_magnitude(gradients: Mapping[str, Tensor]) -> bool:
    """True if in every tensor all entries that are not zero have one magnitude.

    A single layer with one or two outputs on binary inputs may send that: ``k = (p, -p)``.
    """
    tables = [g for g in gradients.values() if g.ndim > 1]
    if len(tables) == 1 and len(tables[0]) <= 2:
        return False
    count = 0
    for gradient in gradients.values():
        largest = torch.maximum(gradient.amax(), -gradient.amin()) if gradient.numel() else 0.0
        others = 0
        for part in torch.split(gradient.flatten(), BLOCK):
            others += int(((part != 0) & (part.abs() != largest)).sum())
            count += int(part.count_nonzero())
        if others:
            return False
    return count >= FEWEST
