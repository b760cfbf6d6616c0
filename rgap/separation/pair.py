"""Samples of a batch from two consecutive fully connected layers.

Every sample of the lower layer's row space must map into the upper layer's: B − 1 unknowns a
sample, width − B equations, whatever the activation and the labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rgap.limits import OUTSIDE
from rgap.separation.batch import Batch, Separated, Unseparated
from rgap.separation.between import Between
from rgap.separation.finish import finish
from rgap.separation.identify import Identity, continuous, identify
from rgap.separation.lines import lines
from rgap.separation.mixture import Mixture
from rgap.separation.peeling import GROWTH, STARTS, Collected, collect
from rgap.separation.subspace import Consistency
from rgap.separation.targets import admissible, contradicted, single


def separate_pair(
    batch: Batch, consistency: Between, top: Mixture, watch: Callable[[str], None] | None = None
) -> Separated | Unseparated:
    """All samples of a batch at the lower of two fully connected layers.

    Args:
        batch: the update.
        consistency: of the pair.
        top: mixture of the head.
        watch: told of the progress.
    """
    began = time.perf_counter()
    lower = consistency.samples
    stage = lower.stage

    def naming(roots: Tensor, _: Consistency) -> list[Identity]:
        return identify_roots(batch, lower, top, roots)

    found = collect(
        consistency,
        naming,
        partial(admissible, batch, lower.rank),
        batch.precision.seed,
        starts=batch.starts(lower.rank, STARTS, GROWTH),
        watch=watch,
    )
    if not found.complete:
        short = Unseparated(_shortfall(consistency, found))
        return contradicted(batch, lower, found) or short
    result = finish(
        batch,
        consistency,
        found,
        naming,
        f"every sample of '{stage.name}' must map into the row space of "
        f"'{consistency.above.stage.name}' (for each {consistency.equations} equations, unknowns: "
        f"{lower.rank - 1})",
        began,
    )
    where = "" if isinstance(result, Separated) else lines(consistency, found.roots)
    if isinstance(result, Unseparated) and where:
        return replace(result, reason=f"{result.reason}; {where}", consistent=True)
    return result


def identify_roots(batch: Batch, samples: Mixture, top: Mixture, roots: Tensor) -> list[Identity]:
    """The target of every root; one picture with several labels where no single class fits."""
    found = identify(batch.chain, samples, top, roots, batch.loss)
    missing = [i for i, identity in enumerate(found) if not identity.accepted]
    if single(batch, samples.rank):  # then no picture has two labels, each occurs once
        return found
    if not missing or batch.classes > samples.gradient.shape[0] - samples.rank:
        return found
    again = continuous(batch.chain, samples, roots[missing], batch.loss)
    for i, identity in zip(missing, again, strict=True):
        if identity.accepted:
            found[i] = identity
    return found


def _shortfall(consistency: Between, found: Collected) -> str:
    lower = consistency.samples
    name = lower.stage.name
    said = (
        f"{len(found.roots)} of the {lower.rank} samples of '{name}' found in {found.starts} "
        f"starts (σ_B/σ_1 {lower.ratio:.1e} there, {consistency.above.ratio:.1e} at "
        f"'{consistency.above.stage.name}')"
    )
    where = lines(consistency, torch.cat([found.roots, *(q[None] for q in found.stray)]))
    if where:
        return f"{said}; {where}"
    if found.rejected <= OUTSIDE:
        return (
            f"{said}; targets fit there (the nearest misses by {found.rejected:.1e}), but not one "
            "alone whose weight is that of a sample"
        )
    if found.rejected < 1.0:
        return (
            f"{said}; points that satisfy the equations were no samples: the nearest target misses "
            f"by {found.rejected:.1e}"
        )
    return said
