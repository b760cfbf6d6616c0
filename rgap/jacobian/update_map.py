"""The Jacobian of an update with respect to the data, for any module: products, blocks, sketches.

``g(x) = ∂L(f_θ(x), t)/∂θ`` at a probe batch.  Its derivative in a direction v of the data is
``J v``: forward over reverse, many directions at once.  Operations without a forward derivative
go through two reverse passes instead (:mod:`rgap.jacobian.products`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rgap import memory
from rgap.jacobian.products import GraphProducts
from rgap.network.isolation import plain_kernels
from rgap.network.running import first_line, recorded
from rgap.update.losses import Loss

log = logging.getLogger(__name__)
CHUNK_BYTES = 256e6  # of gradient directions held at once, at most
PARTS = 16  # of a budget, one of which a chunk of directions takes
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


class UpdateMap:
    """``x ↦ update`` of any module, on a float64 copy, at one batch.

    Args:
        model: in eval mode; left as it was.
        inputs: the batch [B, *input_shape]; all is computed on its device.
        targets: as the loss wants them.
        loss: of the client.
        room: bytes for everything; directions go through in chunks of a share of it.

    Raises:
        ValueError: a model without trained parameters, or whose forward or backward pass fails.

    >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).eval()
    >>> update = UpdateMap(net, torch.rand(1, 3), torch.tensor([1]), Loss())
    >>> [block.layer for block in update.blocks], update.columns(torch.eye(3)[:, None]).shape
    (['0', '2'], torch.Size([3, 14]))
    """

    def __init__(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, room: float = inf
    ) -> None:
        self.chunk_bytes = min(CHUNK_BYTES, max(room, memory.LEAST) / PARTS)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError(_nothing_trained(model))
        self._twin = copy.deepcopy(model).to(inputs.device).double()
        for module in self._twin.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self._targets, self._loss = targets.to(inputs.device), loss
        self.inputs = inputs.detach().double()
        values = {name: p.detach() for name, p in self._twin.named_parameters()}
        self._parameters = {name: p for name, p in values.items() if name in trained}
        self._rest = {name: p for name, p in values.items() if name not in trained}
        self._rest |= {name: b.detach() for name, b in self._twin.named_buffers()}
        self.blocks = self._blocks()
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
        return tuple(self._parameters[name].numel() for b in self.blocks for name in b.names)

    @property
    def chunk(self) -> int:
        """Directions that go through at once."""
        wide = max(self.equations, 8 * self.unknowns)
        return max(1, min(self.unknowns, int(self.chunk_bytes / (8.0 * wide))))

    @property
    def held(self) -> float:
        """Bytes that a chunk of directions takes on its way."""
        return 8.0 * WITHIN * self.chunk * max(self.equations, self.unknowns)

    def gradient(self, inputs: Tensor) -> dict[str, Tensor]:
        """g(x) by parameter name."""

        def value(parameters: dict[str, Tensor]) -> Tensor:
            with recorded():
                outputs = functional_call(self._twin, {**parameters, **self._rest}, (inputs,))
            return self._loss(outputs, self._targets)

        found: dict[str, Tensor] = torch.func.grad(value)(self._parameters)
        return found

    def value(self, inputs: Tensor) -> Tensor:
        """g(x) in the order of the rows, [equations]."""
        return self._stacked(self.gradient(inputs))

    def columns(self, directions: Tensor) -> Tensor:
        """J v for directions [S, B, *input_shape]: [S, equations], block by block."""
        directions = directions.to(self.inputs)
        if self.forward_mode:
            try:
                with plain_kernels(), recorded():
                    return torch.vmap(self._forward_over_reverse)(directions)
            except RuntimeError as error:
                log.info("no forward derivative (%s): two reverse passes", first_line(error))
                self.forward_mode = False
        with plain_kernels():
            at = GraphProducts(self._graph, self.inputs)
            return torch.stack([at.push(v) for v in directions]).detach()

    def rows(self, cotangents: Tensor) -> Tensor:
        """Jᵀ y for cotangents [S, equations]: [S, B, *input_shape]."""
        with plain_kernels():
            return GraphProducts(self._graph, self.inputs).pulls(cotangents).detach()

    def chunks(self, directions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`columns` in pieces that fit a moderate memory: (which directions, their products)."""
        size = min(len(directions), self.chunk)
        for start in range(0, len(directions), size):
            piece = slice(start, min(start + size, len(directions)))
            yield piece, self.columns(directions[piece])

    def _forward_over_reverse(self, direction: Tensor) -> Tensor:
        product: Tensor = torch.func.jvp(self.value, (self.inputs,), (direction,))[1]
        return product

    def _graph(self, x: Tensor) -> Tensor:
        """g(x) in the order of the rows, as part of the graph of x."""
        leaves = {name: p.clone().requires_grad_() for name, p in self._parameters.items()}
        with recorded():
            outputs = functional_call(self._twin, {**leaves, **self._rest}, (x,))
        slopes = torch.autograd.grad(
            self._loss(outputs, self._targets), list(leaves.values()),
            create_graph=True, materialize_grads=True,
        )  # fmt: skip
        return self._stacked(dict(zip(leaves, slopes, strict=True)))

    def _stacked(self, update: dict[str, Tensor]) -> Tensor:
        return torch.cat([update[name].flatten() for block in self.blocks for name in block.names])

    def _blocks(self) -> tuple[Block, ...]:
        """Layers in the order of their first call; those never called come first."""
        modules = dict(self._twin.named_modules())
        owners: dict[str, list[str]] = {}
        for name in self._parameters:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        order: list[str] = []
        for path in owners:
            modules[path].register_forward_pre_hook(lambda *_, path=path: order.append(path))
        try:
            with torch.no_grad(), plain_kernels():
                outputs = self._twin(self.inputs)
        except RuntimeError as error:
            raise ValueError(
                f"model: the forward pass of {type(self._twin).__name__} failed for inputs "
                f"{list(self.inputs.shape)}: {first_line(error)}; write the input_shape that the "
                "model was built for"
            ) from error
        finally:
            for path in owners:
                modules[path]._forward_pre_hooks.clear()
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"expected one tensor from {type(self._twin).__name__}.forward, got a "
                f"{type(outputs).__name__}; wrap it in a module whose forward returns the logits"
            )
        self._loss.check_targets(outputs, self._targets)
        called = list(dict.fromkeys(order))
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
        found = []
        for path, own in gathered.items():
            names = tuple(own)
            count = sum(prod(self._parameters[name].shape) for name in names)
            kind = type(modules[path]).__name__.lower()
            found.append(Block(path, kind, names, count))
        return tuple(found)


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
