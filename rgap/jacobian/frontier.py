"""Values of a network as a function of the data, nearest to them, and its derivative.

The frontier is where paths from the data meet values that are known: below it nothing is, above it
the data are not needed.  Products with the Jacobian run layer by layer, for many vectors at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from rgap.jacobian.smoothing import NEIGHBOURS, rounded_kink, rounded_pool
from rgap.jacobian.smoothing import rounded as has_kinks
from rgap.limits import CLEAR, CLIENT, OWN
from rgap.network.activations import Activation
from rgap.network.activations.piecewise import PiecewiseLinear
from rgap.network.affine import Affine
from rgap.network.flow import Flow, Node
from rgap.network.pooling import MaxPool
from rgap.precision import Estimate

__all__ = ["Frontier", "Tangent", "frontier", "rounded"]


def frontier(flow: Flow, known: Mapping[int, Estimate]) -> list[int]:
    """Places of known values that a path from the data meets before any other of them.

    Empty where a path to the output meets none.
    """
    reached, edge = {0}, list[int]()
    for place in range(1, len(flow.nodes)):
        if not reached & set(flow.nodes[place].sources):
            continue
        if place in known:
            edge.append(place)
        else:
            reached.add(place)
    return [] if len(flow.nodes) - 1 in reached else edge


def rounded(flow: Flow, place: int, value: Tensor, unit: float) -> float:
    """Standard error of a value that a client computed from the data, and of our own.

    Args:
        flow: the network.
        place: of the value.
        value: as we compute it.
        unit: unit roundoff of the client's arithmetic.
    """
    own = OWN * torch.finfo(value.dtype).eps
    return (own + CLIENT * flow.depth(place) * unit) * float(value.abs().max())


class Frontier:
    """Known values as a function f of the data.

    Args:
        flow: the network.
        edge: places of the values, in order; no path to one leads through another but from below.
        known: values [B, *shape] by place, with their errors.
        unit: unit roundoff of the client's arithmetic, in which the values were computed.
    """

    def __init__(
        self, flow: Flow, edge: list[int], known: Mapping[int, Estimate], unit: float = 0.0
    ) -> None:
        self.edge, self.unit = edge, unit
        self.flow = Flow(flow.nodes[: max(edge) + 1], flow.name)
        self.needed = _needed(self.flow, edge)
        self.known = {place: known[place] for place in edge}

    def between(self) -> list[tuple[int, Node]]:
        """The values above the data up to the frontier, in forward order."""
        return [(place, self.flow.nodes[place]) for place in self.needed]

    @property
    def numbers(self) -> int:
        """Entries of all these values of one sample."""
        return sum(prod(node.shape) for _, node in self.between())

    def values(self, x: Tensor, sharp: Mapping[int, float] | None = None) -> dict[int, Tensor]:
        """All of them, by place, of data [B, *in_shape].

        Args:
            x: the data.
            sharp: by place of an activation, how sharp its kink is; others are what they are.
        """
        values, beta = {0: x}, sharp or {}
        for place, node in self.between():
            inside = [values[source] for source in node.sources]
            if place in beta and isinstance(node.link, MaxPool):
                assert isinstance(node.link.module, nn.MaxPool1d | nn.MaxPool2d)
                values[place] = rounded_pool(node.link.module, inside[0], beta[place])
            elif place in beta:
                assert isinstance(node.link, Activation)
                one = torch.ones_like(inside[0][:1])
                left, right = node.link.derivative(-one), node.link.derivative(one)
                values[place] = rounded_kink(inside[0], left, right, beta[place])
            else:
                values[place] = node.forward(inside)
        return values

    def sharpness(self, x: Tensor, beta: float) -> dict[int, float]:
        """β over the spread of what enters each step with a kink, by place; more in a pool."""
        values, sharp = self.values(x), dict[int, float]()
        for place, node in self.between():
            pool = isinstance(node.link, MaxPool) and has_kinks(node.link.module)
            if pool or (isinstance(node.link, PiecewiseLinear) and node.link.barrier is None):
                over = beta / max(float(values[node.sources[0]].std()), 1e-12)
                sharp[place] = NEIGHBOURS * over if pool else over
        return sharp

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Those of the frontier."""
        values = self.values(x)
        return [values[place] for place in self.edge]

    def to(self, dtype: torch.dtype) -> Frontier:
        """The same in other arithmetic."""
        nodes = [
            node if node.link is None else replace(node, link=node.link.to(dtype))
            for node in self.flow.nodes
        ]
        return Frontier(Flow(tuple(nodes), self.flow.name), self.edge, self.known, self.unit)

    def own(self, place: int) -> float:
        """Rounding of a value on its way up from the data: the client's, and our own."""
        return rounded(self.flow, place, self.known[place].value, self.unit)

    def sigma(self, row: int) -> list[Tensor]:
        """Standard errors of the known values of a sample, [*shape]; none below that of its map."""
        sigma = []
        for place in self.edge:
            std = self.known[place].std[row]
            least = max(self.own(place), 1e-300)
            sigma.append(torch.maximum(std, std.square().mean().sqrt()).clamp_min(least))
        return sigma

    def on(self, row: int, places: Sequence[int]) -> int:
        """Values of a sample at some places that are not zero within their errors."""
        parts = [(p, s) for p, s in zip(self.edge, self.sigma(row), strict=True) if p in places]
        return sum(int((self.known[p].value[row].abs() > CLEAR * s).sum()) for p, s in parts)

    @property
    def undifferentiated(self) -> str:
        """A step on the way that has no derivative in closed form, in words; or ""."""
        for _, node in self.between():
            link = node.link
            if link is None or isinstance(link, Activation | Affine | MaxPool):
                continue
            if not link.affine:
                return f"'{node.name}' ({link.kind})"
        return ""


