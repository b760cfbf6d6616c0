"""Layers whose gradient is exactly zero although others show that it is not.

``G_i = Σ k_i x_iᵀ`` of a stage of a chain vanishes where k_i or x_i do, for dead units.  But a
layer below that has a gradient got it through k_i.  And where the features above are not zero, the
steps in between were open: a ReLU's slope is 1 there, and smooth steps that are saturated leave no
more than two values of a feature, ``2^B`` columns of the gradient above.  What is zero then was
frozen at the client, or set to zero afterwards.  Nothing is said of a layer without a bias, whose
input may be black, nor below a batch norm in train mode, where copies of one sample cancel.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor, nn

from rgap.diagnosis.evidence import Evidence, usual
from rgap.diagnosis.finding import Finding, Kind
from rgap.network.activations.piecewise import Activation
from rgap.network.chain import Chain, Stage
from rgap.remedy import frozen_where

LOUD = 30.0  # times its noise that the gradient should have
TINY = 1e6  # times the smallest normal number, below which it may have underflowed
APART = 1e-3  # relative difference of columns that are not the same
COUNTED = 8  # samples up to which combinations of saturated features are counted
LINE = frozen_where("not update.gradients[n].any()")


def read(model: nn.Module, evidence: Evidence) -> list[Finding]:
    """The layers, in one finding.

    Args:
        model: the caller's, which says what it trains.
        evidence: of its update.
    """
    chain, sent = evidence.chain, evidence.update.gradients
    if chain is None or not evidence.gradients:
        return []
    evidence.tested.add(Kind.ABSENT)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n in sent}
    silent = []
    for stage in chain.stages:
        parts = trained.intersection((stage.affine.weight_name, stage.affine.bias_name))
        parts -= evidence.mixed
        if parts and not any(bool(sent[n].any()) for n in parts):
            why = _open(evidence, chain, stage, parts)
            if why is not None and _expected(evidence, chain, parts):
                silent.append((stage.name, why))
    if not silent:
        return []
    name, why = silent[0]
    said = f"the gradient of '{name}' is exactly zero, but {why}"
    if len(silent) > 1:
        said += f"; so with {len(silent) - 1} more layers"
    return [Finding(Kind.ABSENT, float(len(silent)), said, str(LINE), inf)]


def _expected(evidence: Evidence, chain: Chain, parts: set[str]) -> bool:
    """True if gradients that small elsewhere leave this one far above rounding and underflow."""
    sizes = evidence.usual
    if not sizes:
        sizes = usual(evidence.model, chain.input_shape, evidence.update.loss, evidence.batch)
    level = min(
        (
            float(g.square().mean()) ** 0.5 / sizes[n]
            for n, g in evidence.gradients.items()
            if sizes.get(n)
        ),
        default=0.0,
    )
    tiny = TINY * torch.finfo(evidence.update.dtype).smallest_normal
    noise = evidence.update.noise or {}
    return all(
        level * sizes.get(n, 0.0) > max(tiny, LOUD * float(noise[n].max()) if n in noise else 0.0)
        for n in parts
    )


def _open(evidence: Evidence, chain: Chain, stage: Stage, parts: set[str]) -> str | None:
    """Why the backward pass reached a stage with something, in words; None where it may not.

    Args:
        evidence: of the update.
        chain: of the network.
        stage: whose gradient is zero.
        parts: parameters of it whose gradient would not be.
    """
    order = [c.name for c in evidence.calls]
    if stage.name in order:
        for below in order[: order.index(stage.name)]:
            if f"{below}.weight" in evidence.gradients:
                return f"'{below}' below has one, that came through it"
    if stage.index + 1 >= len(chain.stages) or stage.affine.bias_name not in parts:
        return None
    above = chain.stages[stage.index + 1]
    gradient = evidence.gradients.get(above.affine.weight_name)
    if gradient is None:
        return None
    steps = [op for op in (*stage.tail, *above.lead) if isinstance(op, Activation)]
    if all(op.homogeneous for op in steps) or _unsaturated(gradient, evidence.batch):
        return f"that of '{above.name}' shows that its units were open"
    return None


def _unsaturated(gradient: Tensor, batch: int | None) -> bool:
    """True if the columns of [m, n] are more than saturated features of a batch leave."""
    if gradient.ndim != 2 or batch is None or batch > COUNTED:
        return False
    sizes: Tensor = gradient.norm(dim=0)
    sizes = sizes[sizes > 0].sort().values
    distinct = 1 + int((sizes.diff() > APART * sizes[1:]).sum())
    return bool(distinct > 2**batch + 1)
