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

from rgap import validation
from rgap.network.affine import Affine
from rgap.network.agreement import disagreement, refuse_unready
from rgap.network.connected import as_matrix
from rgap.network.fitting import fitting_shape
from rgap.network.graph import ADVICE_NONE, Barrier, Link, links
from rgap.network.probing import UnreadyError
from rgap.network.reshape import Op, Pad, Rearrange, Reshape

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
    def steps(self) -> tuple[Link, ...]:
        """Every affine map and step, in forward order."""
        pieces: list[Link] = []
        for stage in self.stages:
            pieces += [*stage.lead, stage.affine, *stage.tail]
        return tuple(pieces)

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


def parse(model: nn.Module, input_shape: Sequence[int], *, mixing: bool = False) -> Chain:
    """The chain that ``model`` is, for inputs ``[B, *input_shape]``.

    The model keeps its mode, parameters, buffers, hooks and attributes; nothing random is drawn.
    It runs once, on two random inputs (forward hooks do too), and a chain that does not compute
    the same becomes a barrier: no trace shows a hook that changes an output.

    Args:
        model: in eval mode where it has dropout or batch norm; float32 or float64.
        input_shape: of one sample, without the batch dimension.
        mixing: True: a batch norm in train mode is a barrier; the chain is what stands above it.

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
    validation.module(model)
    parameters = tuple(name for name, _ in model.named_parameters())
    if not parameters:
        raise ValueError(
            f"model: {type(model).__name__} has no parameters, so its update says nothing; write "
            "parse(network) with the network that was trained"
        )
    refuse_unready(model, mixing=mixing)
    try:
        pieces, barrier, output = links(model, shape)
    except UnreadyError:
        raise
    except ValueError as error:
        fits = fitting_shape(model, shape)
        if fits is None:
            raise
        raise ValueError(f"{error}; input_shape={fits} would fit") from error
    stages = assemble(pieces)
    if barrier is None and not stages:
        barrier = Barrier(
            type(model).__name__, "model", "it has no linear or convolutional layer", ADVICE_NONE
        )
    device = next(model.parameters()).device
    chain = Chain(stages, barrier, shape, output, parameters).to(device)
    reason = disagreement(model, chain.steps, chain.input_shape, complete=chain.complete)
    if reason is None:
        return chain
    failure = Barrier(type(model).__name__, "forward", reason, ADVICE_NONE)
    return replace(chain, stages=(), barrier=failure)


def unparsed(model: nn.Module, input_shape: Sequence[int], reason: str) -> Chain:
    """The chain of a model that was not read: no stages, and why."""
    parameters = tuple(name for name, _ in model.named_parameters())
    barrier = Barrier(type(model).__name__, "model", reason, ADVICE_NONE)
    return Chain((), barrier, _shape(input_shape), (), parameters)


def assemble(pieces: Sequence[Link]) -> tuple[Stage, ...]:
    """Group links into stages; steps before the first affine map lead into it."""
    pieces = [piece for link in pieces for piece in _spelled_out(link)]
    at = [i for i, link in enumerate(pieces) if isinstance(link, Affine)]
    stages: list[Stage] = []
    start = 0
    for index, place in enumerate(at):
        end = at[index + 1] if index + 1 < len(at) else len(pieces)
        rest = pieces[place + 1 : end]
        cut = len(rest) if index + 1 == len(at) else _tail_length(rest)
        affine = pieces[place]
        assert isinstance(affine, Affine)
        lead, tail = list(_steps(pieces[start:place])), _steps(rest[:cut])
        while lead and (sides := _border(lead[-1], affine)):
            affine = affine.bordered(sides, getattr(lead[-1], "border", "") or "zeros")
            lead.pop()
        stages.append(Stage(index, affine.name, tuple(lead), affine, tail))
        start = place + 1 + cut
    return tuple(stages)


def _spelled_out(link: Link) -> tuple[Link, ...]:
    return as_matrix(link) if isinstance(link, Affine) else (link,)


def _border(op: Op, affine: Affine) -> tuple[int, ...]:
    """Sides of a border that ``op`` puts around a convolution's picture, else ``()``.

    As padding of the convolution it is known; as its input it would be unknowns.
    """
    if not isinstance(op, Pad | Rearrange) or affine.geometry is None:
        return ()
    padding = any(map(any, affine.geometry.padding))
    if isinstance(op, Rearrange) and (padding or not op.border):
        return ()
    if isinstance(op, Pad) and (op.value != 0 or affine.geometry.border != "zeros"):
        return ()  # a border of the picture shows the constant one too
    spatial = 2 * len(affine.geometry.kernel)
    if min(op.sides) < 0 or any(op.sides[spatial:]):
        return ()
    return op.sides[:spatial]


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


def _steps(pieces: Sequence[Link]) -> tuple[Op, ...]:
    return tuple(link for link in pieces if isinstance(link, Op))


def _shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    example = "write input_shape=(3, 32, 32), the shape of one picture without the batch dimension"
    try:
        shape = tuple(int(n) for n in input_shape)
        whole = all(int(n) == n for n in input_shape)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"input_shape: expected whole numbers, got {input_shape!r}; {example}"
        ) from None
    if not shape or min(shape) < 1 or not whole:
        raise ValueError(
            f"input_shape: expected whole numbers of at least 1, got {input_shape!r}; {example}"
        )
    return shape
