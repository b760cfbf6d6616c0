"""The Fisher information of a noisy update about the batch, and its inverse's diagonal.

``F = Aᵀ A / v`` with ``A = √w · clip'(g) · J``: the Jacobian of the update after the defences, its
rows weighed by what noise leaves of them.  From the singular values of A where it fits, from the
matrix ``Aᵀ A`` where only that fits, from sampled noise sent through least squares otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import inf

import torch
from torch import Tensor

from rgap.analysis.noise_bound.channel import Channel
from rgap.jacobian.update_map import UpdateMap
from rgap.machine import memory
from rgap.machine.allowance import PLAIN, SYMMETRIC, Timed, factorisation
from rgap.progress import Watch, silent
from rgap.solvers.conjugate import cgls
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond

HELD = 4  # matrices of the size of A that are held at a time
FORMED = 4096  # unknowns up to which a matrix of that size is formed
PIECE = 64  # directions at once where only AᵀA is formed


@dataclass(frozen=True)
class Information:
    """What A says about the batch.

    Attributes:
        variance: diagonal of ``(AᵀA)⁺``, ``[B, *input_shape]``: error at unit variance.
        share: share of every entry's unit vector that is identifiable, same shape.
        rank: of A; None for ``"sampled"``, which does not see it.
        values: singular values of A, descending; empty for ``"sampled"``.
        sampling: relative standard error of the sum of ``variance``; 0 where it was computed.
        notes: what the reader should know.
    """

    variance: Tensor
    share: Tensor
    rank: Rank | None
    values: Tensor
    sampling: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class WeighedJacobian:
    """A = Σ^{-1/2} J of an update under its channel: products with A and Aᵀ, and A itself."""

    update: UpdateMap
    channel: Channel

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of A."""
        return self.update.equations, self.update.unknowns

    def columns(self, directions: Tensor) -> Tensor:
        """A v for directions [S, B, *input_shape]: [S, equations]."""
        root = self.channel.weights.sqrt()
        if self.channel.parts == 1:
            return self.channel.clipped(self.update.columns(directions), 0) * root
        total = directions.new_zeros(len(directions), self.update.equations)
        for b in range(self.channel.parts):
            alone = torch.zeros_like(directions)
            alone[:, b] = directions[:, b]
            if bool(alone.any()):
                total += self.channel.clipped(self.update.columns(alone), b)
        return total * root

    def rows(self, cotangents: Tensor) -> Tensor:
        """Aᵀ y for cotangents [S, equations]: [S, B, *input_shape]."""
        weighed = cotangents * self.channel.weights.sqrt()
        if self.channel.parts == 1:
            return self.update.pulls(self.channel.clipped(weighed, 0))
        parts = [
            self.update.pulls(self.channel.clipped(weighed, b))[:, b]
            for b in range(self.channel.parts)
        ]
        return torch.stack(parts, 1)

    def matrix(self, watch: Watch = silent) -> Tensor:
        """A without the rows that are not sent, [≤ equations, unknowns]."""
        rows, size = self.shape
        table = self.update.inputs.new_empty(size, rows)
        for piece, directions in _units(self):
            watch("columns of the Jacobian", piece.stop, size)
            table[piece] = self.columns(directions)
        return table.T[self.channel.weights > 0]


def information(
    sent: WeighedJacobian,
    method: str,
    *,
    room: float,
    samples: int,
    iterations: int,
    seed: int,
    show: Timed,
) -> tuple[str, Information]:
    """The information by the method asked for, or by the first that fits.

    Args:
        sent: A and Aᵀ as products.
        method: "auto", "dense", "normal" or "sampled".
        room: bytes.
        samples: of noise, for "sampled".
        iterations: of its least squares, at most.
        seed: of its noise.
        show: told of every piece of work, and asked before every factorisation for time.

    Returns:
        The method that was taken, and the :class:`Information`.

    Raises:
        OutOfMemory: a method that needs more than ``room`` bytes.
    """
    rows, size = sent.shape
    matrices = {
        "dense": size * (HELD * rows + 4 * size),
        "normal": size * HELD * size,
        "sampled": samples * HELD * (rows + size),
    }
    need = {route: 8.0 * entries + sent.update.held for route, entries in matrices.items()}
    if method == "auto":
        small = size <= FORMED
        formed = [route for route in ("dense", "normal") if small and need[route] <= room]
        method = formed[0] if formed else "sampled"
    memory.require(
        f"the information of {rows:,} equations for {size:,} unknowns, method={method!r},",
        need[method],
        room,
        "fewer samples" if method == "sampled" else "method='sampled', or a smaller input_shape",
    )
    if method == "dense":
        show.ahead(factorisation(rows, size, PLAIN) + factorisation(min(rows, size), size))
        return method, _dense(sent, show.stage)
    if method == "normal":
        show.ahead(factorisation(size, size, SYMMETRIC))
        return method, _normal(sent, show.stage)
    return method, _sampled(sent, samples, iterations, seed, show.stage)


