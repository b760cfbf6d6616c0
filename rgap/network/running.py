"""The one place where a user's forward runs: its error becomes a sentence that names its line."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from rgap.network.fitting import fitting_shape

BEHIND_TOKENS = (
    "which no equation recovers: write a module that starts behind the embedding, whose inputs are "
    "its vectors"
)

__all__ = [
    "BEHIND_TOKENS",
    "called",
    "first_line",
    "guarded",
    "looks_up",
    "only_tensor",
    "recorded",
    "refuse_wrapped",
    "run",
]

# Frames in these folders are not the user's.
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def run(model: nn.Module, inputs: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
    """``model(inputs)``, one tensor, with some of its parameters and buffers replaced.

    Args:
        model: is run as it is: hooks, mode, random state.
        inputs: [B, ...].
        values: of parameters and buffers by name; None: the model's own.

    Raises:
        ValueError: the forward failed; the message names the module, the line and PyTorch's reason.
        TypeError: it returned something else than one tensor.

    Example:
        >>> run(nn.Linear(2, 3), torch.ones(4, 5))
        Traceback (most recent call last):
        ...
        ValueError: model: the forward pass failed in Linear for inputs of shape (4, 5), ...
    """
    return only_tensor(model, called(model, inputs, values))


def called(model: nn.Module, inputs: Tensor, values: Mapping[str, Tensor] | None = None) -> Any:
    """What the model returns, one tensor or several; arguments and errors as for :func:`run`."""
    with guarded(model, inputs), recorded():
        if values is None:
            return model(inputs)
        return torch.func.functional_call(model, dict(values), (inputs,))


def refuse_meta(model: nn.Module) -> None:
    """Raise if a parameter is on the meta device, without values.

    Raises:
        ValueError: its name, and what to write.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: {name!r} is on the meta device and has no values; write "
                "model.to_empty(device='cpu') and load its state_dict."
            )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if the model cannot run with other values in the place of its parameters.

    Raises:
        ValueError: a scripted module, DataParallel, or parameters without values.
    """
    refuse_meta(model)
    for name, module in model.named_modules():
        path = f"'{name}'" if name else "the model"
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"model: {path} is a DataParallel, expected the network itself; write model.module"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {path} is scripted ({type(module).__name__}), which takes no other "
                "parameters and no hooks; write the module that torch.jit was given"
            )


@contextmanager
def recorded() -> Iterator[None]:
    """Checkpointed parts of a forward keep what they compute.

    A checkpoint runs its part again in the backward pass, with the parameters that the model has
    *then*, and its reentrant form refuses `torch.autograd.grad`.
    """
    names = {"_checkpoint_hook": lambda frame: nullcontext(), "CheckpointFunction": _Direct}
    usual = {name: getattr(checkpoint, name) for name in names if hasattr(checkpoint, name)}
    for name in usual:
        setattr(checkpoint, name, names[name])
    try:
        yield
    finally:
        for name, value in usual.items():
            setattr(checkpoint, name, value)


class _Direct:
    """A reentrant checkpoint that is none."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        """Call the checkpointed part."""
        return function(*args)


@contextmanager
def guarded(model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Turn whatever the forward of ``model`` raises into a ValueError; see `run`."""
    try:
        yield
    except Exception as error:
        raise ValueError(_failed(model, inputs, error)) from error


def only_tensor(model: nn.Module, outputs: object) -> Tensor:
    """The outputs, if they are one tensor.

    Raises:
        TypeError: they are a tuple, a dict, …
    """
    if isinstance(outputs, Tensor):
        return outputs
    raise TypeError(
        f"model: {type(model).__name__}.forward returned a {type(outputs).__name__}, expected one "
        "tensor; wrap it in a module whose forward returns the logits only."
    )


def _failed(model: nn.Module, inputs: Tensor, error: Exception) -> str:
    """Name the innermost module in which ``forward`` failed, and the last line of the user's.

    Hooks would name the module too, but a failing model must be left without them.
    """
    names = {id(module): name for name, module in model.named_modules()}
    where, line = type(model).__name__, ""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            where = f"{names[id(module)]} ({first_line_of(module)})"
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARIES) and not file.startswith(sys.base_prefix):
            text = linecache.getline(file, trace.tb_lineno).strip()
            line = f" at {Path(file).name}:{trace.tb_lineno}" + (f" `{text}`" if text else "")
        trace = trace.tb_next
    if "mbedding" in where and (tokens := looks_up(model)) and inputs.is_floating_point():
        return f"model: {where} in {type(model).__name__} got real numbers. {tokens}"
    reason = first_line(error)
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return (
        f"model: the forward pass failed in {where}{line} for inputs of shape "
        f"{tuple(inputs.shape)}, {str(inputs.dtype).removeprefix('torch.')}: {kind}{reason}. "
        f"{_advice(model, inputs, error)}"
    )


def first_line_of(module: nn.Module) -> str:
    """A module as PyTorch prints it, cut after its first line."""
    lines = repr(module).splitlines()
    return lines[0] if len(lines) == 1 else type(module).__name__


def looks_up(model: nn.Module) -> str:
    """What to write of a model that takes tokens, "" for one without an embedding."""
    if not any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in model.modules()):
        return ""
    return f"An embedding takes whole numbers, {BEHIND_TOKENS}."


def _advice(model: nn.Module, inputs: Tensor, error: Exception) -> str:
    text = str(error)
    if "more than 1 value per channel" in text:
        return (
            "A batch norm in train mode divides by the spread of a channel, and one value has none:"
            " write a batch of B >= 2 samples, or model.eval() where the client had it so."
        )
    if inputs.is_floating_point() and looks_up(model):
        return looks_up(model)
    if isinstance(error, TypeError) and "positional argument" in text:
        return "Write a module whose forward takes one tensor [B, ...] and splits it."
    if "dtype" in text or "scalar type" in text:
        return "Write a model of one precision, whose forward casts nothing."
    shape = tuple(inputs.shape[1:])
    fits = fitting_shape(model, shape)
    which = "" if fits in (None, shape) else f"; input_shape={fits} would fit"
    return f"Write inputs of the shape the model was built for{which}."


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
