"""Which entries of its windows a max-pool took, where shifts do not tell positions apart.

With v the pool's output and κ the cotangent there, both known, and x the input of the convolution
below,

    v = Σ_window π z,    z = W x + b,    ∂L/∂W = Σ_b Σ_p k_bp x_bpᵀ,    k = π κ,

π the winners of every window, 0 and 1.  These are equations for x alone, since z says who wins, and
once that is settled the last is linear, with F·kh·kw rows for B·H·W unknowns of a channel.  With a
sharpness β, π = softmax(β z/s) in every window, s the spread of z, and x follows from blunt to
sharp.  The slope of π is no part of k: what the client sent has none.  Then winners are what they
are: x by least squares, every filter weighed by what it missed before, winners by x, until none
changes.

Source: deterministic annealing is Rose, Gurewitz and Fox (1990); the equations for x are ours.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rgap.constraints import gradient_constraint, gradient_rows
from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.pooling import MaxPool
from rgap.network.reshape import Op
from rgap.precision import Estimate
from rgap.recursion.steps_above import StepsAbove
from rgap.separation.shifts.confirmed import confirmed, short_of
from rgap.solvers.lbfgs import HISTORY, lowered
from rgap.solvers.nonnegative import nonnegative_least

__all__ = ["Above", "Missed", "bytes_of", "winners_of"]

SHARP = 128.0  # the last sharpness, over the spread of z
# The first sharpness, levels, and steps of L-BFGS at each: fast, then slow.
PACES = (2.0, 12, 30), (1.0, 24, 60)
RIDGE = 1e-2  # of the start, for which all entries of a window share its cotangent
NEGATIVE = 10.0  # weight of what lies below 0 in an input that has no such entries
ROUNDS = 40  # of winners and least squares in turn
HELD = 6  # matrices of the size of K at a time: of two candidates, weighed, and its factors
FEW = 2.0  # equations an unknown, below which a wrong winner hides among them
CALM = 0.03  # share of windows whose winner a level changes, from which on least squares tell
FALLS = 0.97  # of the lowest misfit so far, above which a level has not lowered it
STOPS = 3  # levels in a row that have not
STILL = 1e-7  # share of x by which a round moves it at the end
LEAST = 1e-12  # share of its gradient that a filter misses at least, as a weight sees it


@dataclass(frozen=True)
class Above:
    """What is known above a convolution.

    Attributes:
        value: the output v of the pool, [B, F, *windows].
        cotangent: κ there.
        on: windows that let something through, as bool; v is at most 0 in the others, below a
            rectifier.
    """

    value: Tensor
    cotangent: Tensor
    on: Tensor

    def to(self, dtype: torch.dtype) -> Above:
        """The same in other arithmetic."""
        return Above(self.value.to(dtype), self.cotangent.to(dtype), self.on)


class Missed(NamedTuple):
    """Winners that no gradient confirms.

    Attributes:
        reason: why, in words.
        near: where the search ended, the input of the convolution or not quite.
    """

    reason: str
    near: Tensor


class _Windows:
    """The windows of a pool without overlap, as numbers of the places of its input."""

    def __init__(self, pool: MaxPool, device: torch.device) -> None:
        channels, *space = pool.out_shape
        self.count = prod(space)
        number = torch.arange(self.count, dtype=torch.float64, device=device) + 1.0
        ids = pool.spread(number.reshape(1, 1, *space).expand(1, channels, *space))[0, 0].flatten()
        # Places that no window reads have one of their own, the last.
        self.ids = torch.where(ids > 0, ids - 1, self.count).round().long()
        self.space = pool.in_shape[1:]

    def sums(self, z: Tensor) -> Tensor:
        """Over every window, [B, F, windows + 1]."""
        flat = z.flatten(2)
        empty = flat.new_zeros(*flat.shape[:2], self.count + 1)
        return empty.index_add(2, self.ids, flat)

    def spread(self, of: Tensor) -> Tensor:
        """A number of every window at all of its places, [B, F, *space]."""
        whole = F.pad(of.flatten(2), (0, self.count + 1 - prod(of.shape[2:])))
        return whole[..., self.ids].reshape(*of.shape[:2], *self.space)

    def shares(self, z: Tensor, beta: float) -> Tensor:
        """Softmax of βz in every window, at its places."""
        highest = z.new_full((*z.shape[:2], self.count + 1), -inf)
        ids = self.ids.expand(*z.shape[:2], -1)
        highest = highest.scatter_reduce(2, ids, z.detach().flatten(2), "amax")
        powers = torch.exp(beta * (z - self.spread(highest)))
        return powers / self.spread(self.sums(powers)).clamp_min(1e-30)


class _Winners:
    """The equations for the input of one convolution.

    Args:
        affine: the convolution, without groups.
        gradient: its own, float64.
        steps: from it up to the pool.
        above: what is known there.
    """

    def __init__(self, affine: Affine, gradient: Tensor, steps: StepsAbove, above: Above) -> None:
        assert steps.pool is not None
        self.pool, self.above, self.kept = steps.pool, above, steps.kept
        links = [node.link for node in steps.path]
        self.between = [
            link for link in links[: links.index(steps.pool)] if isinstance(link, Op)
            and not isinstance(link, Activation)
        ]  # fmt: skip
        self.windows = _Windows(steps.pool, affine.weight.device)
        self.affine, self.gradient = affine, gradient
        self.rows = gradient_rows(affine, gradient).T  # [rows, C]

    def to(self, dtype: torch.dtype) -> _Winners:
        """The same in other arithmetic."""
        other = copy.copy(self)
        other.affine, other.gradient = self.affine.to(dtype), self.gradient.to(dtype)
        other.between = [link.to(dtype) for link in self.between]
        other.above = self.above.to(dtype)
        return other

    def entering(self, x: Tensor) -> Tensor:
        """What the pool's windows are of, where no rectifier on the way turns any of it off."""
        z = self.affine.forward(x)
        for link in self.between:
            z = link.forward(z)
        return z

    def cotangent(self, shares: Tensor) -> Tensor:
        """At the convolution's output, with shares of every window, [B, F, *out]."""
        k = shares * self.windows.spread(self.above.cotangent * self.above.on)
        for link in reversed(self.between):
            k = link.adjoint(k)
        return k

    def misfit(self, x: Tensor, beta: float) -> Tensor:
        """Of values and of the gradient, relative, with kinks of sharpness β over the spread."""
        z, above = self.entering(x), self.above
        shares = self.windows.shares(z, beta)
        v = self.windows.sums(shares * z)[..., : self.windows.count].reshape(above.value.shape)
        gap = torch.where(above.on, v - above.value, F.relu(v)).square().flatten(1).sum(1)
        sizes = above.value.square().flatten(1).sum(1).clamp_min(1e-30)
        sent = self.affine.weight_gradient(x, self.cotangent(shares))
        missed = (sent - self.gradient).square().sum() / self.gradient.square().sum()
        total = (gap / sizes).mean() + missed
        if self.kept:
            size = x.detach().square().sum().clamp_min(1e-30)
            total = total + NEGATIVE * F.relu(-x).square().sum() / size
        return total

    def start(self) -> Tensor:
        """The input if all entries of a window had their share of its cotangent."""
        even = self.windows.shares(torch.zeros_like(self.windows.spread(self.above.value)), 0.0)
        matrix = gradient_constraint(self.affine, self.cotangent(even)).matrix[0]
        size = float(matrix.square().sum(0).mean()) ** 0.5
        ridge = RIDGE**0.5 * size * torch.eye(matrix.shape[1]).to(matrix)
        x = self.folded(_least(torch.cat([matrix, ridge]), F.pad(self.rows, (0, 0, 0, len(ridge)))))
        return x.clamp_min(0.0) if self.kept else x

    def folded(self, table: Tensor) -> Tensor:
        """Unknowns [B·positions, C] as samples."""
        channels, *space = self.affine.in_shape
        return (
            table.reshape(-1, prod(space), channels).transpose(1, 2).reshape(-1, channels, *space)
        )

    def annealed(
        self, blunt: float, levels: int, steps: int, deadline: float
    ) -> Iterator[tuple[Tensor, bool]]:
        """Inputs where blunt windows lead, sharpened level by level, float32.

        Those of which a level changed few winners, and the last.  Ends before the last level where
        the misfit no longer falls, since what is sharper then only keeps winners that are wrong.

        Args:
            blunt: the first sharpness, over the spread of z.
            levels: of sharpness.
            steps: of L-BFGS at each.
            deadline: of ``time.perf_counter``, after which it ends.

        Yields:
            The input, and if it is the last.
        """
        rough, x = self.to(torch.float32), self.start().float()
        won, lowest, still = rough.winning(x), inf, 0
        for level in range(levels):
            beta = blunt * (SHARP / blunt) ** (level / (levels - 1))
            misfit = partial(rough.misfit, beta=beta / max(float(rough.entering(x).std()), 1e-30))
            x = lowered(x, steps, misfit, deadline)
            before, won, reached = won, rough.winning(x), float(misfit(x))
            still = still + 1 if reached > FALLS * lowest else 0
            lowest = min(lowest, reached)
            last = still == STOPS or level + 1 == levels or time.perf_counter() > deadline
            if last or float((won != before).sum()) <= 2.0 * CALM * float(won.sum()):
                yield x.double(), last
            if last:
                return

    def winning(self, x: Tensor) -> Tensor:
        """1 at the places that win, else 0."""
        return self.pool.winning(self.entering(x)).to(x)

    def settled(self, x: Tensor) -> tuple[Tensor, bool]:
        """Winners by least squares from an input near the one that is looked for.

        Returns:
            The winners, and if they no longer change.
        """
        won, table = self.winning(x), x.flatten(2).transpose(1, 2).flatten(0, 1)
        matrix = self.matrix(won)
        for _ in range(ROUNDS):
            again = self.winning(self.folded(table))
            other = self.matrix(again)
            # Of entries that are nearly equal the gradient of their filter says which has won.
            nearer = self.missed(other, table) < self.missed(matrix, table)
            settled = bool((again == won).transpose(0, 1).flatten(1).all(1)[nearer].all())
            won = torch.where(nearer.reshape(1, -1, *[1] * (won.ndim - 2)), again, won)
            matrix = torch.where(nearer.repeat_interleave(self.taps)[:, None], other, matrix)
            weights = self.trust(self.missed(matrix, table)).repeat_interleave(self.taps)[:, None]
            before, table = table, self.least(weights * matrix, weights * self.rows, table)
            if not bool(table.isfinite().all()):
                break  # filters that are left leave some of x open
            if settled and float((table - before).norm()) <= STILL * float(table.norm()):
                return won, True
        return won, False

    def least(self, matrix: Tensor, rhs: Tensor, start: Tensor) -> Tensor:
        """Least squares; where equations are few, entries that are not negative count as such."""
        if self.kept and len(matrix) < FEW * matrix.shape[1]:
            return nonnegative_least(matrix, rhs, start)
        return _least(matrix, rhs)

    @property
    def taps(self) -> int:
        """Rows of a filter."""
        return len(self.rows) // len(self.gradient)

    def matrix(self, won: Tensor) -> Tensor:
        """K of the gradient constraint with winners, [rows, B·positions]."""
        return gradient_constraint(self.affine, self.cotangent(won)).matrix[0]

    def missed(self, matrix: Tensor, table: Tensor) -> Tensor:
        """What each filter misses of its gradient, [F]."""
        squares = (self.rows - matrix @ table).square().sum(1)
        return squares.reshape(-1, self.taps).sum(1).sqrt()

    def trust(self, missed: Tensor) -> Tensor:
        """One over what each filter misses, [F]; 0 where it has no gradient."""
        sent = self.rows.square().sum(1).reshape(-1, self.taps).sum(1).sqrt()
        own = torch.where(sent > 0, 1.0 / missed.maximum(LEAST * sent), 0.0)
        return own / own.max()


