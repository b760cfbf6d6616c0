"""From the cotangents of separated samples to targets and multiplicities of the batch.

What a cotangent weighs in the gradient says how often its picture occurs: ``xᵀG⁺k = 1/(s m)`` with
s the scale of the loss (1/B for a mean) and m the multiplicity.  In a mean a batch and the same
batch sent twice give one gradient: a batch size that is not stated is the smallest one that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log
from statistics import median

import torch
from torch import Tensor

from rgap.jacobian.batch_loss import BatchLoss, loss_scale
from rgap.limits import (
    ALIKE,
    CERTAIN,
    CLOSE,
    FITS,
    LAW,
    LEAST,
    OUTLYING,
    OUTSIDE,
    ROUGH,
    SIMILAR,
    SURE,
    SURELY,
    WHOLE,
)
from rgap.network.activations import Activation
from rgap.separation.batch import Batch, Unseparated
from rgap.separation.counts import batch_of, multiplicity, split_counts, whole
from rgap.separation.identify import Identity
from rgap.separation.mixture import INSIDE, Mixture
from rgap.separation.peeling import Collected
from rgap.solvers.tall import tall_qr
from rgap.update.targets import CLASSES

COPIES = 1e-2  # σ_B/σ_1 below which samples whose weights are open are called near copies
COMMON = 1.05  # ratio of weights that are taken for one factor; a replay decides
SILENT = 0.25  # share of the distance of logits at which nothing is sent that the others may have
DRAWS, FEW = 3, 8  # features at which a head is looked at, and labels whose vectors are listed
EXPLAINED = 0.01  # share of the head's bias gradient that the roots leave before their polish
PARALLEL = 2  # logits of which all cotangents are parallel: p − y sums to 0


def single(batch: Batch, rank: int) -> bool:
    """True if as many samples were sent as the gradient tells apart: each occurs once."""
    return batch.size == rank and batch.loss.targets == "index"


def admissible(batch: Batch, rank: int, identity: Identity, rough: bool = False) -> bool:
    """True if a root with this target can be a sample of the batch.

    Where each sample is known to occur once, its weight is not needed: a ``rough`` value will do
    once no other root is left, and :func:`confirmed` asks again after the polish.  The same holds
    for how near a free cotangent has to come.
    """
    if identity.label is None:
        return identity.accepted and (rough or identity.outside < CERTAIN)
    m = _copies(batch, identity, batch.size or 1)
    if single(batch, rank):
        best = identity.outside <= OUTSIDE and identity.outside < identity.next
        most = ROUGH if rough else 1.0 + SIMILAR
        return best and 1.0 / most < m < most
    if not identity.accepted:
        return False
    if batch.size is None and batch.loss.reduction == "mean":
        return m > 0
    return whole(m, None if batch.size is None else batch.size - rank + 1)


def confirmed(batch: Batch, head: BatchLoss, identities: Sequence[Identity]) -> str | None:
    """Why the targets of the polished samples are not certain, or None where they are."""
    for row, (identity, copies) in enumerate(zip(identities, head.copies.tolist(), strict=True)):
        if identity.label is None:
            continue
        if not identity.accepted:
            return (
                f"the label of sample {row} is not certain: its cotangent misses the range of the "
                f"gradient by {identity.outside:.1e}, that of the next class by {identity.next:.1e}"
            )
        m = _copies(batch, identity, int(head.copies.sum()))
        if abs(m - copies) > WHOLE * min(copies, 2.0):
            return (
                f"sample {row} weighs {m:.2f} of what {copies:.0f} of a batch of "
                f"{int(head.copies.sum())} do"
            )
    return None


def _copies(batch: Batch, identity: Identity, size: int) -> float:
    if identity.share <= 0:
        return 0.0
    return multiplicity(identity.share, batch.loss, size, batch.classes)


def batch_loss(
    batch: Batch, logits: Tensor, identities: Sequence[Identity], certain: bool = True
) -> BatchLoss | Unseparated:
    """Targets and multiplicities of all samples together.

    Args:
        batch: the update.
        logits: of the samples, [R, C].
        identities: one a sample.
        certain: False where nothing contradicts a weight (see :func:`refuting`).

    Returns:
        The :class:`BatchLoss`, or why no whole numbers of copies fit.
    """
    shares = logits.new_tensor([i.share for i in identities])
    size = batch_of(batch.size, shares, batch.loss, batch.classes)
    if size is None:
        return Unseparated(
            f"no batch size explains how much each of the {len(shares)} samples weighs (B/m = "
            f"{', '.join(f'{float(v):.3g}' for v in shares[:8])}); state batch_size",
        )
    continuous = batch.loss.targets != "index"
    certain = certain and not loose(batch, identities)
    if continuous and batch.size is None:
        return Unseparated(
            f"under {batch.loss.name} with targets {batch.loss.targets!r} nothing says how often "
            "each picture occurs; state batch_size"
        )
    if continuous and size != len(identities):
        return Unseparated(
            f"{len(identities)} different pictures in a batch of {size}: under {batch.loss.name} a "
            "target and how often it occurs cannot be told apart"
        )
    targets, copies = [], []
    for identity, z in zip(identities, logits, strict=True):
        if identity.label is not None:
            m = 1.0
            if not single(batch, len(identities)):
                m = _copies(batch, identity, size)
            if not whole(m, size):
                sure = certain and _clear(identity) and not _explained(batch, identity, size)
                return _fractional(batch, size, m, sure)
            label = torch.tensor([identity.label], device=z.device)
            targets.append(batch.loss.dense(label, z[None])[0])
            copies.append(float(round(m)))
            continue
        excess = identity.kappa / loss_scale(batch.loss, size, batch.classes)
        summed = replace(batch.loss, reduction="sum")
        dense = summed.targets_from(z[None], excess[None])[0]
        if continuous:
            targets.append(dense)
            copies.append(1.0)
            continue
        counts = split_counts(z.softmax(0), excess) if batch.loss.plain else None
        if counts is None or batch.loss.label_smoothing:
            return Unseparated(
                "the cotangent of one sample belongs to no class, nor to one picture with several "
                "labels; is the loss, its targets or the model another one?",
            )
        targets.append(counts[1] / counts[0])
        copies.append(float(counts[0]))
    total = int(sum(copies))
    head = BatchLoss(batch.loss, torch.stack(targets), logits.new_tensor(copies))
    if batch.size is not None and total != batch.size and batch.loss.targets == "index":
        others = ""
        if total < batch.size and _switched_off(batch, head, logits):
            others = "; the others left nothing here, as an input of zero or a ReLU that is off"
        return Unseparated(
            f"the update is that of {total} samples ({len(copies)} different pictures), the stated "
            f"batch size is {batch.size}{others}",
            consistent=bool(others)
            or (total < batch.size and _silent(batch, logits))
            or not (certain and all(_clear(i) for i in identities))
            or any(len(_explained(batch, i, size)) > 1 for i in identities),
        )
    return head


def read_from_head(batch: Batch, features: Tensor, logits: Tensor, head: BatchLoss) -> BatchLoss:
    """Dense targets from the head's own gradient once its inputs are known.

    With u the inputs of the last layer ``G = κᵀu`` and ``∂b = κᵀ1``, linear in κ and overdetermined
    for fewer samples than inputs.  A root's own gradient gives κ too, but divided by its smallest
    singular value.

    Args:
        batch: the update.
        features: u, [R, d].
        logits: z, [R, C].
        head: the targets so far; class indices are left alone.

    Returns:
        The loss with these targets.
    """
    if batch.loss.targets == "index":
        return head
    affine = batch.chain.stages[-1].affine
    columns, sent = [features], [affine.sent(batch.gradients)]
    if affine.bias_name is not None:
        columns.append(torch.ones_like(features[:, :1]))
        sent.append(batch.gradients[affine.bias_name][:, None])
    table = torch.cat(columns, 1)
    if len(table) > table.shape[1]:
        return head
    basis, upper = tall_qr(table.T)
    kappa = torch.linalg.solve_triangular(upper, basis.T @ torch.cat(sent, 1).T, upper=True)
    if not bool(kappa.isfinite().all()):
        return head
    return head.explained(logits, kappa)


def resolved(batch: Batch, samples: Mixture) -> bool:
    """True if every sample of the mixture stands out from what the client rounds.

    Where more samples are stated than the rank tells apart, some may be lost to rounding and
    weigh on the others: then they have to stand out by as much again, and at every layer above by
    the square of what they differ by: three samples on a line are two of other weights up to it.
    """
    limit, ratio = LAW * 2.0 * batch.precision.unit, samples.ratio
    if batch.size in (None, samples.rank):
        return ratio > limit
    above = [s.index for s in batch.chain.stages if s.affine.geometry is None]
    least = min(batch.mixture(i).ratio for i in above if i >= samples.stage.index)
    return ratio > LAW * limit and least**2 > limit


def refuting(batch: Batch, samples: Mixture) -> bool:
    """True if weights that are no whole numbers contradict a stated batch size.

    Not where at most two logits carry the loss: the cotangents of all targets are then parallel,
    and samples of different targets may be shown as one, of any weight.  Nor where those of one
    target are (:func:`_blind`).  A root w [r] solves ``k(w)`` in the range of G and ``Q w = 1``,
    n − r + 1 equations for the n units that are on (a softmax's cotangents sum to zero, one less):
    with no more than r of them roots exist that are no sample.  Nor where a bias gradient is
    outside that range: a sample of zero input weighs on ``Q w = 1`` then, and sent nothing else.
    """
    stage = batch.chain.stages[-1]
    told = int((stage.affine.sent(batch.gradients) != 0).any(1).sum()) > PARALLEL
    equations = int((samples.gradient != 0).any(1).sum()) - samples.rank + 1
    if samples.stage.index == stage.index and batch.loss.name == "cross_entropy":
        equations -= 1
    bias = samples.bias_gradient
    if bias is not None and float(samples.outside(bias)) > INSIDE:
        return False
    return told and equations > samples.rank and not _blind(batch) and resolved(batch, samples)


def _blind(batch: Batch) -> bool:
    """True if the cotangents of one target are parallel wherever a sample is.

    So they are where rows of the head are alike, as before training.  Any mixture of the samples
    with that target is then a root, of a weight that means nothing.
    """
    affine, loss = batch.chain.stages[-1].affine, batch.loss
    generator = torch.Generator().manual_seed(0)
    z = affine.forward(torch.randn(DRAWS, *affine.in_shape, generator=generator).to(affine.weight))
    outputs = loss.outputs(z.shape[1])
    if loss.name not in CLASSES and outputs > FEW:
        return False
    for option in loss.admissible(outputs) or []:
        targets = torch.tensor([option] * DRAWS, device=z.device)
        kappa = loss.cotangent(z, loss.dense(targets, z))
        kappa = kappa / kappa.norm(dim=1, keepdim=True).clamp_min(1e-300)
        away = kappa - (kappa @ kappa[0])[:, None] * kappa[0]
        if float(away.norm(dim=1).max()) <= LAW * 2.0 * batch.precision.unit:
            return True
    return False


def loose(batch: Batch, identities: Sequence[Identity]) -> bool:
    """True if one cotangent fits at roots of different weights: it does not say where a sample is.

    Where a softmax is sure of itself and activations are straight, samples of one label share their
    cotangent, and any mixture of them is a root, of a weight that means nothing.
    """
    kappa = torch.stack([i.kappa / i.kappa.norm() for i in identities])
    weights = torch.stack([kappa.new_tensor(i.share) for i in identities]).abs()
    same = (kappa @ kappa.T).abs() > 1.0 - LAW * 2.0 * batch.precision.unit
    apart = weights[:, None] > COMMON * weights
    return bool((same & apart).any())


def _silent(batch: Batch, logits: Tensor) -> bool:
    """True if others may have sent nothing, as a softmax that is sure of itself does.

    That takes logits log(1/u) apart; those that were found are at least ``SILENT`` of it.
    """
    apart = float((logits.amax(1) - logits.amin(1)).max())
    return apart > SILENT * log(1.0 / batch.precision.unit)


def _switched_off(batch: Batch, found: BatchLoss, logits: Tensor) -> bool:
    """True if others may have sent nothing to the layer of the samples, but something to the head.

    What that layer takes in is zero for them then, as data are or where all units of a ReLU are
    off, and ``∂b ≠ s Σ m ∂ℓ(z, t)`` of those found.
    """
    affine, tails = batch.chain.stages[-1].affine, [s.tail for s in batch.chain.stages]
    if affine.bias_name is None or batch.size is None:
        off = any(isinstance(op, Activation) and op.one_sided for tail in tails for op in tail)
        return off or len(tails) == 1
    bias = batch.gradients[affine.bias_name]
    summed = replace(found, loss=replace(found.loss, reduction="sum"))
    own = summed.cotangent(logits).sum(0) * loss_scale(batch.loss, batch.size, batch.classes)
    return float((bias - own).norm()) > EXPLAINED * float(bias.norm())


def _explained(batch: Batch, identity: Identity, size: int) -> list[int]:
    """Copies of which a batch of ``size`` gives a root the share that it has, within its error."""
    one = multiplicity(1.0, batch.loss, size, batch.classes)
    fits = FITS * identity.error
    return [m for m in range(1, size + 1) if abs(one / m - identity.share) <= fits]


def near_copies(samples: Mixture, identities: Sequence[Identity]) -> str:
    """What to add where samples nearly coincide, and rounding leaves their weights open; or ""."""
    off = [i.error / abs(i.share) for i in identities if i.label is not None and i.share != 0.0]
    if samples.ratio > COPIES or not off or max(off) * FITS < WHOLE:
        return ""
    return (
        "; samples there are near copies of one another: what the client rounds leaves their "
        f"weights open, by {max(off):.1e} of themselves in one standard error"
    )


def _clear(identity: Identity) -> bool:
    """True if the class fits, and the next one misses by so much more that the root is a sample."""
    return identity.outside < SURE < identity.next > SURELY * identity.outside


def _different(identities: Sequence[Identity]) -> int:
    """Roots among those found, each counted once: starts that end at one sample list it again."""
    if not identities:
        return 0
    kappa = torch.stack([i.kappa for i in identities])
    apart = torch.cdist(kappa, kappa) > CLOSE * kappa.norm(dim=1)
    return sum(bool(apart[row, :row].all()) for row in range(len(kappa)))


def common_factor(batch: Batch, rank: int, identities: Sequence[Identity]) -> Unseparated | None:
    """A factor on the whole update: every sample weighs the same, and not what one sample does.

    Args:
        batch: the update; each of its samples has to be known to occur once.
        rank: samples that the gradient tells apart.
        identities: of samples that were found.
    """
    if not single(batch, rank) or _different(identities) < rank:
        return None
    if any(i.label is None or not _clear(i) for i in identities):
        return None
    weights = [_copies(batch, i, rank) for i in identities]
    if not 0.0 < max(weights) < COMMON * min(weights) or abs(median(weights) - 1.0) <= WHOLE:
        return None
    if all(1 in _explained(batch, i, rank) for i in identities):
        return None
    return Unseparated(
        f"every sample that was found weighs {median(weights):.3g} times what one of a batch of "
        f"{batch.size} does",
        consistent=False,
        factor=median(weights),
    )


def contradicted(batch: Batch, samples: Mixture, collected: Collected) -> Unseparated | None:
    """A stated batch size in which samples that were found would not occur whole times.

    A size that is wrong makes most of them fractional; one among many is a root that rounding made.
    """
    if batch.size is None:
        return None
    read = clear = [i for i in collected.refused if _clear(i) and i.label is not None]
    if samples.stage.index == batch.chain.stages[-1].index:
        clear = [i for i in read if i.outside <= OUTLYING * samples.blurred(i.kappa)]
        # In float64 our own rounding puts those of a common factor further out than the client's.
        read = clear + [i for i in read if OUTLYING * samples.blurred(i.kappa) < i.outside <= ALIKE]
    weights = [_copies(batch, i, batch.size) for i in clear if not _explained(batch, i, batch.size)]
    # Copies that the rank leaves no room for may be what noise added to the rank.
    sure = [m for m in weights if LEAST < m < batch.size / LEAST and not whole(m, batch.size)]
    if not collected.roots.numel() and (common := common_factor(batch, samples.rank, read)):
        return common
    if not sure or not refuting(batch, samples) or loose(batch, [*clear, *collected.identities]):
        return None
    if len(sure) < len(collected.roots):
        return None
    return _fractional(batch, batch.size, sure[0])


def _fractional(batch: Batch, size: int, m: float, certain: bool = True) -> Unseparated:
    told = f"at a batch size of {size} one picture would occur {m:.2f} times"
    if not certain:
        return Unseparated(f"what the client rounds leaves the weights of samples open: {told}")
    which = "every" if batch.size is None else "the stated"
    said = f"{told}; the update contradicts {which} batch size"
    return Unseparated(said, consistent=batch.size is None)
