"""A network as a chain of stages: affine map, element-wise steps, steps in between.

:func:`parse` traces a model with torch.fx and walks from its output towards its input.  It stops
at the first node that is no link of a chain (a sum, a concatenation, a layer used twice, an unknown
layer) and says which; the stages above that :class:`Barrier` are the part that equations reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rgap.affine import Affine
from rgap.graph import ADVICE_NONE, Barrier, Link, links
from rgap.ops import Op, Rearrange, Reshape

__all__ = ["Barrier", "Chain", "Stage", "parse"]


@dataclass(frozen=True, eq=False)
class Stage:
    """x_i → lead → u_i → affine → z_i → tail → x_{i+1}.

    Attributes:
        index: place in the chain, 0 at the data.
        name: of the affine map.
        lead: steps before it (pooling, flatten); x_i is the input of the first.
        affine: the map with weights.
        tail: element-wise steps and reshapes after it, up to the last element-wise one.
    """

    index: int
    name: str
    lead: tuple[Op, ...]
    affine: Affine
    tail: tuple[Op, ...]

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one x_i, the unknown of this stage."""
        return self.lead[0].in_shape if self.lead else self.affine.in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of one x_{i+1}."""
        return self.tail[-1].out_shape if self.tail else self.affine.out_shape

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activation z_i and output x_{i+1} for inputs x_i, ``[B, *in_shape]``."""
        for op in self.lead:
            x = op.forward(x)
        z = x = self.affine.forward(x)
        for op in self.tail:
            x = op.forward(x)
        return z, x

    def to(self, device: torch.device | str) -> Stage:
        """The same stage on ``device``."""
        return replace(
            self,
            lead=tuple(op.to(device) for op in self.lead),
            affine=self.affine.to(device),
            tail=tuple(op.to(device) for op in self.tail),
        )


