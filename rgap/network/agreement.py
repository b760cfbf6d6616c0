"""Is the chain the network?  Checks before and after a model is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, islice
from typing import Protocol

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.network.batch_statistics import mixes
from rgap.network.fitting import runs
from rgap.network.isolation import untouched
from rgap.network.probing import Shape, UnreadyError
from rgap.network.running import first_line
from rgap.network.watching import watched

SQUARE = 65  # sides that are tried one by one; beyond, only usual ones
LARGE = (80, 84, 96, 112, 128, 144, 160, 192, 224, 227, 256, 299, 320, 384, 448, 512)


class Runs(Protocol):
    """A step, or all of them at once."""

    @property
    def name(self) -> str:
        """Its path in the model."""

    @property
    def in_shape(self) -> Shape:
        """Of one sample that it takes."""

    def forward(self, x: Tensor, /) -> Tensor:
        """The step itself."""


def disagreement(
    model: nn.Module, steps: Sequence[Runs], shape: Shape, *, complete: bool
) -> str | None:
    """Why a chain is not what its model computes, or None.

    Args:
        model: runs once, on two random inputs; it is left as it was.
        steps: of the chain, in forward order.
        shape: of one input of the model.
        complete: False: the steps are the part above a barrier; it is compared from its first
            module on, where the model is given such inputs without an error.
    """
    entry = None
    if not complete:
        modules = {name for name, _ in model.named_modules() if name}
        steps = steps[next((i for i, s in enumerate(steps) if s.name in modules), len(steps)) :]
        entry = steps[0].name if steps else None
    if not steps or any(p.is_meta for p in model.parameters()):
        return None
    try:
        with untouched(model, seed=1):  # not the state that a constant of the trace was drawn from
            gap = _difference(model, steps, shape, entry)
    except Exception as error:
        inputs = f"[B, {', '.join(map(str, shape))}]"
        return None if entry else f"it fails on inputs {inputs}: {first_line(error)}"
    precision = torch.finfo(next(model.parameters()).dtype).eps
    if gap is None or gap <= max(1e-3, 32 * precision):
        return None
    hooks = [
        name or type(model).__name__
        for name, m in model.named_modules()
        if m._forward_hooks or m._forward_pre_hooks
    ]
    return (
        f"its output differs from the traced one by {gap:.2g} of its size: a hook, a replaced "
        "forward, a random number or a decision by type changes it"
        + (f" (hooks are on {', '.join(map(repr, hooks))})" if hooks else "")
    )


def _difference(
    model: nn.Module,
    steps: Sequence[Runs],
    shape: Shape,
    entry: str | None,
) -> float | None:
    """‖chain − model‖∞/‖model‖∞; inf: other shapes; None: nothing to compare with."""
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *shape, generator=generator, dtype=torch.float64).to(first.device)
    entries = {} if entry is None else {entry: model.get_submodule(entry)}
    with torch.no_grad(), watched(entries) as calls:
        expected = model(x.to(first.dtype))
    seen = [x] if entry is None else [a.double() for call in calls for a in call.args]
    if len(seen) != 1 or tuple(seen[0].shape[1:]) != steps[0].in_shape:
        return None  # called more than once, or the steps begin with a fused border
    rows = []
    # One by one: a convolution in float64 lays out the windows of all that it is given.
    for row in torch.split(seen[0], 1):
        for step in steps:
            row = step.forward(row)
        rows.append(row)
    got = torch.cat(rows)
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        return math.inf
    expected = expected.double()
    if not bool(expected.isfinite().all()):
        return None
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    return float((got - expected).abs().max()) / scale


def sample_shape(model: nn.Module, *stated: Sequence[int] | None) -> Shape:
    """The shape of one sample: as stated, or as the model's own layers fix it.

    A fully connected first layer says how many inputs it has.  A convolution says how many
    channels; where a fully connected layer stands above, only some square sizes fit, and one that
    fits alone is taken.

    Args:
        model: the network.
        *stated: shapes in the order of who has the last word; None where nobody said one.

    Raises:
        ValueError: nothing was stated and the layers leave it open; the message says what fits.

    >>> sample_shape(nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)))
    (12,)
    """
    for shape in stated:
        if shape is not None:
            return validation.shape(shape)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    layer = next((m for m in model.modules() if isinstance(m, kinds)), None)
    fitting: list[Shape] = []
    if isinstance(layer, nn.Linear):
        fitting = [shape for shape in [(layer.in_features,)] if runs(model, shape)]
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        dims, channels = len(layer.kernel_size), layer.in_channels
        sides = chain(range(1, SQUARE), LARGE) if dims < 3 else range(1, 17)
        shapes = ((channels, *(n,) * dims) for n in sides)
        fitting = list(islice((s for s in shapes if runs(model, s)), 2))
        if len(fitting) == 1 and fitting[0][1] >= SQUARE:  # between those that were tried
            near = ((channels, *(fitting[0][1] + n,) * dims) for n in (-1, 1))
            fitting += [shape for shape in near if runs(model, shape)]
    if len(fitting) == 1:
        return fitting[0]
    fits = f" ({fitting[0]} and {fitting[1]} both fit)" if fitting else ""
    advice = (
        f"{fitting[-1] if fitting else (3, 32, 32)}, or the shape that the client's samples have"
    )
    if isinstance(layer, nn.Embedding):  # its width is that of a vector, not the length of a text
        advice = "(n,) with the number n of tokens in each of the client's texts"
    raise ValueError(
        f"expected an input shape, got an update that does not state one, and the layers of the "
        f"{type(model).__name__} leave it open{fits}; write input_shape={advice}"
    )


def refuse_unready(model: nn.Module, *, mixing: bool = False) -> None:
    """Raise if a module has no weights yet, or draws or mixes the batch because of its mode.

    Args:
        model: the network.
        mixing: True: batch norms in train mode may mix the batch, for a reader that runs the whole
            batch at once.
    """
    validation.refuse_broken(model)
    for name, module in model.named_modules():
        does = by_mode(module)
        if does and not (mixing and mixes(module)):
            path, kind = name or type(model).__name__, type(module).__name__
            raise UnreadyError(
                f"'{path}' ({kind}) is in train mode: it {does}",
                "model.eval() before capture, parse and invert",
            )


def by_mode(module: nn.Module) -> str:
    """What a module does in train mode that no update states, in words; "" for nothing."""
    if not module.training:
        return ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "mixes the samples of the batch"
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    random = dropout or isinstance(module, nn.RReLU)
    return "draws random numbers that the update does not state" if random else ""
