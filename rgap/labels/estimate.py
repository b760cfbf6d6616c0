"""One entry for every method: finds the head of a model and its gradient in an update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from rgap.labels.best import best
from rgap.labels.exact import exact
from rgap.labels.gradient import HeadGradient, refuse_loss
from rgap.labels.gradinversion import gradinversion
from rgap.labels.ilrg import ilrg
from rgap.labels.llg import llg, llg_star
from rgap.labels.locate import Located, locate
from rgap.labels.result import LabelEstimate
from rgap.labels.rlg import rlg
from rgap.labels.signs import idlg
from rgap.machine import memory
from rgap.network.agreement import refuse_unready
from rgap.network.chain import Chain, parse
from rgap.network.reshape import Reshape
from rgap.network.running import refuse_wrapped
from rgap.plugins import Registry
from rgap.update.preflight import ClientView
from rgap.update.update import Update

__all__ = ["METHODS", "estimate", "head_features", "head_gradient"]

PROBES = 32
MOVED = "average over {} local steps: the model's weights are those before the first"


def _single(head: HeadGradient) -> LabelEstimate:
    signs = idlg(head.weight_gradient, head.bias_gradient)
    if head.batch_size == 1:
        return signs
    reason = f"expected one sample, got a batch of {head.batch_size}"
    return LabelEstimate.undecided(head.classes, "idlg", signs.assumptions, reason)


METHODS: Registry[Callable[[HeadGradient], LabelEstimate]] = Registry(
    "rgap.labels", "label method", "a function from a HeadGradient to a LabelEstimate", callable
)
"""Every method by its name, each from a `HeadGradient` to a `LabelEstimate`."""

METHODS.register("best", best)
METHODS.register("exact", exact)
METHODS.register("ilrg", ilrg)
METHODS.register("rlg", rlg)
METHODS.register("llg_star", llg_star)
METHODS.register("llg", llg)
METHODS.register("gradinversion", gradinversion)
METHODS.register("idlg", _single)


def estimate(
    model: nn.Module,
    update: Update,
    *,
    method: str = "best",
    batch_size: int | None = None,
    features: Tensor | None = None,
    device: torch.device | str | None = None,
    memory_budget: float | None = None,
) -> LabelEstimate:
    """The labels of the batch behind ``update``, as far as one method can say.

    Only the last fully connected layer is looked at; what lies below it need not be invertible,
    nor a chain. The model runs on a few dummy inputs, on a copy.

    Args:
        model: as the client had it before the update; its mode and values stay.
        update: the gradient; for `Update.from_delta` over several steps see ``batch_size``.
        method: a key of ``METHODS``: built in, or offered by an installed distribution.
        batch_size: B, if the update does not state it or to overrule it. For an average over local
            steps write the number of different samples: B if every step used the same ones.
        features: the head's inputs for the batch [B, d], where known; `exact` needs them.
        device: where the model runs; default its own.  The numbers of one layer are few, and the
            methods work on the CPU.
        memory_budget: bytes to take on top of model and update; by default half of what the
            machine has free.

    Returns:
        The estimate.

    Raises:
        ValueError: an unknown method, an unknown batch size, soft or real-valued targets, a model
            whose output is not a fully connected layer, an update of another model, a model of
            which no float64 copy fits the budget (:class:`rgap.machine.memory.OutOfMemory`).
        TypeError: a model or an update that is none.

    Example:
        >>> import torch
        >>> import rgap
        >>> from rgap.labels import estimate
        >>> model = rgap.models.lenet(activation="sigmoid", seed=0)
        >>> update = rgap.capture(model, rgap.photos.load(4).float(), torch.tensor([3, 1, 3, 7]))
        >>> estimate(model, update).labels
        tensor([1, 3, 3, 7])
    """
    read = METHODS.chosen("method", method)
    room = memory.budget_of(memory_budget, "cpu" if device is None else device)
    if isinstance(model, nn.Module):
        memory.require_copies(model, 1 if device is None else 2, room)
    answer = read(head_gradient(model, update, batch_size, features, device))
    if update.local_steps > 1 and answer.decided:
        flag = MOVED.format(update.local_steps)
        answer = replace(answer, reason=f"{answer.reason}; {flag}" if answer.reason else flag)
    return answer


def head_gradient(
    model: nn.Module,
    update: Update,
    batch_size: int | None = None,
    features: Tensor | None = None,
    device: torch.device | str | None = None,
) -> HeadGradient:
    """The last layer's part of an update, with its weights and its inputs on dummy data.

    Arguments and errors as for `estimate`.
    """
    client = ClientView.of(model, update, batch_size=batch_size)
    if client.batch is None:
        raise ValueError(
            "batch_size: expected a number of samples, got an update that does not state one; "
            "write batch_size=8."
        )
    model, update, stated = client.model, client.update, client.batch
    if device is not None:
        model = copy.deepcopy(model).to(device)
    seen = locate(model, update, dummies(update))
    if isinstance(seen, Located):
        refuse_loss(update.loss, len(seen.weight))
        return seen.gradient(update, stated, features=features, probes=seen.features)
    chain = _chain(model, update, seen)
    stage = chain.stages[-1]
    refuse_loss(update.loss, stage.out_shape[0])
    name = stage.affine.bias_name
    return HeadGradient(
        stage.affine.sent(update.gradients),
        None if name is None else update.gradients[name],
        stated,
        stage.affine.weight,
        stage.affine.bias,
        update.loss,
        features,
        _along(chain, dummies(update)) if chain.complete else None,
        update.local_steps,
    )


def head_features(model: nn.Module, update: Update, inputs: Tensor) -> Tensor | None:
    """The head's input [N, d] in float64 for ``inputs``, ``[N, *input_shape]``.

    None where they cannot be observed: above something that neither runs nor is a chain. Errors as
    for `estimate`.
    """
    ready(model)
    seen = locate(model, update, inputs)
    if isinstance(seen, Located):
        return seen.features
    chain = _chain(model, update, seen)
    return _along(chain, inputs) if chain.complete else None


def ready(model: nn.Module) -> None:
    """Raise if a model cannot run: lazy or on the meta device, dropout in train mode.

    Raises:
        ValueError: the module or parameter, and what to write.
    """
    refuse_unready(model, mixing=True)
    refuse_wrapped(model)


def dummies(update: Update) -> Tensor:
    """Random pictures, a black and a white one, [34, *input_shape], float64."""
    if update.input_shape is None:
        raise ValueError(
            "input_shape: expected the shape of one sample, got an update that does not state it; "
            "write dataclasses.replace(update, input_shape=(3, 32, 32))."
        )
    low, high = update.value_range or (0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((PROBES, *update.input_shape), generator=generator)
    flat = noise.new_tensor([0.0, 1.0]).reshape(2, *(1 for _ in update.input_shape))
    flat = flat.expand(2, *update.input_shape)
    return low + (high - low) * torch.cat([noise, flat]).double()


def _chain(model: nn.Module, update: Update, why: str) -> Chain:
    """The model's stages, of which the last is a fully connected layer whose output is its own.

    Where `locate` saw none: ``why``.
    """
    assert update.input_shape is not None
    chain = parse(model, update.input_shape)
    if not chain.stages:
        raise ValueError(
            f"model: expected a fully connected last layer, but {why}. Write a forward that "
            "returns that layer's logits."
        )
    stage = chain.stages[-1]
    if len(stage.affine.in_shape) != 1:
        raise ValueError(
            f"model: expected a fully connected last layer, got '{stage.name}' "
            f"({stage.affine.kind}, {list(stage.affine.in_shape)} to "
            f"{list(stage.affine.out_shape)}); labels are read from the layer that makes the "
            "logits."
        )
    if len(chain.output_shape) != 1:
        got = ", ".join(map(str, chain.output_shape))
        raise ValueError(
            f"model: expected logits [B, C], got outputs [B, {got}] of '{stage.name}'; write a "
            "forward that returns them flattened, .flatten(1)."
        )
    steps = [op for op in stage.tail if not isinstance(op, Reshape)]
    if steps:
        raise ValueError(
            f"model: expected logits, got '{steps[-1].kind}' after the last layer "
            f"'{stage.name}'; write a forward that returns its input, as "
            f"torch.nn.functional.{update.loss.name} takes."
        )
    return chain


def _along(chain: Chain, inputs: Tensor) -> Tensor:
    """What enters the head of a chain, float64, on the CPU."""
    x = inputs.detach().to(chain.stages[-1].affine.weight)
    for stage in chain.stages[:-1]:
        x = stage.forward(x)[1]
    for op in chain.stages[-1].lead:
        x = op.forward(x)
    return x.cpu()
