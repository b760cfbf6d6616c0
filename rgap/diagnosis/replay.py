"""Replay: the update that the data and the cotangents at the head make under these weights.

Where the lowest fully connected layer reads the data x_i, its gradient shows them, and the head's
shows the cotangents k_i as sent.  ``Σ_i k_iᵀ ∂z/∂θ(x_i)`` is then the whole update, whatever loss,
targets or factor made the k_i: every layer in between is compared, of any kind.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.samples import Samples, single
from rgap.diagnosis.steps import KNOWN, data
from rgap.network.isolation import untouched
from rgap.network.watching import watched

LARGEST = 20_000_000  # parameters of a network that is run again in float64


def replayed(evidence: Evidence, samples: Samples | None) -> tuple[float, float, str] | None:
    """‖G − Σ kᵀ∂z/∂θ‖/‖G‖, what rounding and stated noise explain of it, and where x comes from.

    Args:
        evidence: of an update whose head is a fully connected layer.
        samples: of a batch that was told apart at its data; one sample is read off.
    """
    given, head = data(evidence), evidence.head
    if given is not None:
        samples = single(evidence)
    x = given[1] if given is not None else None if samples is None else samples.inputs
    sent = evidence.gradients
    if head is None or head[2] is None or samples is None or x is None or evidence.late:
        return None
    if sum(g.numel() for g in sent.values()) > LARGEST:
        return None
    total = sum(float(g.square().sum()) for g in sent.values())
    made = _update(evidence, head[0].name, x, samples.cotangents)
    if made is None:
        return None
    rest = sum(float((g - made[n]).square().sum()) for n, g in sent.items())
    added = sum(evidence.precision.noise_length(n, g) ** 2 for n, g in sent.items())
    tolerance = KNOWN * evidence.unit + samples.tolerance + (added / total) ** 0.5
    return (rest / total) ** 0.5, tolerance, evidence.dense[0][0].name


def _update(evidence: Evidence, head: str, x: Tensor, k: Tensor) -> dict[str, Tensor] | None:
    """Σ_i k_iᵀ ∂z/∂θ(x_i) with z the outputs of the head, by parameter name."""
    twin = copy.deepcopy(evidence.model).double()
    named = dict(twin.named_parameters())
    module = {head: twin.get_submodule(head)}
    with torch.enable_grad(), untouched(twin, hooks=False), watched(module) as calls:
        try:
            twin(x)
        except Exception:  # of one sample, or of fewer than it wants
            return None
        slopes = torch.autograd.grad(calls[0].made, list(named.values()), k, materialize_grads=True)
    return dict(zip(named, slopes, strict=True))
