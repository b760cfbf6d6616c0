"""An update and its model, checked and in float64: what everything below the surface works on."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap.network import Chain, parse
from rgap.precision import Precision
from rgap.update import Update

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """An update and its model, checked and in float64, ready to be solved."""

    model: nn.Module
    update: Update
    chain: Chain
    gradients: dict[str, Tensor]
    precision: Precision
    batch: int
    labels: Tensor | None
    value_range: tuple[float, float] | None
    budget: float


def prepare(
    model: nn.Module,
    update: Update,
    batch_size: int | None,
    value_range: tuple[float, float] | None,
    noise: float,
    labels: Tensor | None,
    device: torch.device | str | None,
    seed: int,
    budget: float,
) -> Problem:
    """Check an update against its model and bring both to float64; arguments as for ``invert``."""
    update.check(model)
    batch = update.batch_size if batch_size is None else batch_size
    if batch is None:
        raise ValueError(
            "expected a batch size, got an update that does not state one; write "
            "rgap.invert(model, update, batch_size=1)"
        )
    if batch < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch}; write batch_size=1")
    if update.input_shape is None:
        raise ValueError(
            "expected an input shape, got an update that does not state one; write "
            "dataclasses.replace(update, input_shape=(3, 32, 32))"
        )
    if update.local_steps > 1:
        raise ValueError(
            f"expected one gradient, got the sum of {update.local_steps} local steps: the weights "
            "moved between them and the equations of one step do not hold; ask the client for "
            "local_steps=1"
        )
    model = _with_buffers(model, update)
    chain = parse(model, update.input_shape)
    place = torch.device("cpu") if device is None else torch.device(device)
    if place.type != "cpu":
        chain = chain.to(place)
    gradients = {n: g.detach().to(place, torch.float64) for n, g in update.gradients.items()}
    precision = Precision(update.dtype, noise, seed=seed)
    bounds = update.value_range if value_range is None else value_range
    return Problem(
        model,
        update,
        chain,
        gradients,
        precision,
        batch,
        update.labels if labels is None else labels,
        bounds,
        budget,
    )


def _with_buffers(model: nn.Module, update: Update) -> nn.Module:
    """The model with the client's running statistics, a copy where they differ from its own."""
    own = dict(model.named_buffers())
    other = {
        name: sent
        for name, sent in update.buffers.items()
        if not torch.allclose(own[name].double(), sent.to(own[name].device).double(), rtol=1e-6)
    }
    if not other:
        return model
    log.info("the client's buffers differ from the model's and are used: %s", ", ".join(other))
    twin = copy.deepcopy(model)
    for name, buffer in twin.named_buffers():
        if name in other:
            buffer.copy_(other[name])
    return twin
