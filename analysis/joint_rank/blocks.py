"""Null space of the Jacobian of any module's update: its layers' blocks, from the head down."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from rgap.analysis.joint_rank.nullspace import RankOptions, doubted, eliminate
from rgap.jacobian.update_map import SignSketch, UpdateMap
from rgap.machine import memory
from rgap.machine.allowance import PLAIN, factorisation
from rgap.progress import Watch, silent
from rgap.solvers.limits import BASIS
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond

FORMED = 4  # matrices of the Jacobian's size that are held at a time
BELOW = 32  # times that rounding lies below the cutoff: its size is seen in one direction
STEPS = 4.0  # roundings that data are moved by to see it
SMOOTH = 1e-9  # change of an update by these, as a share of it, beyond which a unit has switched
SPARE = 64  # rows of a sketch beyond the unknowns


@dataclass(frozen=True)
class BlockNull:
    """Result of :func:`eliminate_blocks`, everything in forward order.

    Attributes:
        ranks: of the update of layer i and all above it, cumulative from the head down.
        decisions: what each block's own rank was decided from, after the blocks above.
        joint: of the whole Jacobian by its singular values; None for a sketch.
        basis: orthonormal null directions [nullity, B, *input_shape].
        spectra: singular values by name.
        notes: what the reader should know.
    """

    ranks: tuple[int, ...]
    decisions: tuple[Rank, ...]
    joint: Rank | None
    basis: Tensor
    spectra: tuple[tuple[str, Tensor], ...]
    notes: tuple[str, ...]


def eliminate_blocks(
    update: UpdateMap, options: RankOptions, *, sketch: bool, seed: int = 0
) -> BlockNull:
    """Rank layer by layer, each in its own units on what the layers above it left open.

    Args:
        update: the map whose Jacobian is meant.
        options: of every decision.
        sketch: compress layers with more equations than unknowns by random signs.
        seed: of the signs.

    Raises:
        OutOfMemory: they need more.
    """
    blocks = jacobian_blocks(update, sketch, options.memory, seed, options.watch)
    natural = _natural_sizes(update, options)
    size = update.unknowns
    open_ = _identity(size, update.inputs)
    ranks: list[int] = []
    decisions: list[Rank] = []
    spectra: list[tuple[str, Tensor]] = []
    rcond, error = options.rcond, options.noise
    for block, rows, times in reversed(list(zip(update.blocks, blocks, natural, strict=True))):
        options.ahead(factorisation(len(rows), open_.shape[1]))
        scale = times * _largest(rows)
        own = eliminate(rows @ open_, rcond=rcond, noise=error, dtype=options.dtype, scale=scale)
        own = doubted(own, scale, error if error > options.noise else 0.0)
        open_ = open_ @ own.basis
        if rcond is None and own.rank.rank:
            # The basis inherits the rounding of this decision, enlarged by its condition.
            error = max(error, BASIS * torch.finfo(torch.float64).eps * own.rank.condition)
        ranks.insert(0, size - open_.shape[1])
        decisions.insert(0, own.rank)
        spectra.insert(0, (block.layer, own.values))
    joint: Rank | None = None
    notes: list[str] = []
    if not sketch:
        total = sum(map(len, blocks))
        options.ahead(factorisation(total, size, PLAIN) + factorisation(min(total, size), size))
        joint, values, vectors = _joint(blocks, natural, size, options)
        spectra.insert(0, ("all layers", values))
        if joint.rank != ranks[0]:
            notes.append(
                f"The singular values of all layers together say {joint.rank}, layer by layer "
                f"{ranks[0]}: the cutoff lies inside the spectrum."
            )
        open_ = vectors
    basis = open_.T.reshape(-1, *update.inputs.shape).contiguous()
    return BlockNull(tuple(ranks), tuple(decisions), joint, basis, tuple(spectra), tuple(notes))


def jacobian_blocks(
    update: UpdateMap,
    sketch: bool,
    room: float = inf,
    seed: int = 0,
    watch: Watch = silent,
) -> list[Tensor]:
    """J of every layer [equations or sketched rows, unknowns], in forward order.

    Args:
        update: the map whose Jacobian is meant.
        sketch: compress layers with more equations than unknowns.
        room: bytes, for what is done with them as well.
        seed: of the signs.
        watch: told of every layer.

    Raises:
        OutOfMemory: they need more.
    """
    size = update.unknowns
    places = size + max(SPARE, size // 8)
    kept = [min(b.equations, places) if sketch else b.equations for b in update.blocks]
    memory.require(
        f"the Jacobian of {sum(kept):,} rows for {size:,} unknowns",
        FORMED * 8.0 * sum(kept) * size + update.held,
        room,
        "a smaller batch or input_shape" if sketch else "method='sketch', or a smaller batch",
    )
    out = [update.inputs.new_zeros(size, rows) for rows in kept]
    signs = [
        SignSketch(b.equations, places, seed + at) if b.equations > rows else None
        for at, (b, rows) in enumerate(zip(update.blocks, kept, strict=True))
    ]
    unit = _identity(size, update.inputs).reshape(size, *update.inputs.shape)
    for piece, products in update.chunks(unit):
        watch("columns of the Jacobian", piece.stop, size)
        parts = update.split(products)
        for target, part, sign in zip(out, parts, signs, strict=True):
            target[piece] = part if sign is None else sign(part)
    return [target.T for target in out]


def _natural_sizes(update: UpdateMap, options: RankOptions) -> list[float]:
    """What each block would measure if nothing in it cancelled, in units of its own norm; ≥ 1.

    Sums that cancel (the gradient of a bias below a normalisation that subtracts means is zero
    whatever the data) leave rounding, which has full rank.  Its share η of ``J v`` is what differs
    between ``J(v + w)`` and ``J v + J w``, and between J here and at data that are a few roundings
    away; the terms of the block were about η/ε of its norm.  In units of these it is to lie below
    the cutoff, BELOW times.
    """
    generator = torch.Generator().manual_seed(0)
    v, w = torch.randn(2, *update.inputs.shape, generator=generator, dtype=torch.float64)
    three = torch.stack([v + w, v, w]).to(update.inputs)
    both, one, other = torch.cat([products for _, products in update.chunks(three)])
    rounded = [both - one - other]
    draw = torch.randn(v.shape, generator=generator, dtype=torch.float64).to(update.inputs)
    moved = update.moved(update.inputs * (1.0 + STEPS * torch.finfo(torch.float64).eps * draw))
    before, after = update.value(update.inputs), moved.value(moved.inputs)
    if float((after - before).norm()) <= SMOOTH * float(before.norm()):  # no unit lies at its kink
        [(_, there)] = moved.chunks(three[:1])
        rounded.append(there[0] - both)
    sizes = []
    for block, *parts in zip(update.blocks, *map(update.split, (both, *rounded)), strict=True):
        size = float(parts[0].norm())
        rounding = max(float(part.norm()) for part in parts[1:]) / size if size else 0.0
        shape = (block.equations, update.unknowns)
        cutoff = resolve_rcond(options.rcond, shape, options.dtype, options.noise)
        sizes.append(max(1.0, BELOW * rounding / cutoff) if cutoff else 1.0)
    return sizes


def _joint(
    blocks: list[Tensor], natural: list[float], size: int, options: RankOptions
) -> tuple[Rank, Tensor, Tensor]:
    """Rank, singular values and null space of all rows, every layer of its natural size one."""
    pairs = [pair for pair in zip(blocks, natural, strict=True) if bool(pair[0].any())]
    scaled = [rows / (rows.norm() * times) for rows, times in pairs]
    if not scaled:
        nothing = blocks[0].new_zeros(0)
        return Rank.none(size), nothing, _identity(size, blocks[0])
    matrix = torch.cat(scaled)
    if len(matrix) > size:
        matrix = torch.linalg.qr(matrix, mode="r").R
    _, values, vh = torch.linalg.svd(matrix, full_matrices=True)
    total = sum(len(rows) for rows in blocks)
    cutoff = resolve_rcond(options.rcond, (total, size), options.dtype, options.noise)
    # Relative to what would be the largest if nothing cancelled.
    units = [_largest(rows) / float(rows.norm()) for rows, _ in pairs]
    cutoff *= max(units) / max(u / times for u, (_, times) in zip(units, pairs, strict=True))
    rank = numerical_rank(values, size, cutoff)
    return rank, values, vh[rank.rank :].T


def _largest(rows: Tensor, steps: int = 6) -> float:
    """σ_1 by power iteration; a few per cent are enough for a scale."""
    if not bool(rows.any()):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(rows.shape[1], 2, generator=generator, dtype=rows.dtype).to(rows)
    for _ in range(steps):
        v = torch.linalg.qr(rows.T @ (rows @ v)).Q
    return float(torch.linalg.matrix_norm(rows @ v, 2))


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
