"""An update and its model, checked and in float64: what everything below the surface works on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from rgap import memory, validation
from rgap.completion.complete import Filling
from rgap.doubles import Doubles
from rgap.head.behind import behind
from rgap.head.ending import folded
from rgap.network.agreement import sample_shape
from rgap.network.chain import Chain, parse, unparsed
from rgap.network.probing import UnreadyError
from rgap.precision import Precision
from rgap.recursion.stage import BUDGET
from rgap.update.losses import Loss
from rgap.update.preflight import as_on_the_client, device_of, precision_of
from rgap.update.targets import CLASSES
from rgap.update.update import Update, view

log = logging.getLogger(__name__)

FEWEST = 4  # members of an ensemble: the spread is then known to a third
COPIES = 3  # of an ensemble that are held at a time: before, after, and what is added
BEYOND = 1.0  # slack of a range that nobody stated for this recovery: data are often normalised


@dataclass(frozen=True)
class Problem:
    """An update and its model, checked and in float64, ready to be solved."""

    model: nn.Module
    update: Update
    chain: Chain
    gradients: Doubles
    precision: Precision
    batch: int  # rows of what is recovered: different pictures
    stated: int | None  # batch size, where the update or the caller says it
    labels: Tensor | None
    value_range: tuple[float, float] | None
    slack: float  # widths of the range by which a candidate may leave it
    budget: float  # bytes for the matrices of one layer; without room for them: no matrices
    room: float  # bytes for everything together
    declared: Loss  # of the model's own outputs, as the client minimised it
    unready: str = ""  # why the model, in train mode, is no function of the data
    filling: Filling | None = None  # None: stop where the equations end
    notes: tuple[str, ...] = ()  # what was read off the update before anything was solved

    @property
    def sent(self) -> Doubles:
        """The gradients without those of layers that the client had frozen."""
        return self.gradients.only(n for n in self.gradients if self.precision.sent(n))


def prepare(
    model: nn.Module,
    update: Update,
    batch_size: int | None,
    value_range: tuple[float, float] | None,
    noise: float,
    labels: Tensor | None,
    device: torch.device | str | None,
    seed: int,
    budget: float | None,
    input_shape: Sequence[int] | None = None,
) -> Problem:
    """Check an update against its model and bring both to float64; arguments as for ``invert``."""
    update = update.fitted(model)
    update, rounded = update.as_rounded()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: {name!r} is on the meta device and has no values; write "
                "model.to_empty(device='cpu') and load the weights that the update was computed on"
            )
    stated = update.batch_size if batch_size is None else batch_size
    known = update.labels if labels is None else labels
    if stated is None and isinstance(known, Tensor):
        stated = len(known)
    if stated is not None:
        stated = validation.count("batch_size", stated)
        known = validation.labels(known, stated)
    validation.noise(noise)
    bounds = update.value_range if value_range is None else validation.bounds(value_range)
    slack = BEYOND if value_range is None else 0.0
    place = device_of(device)
    update = view(update, input_shape=sample_shape(model, input_shape, update.input_shape))
    assert update.input_shape is not None
    if update.local_steps > 1:
        raise ValueError(
            f"expected one gradient, got an average over {update.local_steps} local steps: the "
            "weights moved between them and the equations of one step do not hold; ask the client "
            "for local_steps=1, or write rgap.match(model, update, local=rgap.LocalTraining(rate))"
        )
    room = memory.budget_of(budget, place)
    model = as_on_the_client(model, update)
    memory.require_copies(model, 1 if place.type == "cpu" else 2, room)
    declared, unready = update.loss, ""
    try:
        chain = parse(model, update.input_shape)
    except UnreadyError as error:  # what stands below it may be read all the same
        chain, unready = unparsed(model, update.input_shape, str(error)), str(error)
    if place.type != "cpu":
        chain = chain.to(place)
    chain, loss = behind(*folded(chain, declared, stated))
    update = view(update, loss=loss)
    _check_labels(known, update, chain)
    gradients = Doubles(update.gradients, place, room / 8)
    samples = ensemble(chain, stated or 1, room)
    precision = precision_of(update, noise, place, seed, samples)
    return Problem(
        model,
        update,
        chain,
        gradients,
        precision,
        stated or 1,
        stated,
        known,
        bounds,
        slack,
        room if budget is not None else min(room, BUDGET),
        room,
        declared,
        unready,
        notes=(rounded,) if rounded else (),
    )


def ensemble(chain: Chain, batch: int, room: float) -> int:
    """Members of the error ensemble that fit: fewer where the values of a layer are many.

    Raises:
        OutOfMemory: not even the fewest do.
    """
    if not chain.stages:
        return Precision.samples
    widest = max(chain.steps, key=lambda step: prod(step.in_shape) + prod(step.out_shape))
    one = 8.0 * COPIES * batch * (prod(widest.in_shape) + prod(widest.out_shape))
    memory.require(
        f"carrying errors through '{widest.name}' with {batch * prod(widest.in_shape):,} inputs",
        FEWEST * one,
        room,
    )
    return min(Precision.samples, max(FEWEST, int(max(room, memory.LEAST) / one)))


def _check_labels(labels: Tensor | None, update: Update, chain: Chain) -> None:
    """Stated class indices lie in the range of the model's outputs."""
    loss = update.loss
    if labels is None or loss.targets != "index" or labels.is_floating_point() or loss.own:
        return
    outputs = chain.output_shape[0] if chain.output_shape else 0
    classes = max(outputs, 2) if loss.name in CLASSES else 2
    low, high = int(labels.min()), int(labels.max())
    if outputs and (low < 0 or high >= classes):
        raise ValueError(
            f"labels: expected class indices from 0 to {classes - 1}, got values from {low} to "
            f"{high}; write labels=None to have them found"
        )
