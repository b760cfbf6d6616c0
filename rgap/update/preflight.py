"""A client's model and update, as the readers of both take them: buffers, device, errors."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from rgap.precision import Precision
from rgap.update.update import Update

log = logging.getLogger(__name__)


def precision_of(
    update: Update,
    noise: float,
    place: torch.device,
    seed: int = 0,
    samples: int = Precision.samples,
) -> Precision:
    """What is known of an update's errors: its rounding, its own noise, and noise stated beside it.

    Args:
        update: what the client sent.
        noise: standard deviation of noise that was added to every entry.
        place: device of the work.
        seed: of the sampled errors.
        samples: members of the ensemble.
    """
    own = {n: s.to(place, torch.float64) for n, s in (update.noise or {}).items()}
    return Precision(update.dtype, noise, samples, seed, entries=own)


def as_on_the_client(model: nn.Module, update: Update) -> nn.Module:
    """The model as the client had it: its running statistics, every parameter trained.

    A copy where that differs from the model given: other buffers, or parameters that the server
    froze in its own copy (the update has their gradients, so the client trained them).
    """
    own = dict(model.named_buffers())
    other = {
        name: sent
        for name, sent in update.buffers.items()
        if not torch.equal(own[name].double().cpu(), sent.double().cpu())
    }
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if not other and not frozen:
        return model
    if other:
        log.info("the client's buffers differ from the model's and are used: %s", ", ".join(other))
    twin = copy.deepcopy(model)
    for name, buffer in twin.named_buffers():
        if name in other:
            buffer.copy_(other[name])
    for parameter in twin.parameters():
        parameter.requires_grad_()
    return twin


def device_of(device: torch.device | str | None) -> torch.device:
    """The device to compute on, tried out."""
    if device is None:
        return torch.device("cpu")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device: expected one that computes on this machine, got {device!r} "
            f"({str(error).splitlines()[0]}); write device='cpu'"
        ) from error
    return place
