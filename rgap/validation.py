"""What is refused, and in which words: one place that checks tensors, targets and updates.

Every message says what was expected, what came, and what to write instead, and names the tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rgap.arithmetic.doubles import blocks
from rgap.arithmetic.rounding import LARGEST
from rgap.remedy import GRADIENTS, NAMED, Remedy, frozen

_AFTER_STEP = Remedy(
    "Update.from_ndarrays(model, arrays, lr=0.01) or Update.from_delta(model, weights, lr=0.01)",
    "--after-step 0.01",
)
WEIGHTS = 0.2  # distance from the weights, over their size, up to which gradients are weights

# What to write for a count that is refused; 1 where nothing else is usual.
_EXAMPLES = {
    "input_shape": "(3, 32, 32)",
    "latent_shape": "(128,)",
    "channels": "12",
    "classes": "10",
    "widths": "(512, 512)",
}


def require_finite(name: str, tensor: Tensor, advice: str) -> None:
    """Raise ValueError if ``tensor`` has NaN or infinity, counting them; ``advice`` ends it."""
    if not all(bool(torch.isfinite(part).all()) for part in blocks(tensor)):
        bad = sum(int((~torch.isfinite(part)).sum()) for part in blocks(tensor))
        raise ValueError(
            f"{name} has NaN or infinity in {bad} of {tensor.numel()} entries; {advice}."
        )


def refuse_broken(
    model: nn.Module, what: str = "model", whose: str = "that the client trained from"
) -> None:
    """Raise ValueError if a parameter has no shape yet, or values that are none; it is named."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{what}: the parameter '{name}' of a lazy layer has no shape yet; call "
                f"{what}(example) once before, and load the weights {whose}"
            )
        if not parameter.is_meta:
            require_finite(f"{what}: {name!r}", parameter, f"load the weights {whose}")


def named(tensors: Any, what: str) -> dict[str, Any]:
    """A plain dict of ``tensors``."""
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"{what}: expected a dict of tensors by name, got {type(tensors).__name__}; write "
            "dict(zip(names, tensors)) with names = [n for n, _ in model.named_parameters()]."
        )
    return dict(tensors)


def gradient(name: str, tensor: Any) -> Tensor:
    """A dense copy of one gradient, or the reason why it is none."""
    if tensor is None:
        raise TypeError(
            f"gradients: {name!r} is None (no backward pass reached it); write "
            "torch.zeros_like(parameter) if the model does not use it."
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"gradients: {name!r} is a {type(tensor).__name__}, expected a torch.Tensor; write "
            "torch.as_tensor(array), or Update.from_ndarrays(model, arrays)."
        )
    if not tensor.is_floating_point():
        raise TypeError(
            f"gradients: {name!r} has dtype {tensor.dtype}, expected a floating dtype; a gradient "
            "of real parameters is real: write .float() if these are whole-number values."
        )
    if tensor.is_meta:
        raise ValueError(f"gradients: {name!r} is on the meta device and has no values.")
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach().clone()
    finite_gradient(name, dense)
    return dense


def finite_gradient(name: str, tensor: Tensor) -> None:
    """Raise ValueError if one gradient has NaN or infinity."""
    require_finite(
        f"gradients: {name!r}", tensor, "capture again in float64, or drop the client's update"
    )


def gradient_sizes(gradients: Mapping[str, Tensor]) -> None:
    """Raise ValueError if an entry of a gradient is beyond ``LARGEST``."""
    for name, tensor in gradients.items():
        sizes = (float(part.abs().max()) for part in blocks(tensor) if part.numel())
        largest = max(sizes, default=0.0)
        if largest > LARGEST:
            raise ValueError(
                f"gradients: {name!r} has entries of {largest:.1e}; expected at most "
                f"{LARGEST:.0e}, from where squares leave the range of float64; divide the update "
                "by what its loss was scaled with, or drop the client's update."
            )


