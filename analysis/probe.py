"""Inputs and cotangents of every layer of any network, recorded on a probe batch."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rgap.analysis.calls.recorder import record
from rgap.analysis.calls.uses import Recording, Use
from rgap.network.affine import Affine
from rgap.network.modules import affine_map
from rgap.network.probing import Unsupported
from rgap.network.running import refuse_wrapped
from rgap.update.losses import Loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """One layer as the probe batch met it.

    Attributes:
        affine: the layer.
        inputs: u, [B, *in_shape], float64; over a sequence, every place is a sample.
        cotangents: k, [B, *out_shape], float64.
        trained: False for a weight that is frozen: its gradient is not sent.
        read: number of the tensor u in the forward; two layers with the same number read one input.
        use: number of the use of a weight in the forward.
    """

    affine: Affine
    inputs: Tensor
    cotangents: Tensor
    trained: bool = True
    read: int = -1
    use: int = -1

    @property
    def active(self) -> Tensor:
        """False where nothing came back: the layers above say nothing about such a z."""
        return self.cotangents != 0

    @property
    def sent(self) -> Tensor:
        """The cotangents of the gradient constraints: zero where the gradient is not sent."""
        return self.cotangents if self.trained else torch.zeros_like(self.cotangents)


def probe_layers(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> list[Probe]:
    """Run a batch forward and backward on a float64 copy; note u and k of every layer.

    Works on any network, chain or not: skip connections, max-pool, attention, functions in the
    place of modules.  A layer that is called several times is listed once per call; a layer that
    the equations do not cover is logged and left out.

    Args:
        model: left as it was; a copy does the work.
        inputs: [B, *input_shape]; all is computed on their device.
        targets: as the loss wants them.
        loss: of the client.

    Returns:
        The fully connected and convolutional layers in the order of their calls.

    Raises:
        ValueError: a model without such layers.
    """
    return probed(model, inputs, targets, loss)[0]


def probed(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss
) -> tuple[list[Probe], Recording]:
    """:func:`probe_layers`, and the recording that they come from."""
    refuse_wrapped(model)
    place = inputs.device
    twin = copy.deepcopy(model).to(place).double()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    wanted = targets.to(place)
    recording = record(twin, inputs.detach().double(), lambda out: loss(out, wanted))
    if not any(use.covered for use in recording.uses):
        raise ValueError(
            f"expected a model with fully connected or convolutional layers, got "
            f"{type(model).__name__} with none: there is nothing to audit"
        )
    names = {id(value): name for name, value in twin.named_parameters()}
    frozen = frozen_weights(twin)
    found = []
    for number, use in enumerate(recording.uses):
        if not use.covered:
            continue
        probe = _probe(use, names, number)
        if probe is not None:
            found.append(replace(probe, trained=probe.affine.weight_name not in frozen))
    return found, recording


def frozen_weights(model: nn.Module) -> frozenset[str]:
    """Parameters that are not trained beside others that are; none where all are frozen.

    A network that is frozen altogether is one that was put out of training to be looked at.
    """
    frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
    return frozen if len(frozen) < len(list(model.parameters())) else frozenset()


def _probe(use: Use, names: dict[int, str], number: int) -> Probe | None:
    u, _, k = use.rows
    try:
        options = {} if use.kind == "linear" else use.options
        assert use.weight is not None
        affine = affine_map(use.name, use.weight, use.bias, tuple(u.shape[1:]), names, **options)
    except Unsupported as refusal:
        log.warning("'%s' is left out of the audit: %s", use.name, refusal.reason)
        return None
    assert isinstance(affine, Affine)
    return Probe(affine, u, k, read=use.read[0], use=number)
