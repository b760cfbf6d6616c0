"""The last fully connected layer, seen at work: no trace of the model is needed.

The model runs on dummy inputs while every product with one of its parameters is noted; the head is
the product that its output is, up to a constant factor (a temperature).  What lies below may
branch, assert, cast, checkpoint or read tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rgap.labels.gradient import HeadGradient
from rgap.network.isolation import untouched
from rgap.network.running import guarded, recorded
from rgap.update.update import Update

__all__ = ["Located", "locate"]

NAMED = ("logits", "out", "output", "outputs")  # of an output with several members, in this order
FEW = 3  # samples of the second run, which shows a factor that depends on the batch
ALIKE = 64.0  # roundings of the arithmetic by which an output may differ from the product
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_)


@dataclass(frozen=True, eq=False)
class Located:
    """The head of a model and what entered it.

    Attributes:
        weight_name: of the parameter W.
        bias_name: of the parameter b, or None.
        weight: c·W, [C, d], with the constant factor c between Wx + b and the output.
        bias: c·b, [C], or None.
        factor: c.
        across: True: the parameter is [d, C].
        features: the head's inputs, [N, d], float64, on the CPU.
    """

    weight_name: str
    bias_name: str | None
    weight: Tensor
    bias: Tensor | None
    factor: float
    across: bool
    features: Tensor

    def gradient(self, update: Update, batch_size: int, **known: Any) -> HeadGradient:
        """Its part of an update, as that of the weights ``c·W``."""
        gradient = update.gradients[self.weight_name]
        gradient = (gradient.T if self.across else gradient) / self.factor
        bias = None if self.bias_name is None else update.gradients[self.bias_name] / self.factor
        return HeadGradient(
            gradient, bias, batch_size, self.weight, self.bias, update.loss, **known,
            local_steps=update.local_steps,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Product:
    """One product that a forward made: out = x Wᵀ + b."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    across: bool
    out: Tensor

    def again(self) -> Tensor:
        """The output once more: ``out`` may have been written to."""
        logits = self.x @ (self.weight if self.across else self.weight.T)
        return logits if self.bias is None else logits + self.bias


