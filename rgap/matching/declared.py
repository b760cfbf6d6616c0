"""What a search is given, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.labels import estimate
from rgap.matching.presets import Preset
from rgap.network.agreement import refuse_unready, sample_shape
from rgap.network.isolation import untouched
from rgap.network.running import refuse_wrapped, run
from rgap.precision import Precision
from rgap.recovery import Recovery
from rgap.seeding import start_of
from rgap.update.local_training import LocalTraining
from rgap.update.preflight import as_on_the_client, device_of, precision_of
from rgap.update.update import Update, view


@dataclass(frozen=True, eq=False)
class Declared:
    """A model and an update, ready to be matched.

    Attributes:
        model: as the client had it.
        update: what it sent.
        gradients: its tensors, where the work is done.
        shape: of the batch, [B, *input_shape].
        targets: of the batch; None where the method searches them.
        start: to begin with, float64.
        local: how the client trains; None for one gradient.
        steps: of its training.
        precision: of the update, with the noise that was stated.
    """

    model: nn.Module
    update: Update
    gradients: dict[str, Tensor]
    shape: tuple[int, ...]
    targets: Tensor | None
    start: Tensor | None
    local: LocalTraining | None
    steps: int
    precision: Precision


def declare(
    model: nn.Module,
    update: Update,
    preset: Preset | None,
    labels: Tensor | None,
    batch_size: int | None,
    start: Tensor | Recovery | None,
    local: LocalTraining | None,
    noise: float,
    device: torch.device | str | None,
    input_shape: Sequence[int] | None = None,
) -> Declared:
    """Check what a search is given; arguments and errors as for :func:`rgap.match`."""
    validation.noise(noise)
    update = update.fitted(model)
    update, _ = update.as_rounded()
    refuse_unready(model)
    refuse_wrapped(model)
    place = device_of(device)
    update = view(update, input_shape=sample_shape(model, input_shape, update.input_shape))
    assert update.input_shape is not None
    if update.local_steps > 1 and local is None:
        raise ValueError(
            f"local: the update is an average over {update.local_steps} local steps, expected how "
            "the client trains; write local=rgap.LocalTraining(rate=0.01)"
        )
    known = update.labels if labels is None else labels
    size = update.batch_size if batch_size is None else batch_size
    if size is None and isinstance(known, Tensor):
        size = len(known)
    if size is None:
        raise ValueError("batch_size: expected a number of samples, got none; write batch_size=1")
    size = validation.count("batch_size", size)
    known, shape = validation.labels(known, size), (size, *update.input_shape)
    if local is not None and local.size is not None and local.size > size:
        raise ValueError(
            f"local: expected at most {size} samples a step, the batch, got {local.size}; write "
            "LocalTraining(rate=0.01)"
        )
    model = as_on_the_client(model, update)
    searched = preset is not None and preset.joint and update.loss.name == "cross_entropy"
    if known is None and not searched:
        read = estimate(model, update, method=preset.labels if preset else "best", batch_size=size)
        if read.labels is None:
            raise ValueError(
                f"labels: they cannot be read off this update ({read.reason}); write "
                "labels=torch.tensor([3, 5])"
            )
        known = read.labels
    if known is not None:
        _fits(model, update, known, shape)
        known = known.to(place)
    begin = None if start is None else _start(start, shape).to(place)
    precision = precision_of(update, noise, place)
    sent = {n: g for n, g in update.gradients.items() if precision.sent(n)}
    gradients = {n: g.detach().to(place) for n, g in sent.items()}
    return Declared(
        model, update, gradients, shape, known, begin, local, update.local_steps, precision
    )


def _fits(model: nn.Module, update: Update, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless the labels are targets of the model's outputs."""
    like = next(model.parameters())
    with torch.no_grad(), untouched(model, hooks=False):
        outputs = run(model, torch.full(shape, 0.5, dtype=like.dtype, device=like.device))
    update.loss.check_targets(outputs, labels.to(outputs.device))


def _start(start: Tensor | Recovery, shape: tuple[int, ...]) -> Tensor:
    """The batch to begin with, float64."""
    batch = start_of(start) if isinstance(start, Recovery) else start
    if not isinstance(batch, Tensor):
        raise TypeError(f"start: expected a tensor or a Recovery, got {type(batch).__name__}")
    if tuple(batch.shape) != shape or not bool(torch.isfinite(batch).all()):
        raise ValueError(
            f"start: expected finite entries of shape {list(shape)}, got {list(batch.shape)}; "
            "write start=recovery"
        )
    return batch.detach().double()
