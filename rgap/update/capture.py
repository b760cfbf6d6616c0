"""Capture: the gradient that a client with these inputs and targets would send."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rgap import validation
from rgap.network.running import called, looks_up, only_tensor, refuse_wrapped
from rgap.update.losses import Loss
from rgap.update.update import Update

__all__ = ["capture"]


def capture(
    model: nn.Module,
    inputs: Tensor,
    targets: Any,
    loss: str | Loss | nn.Module | Callable[[Any, Any], Tensor] = "cross_entropy",
    *,
    share_labels: bool = False,
    share_batch_size: bool = True,
    dtype: torch.dtype | None = None,
    value_range: tuple[float, float] | None = (0.0, 1.0),
) -> Update:
    """The `Update` of one batch: ``G_i = dL/dW_i`` for every parameter of ``model``.

    The model is left as it was: mode, ``.grad``, parameters, buffers, hooks, dtype and the global
    random state. It runs once through `torch.func.functional_call` on detached copies of its
    parameters and buffers, so that a layer that updates a buffer updates a copy. Forward hooks of
    the user run, as they did on the client. Neither ``inputs`` nor ``targets`` are kept.

    Args:
        model: any module whose ``forward`` takes one tensor and returns one, in the mode that the
            client had: in train mode a batch norm takes the statistics of this batch, which the
            gradient is differentiated through, and its running statistics stay as they are.
            Dropout in train mode is refused.
        inputs: ``[B, *shape]``, floating; cast to the precision that is computed in.
        targets: class indices [B] for cross-entropy, else as `Loss` says; for a function whatever
            it takes.
        loss: name, `Loss`, a PyTorch loss module, or a function of outputs and targets; a function
            takes whatever the model returns.
        share_labels: put ``targets`` in the update, for a setting in which the client sends them.
        share_batch_size: put B in the update.
        dtype: None computes truly in the model's own dtype, autocast switched off;
            ``torch.float64`` computes in float64 on copies.
        value_range: range of the input values that the attacker may assume, None for none.

    Returns:
        The update, gradients in the order of ``model.named_parameters()``. A parameter used in
        several places has the sum of their gradients; an unused one has zeros. Parameters that are
        frozen (``requires_grad=False``) have no gradient and are left out, as a client does.

    Raises:
        ValueError: bad values, shapes or a model in a state whose gradient no one can invert; the
            message names the tensor or module and what to write instead.
        TypeError: integer or complex inputs, outputs that are no tensor.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
        >>> update = capture(model, torch.rand(2, 3, 2, 2), torch.tensor([0, 2]))
        >>> list(update.gradients), update.input_shape, update.labels
        (['1.weight', '1.bias'], (3, 2, 2), None)
    """
    loss = _computable(loss, targets)
    parameters = _parameters(model)
    _check_mode(model)
    _check_inputs(model, inputs)
    _check_range(inputs, value_range)
    if share_labels and not share_batch_size:
        raise ValueError(
            "share_labels=True gives the batch size away; write share_batch_size=True as well."
        )
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype such as torch.float64, got {dtype}.")

    first = next(iter(parameters.values()))
    with torch.inference_mode(False), torch.enable_grad():
        copies = {name: _copy(p, dtype).requires_grad_() for name, p in parameters.items()}
        buffers = {name: _copy(b, dtype) for name, b in model.named_buffers()}
        frozen = {n: _copy(p, dtype) for n, p in model.named_parameters() if n not in copies}
        data = inputs.detach().to(device=first.device, dtype=dtype or first.dtype, copy=True)
        wanted = tree_map(lambda t: _moved(t, first.device), targets)
        with torch.autocast(first.device.type, enabled=False):
            gradients = _gradients(model, copies, {**buffers, **frozen}, data, wanted, loss)
    return Update(
        gradients=gradients,
        buffers=dict(model.named_buffers()),
        batch_size=int(inputs.shape[0]) if share_batch_size else None,
        labels=targets if share_labels else None,
        loss=loss,
        input_shape=tuple(inputs.shape[1:]),
        value_range=value_range,
        dtype=dtype,  # type: ignore[arg-type]  # None: the coarsest of the gradients' own
    )


def _computable(loss: Any, targets: Any) -> Loss:
    """The loss, once it can be computed with these targets."""
    declared: Loss = Loss.of(loss)
    if not declared.known:
        raise ValueError(
            f"loss: expected one that can be computed, got {declared.name!r}; write its name, or "
            "dataclasses.replace(update, loss=the_function) for one of your own."
        )
    if not isinstance(targets, Tensor) and not declared.own:
        raise TypeError(
            f"targets: expected a tensor, got {type(targets).__name__}; write "
            "torch.tensor(targets)."
        )
    return declared


def _gradients(
    model: nn.Module,
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor],
    inputs: Tensor,
    targets: Any,
    loss: Loss,
) -> dict[str, Tensor]:
    devices = [inputs.device.index or 0] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        before = _random_state(inputs.device)
        outputs = called(model, inputs, {**parameters, **buffers})
        if not loss.own:  # a function of one's own takes whatever the model returns
            outputs = only_tensor(model, outputs)
        random = any(
            not torch.equal(a, b) for a, b in zip(before, _random_state(inputs.device), strict=True)
        )
        _check_outputs(model, inputs, outputs, random)
        loss.check_targets(outputs, targets)
        value = loss(outputs, targets)
        try:
            gradients = torch.autograd.grad(
                value, list(parameters.values()), materialize_grads=True
            )
        except RuntimeError as error:
            raise ValueError(
                f"model: the backward pass of {type(model).__name__} failed: "
                f"{str(error).splitlines()[0]}. Write a forward whose steps are differentiable."
            ) from error
    return dict(zip(parameters, gradients, strict=True))


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    validation.module(model)
    refuse_wrapped(model)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if not parameters:
        raise ValueError(f"model: the {type(model).__name__} has no parameters, so no gradient.")
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"model: {name!r} is not initialised yet; run model(inputs) once before capture."
            )
        if not parameter.is_floating_point():
            raise TypeError(f"model: {name!r} has dtype {parameter.dtype}, expected a real one.")
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trained:
        raise ValueError(
            f"model: every parameter of the {type(model).__name__} is frozen (requires_grad=False),"
            " so that a client sends nothing. Write model.requires_grad_(True) if it trained them."
        )
    return trained


def _check_mode(model: nn.Module) -> None:
    """Refuse layers that draw in train mode: the gradient depends on what they drew."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        kind = type(module).__name__
        where = f"model: {name or 'the model itself'} ({kind}) is in train mode"
        dropout = float(getattr(module, "dropout", 0.0) or 0.0) if _has_rate(module) else 0.0
        if isinstance(module, nn.modules.dropout._DropoutNd):
            dropout = module.p
        if dropout > 0 or isinstance(module, nn.RReLU):
            raise ValueError(
                f"{where}: it draws random numbers that are not in the update. Write "
                "model.eval() before capture."
            )


