"""Inputs and cotangents of every layer of any network, by hooks on a probe batch."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap.affine import Affine
from rgap.layers import build
from rgap.losses import Loss
from rgap.probing import Unsupported
from rgap.running import refuse_wrapped, run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """One layer as the probe batch met it.

    Attributes:
        affine: the layer.
        inputs: u, [B, *in_shape], float64.
        cotangents: k, [B, *out_shape], float64.
        active: where z can be known from above, [B, *out_shape]: where k is not 0.
    """

    affine: Affine
    inputs: Tensor
    cotangents: Tensor

    @property
    def active(self) -> Tensor:
        """False where nothing came back: the layers above say nothing about such a z."""
        return self.cotangents != 0


def probe_layers(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> list[Probe]:
    """Run a batch forward and backward on a float64 copy on the CPU; note u and k of every layer.

    Works on any network, chain or not: skip connections, max-pool, attention.  A layer that is
    called several times is listed once per call; a layer that the equations do not cover is logged
    and left out.

    Args:
        model: left as it was; a copy does the work.
        inputs: [B, *input_shape].
        targets: as the loss wants them.
        loss: of the client.

    Returns:
        The fully connected and convolutional layers in the order of their calls.

    Raises:
        ValueError: a model without such layers.
    """
    refuse_wrapped(model)
    twin = copy.deepcopy(model).cpu().double()
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    for name, module in twin.named_modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            _note(name, module, calls)
    outputs = run(twin, inputs.detach().cpu().double())
    value = loss(outputs, targets)
    if not calls:
        raise ValueError(
            f"expected a model with fully connected or convolutional layers, got "
            f"{type(model).__name__} with none: there is nothing to audit"
        )
    grads = torch.autograd.grad(value, [z for *_, z in calls], allow_unused=True)
    names = {id(value): name for name, value in twin.named_parameters()}
    found = []
    for (name, module, u, z), k in zip(calls, grads, strict=True):
        cotangent = torch.zeros_like(z) if k is None else k
        if isinstance(module, nn.Linear):  # over a sequence, every position is a sample
            u, cotangent = u.reshape(-1, u.shape[-1]), cotangent.reshape(-1, z.shape[-1])
        try:
            affine = build(module, name, tuple(u.shape[1:]), names)
        except Unsupported as refusal:
            log.warning("'%s' is left out of the audit: %s", name, refusal.reason)
            continue
        if isinstance(affine, Affine):
            found.append(Probe(affine, u.detach(), cotangent.detach()))
    return found


def _note(name: str, module: nn.Module, calls: list[tuple[str, nn.Module, Tensor, Tensor]]) -> None:
    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        fresh = output if output.requires_grad else output.requires_grad_()
        calls.append((name, layer, args[0], fresh))
        return fresh.clone()  # what comes next may overwrite its input, nn.ReLU(inplace=True) does

    module.register_forward_hook(hook)
