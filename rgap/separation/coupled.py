"""All samples of a softmax head at once, where the range of G leaves too little to each alone.

With K(Q) = s(softmax(Q VᵀWᵀ + b) − Y) for given labels, ``K(Q)ᵀ Q = U S`` and ``Q w = 1`` are
C·B equations in B(B − 1) unknowns, enough for any B ≤ C − 1.  Samples of one label are told apart
by the curvature of the softmax alone: to first order a turn of their differences changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rgap.precision import Precision
from rgap.solvers.least_squares import refine

from .mixture import Mixture

NOISE = 5.0  # times the residual that rounding explains, up to which a batch fits
RIVAL = 100.0  # times the cost of the worst fit, below which another batch is not refuted
ARITHMETIC = 20 * torch.finfo(torch.float64).eps  # what our own sums leave of a residual
NORMAL = 1e-10  # the same where only the normal equations are affordable
SCATTERS = (1.0, 0.3, 3.0, 0.1)  # times the scatter that the gradient suggests
RCOND = 1e-6
KEPT = 8  # ends that are compared
FORMED = 24  # samples up to which J is formed
SAME = 0.1  # distance from 1 of q·d for two ends that are one sample


@dataclass(frozen=True)
class Coupled:
    """``(K(Q)ᵀ Q S⁻¹ − U)/√R`` with q_b = q₀ + N t_b; t [S, R(R−1)], sample by sample.

    Attributes:
        head: mixture of the head.
        labels: class of every sample, [R].
        scale: s of the loss.
        smoothing: of its labels.
    """

    head: Mixture
    labels: Tensor
    scale: float
    smoothing: float

    @cached_property
    def origin(self) -> Tensor:
        """The shortest q with w·q = 1, [R]."""
        w: Tensor = self.head.weights
        return w / (w @ w)

    @cached_property
    def directions(self) -> Tensor:
        """N, orthonormal and orthogonal to w, [R, R − 1]."""
        full: Tensor = torch.linalg.qr(self.head.weights[:, None], mode="complete").Q
        return full[:, 1:]

    @cached_property
    def matrix(self) -> Tensor:
        """M = W V, [C, R]."""
        return self.head.stage.affine.weight @ self.head.right

    @cached_property
    def shift(self) -> Tensor:
        """b, [C]."""
        affine = self.head.stage.affine
        return affine.forward(self.head.gradient.new_zeros(1, *affine.in_shape))[0]

    @cached_property
    def targets(self) -> Tensor:
        """Y, smoothed, [R, C]."""
        classes = len(self.shift)
        dense = torch.eye(classes).to(self.shift)[self.labels]
        return (1.0 - self.smoothing) * dense + self.smoothing / classes

    def rows(self, t: Tensor) -> Tensor:
        """Q of t, [S, R, R]."""
        rank = self.head.rank
        return self.origin + t.reshape(len(t), rank, rank - 1) @ self.directions.T

    def cost(self, t: Tensor) -> Tensor:
        """Mean squared residual of a column of U."""
        return self._residual(t)[3].square().sum((1, 2))

    def floor(self, precision: Precision) -> float:
        """The cost that rounding of the update explains, with some room."""
        blur = (self.head.entry_noise / self.head.values).square().sum() * len(self.shift)
        own = (precision.unit * float(self.head.values[0]) / self.head.values).square().sum()
        explained = float(((blur + own / len(self.shift)) / self.head.rank).sqrt())
        own_arithmetic = ARITHMETIC if self.head.rank <= FORMED else NORMAL
        return (NOISE * explained + own_arithmetic) ** 2

    def linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Residual [S, C·R] and Jacobian [S, C·R, R(R−1)]."""
        q, k, slope, residual = self._residual(t)
        rank = self.head.rank
        scaled = q / self.head.values
        fixed = self.directions / self.head.values[:, None]
        jacobian = torch.einsum("sbct,sbj->scjbt", slope, scaled)
        jacobian = jacobian + torch.einsum("sbc,jt->scjbt", k, fixed)
        return residual.flatten(1), jacobian.reshape(len(t), -1, rank * (rank - 1)) / rank**0.5

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cost, Jᵀr and JᵀJ from inner products of samples: J is never formed."""
        q, k, slope, residual = self._residual(t)
        rank = self.head.rank
        scaled = q / self.head.values
        fixed = self.directions / self.head.values[:, None]
        inner = scaled @ scaled.transpose(1, 2)
        side = torch.einsum("sbct,sac->sabt", slope, k)  # slope of b against k of a
        turned = scaled @ fixed
        matrix = torch.einsum("sbct,sacu,sba->sbtau", slope, slope, inner)
        matrix = matrix + torch.einsum("sabt,sbu->sbtau", side, turned)
        matrix = matrix + torch.einsum("sbau,sat->sbtau", side, turned)
        both = k @ k.transpose(1, 2)
        matrix = matrix + torch.einsum("sba,tu->sbtau", both, fixed.T @ fixed)
        size = rank * (rank - 1)
        gradient = torch.einsum("sbct,scj,sbj->sbt", slope, residual, scaled)
        gradient = gradient + torch.einsum("scj,sbc,jt->sbt", residual, k, fixed)
        return (
            residual.square().sum((1, 2)),
            gradient.reshape(len(t), size) / rank**0.5,
            matrix.reshape(len(t), size, size) / rank,
        )

    def starts(self, count: int, generator: torch.Generator) -> Tensor:
        """Class means from the gradient at a softmax that varies little, and a scatter around them.

        To first order in the scatter Σ of the samples ``U S = Σ_c n_c k_c q_cᵀ + s H M Σ``, H the
        curvature of the loss: least squares for the means, then for Σ, then a random turn.
        """
        rank = self.head.rank
        classes, place, counts = torch.unique(self.labels, return_inverse=True, return_counts=True)
        sent = self.head.left * self.head.values
        targets = torch.stack([self.targets[self.labels == c][0] for c in classes])
        means = self.origin.expand(len(classes), -1)
        for _ in range(3):
            p = torch.softmax(means @ self.matrix.T + self.shift, 1)
            k = self.scale * counts[:, None] * (p - targets)
            means = torch.linalg.lstsq(k.T, sent, driver="gelsd").solution
            means = means / (means @ self.head.weights)[:, None]
        p = torch.softmax(means @ self.matrix.T + self.shift, 1)
        left = sent - (self.scale * counts[:, None] * (p - targets)).T @ means
        slope = self.scale * p[:, :, None] * (self.matrix - (p @ self.matrix)[:, None])
        slope = (slope * counts[:, None, None]).sum(0) / rank
        scatter = torch.linalg.pinv(slope @ self.directions, rtol=RCOND) @ left @ self.directions
        values, vectors = torch.linalg.eigh((scatter + scatter.T) / 2)
        values = values.abs().clamp_max(10.0 * values.abs().median())
        root = (vectors * values.sqrt()) @ vectors.T
        base = (means[place] - self.origin) @ self.directions
        draw = torch.randn(count, rank, rank - 1, generator=generator, dtype=torch.float64).to(base)
        for index in range(len(classes)):
            own = place == index
            draw[:, own] = draw[:, own] - draw[:, own].mean(1, keepdim=True)
        if len(classes) == 1:
            draw = torch.linalg.qr(draw).Q
        else:
            draw = draw / max(rank - len(classes), 1) ** 0.5
        size = torch.tensor(SCATTERS).to(base)[torch.arange(count) % len(SCATTERS)]
        found: Tensor = (base + size[:, None, None] * (draw @ root)).flatten(1)
        return found

    def _residual(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q, K, ∂K/∂t of each sample and the residual [S, C, R]."""
        q = self.rows(t)
        p = torch.softmax(q @ self.matrix.T + self.shift, 2)
        k = self.scale * (p - self.targets)
        slope = self.scale * p[..., None] * (self.matrix - (p @ self.matrix)[:, :, None, :])
        residual = (k.transpose(1, 2) @ q) / self.head.values - self.head.left
        return q, k, slope @ self.directions, residual / self.head.rank**0.5