def _has_rate(module: nn.Module) -> bool:
    return isinstance(getattr(module, "dropout", None), float) and isinstance(
        module, nn.RNNBase | nn.MultiheadAttention
    )


def _check_inputs(model: nn.Module, inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"inputs: expected a tensor [B, ...], got {type(inputs).__name__}; write "
            "torch.as_tensor(inputs)."
        )
    if inputs.is_complex():
        raise TypeError(f"inputs: expected real numbers, got {inputs.dtype}.")
    if not inputs.is_floating_point():
        raise TypeError(
            f"inputs: expected floating numbers, got {inputs.dtype}. "
            + (looks_up(model) or "For pictures write inputs.float() / 255.")
        )
    if inputs.ndim < 2:
        raise ValueError(
            f"inputs: expected [B, ...] with a batch dimension, got shape {tuple(inputs.shape)}; "
            "write inputs.unsqueeze(0) for a single sample."
        )
    if inputs.numel() == 0:
        raise ValueError(
            f"inputs: expected at least one sample (batch size 1), got shape {tuple(inputs.shape)}."
        )
    validation.require_finite("inputs", inputs, "write torch.nan_to_num(inputs) or clean the batch")


def _check_range(inputs: Tensor, value_range: tuple[float, float] | None) -> None:
    if value_range is None:
        return
    low, high = value_range
    if float(inputs.detach().min()) < low or float(inputs.detach().max()) > high:
        warnings.warn(
            f"inputs: some values lie outside value_range=({low:g}, {high:g}), which the update "
            "would declare to the attacker; write value_range=None, or the range after "
            "normalisation.",
            stacklevel=3,
        )


def _check_outputs(model: nn.Module, inputs: Tensor, outputs: object, random: bool) -> None:
    kind = type(model).__name__
    if random:
        raise ValueError(
            f"model: {kind}.forward drew random numbers, which are not in the update, so its "
            "gradient is no function of the data. Write model.eval() before capture, or take the "
            "noise out."
        )
    if not isinstance(outputs, Tensor):
        return  # whoever wrote the loss knows what it takes
    if outputs.ndim == 0 or outputs.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"model: expected {inputs.shape[0]} outputs for inputs {tuple(inputs.shape)}, got "
            f"shape {tuple(outputs.shape)}; write inputs.unsqueeze(0) for a single sample."
        )
    if not outputs.requires_grad:
        raise ValueError(
            f"model: the output of {kind} does not depend on its parameters (detached, or "
            "computed under torch.no_grad)."
        )
    if not bool(torch.isfinite(outputs).all()):
        validation.refuse_broken(model)
        raise ValueError(
            f"model: the output of {kind} has NaN or infinity; write dtype=torch.float64 if "
            "it overflowed."
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value.detach().to(device=device, copy=True) if isinstance(value, Tensor) else value


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Detached copy; only floating tensors change dtype (a batch counter stays an integer)."""
    floating = tensor.is_floating_point()
    return tensor.detach().to(dtype=dtype if floating else None, copy=True)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
