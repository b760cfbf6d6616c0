"""K and X of a convolution where G is known with errors: least squares, and what they leave open.

The walk from the corners is linear in each step and carries errors from position to position: it
may end with K and X that miss G by a thousand times its errors.  Gauss–Newton on ``G_u = Kᵀ S_u X``
begins there and ends where they miss it by as much as the errors of G explain; the same linear
system then says what these errors do to K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.constraints import gradient_constraint, weight_constraint
from rgap.network.affine import Affine
from rgap.separation.shifts.positions import shown
from rgap.solvers.gauss_newton import conjugate_gradients
from rgap.solvers.tall import tall_qr

__all__ = ["Linearised", "refined"]

STEPS = 12  # of Gauss–Newton
SETTLED = 1e-2  # move of the equations, in standard errors, at which it ends
PRODUCTS = 3000  # for one of them
ACCURACY = 1e-9  # of its normal equations


class Linearised:
    """``dG = dKᵀ S X + Kᵀ S dX``, in coordinates in which each of its two halves is orthonormal.

    With Q_K of the gradient constraint and Q_X of what X shows to the taps, the normal matrix is
    ``[[I, M], [Mᵀ, I]]``, and M a sum over taps of products of the small factors.

    Args:
        affine: the convolution, without groups.
        k: K̃, [B, F, *out].
        x: X̃, [B, C, *space].
    """

    def __init__(self, affine: Affine, k: Tensor, x: Tensor) -> None:
        self.affine, self.k, self.x = affine, k, x
        block = gradient_constraint(affine, k, read_only=True)
        of_x, self.upper_x = tall_qr(block.matrix[0])  # [F·taps, B·positions]
        of_k, self.upper_k = tall_qr(shown(affine, x))  # [C·taps, B·outputs]
        self.filters, self.channels = affine.weight.shape[:2]
        self.of_x = of_x.reshape(self.filters, -1, of_x.shape[1]).transpose(0, 1)  # [taps, F, P]
        self.of_k = of_k.reshape(self.channels, -1, of_k.shape[1]).transpose(0, 1)  # [taps, C, Q]
        self.split = of_x.shape[1] * self.channels

    @property
    def size(self) -> int:
        """Unknowns n."""
        return self.split + self.of_k.shape[2] * self.filters

    def adjoint(self, gradient: Tensor) -> Tensor:
        """Of dG [F, C, *kernel]: what the equations make of it, [n]."""
        taps = gradient.flatten(2).permute(2, 0, 1)  # [taps, F, C]
        y = (self.of_x.transpose(1, 2) @ taps).sum(0)
        z = (self.of_k.transpose(1, 2) @ taps.transpose(1, 2)).sum(0)
        return torch.cat([y.flatten(), z.flatten()])

    def normal(self, v: Tensor) -> Tensor:
        """The normal matrix times v, [S, n]."""
        y, z = self._halves(v)
        up = self.of_x.transpose(1, 2) @ z[:, None].transpose(2, 3)  # [S, taps, P, Q]
        down = y[:, None] @ self.of_k  # [S, taps, P, Q]
        first = y + (up @ self.of_k.transpose(1, 2)).sum(1)
        second = z + (down.transpose(2, 3) @ self.of_x.transpose(1, 2)).sum(1)
        return torch.cat([first.flatten(1), second.flatten(1)], 1)

    def solve(self, pulled: Tensor) -> Tensor:
        """The v of least norm, [S, n], for what :meth:`adjoint` made of changes of G, [S, n]."""
        return conjugate_gradients(self.normal, pulled, PRODUCTS, ACCURACY)[0]

    def moved(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """DK [S, B, F, *out] and dX [S, B, C, *space] of some v."""
        y, z = self._halves(v)
        solved = torch.linalg.solve_triangular(self.upper_x, y, upper=True).transpose(1, 2)
        coupling = weight_constraint(self.affine, len(self.k), read_only=True)
        dx = coupling.fold(solved).reshape(-1, *self.x.shape)
        solved = torch.linalg.solve_triangular(self.upper_k, z, upper=True)
        dk = solved.reshape(len(v), len(self.k), -1, self.filters).transpose(2, 3)
        return dk.reshape(-1, *self.k.shape), dx

    def _halves(self, v: Tensor) -> tuple[Tensor, Tensor]:
        y, z = v[:, : self.split], v[:, self.split :]
        return y.reshape(len(v), -1, self.channels), z.reshape(len(v), -1, self.filters)


def refined(
    affine: Affine, gradient: Tensor, k: Tensor, x: Tensor, noise: float
) -> tuple[Linearised, float]:
    """The least squares that K̃ and X̃ lie near, and the rms of what they miss, over ``noise``.

    Claim: K and X of least ``‖G − Kᵀ S X‖`` are within what the errors of G leave open, up to Γ,
    where the linearised equations determine them up to Γ.

    Args:
        affine: the convolution, without groups.
        gradient: G, float64.
        k: K̃ to begin with, [B, F, *out].
        x: X̃, [B, C, *space].
        noise: standard error of an entry of G.
    """

    def rest_of(k: Tensor, x: Tensor) -> tuple[Tensor, float]:
        rest = gradient - affine.weight_gradient(x, k)
        return rest, float(rest.square().mean().sqrt()) / noise

    made, (rest, misfit) = Linearised(affine, k, x), rest_of(k, x)
    for _ in range(STEPS):
        v = made.solve(made.adjoint(rest)[None])
        step = max(0.0, float((v * made.normal(v)).sum()) / rest.numel()) ** 0.5 / noise
        dk, dx = made.moved(v)
        after, left = rest_of(made.k + dk[0], made.x + dx[0])
        if not left < misfit:
            break
        made, rest, misfit = Linearised(affine, made.k + dk[0], made.x + dx[0]), after, left
        if step <= SETTLED:
            break
    return made, misfit
