"""Solutions of the head equations that one recursion answers together."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.head.features import HeadCandidate
from rgap.network.chain import Chain
from rgap.network.pooling import LinearMap
from rgap.network.reshape import Rearrange, Reshape

__all__ = ["families", "matching"]


def families(found: list[HeadCandidate], chain: Chain) -> list[list[HeadCandidate]]:
    """Candidates that one descent answers together.

    In a chain without biases whose activations are positively homogeneous, (c·x, k/c) satisfies
    every equation below the head that (x, k) does: roots of one sign differ by a scale alone.
    """
    homogeneous = all(
        stage.affine.bias is None
        and all(isinstance(op, Reshape) or getattr(op, "homogeneous", False) for op in stage.tail)
        and all(isinstance(op, (Reshape, Rearrange, LinearMap)) for op in stage.lead)
        for stage in chain.stages
    )
    if not homogeneous:
        return [[candidate] for candidate in found]
    signs = (True, False)
    groups = [[c for c in found if (c.scale > 0) is positive] for positive in signs]
    return [group for group in groups if group]


def matching(found: list[HeadCandidate], labels: Tensor | None) -> list[HeadCandidate]:
    """The candidates whose labels are the stated ones."""
    if labels is None:
        return found
    wanted = labels.flatten().double()
    return [c for c in found if torch.equal(c.labels.flatten().double(), wanted)]
