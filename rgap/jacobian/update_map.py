"""The Jacobian of an update with respect to the data, for any module: products, blocks, sketches.

The derivative of g (:mod:`rgap.jacobian.module_gradient`) in a direction v of the data is ``J v``:
forward over reverse, many directions at once.  Operations without a forward derivative go through
two reverse passes instead (:mod:`rgap.jacobian.products`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from rgap.jacobian.module_gradient import ClientLoss, ModuleGradient
from rgap.machine import memory
from rgap.machine.allowance import OutOfTime
from rgap.network.isolation import bare_copy, plain_kernels
from rgap.network.running import first_line
from rgap.network.watching import watched
from rgap.update.losses import Loss

log = logging.getLogger(__name__)
CHUNK_BYTES = 256e6  # of gradient directions held at once, at most
PARTS = 16  # of a budget, one of which a chunk of directions takes
GROWTH = 4  # times that a chunk is larger than the one before, at most, where time is limited
WITHIN = 4  # chunks that are held at a time on the way
SIGNS = 8  # entries per row of the sparse sign embedding


@dataclass(frozen=True)
class Block:
    """The rows of the Jacobian that one layer's parameters make.

    Attributes:
        layer: module path.
        kind: class of the module, lower case, as `rgap.analysis.audit` names layers.
        names: its parameters that are trained.
        equations: number of their entries.
    """

    layer: str
    kind: str
    names: tuple[str, ...]
    equations: int


class UpdateMap(ModuleGradient):
    """The update of any module at one batch: its Jacobian, and what each layer adds to it.

    Its rows are those of the blocks, one layer after the other.

    Args:
        model: left as it was, a float64 copy without its hooks does the work; batch norms in train
            mode take the statistics of the batch, which are differentiated.
        inputs: the batch [B, *input_shape]; all is computed on its device.
        targets: as the loss wants them.
        loss: of the client.
        room: bytes for everything; directions go through in chunks of a share of it.
        seconds: that a chunk may take, told from the one before; the first is one direction.

    Raises:
        ValueError: a model without trained parameters, or whose forward or backward pass fails.

    >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).eval()
    >>> update = UpdateMap(net, torch.rand(1, 3), torch.tensor([1]), Loss())
    >>> [block.layer for block in update.blocks], update.columns(torch.eye(3)[:, None]).shape
    (['0', '2'], torch.Size([3, 14]))
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        loss: Loss,
        room: float = inf,
        seconds: float = inf,
    ) -> None:
        self.chunk_seconds = seconds
        self.chunk_bytes = min(CHUNK_BYTES, max(room, memory.LEAST) / PARTS)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError(_nothing_trained(model))
        self.inputs = inputs.detach().double()
        source = ClientLoss(loss, targets.to(inputs.device))
        super().__init__(bare_copy(model, inputs.device), source, trained)
        self.blocks = self._blocks(source)
        self.parameters = {n: self.parameters[n] for block in self.blocks for n in block.names}
        self.forward_mode = True

    @property
    def unknowns(self) -> int:
        """B·n: entries of the batch."""
        return self.inputs.numel()

    @property
    def equations(self) -> int:
        """Entries of the update."""
        return sum(block.equations for block in self.blocks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each tensor of the update, in the order of the rows."""
        return tuple(p.numel() for p in self.parameters.values())

    @property
    def chunk(self) -> int:
        """Directions that go through at once."""
        wide = max(self.equations, 8 * self.unknowns)
        return max(1, min(self.unknowns, int(self.chunk_bytes / (8.0 * wide))))

    @property
    def held(self) -> float:
        """Bytes that a chunk of directions takes on its way."""
        return 8.0 * WITHIN * self.chunk * max(self.equations, self.unknowns)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Vectors of all rows [..., equations] by block."""
        return torch.split(rows, [b.equations for b in self.blocks], -1)

    def moved(self, inputs: Tensor) -> UpdateMap:
        """The same map at another batch."""
        other = copy(self)
        other.inputs = inputs
        return other

    def value(self, inputs: Tensor) -> Tensor:
        """:meth:`rows` by function transforms, which can be batched and differentiated forwards."""
        return torch.cat([g.flatten() for g in self.gradient(inputs, graph=False)[0].values()])

    def columns(self, directions: Tensor) -> Tensor:
        """J v for directions [S, B, *input_shape]: [S, equations], block by block."""
        directions = directions.to(self.inputs)
        if self.forward_mode:
            try:
                return torch.vmap(self._forward_over_reverse)(directions)
            except OutOfTime:
                raise
            except (RuntimeError, ValueError) as error:  # ValueError: raised by the forward itself
                log.info("no forward derivative (%s): two reverse passes", first_line(error))
                self.forward_mode = False
        with plain_kernels():
            at = self.at(self.inputs)
            return torch.stack([at.push(v) for v in directions]).detach()

    def pulls(self, cotangents: Tensor) -> Tensor:
        """Jᵀ y for cotangents [S, equations]: [S, B, *input_shape]."""
        with plain_kernels():
            return self.at(self.inputs).pulls(cotangents).detach()

    def chunks(self, directions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`columns` in pieces that fit a moderate memory: (which directions, their products)."""
        for piece in self.pieces(len(directions)):
            yield piece, self.columns(directions[piece])

    def pieces(self, count: int, most: int | None = None) -> Iterator[slice]:
        """Which of many directions go through at once: as many as fit the memory and the time.

        Args:
            count: of the directions.
            most: at once; None for no bound of its own.
        """
        most = self.chunk if most is None else min(most, self.chunk)
        limited, start = self.chunk_seconds < inf, 0
        size = 1 if limited else most
        while start < count:
            piece = slice(start, min(start + size, count))
            began = time.perf_counter()
            yield piece
            if limited:
                each = (time.perf_counter() - began) / (piece.stop - start)
                fit = int(self.chunk_seconds / each) if each > 0 else most
                size = max(1, min(GROWTH * size, fit, most))
            start = piece.stop

    def _forward_over_reverse(self, direction: Tensor) -> Tensor:
        product: Tensor = torch.func.jvp(self.value, (self.inputs,), (direction,))[1]
        return product

    def _blocks(self, source: ClientLoss) -> tuple[Block, ...]:
        """Layers in the order of their first call; those never called come first."""
        modules = dict(self.model.named_modules())
        owners: dict[str, list[str]] = {}
        for name in self.parameters:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        called: dict[str, None] = {}  # in the order of their first call
        layers = {path: modules[path] for path in owners}
        with torch.no_grad(), watched(layers, lambda call: called.setdefault(call.name)):
            outputs = self.run(self.inputs)
        source.loss.check_targets(outputs, source.targets)
        gathered = {path: list(owners[path]) for path in called}
        lost: list[str] = []
        for path, own in owners.items():
            if path in gathered:
                continue
            above = path  # read by a module further up, as attention reads its projection
            while above and above not in called:
                above = above.rpartition(".")[0]
            if above in called:
                gathered[above] += own
            else:
                lost.append(path)
        for path in lost:
            gathered = {path: list(owners[path]), **gathered}
        blocks = []
        for path, own in gathered.items():
            names = tuple(own)
            count = sum(self.parameters[name].numel() for name in names)
            kind = type(modules[path]).__name__.lower()
            blocks.append(Block(path, kind, names, count))
        return tuple(blocks)


class SignSketch:
    """Sparse random signs ``S [d, p]`` that keep the rank of what they multiply, almost surely.

    Every row of the p is added with random signs to eight of the d places (Nelson and Nguyen 2013),
    so ``S A`` costs eight additions per entry of A; for d above the rank it keeps the rank with
    probability close to 1, and never raises it.

    Args:
        rows: p.
        places: d.
        seed: of the signs.
    """

    def __init__(self, rows: int, places: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.places = places
        self._at = torch.randint(places, (SIGNS, rows), generator=generator)
        self._signs = torch.randint(2, (SIGNS, rows), generator=generator).double() * 2 - 1

    def __call__(self, products: Tensor) -> Tensor:
        """[S, p] → [S, d]."""
        out = products.new_zeros(len(products), self.places)
        for at, signs in zip(self._at, self._signs, strict=True):
            own = products * signs.to(products)
            out.index_add_(1, at.to(products.device), own)
        return out


def _nothing_trained(model: nn.Module) -> str:
    kind = type(model).__name__
    if not list(model.parameters()):
        return (
            f"model: {kind} has no parameters, so its update says nothing; write "
            "identifiability(network, ...) with the network that was trained"
        )
    return (
        f"model: every parameter of {kind} is frozen (requires_grad=False), so its update says "
        "nothing; write model.requires_grad_(True) for the parameters that the client trained"
    )