def entrywise_noise(noise: Any, gradients: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Copies of the standard deviations of each entry, in the order of the gradients."""
    if noise is None:
        return None
    given = named(noise, "noise")
    for name, std in given.items():
        if name not in gradients:
            raise ValueError(
                f"noise: {name!r} is not among the gradients, expected names such as "
                f"{next(iter(gradients))!r}; write one standard deviation per entry, "
                "noise={n: torch.full_like(g, 0.01) for n, g in gradients.items()}."
            )
        if not isinstance(std, Tensor) or not std.is_floating_point():
            raise TypeError(
                f"noise: {name!r} is a {type(std).__name__}, expected a floating torch.Tensor; "
                f"write torch.full_like(gradients[{name!r}], 0.01)."
            )
        if std.shape != gradients[name].shape:
            raise ValueError(
                f"noise: {name!r} has shape {tuple(std.shape)}, expected "
                f"{tuple(gradients[name].shape)} as its gradient; write "
                f"std.expand_as(gradients[{name!r}])."
            )
        require_finite(f"noise: {name!r}", std, "write 0.0 where no noise was added")
        if bool((std < 0).any()):
            raise ValueError(
                f"noise: {name!r} has a negative entry {float(std.min()):.3g}, expected standard "
                "deviations; write std.abs()."
            )
    return {name: given[name].detach().clone() for name in gradients if name in given} or None


def buffer(name: str, tensor: Any) -> Tensor:
    """A copy of one buffer."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"buffers: {name!r} is a {type(tensor).__name__}, expected a torch.Tensor.")
    if tensor.is_floating_point():
        require_finite(f"buffers: {name!r}", tensor, "the model's own statistics are broken")
    return tensor.detach().clone()


def count(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    advice = f"write {name}={_EXAMPLES.get(name, '1')}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: expected whole numbers, got {value!r}; {advice}.")
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {value!r}; {advice}.")
    return number


def real(name: str, value: Any, example: float) -> None:
    """Raise unless a value is one number."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if not one and (isinstance(value, Tensor) or not hasattr(value, "__float__")):
        raise TypeError(f"{name}: expected a number, got {value!r}; write {name}={example}")


def seconds(name: str, value: Any) -> None:
    """Raise unless a value is a time limit: a number, at least 0."""
    real(name, value, 60.0)
    if not value >= 0:
        raise ValueError(f"{name}: expected seconds, at least 0, got {value!r}; write {name}=60.0")


def seed(value: Any) -> int:
    """A whole number of 63 bits and a sign, as torch.manual_seed takes."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"seed: expected a whole number, got {value!r}; write seed=0") from None
    if isinstance(value, bool) or not -(2**63) <= number < 2**63 - 2**10:  # a few are added to it
        raise ValueError(f"seed: expected a whole number of 64 bits, got {value!r}; write seed=0")
    return number


def shape(value: Any, name: str = "input_shape") -> tuple[int, ...]:
    """The shape of one sample, or of what else is named."""
    flat = isinstance(value, Tensor) and value.ndim == 0
    if flat or not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise TypeError(
            f"{name}: expected the shape of one sample, got {value!r}; write "
            f"{name}={_EXAMPLES[name]}, or {name}=(12,) for 12 values in a row"
        )
    return tuple(count(name, n) for n in value)


def module(model: object) -> None:
    """Raise TypeError unless it is a network."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def labels(labels: Any, batch_size: int | None) -> Tensor | None:
    """A copy of the labels, one per sample."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels: expected a tensor, got {type(labels).__name__}; write torch.tensor(labels)."
        )
    if labels.ndim == 0 or (batch_size is not None and labels.shape[0] != batch_size):
        raise ValueError(
            f"labels: expected one target per sample (batch_size={batch_size}), got shape "
            f"{tuple(labels.shape)}."
        )
    return labels.detach().clone()