@dataclass(frozen=True, eq=False)
class Chain:
    """The stages of a network, in forward order, in float64.

    Attributes:
        stages: all of them, or, if ``barrier`` is set, those above it up to the output.
        barrier: the last node on the way to the output that is no link of a chain, or None.
        input_shape: shape of one input of the model.
        output_shape: shape of one output; ``()`` where nothing could be traced.
        parameters: names of all parameters of the model, in its order.
    """

    stages: tuple[Stage, ...]
    barrier: Barrier | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """True if the stages reach from the data to the output."""
        return self.barrier is None

    def forward(self, x: Tensor) -> Tensor:
        """The network's output, ``[B, *input_shape]`` → ``[B, *output_shape]``.

        For an incomplete chain x is the input of its first stage, ``stages[0].in_shape``.
        """
        self._needs_stages()
        for stage in self.stages:
            x = stage.forward(x)[1]
        return x

    def trace(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Input x_i and pre-activation z_i of every stage, for the same x as :meth:`forward`."""
        self._needs_stages()
        pairs = []
        for stage in self.stages:
            z, after = stage.forward(x)
            pairs.append((x, z))
            x = after
        return pairs

    def to(self, device: torch.device | str) -> Chain:
        """The same chain on ``device``."""
        return replace(self, stages=tuple(stage.to(device) for stage in self.stages))

    def _needs_stages(self) -> None:
        if not self.stages:
            barrier = self.barrier
            why = f": '{barrier.node}' ({barrier.kind}): {barrier.reason}" if barrier else ""
            raise ValueError(f"this chain has no stages{why}; call the model itself")


def parse(model: nn.Module, input_shape: Sequence[int]) -> Chain:
    """The chain that ``model`` is, for inputs ``[B, *input_shape]``.

    The model keeps its mode, parameters, buffers, hooks and attributes; nothing random is drawn.

    Args:
        model: in eval mode where it has dropout or batch norm; float32 or float64.
        input_shape: of one sample, without the batch dimension.

    Returns:
        The :class:`Chain`.  A graph that is no chain gives one with a ``barrier``.

    Raises:
        ValueError: no parameters; dropout or batch norm in train mode; a shape that does not fit,
            with the layer's name.
        TypeError: ``model`` is no module, or ``input_shape`` is no sequence of whole numbers.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3))
    >>> chain = parse(net, (1, 4, 4))
    >>> [(s.name, s.affine.kind, s.in_shape, s.out_shape) for s in chain.stages]
    [('0', 'conv2d', (1, 4, 4), (2, 2, 2)), ('3', 'linear', (2, 2, 2), (3,))]
    >>> [op.kind for op in chain.stages[0].tail], [op.kind for op in chain.stages[1].lead]
    (['sigmoid'], ['flatten'])
    """
    shape = _shape(input_shape)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    parameters = tuple(name for name, _ in model.named_parameters())
    if not parameters:
        raise ValueError(
            f"model: {type(model).__name__} has no parameters, so its update says nothing; write "
            "parse(network) with the network that was trained"
        )
    _refuse_train_mode(model)
    try:
        found, barrier, output = links(model, shape)
    except ValueError as error:
        fits = _fitting_shape(model, shape)
        if fits is None:
            raise
        raise ValueError(f"{error}; input_shape={fits} would fit") from error
    stages = _assemble(found)
    if barrier is None and not stages:
        barrier = Barrier(
            type(model).__name__, "model", "it has no linear or convolutional layer", ADVICE_NONE
        )
    device = next(model.parameters()).device
    return Chain(stages, barrier, shape, output, parameters).to(device)


def _fitting_shape(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """A common picture shape that the model accepts, for the message that refuses ``shape``."""
    if len(shape) > 1 and shape[0] == 1:
        shape = shape[1:] if len(shape) > 3 else shape
    sizes = (28, 32, 64, 96, 128, 224, 256, 299)
    tries = [(c, *shape[1:]) for c in (1, 3)] if len(shape) > 1 else []
    tries += [shape, *((c, n, n) for n in sizes for c in dict.fromkeys((shape[0], 1, 3)))]
    for candidate in tries:
        try:
            links(model, candidate)
        except ValueError:
            continue
        return candidate
    return None


def _assemble(found: Sequence[Link]) -> tuple[Stage, ...]:
    """Group links into stages; steps before the first affine map lead into it."""
    at = [i for i, link in enumerate(found) if isinstance(link, Affine)]
    stages: list[Stage] = []
    start = 0
    for index, place in enumerate(at):
        end = at[index + 1] if index + 1 < len(at) else len(found)
        rest = found[place + 1 : end]
        cut = len(rest) if index + 1 == len(at) else _tail_length(rest)
        affine = found[place]
        assert isinstance(affine, Affine)
        lead, tail = _steps(found[start:place]), _steps(rest[:cut])
        stages.append(Stage(index, affine.name, lead, affine, tail))
        start = place + 1 + cut
    return tuple(stages)


def _tail_length(rest: Sequence[Link]) -> int:
    """How many of the links after an affine map belong to its tail."""
    length = 0
    for place, op in enumerate(rest):
        assert isinstance(op, Op)
        if op.elementwise:
            length = place + 1
        elif not isinstance(op, Reshape) and not _permutes(op):
            break
    return length


def _permutes(op: Op) -> bool:
    return isinstance(op, Rearrange) and op.barrier is None and len(op.index) == len(op.where)


def _steps(found: Sequence[Link]) -> tuple[Op, ...]:
    return tuple(link for link in found if isinstance(link, Op))


def _shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    example = "write input_shape=(3, 32, 32), the shape of one picture without the batch dimension"
    try:
        shape = tuple(int(n) for n in input_shape)
        whole = all(int(n) == n for n in input_shape)
    except TypeError:
        raise TypeError(
            f"input_shape: expected whole numbers, got {input_shape!r}; {example}"
        ) from None
    if not shape or min(shape) < 1 or not whole:
        raise ValueError(
            f"input_shape: expected whole numbers of at least 1, got {input_shape!r}; {example}"
        )
    return shape


def _refuse_train_mode(model: nn.Module) -> None:
    """Raise if a module draws random numbers or mixes the batch because of its mode."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        path = name or type(model).__name__
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"'{path}' ({kind}) is in train mode: it mixes the samples of the batch; write "
                "model.eval() before capture, parse and invert"
            )
        random = isinstance(module, nn.RReLU) or (
            isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        )
        if random:
            raise ValueError(
                f"'{path}' ({kind}) is in train mode: it draws random numbers that the update "
                "does not state; write model.eval() before capture, parse and invert"
            )
