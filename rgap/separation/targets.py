"""From the cotangents of separated samples to targets and multiplicities of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rgap.batchloss import BatchLoss, loss_scale

from .batch import Batch, Unseparated
from .identify import Identity
from .multiplicity import batch_of, multiplicity, split_counts, whole


def possible(batch: Batch, rank: int, identity: Identity) -> bool:
    """False if the stated batch size rules the multiplicity of this sample out."""
    if identity.label is None:
        return True
    if batch.size is None and batch.loss.reduction == "mean":
        return identity.share > 0
    if identity.share <= 0:
        return False
    m = multiplicity(identity.share, batch.loss, batch.size or 1, batch.classes)
    return whole(m, None if batch.size is None else batch.size - rank + 1)


def batch_loss(
    batch: Batch, logits: Tensor, identities: Sequence[Identity]
) -> BatchLoss | Unseparated:
    """Targets and multiplicities of all samples together.

    Args:
        batch: the update.
        logits: of the samples, [R, C].
        identities: one a sample.

    Returns:
        The :class:`BatchLoss`, or why no whole numbers of copies fit.
    """
    shares = torch.tensor([i.share for i in identities], dtype=torch.float64)
    size = batch_of(batch.size, shares, batch.loss, batch.classes)
    if size is None:
        return Unseparated(
            f"no batch size explains how much each of the {len(shares)} samples weighs (B/m = "
            f"{', '.join(f'{float(v):.3g}' for v in shares[:8])}); is the update a plain gradient "
            "of this loss?",
            consistent=False,
        )
    targets, copies = [], []
    for identity, z in zip(identities, logits, strict=True):
        if identity.label is not None:
            m = multiplicity(identity.share, batch.loss, size, batch.classes)
            if not whole(m, size):
                return _fractional(batch, size, m)
            targets.append(_one_hot(batch, identity.label, z))
            copies.append(float(round(m)))
            continue
        excess = identity.kappa / loss_scale(batch.loss, size, batch.classes)
        single = replace(batch.loss, reduction="sum")
        dense = single.targets_from(z[None], excess[None])[0]
        if batch.loss.targets != "index":
            targets.append(dense)
            copies.append(1.0)
            continue
        found = split_counts(z.softmax(0), excess)
        if found is None or batch.loss.label_smoothing:
            return Unseparated(
                "the cotangent of one sample belongs to no class, nor to one picture with several "
                "labels; is the loss, its targets or the model another one?",
                consistent=False,
            )
        targets.append(found[1] / found[0])
        copies.append(float(found[0]))
    total = int(sum(copies))
    if batch.size is not None and total != batch.size and batch.loss.targets == "index":
        return Unseparated(
            f"the update is that of {total} samples ({len(copies)} different pictures), the stated "
            f"batch size is {batch.size}",
            consistent=False,
        )
    return BatchLoss(batch.loss, torch.stack(targets), torch.tensor(copies).to(logits))


def _one_hot(batch: Batch, label: int, z: Tensor) -> Tensor:
    if len(z) == 1:
        return torch.full_like(z, float(label))
    return F.one_hot(torch.tensor(label), len(z)).to(z)


def _fractional(batch: Batch, size: int, m: float) -> Unseparated:
    return Unseparated(
        f"at a batch size of {size} one picture would occur {m:.2f} times; the update contradicts "
        f"{'the stated' if batch.size is not None else 'every'} batch size",
        consistent=False,
    )