def bounds(
    value_range: Any, instead: str = "write None for values without bounds"
) -> tuple[float, float] | None:
    """The range of values as two floats; ``instead`` ends the message about one that is none."""
    if value_range is None:
        return None
    flat = isinstance(value_range, Tensor) and value_range.ndim == 0
    if flat or not isinstance(value_range, Iterable) or len(pair := tuple(value_range)) != 2:
        raise TypeError(
            f"value_range: expected (low, high), got {value_range!r}; write value_range=(0.0, 1.0)"
        )
    low, high = float(pair[0]), float(pair[1])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"value_range: expected (low, high) with low < high, got {value_range!r}; {instead}."
        )
    return low, high


def refuse_weights(gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise if the gradients are the model's own parameters, a little trained perhaps."""
    apart = size = 0.0
    for name, g in gradients.items():
        p = parameters.get(name)
        if p is None or p.shape != g.shape:
            return  # named by the other checks
        if p.is_meta:
            return  # no values to compare with
        for sent, weight in zip(blocks(g), blocks(p), strict=True):
            own = weight.to(g.device, torch.float64)
            apart += float((sent.double() - own).square().sum())
            size += float(own.square().sum())
    if size > 0.0 and apart < (WEIGHTS * WEIGHTS) * size:
        raise ValueError(
            f"gradients: they are the model's own parameters to within {(apart / size) ** 0.5:.1e} "
            "of their size: weights after training, expected gradients. Write "
            f"{_AFTER_STEP} with the client's learning rate."
        )


def check_names(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str) -> None:
    """Raise unless names and order are the model's."""
    missing = [name for name in expected if name not in got]
    extra = [name for name in got if name not in expected]
    if extra and missing and all(name.isdigit() for name in got):
        raise ValueError(
            f"gradients: the tensors are numbered, not named, expected {missing[0]!r} first; write "
            "Update.from_breaching(server_payload, shared_data, model=model)."
        )
    if missing:
        also = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        instead = f"; it has {', '.join(map(repr, extra[:3]))} instead" if extra else ""
        untrained = "" if extra else f", or, if the client froze it, {frozen(missing[0])}"
        raise ValueError(
            f"gradients: {missing[0]!r} is missing{also}, expected the {len(expected)} parameters "
            f"of the {model}{instead}. Write {GRADIENTS}{untrained}."
        )
    if extra:
        raise ValueError(
            f"gradients: {extra[0]!r} is not a parameter of the {model}; write "
            f"{NAMED} if it does not belong."
        )
    for place, (have, want) in enumerate(zip(got, expected, strict=True)):
        if have != want:
            raise ValueError(
                f"gradients: the order differs from the model's at place {place}: expected "
                f"{want!r}, got {have!r}. Names that follow another order may be mixed up; if "
                f"they are right, write {NAMED}."
            )


def check_shapes(what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise unless every tensor has its shape in the model."""
    for name, tensor in got.items():
        if tensor.ndim and tensor.shape[1:] == expected[name].shape:
            raise ValueError(
                f"{what}: {name!r} has shape {tuple(tensor.shape)}, {len(tensor)} times the "
                f"model's {tuple(expected[name].shape)}: gradients sample by sample, as Opacus "
                "keeps them in grad_sample; write g[0] of each for one sample with batch_size=1, "
                "or g.mean(0) for the batch."
            )
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{what}: {name!r} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name].shape)} as in the model; was it captured from a model with "
                "other widths? Build the model that the client trained."
            )


def noise(value: float) -> None:
    """Refuse a standard deviation that is none.

    Raises:
        ValueError: it is negative or not finite.

    >>> noise(0.1)
    """
    if isinstance(value, Mapping):
        raise TypeError(
            "noise: expected one number for all entries, got a mapping; write "
            "dataclasses.replace(update, noise={n: torch.full_like(g, 0.01) for n, g in "
            "update.gradients.items()}) for a level of each entry"
        )
    real("noise", value, 0.01)
    if not 0.0 <= value < math.inf:
        raise ValueError(
            f"noise: expected a standard deviation, a finite number of at least 0, got {value!r}; "
            "write noise=0.0 for an update without added noise"
        )
