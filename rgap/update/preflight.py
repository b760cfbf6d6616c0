"""A client's model and update, checked against each other once, as every reader takes them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.network.agreement import refuse_unready, sample_shape
from rgap.network.isolation import untouched
from rgap.network.running import refuse_meta, refuse_wrapped, run
from rgap.precision import Precision
from rgap.update.losses import Loss
from rgap.update.update import Update, view

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ClientView:
    """A model and an update that belong together, with what the caller stated about them.

    Attributes:
        model: as the client had it (:func:`as_on_the_client`).
        update: under the model's names, at the precision that its values show, with a shape of one
            sample.
        batch: samples, where the update, the caller or stated labels say it.
        labels: targets of the batch, where the update or the caller says them.
        noise: standard deviation of noise stated beside the update's own.
        place: where to compute.
        rounded: what was read off the values of the update about its precision, if anything.
    """

    model: nn.Module
    update: Update
    batch: int | None
    labels: Tensor | None
    noise: float
    place: torch.device
    rounded: str | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        update: Update,
        *,
        batch_size: int | None = None,
        labels: Tensor | None = None,
        input_shape: Sequence[int] | None = None,
        noise: float = 0.0,
        device: torch.device | str | None = None,
        ready: bool = True,
    ) -> ClientView:
        """Check an update against its model; what the caller states goes before the update's.

        Args:
            model: the network; left as it is.
            update: what the client sent.
            batch_size: samples.
            labels: targets of the batch.
            input_shape: of one sample; else the update's, else as the layers fix it.
            noise: standard deviation of noise that was added to every entry.
            device: where to compute; default the CPU.
            ready: refuse a model that draws random numbers in its mode, or cannot be run with
                other weights.

        Raises:
            ValueError: an update of another model, a model without finite values, a batch size,
                labels, noise or device that are none, a shape that the layers leave open.
            TypeError: a model or an update that is none.

        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).eval()
        >>> sent = Update({n: torch.rand_like(p) for n, p in net.named_parameters()})
        >>> client = ClientView.of(net, sent, labels=torch.tensor([1, 0]))
        >>> client.batch, client.input_shape
        (2, (3,))
        """
        validation.module(model)
        if not isinstance(update, Update):
            raise TypeError(
                f"update: expected an rgap.Update, got {type(update).__name__}; write "
                "rgap.capture(model, inputs, targets) or rgap.Update(gradients)"
            )
        validation.refuse_broken(model)
        update, rounded = update.fitted(model).as_rounded()
        validation.gradient_sizes(update.gradients)
        refuse_meta(model)
        if ready:
            refuse_unready(model, mixing=True)
            refuse_wrapped(model)
        batch = update.batch_size if batch_size is None else batch_size
        known = update.labels if labels is None else labels
        if batch is None and isinstance(known, Tensor):
            batch = len(known)
        if batch is not None:
            batch = validation.count("batch_size", batch)
            known = validation.labels(known, batch)
        validation.noise(noise)
        place = device_of(device)
        shape = sample_shape(model, input_shape, update.input_shape)
        update = view(update, input_shape=shape)
        model = as_on_the_client(model, update)
        return cls(model, update, batch, known, noise, place, rounded)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        assert self.update.input_shape is not None
        return self.update.input_shape

    def precision(self, seed: int = 0, samples: int = Precision.samples) -> Precision:
        """What is known of the update's errors: its rounding, its own noise, the noise stated.

        Args:
            seed: of the sampled errors.
            samples: members of the ensemble.
        """
        own = {n: s.to(self.place, torch.float64) for n, s in (self.update.noise or {}).items()}
        return Precision(self.update.dtype, self.noise, samples, seed, entries=own)


def require_targets(
    model: nn.Module, loss: Loss, labels: Tensor, shape: Sequence[int], samples: int = 1
) -> None:
    """Raise unless labels are targets of a model's outputs.

    Args:
        model: in the client's mode; run once, and left as it is.
        loss: the client's.
        labels: one a sample, [B, ...].
        shape: of one sample.
        samples: that the model is run on: 1, or the batch where its outputs need all of it.

    Raises:
        TypeError: targets of another kind than the loss's.
        ValueError: another shape, an index that is no class, soft targets that are none.

    >>> require_targets(nn.Linear(3, 2), Loss(), torch.tensor([0, 1]), (3,))
    """
    like = next(model.parameters())
    with torch.no_grad(), untouched(model, hooks=False):
        probe = torch.full((samples, *shape), 0.5, dtype=like.dtype, device=like.device)
        outputs = run(model, probe)
    if samples != len(labels):
        outputs = outputs.expand(len(labels), *outputs.shape[1:])
    loss.check_targets(outputs, labels.to(outputs.device))


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