def _dense(sent: WeighedJacobian, watch: Watch) -> Information:
    rows, size = sent.shape
    matrix = sent.matrix(watch)
    if len(matrix) > size:
        matrix = torch.linalg.qr(matrix, mode="r").R
    _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
    rank = numerical_rank(values, size, resolve_rcond(None, (rows, size)))
    return _from_spectrum(sent, values, vectors, rank, ())


def _normal(sent: WeighedJacobian, watch: Watch) -> Information:
    rows, size = sent.shape
    square = sent.update.inputs.new_empty(size, size)
    for piece, directions in _units(sent):
        watch("rows of the information", piece.stop, size)
        square[piece] = sent.rows(sent.columns(directions)).flatten(1)
    squares, vectors = torch.linalg.eigh((square + square.T) / 2)
    values = squares.flip(0).clamp_min(0).sqrt()
    # Forming AᵀA squares the condition: its rounding hides what is below the root of eps.
    rcond = resolve_rcond(None, (rows, size)) ** 0.5
    rank = numerical_rank(values, size, rcond)
    note = (
        f"From AᵀA, in which singular values below {rcond:.0e} of the largest are not told from "
        "zero."
    )
    return _from_spectrum(sent, values, vectors.flip(1).T, rank, (note,))


def _from_spectrum(
    sent: WeighedJacobian, values: Tensor, vectors: Tensor, rank: Rank, notes: tuple[str, ...]
) -> Information:
    kept = vectors[: rank.rank]
    shape = sent.update.inputs.shape
    variance = (kept / values[: rank.rank, None]).square().sum(0)
    share = kept.square().sum(0).clamp_max(1.0)
    if rank.nullity == 0:
        share = torch.ones_like(share)
    return Information(variance.reshape(shape), share.reshape(shape), rank, values, 0.0, notes)


def _sampled(
    sent: WeighedJacobian, samples: int, iterations: int, seed: int, watch: Watch
) -> Information:
    """``A⁺ e`` for sampled unit noise e: its mean square is the diagonal of ``(AᵀA)⁺``."""
    rows = sent.update.equations
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, rows, generator=generator, dtype=torch.float64)
    drawn = drawn.to(sent.update.inputs)
    done = count(1)

    def columns(directions: Tensor) -> Tensor:
        watch("least squares", next(done), iterations)
        return sent.columns(directions)

    answer = cgls(columns, sent.rows, drawn, iterations)
    squares = answer.x.square()
    each = squares.flatten(1).sum(1)
    error = float(each.std() / samples**0.5 / each.mean()) if samples > 1 and each.any() else inf
    notes = [
        f"From {samples} samples of noise sent through least squares: the total error is known to "
        f"±{error:.0%} (one standard error), that of one entry to ±{(2 / samples) ** 0.5:.0%}. "
        "Directions that the update does not fix are not seen by this method."
    ]
    if not answer.converged:
        notes.append(
            f"The solves stopped after {answer.iterations} iterations: directions that were not "
            "reached are missing, so the predicted error is too small."
        )
    mean = squares.mean(0)
    empty = sent.update.inputs.new_zeros(0)
    return Information(mean, torch.ones_like(mean), None, empty, error, tuple(notes))


def _units(sent: WeighedJacobian) -> Iterator[tuple[slice, Tensor]]:
    """Unit directions in pieces of moderate memory."""
    size, like = sent.update.unknowns, sent.update.inputs
    eye = torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *like.shape)
    for piece in sent.update.pieces(size, PIECE):
        yield piece, eye[piece]
