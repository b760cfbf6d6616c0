"""What a client computes on the way to its update: the cotangent at the output beside gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.network.flow import Flow, flow_of


class Computed(NamedTuple):
    """The graph of a network, gradients by parameter name and ∂L/∂output, in float64."""

    flow: Flow
    gradients: dict[str, Tensor]
    top: Tensor


def computed(model: nn.Module, x: Tensor, labels: Tensor) -> Computed:
    """Under cross-entropy, in the precision of model and batch; the model ends in float64."""
    out = model(x)
    loss = F.cross_entropy(out, labels)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    top, *sent = torch.autograd.grad(loss, [out, *(p for _, p in named)])
    gradients = {name: g.double() for (name, _), g in zip(named, sent, strict=True)}
    flow = flow_of(model.double(), tuple(x.shape[1:]))
    assert isinstance(flow, Flow), flow
    return Computed(flow, gradients, top.double())
