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

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.labels.head import HeadGradient
from rgap.labels.integers import nearest_simplex

__all__ = ["Contrasts", "Posterior"]

STEPS = 12  # of the fixed point; half of every step is taken
# The mean of a batch lies about two standard deviations of the dummy data's scatter from theirs.
WIDTH = 4.0
# Weight of the dummy data, in samples: of the size of the scatter, and of its shape.
SIZED, SHAPED = 2.0, 2.0
DOUBT = 0.3  # relative error of what the scatter adds to the counts
SPREAD = 0.03  # standard deviation that every count keeps for what this leaves out
SIZES = 0.25  # relative scatter of the features' sizes, where row sums stand for a bias gradient
DIRECTIONS = 8  # of the scatter, along which the softmax is averaged
RIDGE = 1e-6  # of S, relative to its mean, and of A per sample
LEVEL = 1e-4  # of the dummy logits' mean square, in S: dummy data may all be alike


def inverse_of(a: Tensor) -> Tensor:
    """The inverse of a symmetric matrix; its pseudoinverse where rounding left it singular."""
    found, info = torch.linalg.inv_ex(a)
    inverse: Tensor = torch.linalg.pinv(a.nan_to_num(), hermitian=True) if int(info) else found
    return inverse


@dataclass(frozen=True)
class Posterior:
    """Real-valued counts and their errors, from one hypothesis of the batch's make-up.

    Attributes:
        estimates: counts before projection on the simplex, [C].
        covariance: of their errors, [C, C].
        spread: standard deviation of one sample's logits, in the mean over contrasts.
    """

    estimates: Tensor
    covariance: Tensor
    spread: float


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

    def plain(self) -> Tensor:
        """Counts by the identity with the mean softmax of the dummy data, [C]."""
        head = self.head
        if head.probes is None:
            p = torch.softmax(self.bias, 0)
        else:
            p = head.probabilities(head.probes).mean(0)
        return (head.batch_size * p - self.sums) / head.sharpness

    def fit(self, known: Tensor | None = None) -> Posterior:
        """The posterior with counts held at ``known`` [C], or found along with it.

        The classes' means ``m + a_k`` follow from the rows as the scatter's own conditional mean,
        ``a_k = (k_k - s/B)^T A^-1 D`` with ``D = R - s m^T``; ``1 - h_k`` of S is left within a
        class, ``h_k = (k_k - s/B)^T A^-1 (k_k - s/B)``, and bends the mean softmax.
        """
        head, s = self.head, self.s
        batch, q = head.batch_size, head.classes - 1
        eye = torch.eye(q, dtype=torch.float64, device=s.device)
        counts = nearest_simplex(self.plain(), batch) if known is None else known.double()
        mean, scatter = self.mean, self.scatter
        apart = torch.zeros(head.classes, q, dtype=torch.float64, device=s.device)
        fixed = torch.zeros(head.classes, dtype=torch.float64, device=s.device)  # h_k
        own = head.sharpness * self.one + self.smoothed  # the targets of every class
        for step in range(STEPS):
            p, slopes, _ = self._softmax(mean, apart, scatter, fixed)
            if known is None and step > 1:
                free = (counts @ p - self.sums) / head.sharpness
                counts = nearest_simplex((free + counts) / 2.0, batch)
            away = (p - own) @ self.basis - s / batch
            moved = self.basis.T @ slopes  # contrasts of p by contrasts of z, [C, q, q]
            a = (away.T * counts) @ away + RIDGE * batch * 1e-3 * eye
            a = a + torch.einsum("k,kpr,rt,kqt->pq", counts, moved, scatter, moved)
            inverse = inverse_of(a)
            shared = torch.einsum("k,kpq->pq", (1.0 - fixed) * counts, moved) @ scatter
            prior = inverse_of(WIDTH * self.scatter + scatter / batch)
            precise = inverse_of(scatter)
            information = float(s @ inverse @ s)
            covariance = inverse_of(prior + information * precise)
            new = covariance @ (
                prior @ self.mean + precise @ ((self.rows - shared).T @ (inverse @ s))
            )
            left = self.rows - torch.outer(s, new) - shared
            between = away @ (inverse @ left)
            if step:
                new, between = (mean + new) / 2.0, (apart + between) / 2.0
            mean, apart = new, between
            fixed = ((away @ inverse) * away).sum(1).clamp(0.0, 1.0)
            scatter = self._scatter(left.T @ inverse @ left, information, prior, precise)
        return self._errors(counts, mean, apart, scatter, fixed, covariance)

    def _scatter(self, found: Tensor, information: float, prior: Tensor, precise: Tensor) -> Tensor:
        """S: the dummy data's, in size and then in shape drawn to what the rows leave, [q, q]."""
        q = len(found)
        # The mean takes away one of q rows where the gradient says more of it than the prior.
        doubt = float(torch.linalg.solve(precise, prior).trace()) / q
        freedom = max(q - information / (information + doubt), 0.0)
        size = float(torch.linalg.solve(self.scatter, found).trace()) / q
        scale = (SIZED + size) / (SIZED + freedom)
        scatter = ((q + SHAPED) * scale * self.scatter + found) / (q + SHAPED + freedom)
        return (scatter + scatter.T) / 2.0

    def _errors(
        self,
        counts: Tensor,
        mean: Tensor,
        apart: Tensor,
        scatter: Tensor,
        fixed: Tensor,
        covariance: Tensor,
    ) -> Posterior:
        sharp = self.head.sharpness
        p, slopes, straight = self._softmax(mean, apart, scatter, fixed)
        bent = counts @ (p - straight) / sharp
        whole = torch.einsum("k,kcq->cq", counts, slopes)
        # d_i add up to zero over the batch: only slopes that differ from the mean one see them.
        apart_slopes = slopes - whole / counts.sum()
        within = torch.einsum(
            "k,kcq,qp,kdp->cd", counts * (1.0 - fixed), apart_slopes, scatter, apart_slopes
        )
        errors = (whole @ covariance @ whole.T + within) / sharp**2
        alone = SPREAD**2 + (DOUBT * bent) ** 2
        if self.head.bias_gradient is None:
            alone = alone + SIZES**2 * counts
        spread = max(float(scatter.trace() / len(scatter)), 0.0) ** 0.5
        return Posterior((counts @ p - self.sums) / sharp, errors + torch.diag(alone), spread)

    def _softmax(
        self, mean: Tensor, apart: Tensor, scatter: Tensor, fixed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean softmax of every class [C, C], its slope by z [C, C, q], and that of its mean.

        A cubature of two points per direction of the scatter.
        """
        values, vectors = torch.linalg.eigh(scatter)
        roots = (vectors * values.clamp_min(0.0).sqrt()).T[-DIRECTIONS:]
        points = torch.cat([roots, -roots]) * len(roots) ** 0.5
        centres = mean + apart
        logits = centres[:, None] + (1.0 - fixed).sqrt()[:, None, None] * points
        each = torch.softmax(logits @ self.basis.T + self.bias, dim=-1)
        p = each.mean(1)
        slopes = p[:, :, None] * self.basis
        slopes = slopes - each.transpose(1, 2) @ (each @ self.basis) / each.shape[1]
        return p, slopes, torch.softmax(centres @ self.basis.T + self.bias, dim=-1)