class Tangent:
    """The linear map that known values are at x, in units of their errors over ``unit``.

    Args:
        function: the values.
        sigma: standard errors of each, [*shape].
        x: [1, *in_shape], in the arithmetic of the function.
        near: other data [S, *in_shape] that x may be as well: what units let through of all of
            them, the smaller slope on the two sides of a kink and nothing of a pool with a tie.

    ``unit`` is the least of the errors, so that products stay in the range of float32.
    """

    def __init__(
        self,
        function: Frontier,
        sigma: Sequence[Tensor],
        x: Tensor,
        near: Tensor | None = None,
    ) -> None:
        self.function, self.unit = function, min(float(s.min()) for s in sigma)
        self.sigma = [(s[None] / self.unit).to(x) for s in sigma]
        values = function.values(x if near is None else torch.cat([x, near]))
        self.slopes, self.winners = dict[int, Tensor](), dict[int, Tensor]()
        for place, node in function.between():
            if isinstance(node.link, Activation):
                self.slopes[place] = _least(node.link.derivative(values[node.sources[0]]))
            elif isinstance(node.link, MaxPool):
                winners = node.link.winners(values[node.sources[0]])
                self.winners[place] = winners[:1]
                self.slopes[place] = (winners == winners[:1]).all(0, keepdim=True).to(x)

    def alike(self, other: Tangent) -> bool:
        """True if all units let the same through, so that the other is this very map."""
        return all(torch.equal(slope, other.slopes[at]) for at, slope in self.slopes.items())

    def push(self, v: Tensor) -> Tensor:
        """``J v``, [S, *in_shape] → [S, m]."""
        moved = {0: v}
        for place, node in self.function.between():
            parts = [moved[source] for source in node.sources]
            if isinstance(node.link, MaxPool):
                taken = node.link.taken(parts[0], self.winners[place])
                moved[place] = taken * self.slopes[place]
            elif place in self.slopes:
                moved[place] = parts[0] * self.slopes[place]
            elif node.link is None:
                moved[place] = node.forward(parts)
            else:
                moved[place] = node.link.linear(parts[0])
        edge = zip(self.function.edge, self.sigma, strict=True)
        return torch.cat([(moved[place] / s).flatten(1) for place, s in edge], 1)

    def pull(self, r: Tensor) -> Tensor:
        """``Jᵀ r``, [S, m] → [S, *in_shape]."""
        pieces = torch.split(r, [s.numel() for s in self.sigma], 1)
        edge = zip(self.function.edge, self.sigma, pieces, strict=True)
        sent = {place: piece.reshape(-1, *s.shape[1:]) / s for place, s, piece in edge}
        for place, node in reversed(self.function.between()):
            k = sent[place]
            if isinstance(node.link, MaxPool):
                parts = [node.link.put(k * self.slopes[place], self.winners[place])]
            elif place in self.slopes:
                parts = [k * self.slopes[place]]
            elif node.link is None:
                sizes = [self.function.flow.nodes[source].shape[0] for source in node.sources]
                parts = node.spread(k, sizes)
            else:
                parts = [node.link.adjoint(k)]
            for source, part in zip(node.sources, parts, strict=True):
                sent[source] = sent[source] + part if source in sent else part
        return sent[0]


def _least(slopes: Tensor) -> Tensor:
    """Of every unit the slope of least size, [S, *shape] → [1, *shape]."""
    return slopes.gather(0, slopes.abs().argmin(0, keepdim=True))


def _needed(flow: Flow, edge: list[int]) -> list[int]:
    """Places between the data and the frontier, in forward order."""
    needed = set(edge)
    for place in reversed(range(len(flow.nodes))):
        if place in needed:
            needed |= set(flow.nodes[place].sources)
    return sorted(needed - {0})