def refined(problem: Coupled, t: Tensor) -> Tensor:
    """The best ends after their last steps by QR, where J is small enough to be formed."""
    best = t[problem.cost(t).nan_to_num(torch.inf).argsort()][:KEPT]
    if problem.head.rank > FORMED:
        return best
    return torch.cat([refine(problem, one[None]) for one in best])


def agreement(problem: Coupled, t: Tensor, floor: float) -> Tensor | str:
    """Q of the batch that fits, [R, R], or why there is none, or not one alone.

    Args:
        problem: the equations.
        t: ends, best first, [S, R(R−1)].
        floor: cost up to which a batch fits.
    """
    cost = problem.cost(t).nan_to_num(torch.inf)
    order = cost.argsort()
    best = float(cost[order[0]])
    if not best <= floor:
        return (
            f"the nearest batch misses by {best**0.5:.1e} of the gradient's singular vectors, "
            f"where rounding explains {floor**0.5:.1e}"
        )
    rows = problem.rows(t[order])
    duals = torch.linalg.pinv(rows[0])
    agreeing = 0
    for other, own in zip(rows, cost[order].tolist(), strict=True):
        same = bool((((other @ duals) - 1.0).abs() < SAME).any(1).all())
        agreeing += same and own <= floor
        if not same and own <= RIVAL * floor:
            return (
                f"different batches fit: one misses by {best**0.5:.1e}, another by {own**0.5:.1e} "
                f"of the gradient's singular vectors, where rounding explains {floor**0.5:.1e}"
            )
    if agreeing < 2:
        return f"only one of {len(t)} ends fits, which proves little"
    return rows[0]