class _Watch(TorchFunctionMode):
    """Notes products with parameters, and how often a parameter is used at all."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.products = names, list[_Product]()
        self.uses: dict[int, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        for key in {id(a) for a in given} & self.names.keys():
            self.uses[key] = self.uses.get(key, 0) + 1
        if func is F.linear:
            bound = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            self._note(bound["input"], bound["weight"], bound.get("bias"), False, out)
        elif func in _PRODUCTS and len(given) == 2:
            self._note(given[0], given[1], None, True, out)
        elif func in _SUMS and len(given) == 2:
            for one, other in (given, given[::-1]):
                made = next((p for p in reversed(self.products) if p.out is one), None)
                if made is not None and made.bias is None and id(other) in self.names:
                    self._note(made.x, made.weight, other, made.across, out)
        return out

    def _note(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, across: bool, out: Tensor
    ) -> None:
        if weight.ndim == 2 and out.ndim == 2:
            self.products.append(_Product(x, weight, bias, across, out))


def locate(model: nn.Module, update: Update, inputs: Tensor) -> Located | str:
    """The head and its inputs for ``inputs`` [N, *input_shape], or why none was seen.

    Args:
        model: runs twice, on copies of its values in float64, or in its own precision where its
            forward insists on it; it is left as it was.
        update: its buffers take the place of the model's.
        inputs: of the right shape; rounded to tokens where the model embeds them.

    Raises:
        ValueError: the forward fails on them; the message names its line.
    """
    with untouched(model):
        return _located(model, update, inputs)


def _located(model: nn.Module, update: Update, inputs: Tensor) -> Located | str:
    values, ran_in, outputs, watch = _watched(model, update, inputs)
    if len(outputs) != len(inputs) or outputs.ndim != 2:
        return (
            f"{type(model).__name__} gives outputs {list(outputs.shape)} for {len(inputs)} "
            "samples, expected one row of logits each"
        )
    names = {id(t): n for n, t in values.items()}
    for product in reversed(watch.products):
        factor = _factor(product, outputs)
        if factor is None:
            continue
        if id(product.weight) not in names:
            return "the weights of its last layer are computed from its parameters"
        if product.bias is not None and id(product.bias) not in names:
            return "the bias of its last layer is computed from its parameters"
        weight, bias = names[id(product.weight)], None
        if product.bias is not None:
            bias = names[id(product.bias)]
        if any(watch.uses.get(id(values[n]), 0) > 1 for n in (weight, bias) if n is not None):
            return f"the weights of its last layer, '{weight}', are used elsewhere as well"
        few = _watched(model, update, inputs[:FEW], ran_in)
        again = [_factor(p, few[2]) for p in few[3].products if p.out.shape == few[2].shape]
        if not any(c is not None and abs(c / factor - 1.0) < 1e-3 for c in again):
            return "its output is its last layer's times a number that depends on the batch"
        own = product.weight.detach().double().cpu() * factor
        return Located(
            weight, bias, own.T if product.across else own,
            None if product.bias is None else product.bias.detach().double().cpu() * factor,
            factor, product.across, product.x.detach().double().cpu(),
        )  # fmt: skip
    return "its output is not that of a fully connected layer"


def _factor(product: _Product, outputs: Tensor) -> float | None:
    """The c with ``outputs = c (x Wᵀ + b)``, or None."""
    if product.out.shape != outputs.shape:
        return None
    mine, theirs = product.again().detach().double(), outputs.detach().double()
    energy = float(mine.square().sum())
    if energy == 0.0:
        return None
    c = float((mine * theirs).sum()) / energy
    eps = torch.finfo(outputs.dtype).eps * ALIKE
    close = bool(((c * mine - theirs).abs() <= eps * theirs.abs().max()).all())
    if abs(c - 1.0) < eps:
        c = 1.0
    return c if close and c != 0.0 else None


def _watched(
    model: nn.Module, update: Update, inputs: Tensor, dtype: torch.dtype | None = torch.float64
) -> tuple[dict[str, Tensor], torch.dtype | None, Tensor, _Watch]:
    """The values it ran with, their precision (None: its own), its logits, what was noted."""
    place = next(model.parameters()).device
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {
        n: t.detach().to(dtype if t.is_floating_point() else None, copy=True)
        for n, t in own.items()
    }
    for name, sent in update.buffers.items():
        values[name] = sent.to(place, values[name].dtype, copy=True)
    first = next(t for n, t in values.items() if own[n].is_floating_point())
    data = _tokens(model, inputs).to(place)
    if data.is_floating_point():
        data = data.to(first.dtype)
    watch = _Watch({id(t): n for n, t in values.items()})
    try:
        with torch.no_grad(), guarded(model, data), recorded(), watch:
            outputs = torch.func.functional_call(model, values, (data,))
    except ValueError:
        if dtype is None:
            raise
        return _watched(model, update, inputs, None)
    logits = _logits(outputs)
    if logits is None:
        raise TypeError(
            f"model: {type(model).__name__}.forward returned a {type(outputs).__name__} without a "
            f"tensor; wrap it in a module whose forward returns the logits only"
        )
    return values, dtype, logits, watch


def _logits(outputs: Any) -> Tensor | None:
    """The tensor among what a forward returned: by its name, else the first one."""
    if isinstance(outputs, Tensor):
        return outputs
    if is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = {f.name: getattr(outputs, f.name) for f in fields(outputs)}
    elif hasattr(outputs, "_asdict"):
        outputs = outputs._asdict()
    if isinstance(outputs, Mapping):
        named = [outputs[n] for n in NAMED if n in outputs]
        outputs = [*named, *outputs.values()]
    if isinstance(outputs, (list, tuple)):
        return next((t for t in map(_logits, outputs) if t is not None), None)
    return None


def _tokens(model: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs, or whole numbers in their place where the first layer is an embedding."""
    if not inputs.is_floating_point():
        return inputs
    layers = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]
    tables = [m.num_embeddings for m in layers if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    if not tables or not isinstance(layers[0], (nn.Embedding, nn.EmbeddingBag)):
        return inputs
    low, high = float(inputs.min()), float(inputs.max())
    unit = (inputs - low) / max(high - low, torch.finfo(torch.float32).tiny)
    most = int(layers[0].num_embeddings)
    return (unit * most).floor().clamp(0, most - 1).long()
