"""Whether other data give the same known values: folds, mirror images, a second search."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from rgap.completion.value_settling import Settled
from rgap.jacobian.frontier import Frontier
from rgap.limits import SAFETY
from rgap.network.activations import Activation, Identity
from rgap.network.affine import Affine

__all__ = ["agreed", "folded", "mirrored", "paired"]

PARALLEL = 1e-6  # distance of two directions that weights in float32 do not tell apart
DIRECTIONS = 32  # numbers that directions are compared in
ROWS = 1024  # of a table of distances that are made at a time
ALIKE = 1e-3  # relative change of known values up to which a mirror image gives the same


def folded(function: Frontier, unknowns: int, asked: int) -> bool | str:
    """Whether other data may give the same values, by a step that maps two inputs to one output.

    Such a step on as many numbers as there are unknowns is ``|x|``: each entry has its mirror. On
    the data's image among more numbers than that, another image has to have the mirrored entries
    by chance.  ``x − 2 tanh x`` and ``|x| = 2 relu(x) − x`` are as bad with monotone functions, on
    branches that meet.

    Args:
        function: the known values.
        unknowns: numbers of a sample.
        asked: numbers that a step has to take in.

    Returns:
        True if they are to be looked for twice; why they are not unique; or False.
    """
    flow, doubted = function.flow, False
    cuts = set(flow.cuts())
    for place, node in function.between():
        link = node.link
        if not isinstance(link, Activation) or isinstance(link, Identity):
            continue
        few, [source] = prod(node.shape) < asked, node.sources
        if link.barrier is not None and few:
            return (
                f"'{node.name}' ({link.kind}) may give one output for two inputs, and takes in "
                f"{prod(node.shape)} numbers for {unknowns} unknowns: other data give the same"
            )
        alone = source in cuts and flow.users(source) == [place]
        doubted |= link.barrier is not None or (few and not alone)
    return doubted


def paired(affines: Iterable[Affine]) -> str:
    """Why a sum of several functions of one entry may give the same for two of its values; or "".

    Of ``Σ_j q_j φ(c_j u + d_j)`` with different c_j, d_j the summands are linearly independent
    functions of u.  A mirror image ``u → 2m − u`` of one entry permutes them, so that it gives the
    same where the q_j of those that change places agree: two columns of an affine map are parallel.

    Args:
        affines: between the data and what is known of them.
    """
    for affine in affines:
        if pair := _parallel(affine):
            return (
                f"'{affine.name}' weighs its inputs {pair[0]} and {pair[1]} alike, and keeps no "
                "more than their sum: other data may give the same"
            )
    return ""


def _parallel(affine: Affine) -> tuple[int, int] | None:
    """Two input channels, of one group, with the same weights up to a factor."""
    groups = 1 if affine.geometry is None else affine.geometry.groups
    parts = affine.weight.reshape(groups, -1, *affine.weight.shape[1:])  # [g, F/g, C/g, *k]
    generator = torch.Generator().manual_seed(0)
    for group, part in enumerate(parts):
        columns = part.transpose(0, 1).flatten(1)
        sizes = columns.norm(dim=1)
        index = (sizes > 0).nonzero()[:, 0]
        directions = columns[index] / sizes[index, None]
        if directions.shape[1] > DIRECTIONS:
            drawn = torch.randn(directions.shape[1], DIRECTIONS, generator=generator)
            directions = directions @ (drawn / DIRECTIONS**0.5).to(directions)
        for first in range(0, len(directions), ROWS):
            block = directions[first : first + ROWS]
            apart = torch.minimum(
                torch.cdist(block, directions, compute_mode="donot_use_mm_for_euclid_dist"),
                torch.cdist(block, -directions, compute_mode="donot_use_mm_for_euclid_dist"),
            )
            apart.diagonal(first).fill_(1.0)
            if bool((apart < PARALLEL).any()):
                row, column = (apart < PARALLEL).nonzero()[0].tolist()
                whole = group * affine.weight.shape[1]
                return whole + int(index[first + row]), whole + int(index[column])
    return None


def mirrored(function: Frontier, x: Tensor) -> str:
    """Why a mirror image of a sample, of all or of parts, gives the same known values; or "".

    A step that is even, be it one activation or several branches that meet, gives for −z what it
    gives for z: where z is linear in x, or odd, −x sends the same update.

    Args:
        function: the known values, float32.
        x: samples that give them, [B, *in_shape].
    """
    told = (_mirrored(function, x[row : row + 1]) for row in range(len(x)))
    return next((why for why in told if why), "")


def _mirrored(function: Frontier, x: Tensor) -> str:
    values = function.values(x.float())
    generator = torch.Generator().manual_seed(0)
    for place in (0, *(place for place, _ in function.between() if place not in function.edge)):
        signs = torch.randint(0, 2, values[place].shape, generator=generator) * 2.0 - 1.0
        given, moved = {**values, place: values[place] * signs.to(values[place])}, {place}
        if torch.equal(given[place], values[place]):
            continue
        for above, node in function.between():
            if above > place and moved & set(node.sources):
                given[above] = node.forward([given[source] for source in node.sources])
                moved.add(above)
        if all(torch.allclose(given[at], values[at], rtol=ALIKE, atol=0) for at in function.edge):
            return (
                f"what '{function.flow.nodes[place].name}' gives has a mirror image that gives the "
                "same: others may be the data's"
            )
    return ""


def agreed(made: Settled, again: Settled | str) -> Settled | str:
    """The data, if a second search ends at them too."""
    if isinstance(again, str):
        return (
            f"a second search does not find the data again, which may not be the only ones: {again}"
        )
    apart = (made[0].value - again[0].value).abs().flatten(1).amax(1)
    allowed = SAFETY * float(torch.maximum(made[0].std.max(), again[0].std.max()))
    row = int(apart.argmax())
    if float(apart[row]) > allowed:
        return (
            f"two batches give the known values: sample {row} of one is off that of the other by "
            f"{float(apart[row]):.2g} in an entry"
        )
    return made
