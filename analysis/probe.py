"""The batch and targets at which a network is looked at, and what its layers are given there."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.analysis.calls.recorder import record
from rgap.analysis.calls.uses import Recording, Use
from rgap.jacobian.update_map import UpdateMap
from rgap.machine import memory
from rgap.machine.allowance import OVER, seconds_of
from rgap.network.affine import Affine
from rgap.network.agreement import refuse_unready
from rgap.network.isolation import bare_copy
from rgap.network.modules import affine_map
from rgap.network.probing import Unsupported
from rgap.network.running import refuse_wrapped, run
from rgap.update.losses import Loss
from rgap.update.preflight import device_of
from rgap.update.targets import CLASSES
from rgap.validation import require_finite

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
    """The layers of :func:`probe_layers`, same arguments, and the recording that they come from."""
    refuse_wrapped(model)
    place = inputs.device
    twin = bare_copy(model, place)
    wanted = targets.to(place)
    recording = record(twin, inputs.detach().double(), lambda out: loss(out, wanted))
    if not any(use.covered for use in recording.uses):
        raise ValueError(
            f"expected a model with fully connected or convolutional layers, got "
            f"{type(model).__name__} with none: there is nothing to audit"
        )
    names = {id(value): name for name, value in twin.named_parameters()}
    frozen = frozen_weights(twin)
    probes = []
    for number, use in enumerate(recording.uses):
        if not use.covered:
            continue
        probe = _probe(use, names, number)
        if probe is not None:
            probes.append(replace(probe, trained=probe.affine.weight_name not in frozen))
    return probes, recording


def frozen_weights(model: nn.Module) -> frozenset[str]:
    """Parameters that are not trained beside others that are; none where all are frozen.

    A network that is frozen altogether is one that was put out of training to be looked at.
    """
    frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
    return frozen if len(frozen) < len(list(model.parameters())) else frozenset()


def _probe(use: Use, names: dict[int, str], number: int) -> Probe | None:
    u, _, k = use.rows
    try:
        assert use.weight is not None
        affine = affine_map(use.name, use.weight, use.bias, tuple(u.shape[1:]), names, use.geometry)
    except Unsupported as refusal:
        log.warning("'%s' is left out of the audit: %s", use.name, refusal.reason)
        return None
    assert isinstance(affine, Affine)
    return Probe(affine, u, k, read=use.read[0], use=number)


def probe_batch(
    inputs: Tensor | Sequence[int],
    batch_size: int | None,
    seed: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """The batch that was given, in float64, or a random one of the given shape.

    Args:
        inputs: the batch, or the shape of a sample.
        batch_size: with a shape.
        seed: of a random batch, the same on every device.
        device: where to compute; default the CPU.
    """
    place = device_of(device)
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            raise TypeError(
                f"inputs: expected floating numbers, got {inputs.dtype}; for pictures write "
                "inputs.float() / 255"
            )
        if inputs.ndim < 2 or len(inputs) == 0:
            raise ValueError(
                f"inputs: expected a batch [B, *input_shape] with B >= 1, got shape "
                f"{list(inputs.shape)}; write inputs.unsqueeze(0) for one sample"
            )
        if batch_size is not None and batch_size != len(inputs):
            raise ValueError(
                f"expected batch_size={len(inputs)}, the length of inputs, got {batch_size}; "
                f"write inputs[:{batch_size}] or leave batch_size out"
            )
        require_finite("inputs", inputs, "give pictures of finite numbers, or a shape")
        return inputs.detach().to(place, torch.float64)
    try:
        shape = tuple(index(n) for n in inputs)
        batch = index(1 if batch_size is None else batch_size)
    except TypeError as error:
        raise TypeError(
            f"expected a batch of floating numbers, or the shape of one sample and a whole "
            f"batch_size, got {inputs!r} and {batch_size!r}; write identifiability(model, "
            "(3, 32, 32), 2)"
        ) from error
    if not shape or min(shape) < 1 or batch < 1:
        raise ValueError(
            f"expected a shape of numbers >= 1 and batch_size >= 1, got {shape} and {batch}; "
            "write identifiability(model, (3, 32, 32), 2)"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, *shape, generator=generator, dtype=torch.float64).to(place)


def probe_pictures(
    inputs: Tensor | None,
    shape: Sequence[int],
    count: int,
    seed: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """So many samples of a shape, the first that were given or random ones, [count, *shape].

    Args:
        inputs: at least so many; None for :func:`probe_batch`.
        shape: of a sample.
        count: of samples.
        seed: of random ones.
        device: where to compute; default the CPU.

    Raises:
        ValueError: too few, of another shape, or not finite.
    """
    if inputs is None:
        return probe_batch(shape, count, seed, device)
    inputs = torch.as_tensor(inputs)
    if tuple(inputs.shape[1:]) != tuple(shape) or len(inputs) < count:
        raise ValueError(
            f"expected inputs of shape [{count} or more, {', '.join(map(str, shape))}], got "
            f"{list(inputs.shape)}; give one probe picture per sample of the largest batch"
        )
    require_finite("inputs", inputs, "give probe pictures of finite numbers, or write inputs=None")
    return inputs[:count].to(device_of(device), torch.float64)


def probe_targets(
    model: nn.Module, inputs: Tensor, loss: Loss, labels: Tensor | None, seed: int
) -> Tensor:
    """Targets that were given, or such that differ from sample to sample as far as possible.

    Classes are a random order of all of them, repeated where the batch has more samples; other
    losses draw real or binary targets of the outputs' shape.

    Args:
        model: run once in float64, on a copy, for the shape of its outputs.
        inputs: the batch, [B, *input_shape].
        loss: of the client.
        labels: targets as the loss wants them, or None.
        seed: of drawn targets.

    Raises:
        ValueError: a forward that returns no batch of outputs, a loss whose targets are unknown.
    """
    refuse_wrapped(model)
    if labels is not None:
        return torch.as_tensor(labels).detach().to(inputs.device)
    with torch.no_grad():
        outputs = run(copy.deepcopy(model).to(inputs.device).double(), inputs)
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"expected one tensor from {type(model).__name__}.forward, got a "
            f"{type(outputs).__name__}; wrap it in a module whose forward returns the logits"
        )
    if outputs.ndim < 2 and loss.name in CLASSES:
        raise ValueError(
            f"expected logits [B, C] from {type(model).__name__}.forward for {len(inputs)} "
            f"samples, got {tuple(outputs.shape)}; a squeeze() without dimensions takes a batch "
            "of one away: write flatten(1)"
        )
    generator = torch.Generator().manual_seed(seed)
    if loss.own or not loss.known:
        raise ValueError(
            f"labels: expected targets, for nobody knows what {loss.name!r} takes; write "
            "labels=targets, or a loss by name"
        )
    if loss.name in CLASSES:
        classes, space = outputs.shape[1], outputs.shape[2:]
        count = len(inputs) * space.numel()
        order = torch.randperm(max(classes, count), generator=generator)
        return (order[:count] % classes).reshape(len(inputs), *space).to(inputs.device)
    drawn = torch.rand(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    return drawn if loss.name == "mse_loss" else (drawn < 0.5).double()


@dataclass(frozen=True)
class ProbePoint:
    """A network at one batch: the point at which its update is looked at.

    Attributes:
        model: as it was given.
        inputs: [B, *input_shape], float64, on the device that computes.
        targets: as the loss wants them.
        loss: of the client.
        room: bytes that may be taken on top of the model.
        update: the update as a function of the data there.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Loss
    room: float
    update: UpdateMap

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Tensor,
        loss: str | Loss | nn.Module,
        labels: Tensor | int,
        *,
        memory_budget: float | None = None,
        copies: int = 1,
        time_limit: float | None = None,
        mixing: bool = False,
    ) -> ProbePoint:
        """The point, refused where the update of a sample would depend on others or on chance.

        Args:
            model: left as it was.
            inputs: as :func:`probe_batch` gives them.
            loss: of the client.
            labels: targets, or the seed of such as :func:`probe_targets` draws.
            memory_budget: bytes, None for the default.
            copies: of the model in float64 that are held at a time.
            time_limit: seconds of the whole call, of which a chunk of directions takes few.
            mixing: batch norms in train mode are allowed: the caller takes the batch as one.

        Raises:
            TypeError: no module.
            ValueError: train mode, no trained parameters, targets that do not fit.
            OutOfMemory: no room for the copies.
        """
        validation.module(model)
        refuse_unready(model, mixing=mixing)
        room = memory.budget_of(memory_budget, inputs.device)
        memory.require_copies(model, copies, room)
        chosen = Loss.of(loss)
        given, seed = (None, labels) if isinstance(labels, int) else (labels, 0)
        targets = probe_targets(model, inputs, chosen, given, seed)
        seconds = OVER / 2 * seconds_of(time_limit)
        update = UpdateMap(model, inputs, targets, chosen, room, seconds)
        return cls(model, inputs, targets, chosen, room, update)

    @property
    def about(self) -> dict[str, Any]:
        """What every result at this point says of itself, see `Finding`."""
        return {
            "model": type(self.model).__name__,
            "input_shape": tuple(self.inputs.shape[1:]),
            "batch_size": len(self.inputs),
            "loss": self.loss.name,
            "unknowns": self.update.unknowns,
        }
