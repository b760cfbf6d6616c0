"""The input that several layers read, from all their gradients and nothing else.

The gradient constraints ``K_j u = G_j`` of every layer j that reads u stand below each other, each
row weighed by its error; in wide layers they have full column rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, lcm, prod

import torch
from torch import Tensor

from rgap.constraints import gradient_constraint, gradient_rows, weight_constraint
from rgap.constraints.known_input import matrix_noise
from rgap.limits import APART_BY, DETERMINED, FITS, HOPELESS, MOSTLY, TRUSTED
from rgap.network.affine import Affine
from rgap.precision import Estimate, Precision
from rgap.solvers.kronecker import Factor, Kronecker, factor
from rgap.solvers.rank import Rank

__all__ = ["ROUNDS", "Contradicted", "Reader", "disagreeing", "from_gradients"]

FEW = 4  # members whose mean square over all rows of a filter is its error
ROUNDS = 12  # of leaving filters out


def disagreeing(misfits: Tensor) -> Tensor:
    """Filters that are left out together, as bool [F]: those that miss most, in standard errors."""
    return misfits > max(FITS, APART_BY * float(misfits.max()))


@dataclass(frozen=True)
class Reader:
    """A layer that reads a value.

    Attributes:
        affine: the layer.
        k: cotangent at its output, [B, *out_shape].
        unsure: entries of k that may be 0, as bool; the filters that have one say nothing.
    """

    affine: Affine
    k: Estimate
    unsure: Tensor | None = None

    @property
    def heard(self) -> Tensor:
        """1 for filters that say something, else 0, [F]."""
        silent = self.k.silent
        if self.unsure is not None:
            silent = silent | self.unsure.transpose(0, 1).flatten(1).any(1)
        return 1.0 - silent.to(self.k.value)


@dataclass(frozen=True)
class Contradicted:
    """Gradients that no input explains together.

    Attributes:
        reason: by how much, in words.
        filters: of each layer, as bool [F], those without which the others agree; empty where no
            few of them do.
    """

    reason: str
    filters: list[Tensor]


def from_gradients(
    readers: Sequence[Reader],
    gradients: Mapping[str, Tensor],
    precision: Precision,
    room: float = inf,
) -> Estimate | Contradicted | str:
    """The input that several layers read, from all their gradients, or why these leave it open.

    Args:
        readers: all layers that are heard.
        gradients: by parameter name.
        precision: of the update.
        room: bytes.
    """
    need = sum(_bytes(reader) for reader in readers)
    names = " and ".join(f"'{reader.affine.name}'" for reader in readers)
    if need > room:
        return (
            f"{names}: the equations take {need / 1e9:.1f} GB, there is room for {room / 1e9:.1f}"
        )
    stack = _Stack(readers, names, gradients, precision)
    rows, size = stack.whole.matrix.shape[1:]
    if rows < size:
        return f"{stack.names}: {rows} equations for {size} unknowns of a channel"
    solved = stack.solved(stack.heard)
    if isinstance(solved, str):
        return solved
    u, made, weights = solved
    largest, smallest = stack.extremes
    if smallest * DETERMINED <= 1.0:
        return f"{stack.names}: a direction is known to {1.0 / smallest:.1e} only"
    misfit = float(stack.misfits(u, weights).square().mean().sqrt())
    if misfit > FITS:
        why = f"{stack.names}: the gradients contradict each other by {misfit:.1e} errors"
        return Contradicted(why, stack.apart(u, weights))
    members = stack.weighed(stack.perturbed(u), weights)
    if largest <= TRUSTED * smallest:
        errors = made.precondition(made.adjoint((members, None)))
    else:
        errors = made.solve((members, None), 30, tolerance=1e-2)[0]
    return Estimate(u, stack.fold(errors).reshape(-1, *u.shape))


def _bytes(reader: Reader) -> float:
    """Of K, its weighed copy and its factor, and of all members of the right-hand side."""
    affine, k = reader.affine, reader.k
    rows = affine.weight.numel() / max(affine.weight.shape[1], 1)
    positions = len(k.value) * prod(affine.in_shape[1:])
    return 8.0 * rows * (3.0 * positions + len(k.error) * affine.in_shape[0])


def _summed(rows: Tensor, taps: Tensor) -> Tensor:
    """Sums over the rows of every filter, which has ``taps`` of them."""
    place = torch.arange(len(taps), device=taps.device).repeat_interleave(taps)
    return rows.new_zeros(len(taps)).index_add(0, place, rows)


class _Stack:
    """The gradient constraints of several layers that read one value."""

    def __init__(
        self,
        readers: Sequence[Reader],
        names: str,
        gradients: Mapping[str, Tensor],
        precision: Precision,
    ) -> None:
        first = readers[0]
        self.readers, self.precision = readers, precision
        self.names = names
        self.blocks = [gradient_constraint(r.affine, r.k.value) for r in readers]
        channels = first.affine.in_shape[0]
        groups = lcm(*(len(b.matrix) for b in self.blocks))
        each = [b.matrix.repeat_interleave(groups // len(b.matrix), 0) for b in self.blocks]
        self.whole = Kronecker(torch.cat(each, 1), channels)
        self.fold = weight_constraint(first.affine, len(first.k.value)).fold
        self.sent = self.rows([reader.affine.sent(gradients) for reader in readers])
        self.heard = torch.cat([self.by_filter(r, r.heard) for r in readers], 1)
        self.stds = list[Tensor]()
        self.extremes = (0.0, 0.0)

    def rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Gradients of all layers as right-hand sides, [..., C, rows]."""
        layers = [reader.affine for reader in self.readers]
        return torch.cat([gradient_rows(a, g) for a, g in zip(layers, parts, strict=True)], -1)

    def solved(self, heard: Tensor) -> tuple[Tensor, Factor, Tensor] | str:
        """The input by the rows that are heard, their factor, and the weights of all rows."""
        weights = heard
        for _ in range(2):  # once to see how large the errors of the rows are, once weighed by them
            made = self.factored(weights)
            if isinstance(made, str):
                return made
            main = self.weighed(self.sent, weights)
            table, _ = made.solve((main, None), tolerance=self.precision.solved)
            u = self.fold(table)
            weights = self.weights(u) * (heard > 0)
        assert isinstance(made, Factor)
        return u, made, weights

    def misfits(self, u: Tensor, weights: Tensor) -> Tensor:
        """Weighted residuals of all rows, [C, rows]."""
        own = self.rows([r.affine.weight_gradient(u, r.k.value) for r in self.readers])
        return self.weighed(self.sent - own, weights)[0]

    def apart(self, u: Tensor, weights: Tensor) -> list[Tensor]:
        """Filters of each layer without which the others agree, or [] where no few do.

        A wrong entry of a cotangent shows in the rows of its own filter.
        """
        if len(self.whole.matrix) > 1:
            return []
        taps = [reader.affine.weight[0, 0].numel() for reader in self.readers]
        counts = [len(reader.affine.weight) for reader in self.readers]
        filters, taps_of = (
            torch.tensor(numbers, device=self.sent.device).repeat_interleave(
                torch.tensor(counts, device=self.sent.device)
            )
            for numbers in (range(len(counts)), taps)
        )
        heard = self.heard.clone()
        for _ in range(ROUNDS):
            rows = self.misfits(u, weights).square().mean(0)
            each = _summed(rows, taps_of).div(taps_of.to(rows)).sqrt()
            worst = float(each.max())
            if worst <= FITS:
                gone = _summed(heard[0], taps_of) == 0
                ends = [gone[filters == j] for j in range(len(counts))]
                return [e & (r.heard > 0) for e, r in zip(ends, self.readers, strict=True)]
            agree = ~disagreeing(each)
            heard = heard * agree.to(heard).repeat_interleave(taps_of)[None]
            if float((heard > 0).sum()) < MOSTLY * float((self.heard > 0).sum()):
                return []
            again = self.solved(heard)
            if isinstance(again, str):
                return []
            u, _, weights = again
        return []

    def factored(self, weights: Tensor) -> Factor | str:
        """The normal equations, or the rank that the rows which count have."""
        made = factor(self.whole, weights, None, None)
        self.extremes = (0.0, 0.0) if made is None else self.of_one_channel(made)
        largest, smallest = self.extremes
        if made is not None and largest <= TRUSTED * smallest:
            return made
        rank = self.rank(weights)
        full = rank.nullity == 0 and rank.clear
        if made is not None and full and largest <= HOPELESS * smallest:
            return made
        condition = largest / smallest if smallest > 0 else inf
        of = f"rank {rank.rank} for {rank.size} unknowns"
        return f"{self.names}: {of}, condition {condition:.1e}"

    def of_one_channel(self, made: Factor) -> tuple[float, float]:
        """Largest and smallest singular value of the weighed matrix: all channels share it."""
        groups = len(self.whole.matrix)
        own = replace(made, gradient=replace(made.gradient, channels=groups))
        return own.extremes

    def rank(self, weights: Tensor) -> Rank:
        """That of all rows that count, against the errors of the cotangents."""
        known = zip(self.blocks, self.readers, strict=True)
        noises = [matrix_noise(block, reader.k, self.precision) for block, reader in known]
        return self.whole.scaled((weights > 0).to(weights)).rank(noise=max(noises))

    def weights(self, u: Tensor) -> Tensor:
        """One over the standard errors of the rows, those of a filter alike, [groups, rows]."""
        self.stds, parts = [], []
        for reader in self.readers:
            affine, k = reader.affine, reader.k
            squares = affine.weight_gradient(self.precision.squares(u), k.value.square())
            std = self.precision.update_std(affine.weight_name, squares)
            variance = std.square()
            for error in k.error[:FEW]:
                variance += affine.weight_gradient(u, error).square() / min(FEW, len(k.error))
            self.stds.append(std)
            own = variance.flatten(1).mean(1).sqrt().clamp_min(1e-300).reciprocal()
            parts.append(self.by_filter(reader, own * reader.heard))
        return torch.cat(parts, 1)

    def by_filter(self, reader: Reader, values: Tensor) -> Tensor:
        """A number for every filter as one for every row of K, [groups, rows]."""
        geometry = reader.affine.geometry
        groups = 1 if geometry is None else geometry.groups
        rows = values.reshape(groups, -1).repeat_interleave(reader.affine.weight[0, 0].numel(), 1)
        return rows.repeat_interleave(len(self.whole.matrix) // groups, 0)

    def weighed(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows [..., C, rows] times their weights, [S, C, rows]."""
        per_channel = weights.repeat_interleave(rows.shape[-2] // len(weights), 0)
        return (rows * per_channel).reshape(-1, *rows.shape[-2:])

    def perturbed(self, u: Tensor) -> Tensor:
        """What draws of the update's own errors and errors of k do to the rows, [S, C, rows]."""
        members = []
        for member in range(len(self.readers[0].k.error)):
            parts = []
            for reader, std in zip(self.readers, self.stds, strict=True):
                noise = self.precision.normal(std, samples=1)[0]
                parts.append(noise - reader.affine.weight_gradient(u, reader.k.error[member]))
            members.append(self.rows(parts))
        return torch.stack(members)
