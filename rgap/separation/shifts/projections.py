"""What steps above a convolution let through, where its positions outnumber its filters.

Each entry of the cotangent K is that above the steps or 0, and of a window of a max-pool one entry
is not.  With K known ``G = K ⋆ X`` is linear in X, with X known in K; of the two in turn, K taken
to the nearest that the steps allow (Π),

    X ← argmin ‖G − K ⋆ X‖² + λ‖X − X₀‖²,
    K ← Π argmin ‖G − K ⋆ X‖² + λ‖K − K₀‖²,

from the mean of what is allowed.  A padded 3×3 kernel has 9C equations a filter and 9F a channel
for BHW unknowns of each, where shifts ask for ``BHW ≤ F`` and ``BHW(1 + 1/H) < 6C``
(``largest_batch`` of :mod:`rgap.separation.shifts.arrangement`).  That they end at the answer is
no theorem: the end is accepted if every filter meets G to its error, with enough equations beyond
the unknowns to say something, and if forward from X the steps let through what K says
(:mod:`rgap.separation.shifts.confirmed`).

Source: for signals of a finite alphabet, Talwar, Viberg and Paulraj's (1996) iterative least
squares with projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rgap.constraints import gradient_constraint, gradient_rows, weight_constraint
from rgap.network.affine import Affine
from rgap.separation.batch import Unseparated
from rgap.separation.shifts.confirmed import Through, confirmed, short_of
from rgap.separation.shifts.positions import shown

__all__ = ["Projected", "Through", "masks_by_projection"]

ITERATIONS, PATIENCE = 80, 25  # at most; without a smaller misfit
RIDGE = 1e-5  # λ over the mean eigenvalue of the normal equations
SETTLED = 1e-3  # relative misfit from which a K that stays is solved for once more, without λ


@dataclass(frozen=True)
class Projected:
    """What is let through, and the input of the convolution.

    Attributes:
        open: mask [B, F, *out], bool; meaningless where the cotangent above is 0.
        inputs: X [B, C, *space]; 0 where no tap reads.
        iterations: taken.
        misfit: rms of G − K ⋆ X in standard errors, of the worst filter.
    """

    open: Tensor
    inputs: Tensor
    iterations: int
    misfit: float


def masks_by_projection(
    affine: Affine,
    gradient: Tensor,
    above: Tensor,
    through: Through,
    noise: float = 0.0,
    error: float = 0.0,
    room: float = float("inf"),
    unit: float = 0.0,
) -> Projected | Unseparated:
    """The mask and the input of a convolution whose cotangent is known up to a mask.

    Args:
        affine: the convolution, without groups.
        gradient: G [F, C, *kernel], float64.
        above: k [B, F, *out], the cotangent before the steps, at the convolution's output.
        through: the steps.
        noise: standard error of an entry of G, beside the rounding of float64.
        error: of an entry of k.
        room: bytes.
        unit: unit roundoff of the client's arithmetic.

    Returns:
        The :class:`Projected`, or an :class:`Unseparated` with its numbers.

    >>> from rgap.network.affine import convolution
    >>> from rgap.network.geometry import Geometry
    >>> pads, generator = Geometry.of((3,), padding=1), torch.Generator().manual_seed(0)
    >>> w = torch.randn(32, 32, 3, dtype=torch.float64, generator=generator)
    >>> conv = convolution("conv", w, None, ("w", None), (32, 12), pads)
    >>> x, k = torch.randn(2, 1, 32, 12, generator=generator, dtype=torch.float64)
    >>> on = conv.forward(x) > 0
    >>> rectifier = Through(lambda s: s > 0.5, 0.5, lambda z, far: (z > 0, z.abs() > far), False)
    >>> told = masks_by_projection(conv, conv.weight_gradient(x, k * on), k, rectifier)
    >>> bool((told.open == on).all())
    True
    """
    batch, name = len(above), affine.name
    filters, channels = gradient.shape[:2]
    outputs, taps = batch * prod(affine.out_shape[1:]), prod(gradient.shape[2:])
    positions = batch * int(affine.reads[0].sum())
    if channels * taps < outputs:
        return Unseparated(
            f"'{name}' has {channels} channels of {taps} taps for {outputs} outputs: too few"
        )
    if short := short_of(affine, gradient, above):
        return Unseparated(f"'{name}': {short}")
    need = 8.0 * 3 * taps * (filters * positions + channels * outputs)
    if need > room:
        return Unseparated(f"'{name}': its equations take {need / 1e9:.1f} GB")
    size = float(gradient.square().mean().sqrt())
    if not size > 0.0:
        return Unseparated(f"the gradient of '{name}' is 0")
    turns = _Turns(affine, gradient, above, through)
    iterations = turns.run()
    found = confirmed(affine, gradient, turns.open, above, noise, error, through, unit)
    if isinstance(found, str):
        return Unseparated(f"'{name}', after {iterations} steps: {found}")
    return Projected(turns.open, found.inputs.value, iterations, float(found.misfits.max()))


class _Turns:
    """The two least squares in turn."""

    def __init__(self, affine: Affine, gradient: Tensor, above: Tensor, through: Through) -> None:
        self.affine, self.gradient, self.through = affine, gradient, through
        self.above = above
        self.known = above != 0
        self.coupling = weight_constraint(affine, len(above), read_only=True)
        self.sent = gradient_rows(affine, gradient).T  # [taps·F, C]
        self.size = float(gradient.norm())
        self.inputs = above.new_zeros(len(above), *affine.in_shape)
        self.open = torch.zeros_like(above, dtype=torch.bool)

    def run(self) -> int:
        """From the mean on; the steps that were taken."""
        k, table = self.through.mean * self.above, self.sent.new_zeros(())
        best, since = float("inf"), 0
        for number in range(ITERATIONS):
            table, missed = self.solved_inputs(k, table)
            shares = self.shares(self.solved_cotangents(k))
            now = self.through.nearest(shares) & self.known
            stays = number > 0 and bool((now == self.open).all())
            self.open, k = now, self.above * now
            if stays and missed <= SETTLED:
                return number + 1
            since = 0 if missed < 0.99 * best else since + 1
            best = min(best, missed)
            if since > PATIENCE:
                break
        return number + 1

    def solved_inputs(self, k: Tensor, table: Tensor) -> tuple[Tensor, float]:
        """X as a table [B·positions, C] near the last one, and the relative misfit there."""
        matrix = gradient_constraint(self.affine, k, read_only=True).matrix[0]
        left = self.sent - matrix @ table if table.ndim else self.sent
        moved = _ridged(matrix, left)
        table = table + moved
        if self.through.nonnegative:
            table = table.clamp_min(0.0)
        self.place(table)
        return table, float((self.sent - matrix @ table).norm()) / self.size

    def place(self, table: Tensor) -> None:
        """Keep X [B, C, *space]."""
        folded = self.coupling.fold(table.T[None])
        self.inputs = folded.reshape(len(self.above), *self.affine.in_shape)

    def solved_cotangents(self, k: Tensor) -> Tensor:
        """K [B, F, *out] near the last one."""
        matrix = shown(self.affine, self.inputs)
        last = k.flatten(2).transpose(1, 2).reshape(-1, k.shape[1])  # [B·outputs, F]
        table = last + _ridged(matrix, self.gradient.flatten(1).T - matrix @ last)
        return table.reshape(len(k), -1, k.shape[1]).transpose(1, 2).reshape(k.shape)

    def shares(self, k: Tensor) -> Tensor:
        """Of the cotangent above; 0 where that is 0."""
        return torch.where(self.known, k / torch.where(self.known, self.above, 1.0), 0.0)


def _ridged(matrix: Tensor, rhs: Tensor) -> Tensor:
    """``(MᵀM + λ)⁻¹ Mᵀ r``."""
    gram = matrix.T @ matrix
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + torch.finfo(gram.dtype).tiny)
    solved: Tensor = torch.cholesky_solve(matrix.T @ rhs, torch.linalg.cholesky(gram))
    return solved