def bytes_of(affine: Affine, batch: int) -> float:
    """Of the search: K, weighed and factored, and the steps that L-BFGS remembers."""
    unknowns = batch * prod(affine.in_shape[1:])
    rows = affine.weight[:, 0].numel()
    return 8.0 * HELD * rows * unknowns + 4.0 * 2 * HISTORY * unknowns * affine.in_shape[0]


def winners_of(
    affine: Affine,
    gradient: Tensor,
    k: Estimate,
    steps: StepsAbove,
    above: Above,
    noise: float,
    deadline: float = inf,
) -> Tensor | Missed | str:
    """What a max-pool and the rectifiers beside it let through, 0 and 1 [B, F, *out], or why not.

    Args:
        affine: the convolution below them, without groups.
        gradient: its own, float64.
        k: the cotangent above the steps, at the convolution's output.
        steps: from it up to the pool, maps channel by channel.
        above: the pool's output and the cotangent there.
        noise: standard error of an entry of the gradient.
        deadline: of ``time.perf_counter``, after which none are told.
    """
    links = [node.link for node in steps.path]
    if steps.fault or not steps.alone or steps.pool is None or not steps.pool.disjoint:
        return steps.fault or "no pool of windows without overlap"
    if short := short_of(affine, gradient, k.value):
        return short
    for link in links:
        one_sided = isinstance(link, Activation) and link.one_sided
        below = links.index(link) < links.index(steps.pool)
        scaled = below and isinstance(link, Op) and link.affine
        if link is not steps.pool and not one_sided and not scaled:
            return f"'{link.name if link else ''}' stands between '{affine.name}' and the pool"
    equations = _Winners(affine, gradient, steps, above)
    error, missed = float(k.std.square().mean().sqrt()), list[Missed]()
    few = affine.weight[:, 0].numel() < FEW * len(above.value) * prod(affine.in_shape[1:])
    for pace in PACES[few:]:
        for x, last in equations.annealed(*pace, deadline):
            if time.perf_counter() > deadline:
                return f"the time was up in the search for what a pool above '{affine.name}' took"
            if not bool(x.isfinite().all()):
                return f"'{affine.name}': the search for winners overflows"
            won, still = equations.settled(x)
            if not (still or last):
                continue
            told = won * equations.windows.spread(above.on.to(won))
            open_, through = told > 0, steps.through
            met = confirmed(affine, gradient, open_, k.value, noise, error, through, steps.unit)
            if not isinstance(met, str):
                return told
            missed.append(Missed(met, x))
    return missed[-1]


def _least(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Least squares of full column rank."""
    q, r = torch.linalg.qr(matrix)
    x: Tensor = torch.linalg.solve_triangular(r, q.T @ rhs, upper=True)
    return x
