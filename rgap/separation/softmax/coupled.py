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

from rgap.limits import CLOSE
from rgap.precision import Precision
from rgap.separation.mixture import Mixture
from rgap.solvers.least_squares import geodesic, refine

NOISE = 5.0  # standard errors up to which a batch fits
ALIKE = 4.0  # times the largest cost that fits, up to which an end counts as the same batch
RIVAL = 9.0  # times the cost of the best fit, below which another batch is not refuted
ARITHMETIC = 60 * torch.finfo(torch.float64).eps  # what our own sums leave of a residual
NORMAL = 1e-10  # the same where only the normal equations are affordable
SCATTERS = (1.0, 0.3, 3.0, 0.1)  # times the scatter that the gradient suggests
RCOND = 1e-6
SMALL = 12  # samples up to which many accelerated starts are affordable
LAST = 40  # accelerated steps of the ends that are kept
FREE = 1e-16  # damping that they begin with
KEPT = 8  # ends that are compared
FORMED = 24  # samples up to which J is formed
TURNS = 16  # of a batch that was found, from which others are looked for
SAME = 0.1  # distance from 1 of q·d for two ends that are one sample


@dataclass(frozen=True)
class Coupled:
    """``Kᵀ(β1, T) = US(βw, N)`` for the rows q_b = q₀ + N t_b; t [S, R(R−1)], sample by sample.

    This is ``KᵀQ = US`` in the basis (w, N): what samples have in common leaves the equations, so
    that their small differences do not round with it.

    Attributes:
        head: mixture of the head.
        labels: class of every sample, [R].
        scale: s of the loss.
        smoothing: of its labels.
        precision: of the update.
    """

    head: Mixture
    labels: Tensor
    scale: float
    smoothing: float
    precision: Precision

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
    def along(self) -> Tensor:
        """M N, [C, R − 1]."""
        return self.matrix @ self.directions

    @cached_property
    def middle(self) -> Tensor:
        """Logits at the origin, [C]."""
        return self.matrix @ self.origin + self.shift

    @cached_property
    def targets(self) -> Tensor:
        """Y, smoothed, [R, C]."""
        classes = len(self.shift)
        dense = torch.eye(classes, dtype=self.shift.dtype, device=self.shift.device)[self.labels]
        return (1.0 - self.smoothing) * dense + self.smoothing / classes

    def rows(self, t: Tensor) -> Tensor:
        """Q of t, [S, R, R]."""
        rank = self.head.rank
        return self.origin + t.reshape(len(t), rank, rank - 1) @ self.directions.T

    @cached_property
    def noise(self) -> Tensor:
        """Standard error of the equations of every class, [C].

        Of the sums of G, and of every k before: the latter moves the equations by δk qᵀ, inside
        the row space, where what is met beneath the rank of G knows nothing of it.
        """
        affine, rank = self.head.stage.affine, self.head.rank
        x = (self.head.right @ self.origin).reshape(1, *affine.in_shape)
        logits = self.precision.sum_std(affine.squared().linear(x.square()))[0]
        p = torch.softmax(self.middle, 0)
        own = torch.maximum(p, self.targets) * (2.0 * self.precision.unit)
        variance = self.scale**2 * ((p * logits).square() + own.square())  # [R, C]
        start = self.starts(1, torch.Generator().manual_seed(0)).reshape(rank, rank - 1)
        q = torch.cat([torch.full_like(start[:, :1], self.typical), start], 1)
        carried = variance.T @ q.square().mean(1)
        return (self.head.entry_noise**2 + carried).sqrt().clamp_min(1e-300)

    @cached_property
    def typical(self) -> float:
        """Size of an entry of a sample: a bias gradient is so much more exact than G."""
        return float(self.origin.norm() / self.head.gradient.shape[1] ** 0.5)

    @cached_property
    def fixed(self) -> Tensor:
        """∂(β, t)/∂t of one sample, [R, R − 1]."""
        rank = self.head.rank
        return torch.eye(rank, dtype=self.origin.dtype, device=self.origin.device)[:, 1:]

    @cached_property
    def sent(self) -> Tensor:
        """US (βw, N), [C, R]."""
        middle = self.typical * self.head.weights[:, None]
        return (self.head.left * self.head.values) @ torch.cat([middle, self.directions], 1)

    def cost(self, t: Tensor) -> Tensor:
        """Mean squared residual, in standard errors."""
        return self._residual(t)[3].square().sum((1, 2))

    def floor(self) -> float:
        """The cost that rounding of the update explains, with some room."""
        own = ARITHMETIC if self.head.rank <= FORMED else NORMAL
        size = float((self.sent / self.noise[:, None]).square().mean().sqrt())
        allowed = NOISE + own * size
        return allowed * allowed

    def some(self, index: Tensor) -> Coupled:
        """The same for every start."""
        return self

    def linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Residual [S, C·R] and Jacobian [S, C·R, R(R−1)]."""
        q, k, slope, residual = self._residual(t)
        rank = self.head.rank
        jacobian = torch.einsum("sbct,sbj->scjbt", slope, q)
        jacobian = jacobian + torch.einsum("sbc,jt->scjbt", k, self.fixed)
        return residual.flatten(1), jacobian.reshape(len(t), -1, rank * (rank - 1))

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cost, Jᵀr and JᵀJ from inner products of samples: J is never formed."""
        q, k, slope, residual = self._residual(t)
        rank, fixed = self.head.rank, self.fixed
        inner = q @ q.transpose(1, 2)
        side = torch.einsum("sbct,sac->sabt", slope, k)  # slope of b against k of a
        turned = q @ fixed
        matrix = torch.einsum("sbct,sacu,sba->sbtau", slope, slope, inner)
        matrix = matrix + torch.einsum("sabt,sbu->sbtau", side, turned)
        matrix = matrix + torch.einsum("sbau,sat->sbtau", side, turned)
        both = k @ k.transpose(1, 2)
        matrix = matrix + torch.einsum("sba,tu->sbtau", both, fixed.T @ fixed)
        size = rank * (rank - 1)
        gradient = torch.einsum("sbct,scj,sbj->sbt", slope, residual, q)
        gradient = gradient + torch.einsum("scj,sbc,jt->sbt", residual, k, fixed)
        return (
            residual.square().sum((1, 2)),
            gradient.reshape(len(t), size),
            matrix.reshape(len(t), size, size),
        )

    @cached_property
    def classes(self) -> tuple[Tensor, Tensor]:
        """Means over samples of one label and an orthonormal basis of what they leave, [R, ...]."""
        place = torch.unique(self.labels, return_inverse=True)[1]
        member = (place[:, None] == place).to(self.origin)
        mean = member / member.sum(1, keepdim=True)
        eye = torch.eye(len(place), dtype=mean.dtype, device=mean.device)
        basis: Tensor = torch.linalg.svd(eye - mean).U
        return mean, basis[:, : len(place) - int(place.max()) - 1]

    def follow(self, t: Tensor, step: Tensor) -> Tensor:
        """T + step, where the differences of samples with one label turn instead of growing.

        To first order such a turn changes no equation: with A = FᵀT the step is split into Ω A,
        Ω antisymmetric, and the rest, and A goes to ``exp(Ω)(A + rest)``.
        """
        mean, basis = self.classes
        rank = self.head.rank
        old, new = (x.reshape(len(t), rank, rank - 1) for x in (t, step))
        before, change = basis.T @ old, basis.T @ new
        moment = change @ before.mT
        values, vectors = torch.linalg.eigh(before @ before.mT)
        sums = (values[:, :, None] + values[:, None, :]).clamp_min(1e-300)
        turn = vectors @ ((vectors.mT @ (moment - moment.mT) @ vectors) / sums) @ vectors.mT
        turn = torch.where(turn.isfinite(), turn, torch.zeros_like(turn))
        turned = torch.linalg.matrix_exp(turn) @ (before + change - turn @ before)
        moved: Tensor = (mean @ (old + new) + basis @ turned).flatten(1)
        return moved

    def starts(self, count: int, generator: torch.Generator) -> Tensor:
        """Class means from the gradient at a softmax that varies little, and a scatter around them.

        To first order in the scatter Σ of the samples ``U S = Σ_c n_c k_c q_cᵀ + s H M Σ``, H the
        curvature of the loss: least squares for the means, then for Σ, then a random turn.
        """
        rank = self.head.rank
        classes, place, counts = torch.unique(self.labels, return_inverse=True, return_counts=True)
        sent = self.head.left * self.head.values  # in the coordinates of Q
        targets = torch.stack([self.targets[self.labels == c][0] for c in classes])
        means = self.origin.expand(len(classes), -1)
        for _ in range(3):
            p = torch.softmax(means @ self.matrix.T + self.shift, 1)
            k = self.scale * counts[:, None] * (p - targets)
            if not bool(k.isfinite().all()):
                break
            means = torch.linalg.lstsq(k.T, sent, driver="gelsd").solution
            means = means / (means @ self.head.weights)[:, None]
        if not bool(means.isfinite().all()):  # a label whose logit nothing moves
            means = self.origin.expand(len(classes), -1)
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
        turn = torch.arange(count, device=base.device) % len(SCATTERS)
        size = base.new_tensor(SCATTERS)[turn]
        drawn: Tensor = (base + size[:, None, None] * (draw @ root)).flatten(1)
        return drawn

    def _residual(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(β, T), and in standard errors K, ∂K/∂t of each sample and the residual [S, C, R]."""
        rank = self.head.rank
        t = t.reshape(len(t), rank, rank - 1)
        p = torch.softmax(t @ self.along.T + self.middle, 2)
        k = self.scale * (p - self.targets)
        slope = self.scale * p[..., None] * (self.along - (p @ self.along)[:, :, None, :])
        q = torch.cat([torch.full_like(t[..., :1], self.typical), t], 2)
        unit = 1.0 / (self.noise * self.sent.numel() ** 0.5)
        k, slope, sent = k * unit, slope * unit[:, None], self.sent * unit[:, None]
        return q, k, slope, k.transpose(1, 2) @ q - sent


def rivals(problem: Coupled, found: Tensor, floor: float) -> Tensor:
    """Q of other batches that fit as well, [K, R, R]: those that turns of the found one lead to.

    Differences of samples of one label may turn by any orthogonal matrix, to first order, and only
    the curvature of the softmax says by which: in the valley of such turns another batch may fit.
    The starts of a search need not find it, as each of them may roll down to the same one; as many
    more are for batches whose differences have other lengths.

    Args:
        problem: the equations.
        found: Q of a batch that fits, [R, R].
        floor: cost up to which a batch fits.
    """
    rank, t = problem.head.rank, (found - problem.origin) @ problem.directions
    mean, basis = problem.classes
    free, others = basis.shape[1], found[None, :0].new_zeros(0, rank, rank)
    if free < 2 or rank > SMALL:  # a pair is turned by exchanging its samples
        return others
    generator = torch.Generator().manual_seed(problem.precision.seed)
    draw = torch.randn(TURNS, free, free, generator=generator, dtype=torch.float64).to(t)
    turned = mean @ t + basis @ (torch.linalg.qr(draw).Q @ (basis.T @ t))
    start = torch.cat([turned.flatten(1), problem.starts(TURNS, generator)])
    ends = geodesic(problem, start, tolerance=floor, enough=1.0, follow=problem.follow).value
    ends = _settled(problem, ends)
    cost = problem.cost(ends).nan_to_num(torch.inf)
    order = cost.argsort()
    known = found[None]
    for other in problem.rows(ends[order][cost[order] <= floor]):
        gaps = (torch.cdist(other, one).amin(1) for one in known)
        if all(bool((gap > CLOSE * other.norm(dim=1)).any()) for gap in gaps):
            known = torch.cat([known, other[None]])
    return known[1:]


def refined(problem: Coupled, t: Tensor) -> Tensor:
    """The best ends after their last steps by QR, where J is small enough to be formed.

    Of a small batch these bend with the turns of its equal labels, and begin with a damping that
    leaves the flattest directions free: all others have reached their rounding.
    """
    best = t[problem.cost(t).nan_to_num(torch.inf).argsort()][:KEPT]
    if problem.head.rank > FORMED:
        return best
    if problem.head.rank <= SMALL:
        return _settled(problem, best)
    return torch.cat([refine(problem, one[None]) for one in best])


def _settled(problem: Coupled, t: Tensor) -> Tensor:
    """Ends after steps that bend with the turns of equal labels, hardly damped."""
    last = geodesic(problem, t, enough=1.0, max_iterations=LAST, first=FREE, follow=problem.follow)
    return last.value


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
            f"the nearest batch misses by {best**0.5:.1e} standard errors of the gradient, where "
            f"{floor**0.5:.1e} are allowed"
        )
    rows = problem.rows(t[order])
    duals = torch.linalg.pinv(rows[0])
    agreeing = 0
    for other, own in zip(rows, cost[order].tolist(), strict=True):
        same = bool((((other @ duals) - 1.0).abs() < SAME).any(1).all())
        agreeing += same and own <= ALIKE * floor
        if not same and own <= max(RIVAL * max(best, 1.0), floor):
            return (
                f"different batches fit: one misses by {best**0.5:.1e}, another by {own**0.5:.1e} "
                f"standard errors of the gradient, where {floor**0.5:.1e} are allowed"
            )
    if agreeing < 2:
        return f"only one of {len(t)} ends fits, which proves little"
    return rows[0]
