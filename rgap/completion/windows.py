"""Pools that may not tell the places of a window apart, by what each place reads of the data.

A pool gives the same for any order of the values in its window.  Where neighbouring places of a
window read entries in common, another order asks for data that agree where they overlap, and only
chance gives such; where they read none, as below a kernel of size 1 along an axis, a stride as long
as the kernel, or a dilation that keeps phases apart, what they read can change places: other data
give the same values, each isolated.  A pool over a whole axis forgets where the data are along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rgap.jacobian.frontier import Frontier
from rgap.network.affine import Affine
from rgap.network.chain import Chain
from rgap.network.pooling import LinearMap, Pool
from rgap.network.reshape import Op

__all__ = ["confused_of_chain", "confused_of_graph"]


@dataclass(frozen=True)
class Reach:
    """Which entries of the data a place reads, along each axis by itself.

    Attributes:
        offsets: from the first of them.
        jump: entries of the data from one place to the next.
    """

    offsets: tuple[frozenset[int], ...]
    jump: tuple[int, ...]

    @staticmethod
    def of_data(axes: int) -> Reach:
        """Every entry reads itself."""
        return Reach((frozenset({0}),) * axes, (1,) * axes)

    def overlaps(self, axis: int) -> bool:
        """True if neighbouring places read an entry in common."""
        own, jump = self.offsets[axis], self.jump[axis]
        return any(offset + jump in own for offset in own)

    def behind(
        self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
    ) -> Reach:
        """What windows of such places read."""
        reads = tuple(
            frozenset(o + t * d * jump for o in own for t in range(k))
            for own, jump, k, d in zip(self.offsets, self.jump, kernel, dilation, strict=True)
        )
        return Reach(reads, tuple(j * s for j, s in zip(self.jump, stride, strict=True)))

    def beside(self, other: Reach) -> Reach:
        """What a sum of two values reads."""
        pairs = zip(self.offsets, other.offsets, strict=True)
        return Reach(tuple(one | two for one, two in pairs), self.jump)


def confused_of_graph(function: Frontier, enough: int) -> str:
    """Which pool between the data and known values may not tell its places apart, or "".

    Args:
        function: the known values.
        enough: entries of a sample that are not zero, of known values that no such pool stands
            below, with which it does not matter.
    """
    nodes, first = function.flow.nodes, ""
    confused = set[int]()
    reach: dict[int, Reach | None] = {0: Reach.of_data(len(nodes[0].shape) - 1)}
    for place, node in function.between():
        inside = [reach.get(source) for source in node.sources]
        if confused & set(node.sources):
            confused.add(place)
        known = [one for one in inside if one is not None]
        joined = known[0] if len(known) == len(inside) else None
        for one in known[1:]:
            same = joined is not None and joined.jump == one.jump
            joined = joined.beside(one) if joined is not None and same else None
        if node.link is None:
            reach[place] = joined
            continue
        why, reach[place] = _through(node.link, joined, node.name)
        if why:
            first = first or why
            confused.add(place)
    clear = [place for place in function.edge if place not in confused]
    samples = range(len(function.known[function.edge[0]].value))
    if first and clear and min(function.on(row, clear) for row in samples) >= enough:
        return ""
    return first


def confused_of_chain(chain: Chain) -> str:
    """The same of all steps of a chain.

    Args:
        chain: from the data to the last layer.
    """
    steps = list[Affine | Op]()
    for stage in chain.stages:
        steps += [*stage.lead, stage.affine, *stage.tail]
    reach: Reach | None = Reach.of_data(len(chain.input_shape) - 1)
    for step in steps:
        why, reach = _through(step, reach, step.name)
        if why:
            return why
    return ""


def _through(link: Affine | Op, reach: Reach | None, name: str) -> tuple[str, Reach | None]:
    """Why a step may give the same for other data, or ""; and what its places read."""
    before, after = tuple(link.in_shape[1:]), tuple(link.out_shape[1:])
    if isinstance(link, Affine):
        if reach is None or link.geometry is None or len(before) != len(reach.jump):
            return "", None
        geometry = link.geometry
        return "", reach.behind(geometry.kernel, geometry.stride, geometry.dilation)
    if not isinstance(link, Pool | LinearMap):
        return "", reach if len(before) == len(after) else None
    kept = after if len(after) == len(before) else (1,) * len(before)
    windows = [-(-n // max(1, m)) for n, m in zip(before, kept, strict=True)]
    if isinstance(link, Pool):
        windows = [max(w, size) for w, size in zip(windows, _sizes(link, len(before)), strict=True)]
    for axis, (n, m, window) in enumerate(zip(before, kept, windows, strict=True)):
        if n == 1 or window == 1:
            continue
        if m == 1:
            return f"'{name}' ({link.kind}) forgets where the data are along axis {axis + 1}", None
        if reach is None or not reach.overlaps(axis):
            return (
                f"the places of a window of '{name}' ({link.kind}) read nothing in common along "
                f"axis {axis + 1}: what they read may change places"
            ), None
    if reach is None:
        return "", None
    stride = [max(1, n // max(1, m)) for n, m in zip(before, kept, strict=True)]
    return "", reach.behind(windows, stride, [1] * len(stride))


def _sizes(pool: Pool, axes: int) -> tuple[int, ...]:
    """Windows of a pool, 1 where it does not say them."""
    size = getattr(getattr(pool, "module", None), "kernel_size", None)
    if isinstance(size, int):
        return (size,) * axes
    return tuple(size) if isinstance(size, tuple) and len(size) == axes else (1,) * axes
