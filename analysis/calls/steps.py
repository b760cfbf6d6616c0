"""Steps without weights that pass on fewer values than they are given: pools, means, selections.

From the output z of one layer (or from the batch) to the inputs of the next layers the data goes
through steps without weights.  No more values come through than fit the narrowest cut of their
graph, with every tensor as wide as it has independent entries (Menger 1927; Ford and Fulkerson
1956).  What does not fit is discarded, whatever the values are.  A side branch that only averages
(squeeze-and-excitation) discards nothing: the tensor goes on beside it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from rgap.analysis.calls.step_kinds import AFFINE, INDEPENDENT, MAXIMA, MIXES, MOVES, OFF, PLAIN
from rgap.analysis.calls.uses import Recording, Use

__all__ = ["Narrow", "always_read", "arbitrary", "head_use", "linear_reads", "narrow_steps"]


@dataclass(frozen=True)
class Narrow:
    """A place where fewer values go on than arrive.

    Attributes:
        step: what stands there: a module's path, or the name of the function.
        op: the function.
        before: entries of one sample ahead of it.
        after: independent values of one sample behind it.
        use: number of the use of a weight that it leads into; None if it leads to several, or to
            the loss.
        node: number of its first tensor in the forward.
    """

    step: str
    op: str
    before: int
    after: int
    use: int | None
    node: int

    @property
    def lost(self) -> int:
        """Values of one sample that are discarded."""
        return self.before - self.after

    @property
    def chooses(self) -> bool:
        """True for a maximum and its like, whose places are taken as known."""
        return any(word in self.op for word in MAXIMA)

    @property
    def independent(self) -> bool:
        """True if as many values go on as are counted, because none depends on the others."""
        return self.op in INDEPENDENT


def narrow_steps(recording: Recording) -> tuple[Narrow, ...]:
    """Every place where steps without weights discard, each with the tensor that loses most there.

    Args:
        recording: of a forward.

    >>> import torch
    >>> from rgap.analysis.calls.recorder import record
    >>> net = torch.nn.Sequential(
    ...     torch.nn.Conv2d(1, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    ...     torch.nn.Linear(2, 3))
    >>> found = narrow_steps(record(net, torch.rand(1, 1, 6, 6), torch.sum))
    >>> [(one.step, one.before, one.after, one.use) for one in found]
    [('1', 32, 2, 1)]
    """
    by_step: dict[tuple[str, int | None], Narrow] = {}
    values: list[int] = []
    for start, node in enumerate(recording.nodes):
        width = min(node.entries, node.rank)
        if node.inputs and node.use is None:  # an expanded tensor says nothing new
            width = min(width, sum(values[source] for source in node.inputs))
        values.append(width)
        narrow = _narrowest(recording, start, width)
        if narrow is None:
            continue
        key = (narrow.step, narrow.use)
        if key not in by_step or by_step[key].lost < narrow.lost:
            by_step[key] = narrow
    return tuple(by_step.values())


def linear_reads(recording: Recording, node: int) -> tuple[int, ...] | None:
    """Uses of weights that read a tensor through linear steps only; None if anything else does.

    Args:
        recording: of a forward.
        node: the tensor.
    """
    readers = recording.readers()
    into: dict[int, list[int]] = {}
    for number, use in enumerate(recording.uses):
        for read in use.read:
            into.setdefault(read, []).append(number)
    numbers: list[int] = []
    seen, rest = {node}, [node]
    while rest:
        place = rest.pop()
        if place == recording.output:
            return None
        numbers += into.get(place, [])
        for reader in readers[place]:
            if recording.nodes[reader].use is not None or reader in seen:
                continue
            if recording.nodes[reader].op not in AFFINE:
                return None
            seen.add(reader)
            rest.append(reader)
    return tuple(sorted(set(numbers)))


def always_read(recording: Recording, node: int) -> bool:
    """True if a way leads from a tensor to the output past steps that switch entries off (ReLU).

    Args:
        recording: of a forward.
        node: the tensor.
    """
    readers = recording.readers()
    seen, rest = {node}, [node]
    while rest:
        place = rest.pop()
        if place == recording.output:
            return True
        for reader in readers[place]:
            if recording.nodes[reader].op not in OFF and reader not in seen:
                seen.add(reader)
                rest.append(reader)
    return False


def arbitrary(recording: Recording, node: int, onto: Set[int]) -> bool:
    """True if a tensor sweeps an open set as the data do: none of it is constant or said twice.

    From the batch to the tensor there are only steps that move entries, change each by itself or
    select or average independent ones, and layers whose weights map onto their outputs.

    Args:
        recording: of a forward.
        node: the tensor.
        onto: uses whose weights map onto all of their outputs.
    """
    while node > 0:
        own = recording.nodes[node]
        if len(own.inputs) != 1:
            return False
        if own.use is not None:
            if own.use not in onto:
                return False
        elif own.op not in MOVES and not (own.op in INDEPENDENT and own.rank == own.entries):
            return False
        node = own.inputs[0]
    return node == 0


def _narrowest(recording: Recording, source: int, size: int) -> Narrow | None:
    """Minimum vertex cut between a tensor and what reads it with weights, or the output."""
    nodes, readers = recording.nodes, recording.readers()
    inside, rest = {source}, [source]
    while rest:
        for reader in readers[rest.pop()]:
            if nodes[reader].use is None and reader not in inside:
                inside.add(reader)
                rest.append(reader)
    order = sorted(inside)
    at = {node: i for i, node in enumerate(order)}
    sinks = {read: number for number, use in reversed(list(enumerate(recording.uses)))
             for read in use.read if read in inside}  # fmt: skip
    ends = [*sinks, *([recording.output] if recording.output in inside else [])]
    if not ends:
        return None
    count = len(order)
    total = 2 * count  # node i enters at i and leaves at count + i
    rows = [*range(count)]
    columns = [count + i for i in range(count)]
    limits = [size if node == source else nodes[node].rank for node in order]
    for node in order:
        for reader in readers[node]:
            if reader in at and reader != node:
                rows.append(count + at[node])
                columns.append(at[reader])
                limits.append(size)
    for end in set(ends):
        rows.append(count + at[end])
        columns.append(total)
        limits.append(size)
    graph = sparse.csr_matrix(
        (np.array(limits, dtype=np.int32), (rows, columns)), (total + 1, total + 1)
    )
    if size == 0:
        return None
    flow = csgraph.maximum_flow(graph, at[source], total)
    value = int(flow.flow_value)
    if value >= size:
        return None
    spare = (graph - flow.flow).tocsr()
    spare.data = np.maximum(spare.data, 0)
    spare.eliminate_zeros()
    reached = set(csgraph.breadth_first_order(spare, at[source], return_predecessors=False))
    cut = [node for i, node in enumerate(order) if i in reached and count + i not in reached]
    if any(_mixed(recording, node, inside) for node in cut):
        return None  # narrow because other tensors are mixed in, not because it discards
    behind, rest = set(cut), list(cut)
    while rest:
        for reader in readers[rest.pop()]:
            if reader in inside and reader not in behind:
                behind.add(reader)
                rest.append(reader)
    uses = sorted({number for read, number in sinks.items() if read in behind})
    to_loss = recording.output in behind
    names = dict.fromkeys(_name(recording, node) for node in cut)
    ops = "+".join(dict.fromkeys(nodes[node].op for node in cut))
    use = uses[0] if uses and not to_loss else None
    if use is not None and not recording.uses[use].covered:
        use = None
    return Narrow("+".join(names), ops, size, value, use, min(cut))


def _mixed(recording: Recording, node: int, inside: set[int]) -> bool:
    """True for a product with a tensor from elsewhere, and for attention."""
    own = recording.nodes[node]
    mixes = own.op in MIXES and len(own.inputs) > 1
    return mixes or any(source not in inside for source in own.inputs)


def _name(recording: Recording, node: int) -> str:
    own = recording.nodes[node]
    if own.module in recording.leaves:
        return own.module
    return {"__getitem__": "x[...]"}.get(own.op, own.op)


def head_use(recording: Recording) -> Use | None:
    """The fully connected layer whose output is what the model returns, if it is one."""
    if not recording.uses:
        return None
    use = recording.uses[-1]
    if use.kind != "linear" or use.inputs.ndim != 2:
        return None
    return use if _straight(recording, use.node) else None


def _straight(recording: Recording, node: int) -> bool:
    """True if a tensor is returned as it is, up to its shape."""
    place = recording.output
    while place > node and recording.nodes[place].op in PLAIN:
        place = recording.nodes[place].inputs[0]
    return place == node
