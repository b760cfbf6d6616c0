"""What head gradient and dummy data say of the batch's mean logits, and so of its counts.

Let ``Q`` [C, q], q = C - 1, be an orthonormal basis of the contrasts between classes, ``z_i`` the
contrasts of the logits of sample i without the bias, ``k_i = Q^T (p_i - y_i)`` its cotangent.  With
the batch's mean ``m`` and ``z_i = m + d_i``, ``d_i`` of covariance S, the bias gradient is
``s = sum_i k_i`` and the rows of the weight gradient, times W^T and between contrasts, are

    ``R = sum_i k_i z_i^T = s m^T + sum_i k_i d_i^T``,

the last term of covariance ``A (x) S`` with ``A = sum_i (k_i - s/B)(k_i - s/B)^T``.  A balanced
batch has s near 0: then the rows say nothing of the mean, and only the prior does, which is taken
from the network's logits on dummy data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.labels.cubature import MeanSoftmax, roots_of
from rgap.labels.gradient import HeadGradient
from rgap.labels.integers import nearest_simplex

__all__ = ["Contrasts", "Posterior"]

STEPS = 12  # of the fixed point; half of every step is taken
# How far the mean of a batch lies from that of dummy data, beside its own chance, in variances of
# theirs: not at all but for the chance of 34 dummies; half a standard deviation; two of them.
WIDTHS = (0.03, 0.35, 4.0)
RUNAWAY = 20.0  # scatters of dummy data; beyond, theirs is kept
SIZE_DOUBT = 0.7  # standard deviation of the logarithm of scatter by that of dummy data
# Weight of the dummy data, in samples: of the size of the scatter, and of its shape.
SIZED, SHAPED = 2.0, 2.0
DOUBT = 0.3  # relative error of what the scatter adds to the counts
SPREAD = 0.03  # standard deviation that every count keeps for what this leaves out
SIZES = 0.25  # relative scatter of the features' sizes, where row sums stand for a bias gradient
TINY = 1e-300  # below any information
RIDGE = 1e-6  # of S, relative to its mean, and of A per sample
LEVEL = 1e-4  # of the dummy logits' mean square, in S: dummy data may all be alike


def inverse_of(a: Tensor) -> Tensor:
    """The inverse of a symmetric matrix; its pseudoinverse where rounding left it singular."""
    inverted, info = torch.linalg.inv_ex(a)
    inverse: Tensor = torch.linalg.pinv(a.nan_to_num(), hermitian=True) if int(info) else inverted
    return inverse


@dataclass(frozen=True)
class Posterior:
    """Real-valued counts and their errors, from one hypothesis of the batch's make-up.

    Attributes:
        estimates: counts before projection on the simplex, [C].
        covariance: of their errors, [C, C].
        spread: standard deviation of one sample's logits, in the mean over contrasts.
        weight: logarithm of the hypothesis' odds.
    """

    estimates: Tensor
    covariance: Tensor
    spread: float
    weight: float


@dataclass
class _State:
    """The fixed point of `Contrasts.fit`: classes that occur have rows of their own.

    Attributes:
        counts: [C].
        mean: m, [q].
        scatter: S, [q, q].
        apart: a_k, [C, q].
        fixed: h_k, [C].
        shown: the mean that the rows show by themselves, [q].
        information: ``s^T A^-1 s``; ``S`` over it is the error of ``shown``.
    """

    counts: Tensor
    mean: Tensor
    scatter: Tensor
    apart: Tensor
    fixed: Tensor
    shown: Tensor
    information: float


class Contrasts:
    """The head's gradient between contrasts, and the prior of its logits.

    Args:
        head: the gradient, with its weights; without ``probes`` the prior's mean is the bias
            alone and its size that of the gradient's rows.
        sums: of ``head.sums``, or what stands for it.
    """

    def __init__(self, head: HeadGradient, sums: Tensor) -> None:
        self.head, self.sums = head, sums
        weight, self.bias = head.head_parameters()
        self.one = torch.eye(head.classes, dtype=torch.float64, device=sums.device)
        self.basis = torch.linalg.svd(self.one - 1.0 / head.classes)[0][:, :-1]
        self.smoothed = head.loss.label_smoothing / head.classes
        self.s = self.basis.T @ (sums - self.smoothed * head.batch_size)
        self.rows = self.basis.T @ head.rows @ weight.T @ self.basis
        q = head.classes - 1
        eye = torch.eye(q, dtype=torch.float64, device=sums.device)
        if head.probes is None or len(head.probes) < 2:
            self.mean = torch.zeros(q, dtype=torch.float64, device=sums.device)
            size = float(self.rows.square().mean()) / max(head.batch_size, 1)
            scatter = (size + torch.finfo(torch.float64).tiny) * eye
        else:
            logits = head.probes.detach().double().cpu() @ weight.T @ self.basis
            self.mean = logits.mean(0)
            scatter = torch.cov(logits.T).reshape(q, q)
            scatter = scatter + LEVEL / q * torch.outer(self.mean, self.mean)
        ridge = RIDGE * float(scatter.trace()) / q + torch.finfo(torch.float32).tiny
        self.scatter = scatter + ridge * eye
        self.precision = inverse_of(self.scatter)

    def plain(self) -> Tensor:
        """Counts by the identity with the mean softmax of the dummy data, [C]."""
        head = self.head
        if head.probes is None:
            p = torch.softmax(self.bias, 0)
        else:
            p = head.probabilities(head.probes).mean(0)
        return (head.batch_size * p - self.sums) / head.sharpness

    def fit(self, known: Tensor | None = None) -> list[Posterior]:
        """The posteriors with counts held at ``known`` [C], or found along with it.

        One for each of ``WIDTHS``, with its odds: of the mean that the rows show under that width,
        and of a scatter so much larger or smaller than that of dummy data.
        """
        now = self._fixed_point(known)
        if float((self.precision * now.scatter).sum()) > RUNAWAY**2 * len(now.scatter):
            now = self._fixed_point(known, adapt=False)
        scatter, batch = now.scatter, self.head.batch_size
        size = float((self.precision * scatter).sum()) / len(scatter)
        size_odds = -((0.5 * math.log(max(size, TINY)) / SIZE_DOUBT) ** 2) / 2.0
        noise = scatter / max(now.information, TINY)
        precise = inverse_of(noise)
        away = now.shown - self.mean
        counts, logs = [], []
        for width in WIDTHS:
            prior = inverse_of(width * self.scatter + scatter / batch)
            covariance = inverse_of(prior + precise)
            mean = covariance @ (prior @ self.mean + precise @ now.shown)
            total = (width + 1.0 / batch) * self.scatter + noise
            far = float(away @ torch.linalg.solve(total, away))
            logs.append(-(float(torch.logdet(total)) + far) / 2.0)
            counts.append(self._errors(now, mean, covariance))
        spread = max(float(scatter.trace() / len(scatter)), 0.0) ** 0.5
        odds = torch.log_softmax(torch.tensor(logs, dtype=torch.float64, device="cpu"), 0)
        return [
            Posterior(*pair, spread, float(odd) + size_odds)
            for pair, odd in zip(counts, odds, strict=True)
        ]

    def _fixed_point(self, known: Tensor | None, adapt: bool = True) -> _State:
        """Mean and scatter that agree with the rows, from the widest prior.

        The classes' means ``m + a_k`` follow from the rows as the scatter's own conditional mean,
        ``a_k = (k_k - s/B)^T A^-1 D`` with ``D = R - s m^T``; ``1 - h_k`` of S is left within a
        class, ``h_k = (k_k - s/B)^T A^-1 (k_k - s/B)``, and bends the mean softmax.  Half of every
        step is taken, of S too: a large S makes A large, the mean uncertain and what the rows leave
        large, and would run away.  Without ``adapt`` S stays that of dummy data.
        """
        head, s = self.head, self.s
        batch, q = head.batch_size, head.classes - 1
        eye = torch.eye(q, dtype=torch.float64, device=s.device)
        counts = nearest_simplex(self.plain(), batch) if known is None else known.double()
        now = _State(
            counts, self.mean, self.scatter, eye.new_zeros(head.classes, q),
            eye.new_zeros(head.classes), self.mean, 0.0,
        )  # fmt: skip
        own = head.sharpness * self.one + self.smoothed  # the targets of every class
        for step in range(STEPS):
            present, roots = now.counts.nonzero()[:, 0], roots_of(now.scatter)
            soft = self._softmax(now, present, roots)
            if known is None and step > 1:
                free = (now.counts[present] @ soft.mean - self.sums) / head.sharpness
                now.counts = nearest_simplex((free + now.counts) / 2.0, batch)
                present = now.counts.nonzero()[:, 0]
                soft = self._softmax(now, present, roots)
            n = now.counts[present]
            away = (soft.mean - own[present]) @ self.basis - s / batch
            bent = (self.basis.T @ soft.along(roots)) * n.sqrt()[:, None, None]
            bent = bent.transpose(0, 1).flatten(1)
            a = (away.T * n) @ away + bent @ bent.T + RIDGE * batch * 1e-3 * eye
            inverse = inverse_of(a)
            shared = self.basis.T @ soft.slope((1.0 - now.fixed[present]) * n) @ now.scatter
            prior = inverse_of(WIDTHS[-1] * self.scatter + now.scatter / batch)
            now.information = float(s @ inverse @ s)
            shown = (self.rows - shared).T @ (inverse @ s)
            now.shown = shown / max(now.information, TINY)
            precise = inverse_of(now.scatter)
            mean = torch.linalg.solve(
                prior + now.information * precise, prior @ self.mean + precise @ shown
            )
            left = self.rows - torch.outer(s, mean) - shared
            between = away @ (inverse @ left)
            half = 2.0 if step else 1.0
            now.mean = now.mean + (mean - now.mean) / half
            apart, fixed = torch.zeros_like(now.apart), torch.zeros_like(now.fixed)
            apart[present] = now.apart[present] + (between - now.apart[present]) / half
            fixed[present] = ((away @ inverse) * away).sum(1).clamp(0.0, 1.0)
            now.apart, now.fixed = apart, fixed
            scatter = self._scatter(left.T @ inverse @ left, now, prior)
            if adapt:
                now.scatter = (now.scatter + scatter) / 2.0
        return now

    def _scatter(self, left: Tensor, now: _State, prior: Tensor) -> Tensor:
        """S: the dummy data's, in size and then in shape drawn to what the rows leave, [q, q]."""
        q = len(left)
        # The mean takes away one of q rows where the gradient says more of it than the prior.
        doubt = float((now.scatter * prior).sum()) / q
        freedom = max(q - now.information / (now.information + doubt), 0.0)
        size = float((self.precision * left).sum()) / q
        scale = (SIZED + size) / (SIZED + freedom)
        scatter = ((q + SHAPED) * scale * self.scatter + left) / (q + SHAPED + freedom)
        return (scatter + scatter.T) / 2.0

    def _errors(self, now: _State, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Counts [C] with this mean of covariance [q, q], and their errors [C, C]."""
        sharp, present = self.head.sharpness, now.counts.nonzero()[:, 0]
        n, roots = now.counts[present], roots_of(now.scatter)
        soft = self._softmax(replace(now, mean=mean), present, roots)
        bent = n @ (soft.mean - soft.centre) / sharp
        whole = soft.slope(n)
        # d_i add up to zero over the batch: only slopes that differ from the mean one see them.
        own = soft.along(roots) - whole @ roots / n.sum()
        own = own * (n * (1.0 - now.fixed[present])).sqrt()[:, None, None]
        own = own.transpose(0, 1).flatten(1)
        errors = (whole @ covariance @ whole.T + own @ own.T) / sharp**2
        alone = SPREAD**2 + (DOUBT * bent) ** 2
        if self.head.bias_gradient is None:
            alone = alone + SIZES**2 * now.counts
        return (n @ soft.mean - self.sums) / sharp, errors + torch.diag(alone)

    def _softmax(self, now: _State, present: Tensor, roots: Tensor) -> MeanSoftmax:
        """The mean softmax of the classes that occur."""
        centres, shares = now.mean + now.apart[present], 1.0 - now.fixed[present]
        return MeanSoftmax(self.basis, self.bias, centres, shares, roots)
