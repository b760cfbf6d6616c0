"""Our estimate: class means that explain every row of the gradient, and the likeliest counts.

With the features' mean per class m_j, logits z = W m + b and P_k = softmax averaged over class k,

    ``sum_i p_i = sum_k n_k P_k``                          the identity,
    ``n_j (m_j - m) = db_j m + sum_k n_k P_kj (m_k - m) - dW_j``   the rows of the weight gradient,

both times s. Everything happens in the C logits of W m, not in the d features: rows times W^T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.labels.head import HeadGradient
from rgap.labels.integers import nearest_simplex
from rgap.labels.lattice import search
from rgap.labels.restoration import solve
from rgap.labels.result import LabelEstimate
from rgap.labels.unbiased import bias_sums

__all__ = ["best"]

METHOD = "best"
ASSUMPTIONS = (
    "samples scatter around the mean of their class alike in every class",
    "their logits scatter by less than about 1",
)
STEPS = 20
REFITS = 2  # with the counts held at whole numbers
WIDE = 1.0
# Variance of a row whose class does not occur, in samples: what the fixed softmax of a class mean
# leaves unexplained. Of no consequence within a factor 10.
FLOOR = 0.05
# Standard deviation that every count keeps for what the model of the errors leaves out.
SPREAD = 0.05
DOUBT = 0.3  # relative error of what the scatter adds to the counts
SIZES = 0.25  # relative scatter of the features' sizes, where row sums stand for a bias gradient
DIRECTIONS = 8


@dataclass(frozen=True)
class Fit:
    """A real-valued solution of both equations.

    Attributes:
        estimates: counts before projection on the simplex, [C].
        covariance: of their errors, [C, C].
        spread: standard deviation of a sample's logits, the largest of any class.
    """

    estimates: Tensor
    covariance: Tensor
    spread: float


def best(head: HeadGradient) -> LabelEstimate:
    """The likeliest counts, with the mean of the features weighed by what each row says of it.

    iLRG takes ``dW_j / db_j`` for the features of class j, which has no meaning where the count is
    near its expectation and ``db_j`` near 0. Here all rows estimate the batch's mean together: row
    j is ``db_j`` times the mean plus the scatter of its ``n_j`` samples, so it counts with weight
    ``db_j / n_j`` (generalised least squares; the rows of absent classes give the mean almost
    exactly). The scatter that is left tells how logits vary within the batch: it bends the mean
    softmax (a second-order term) and gives the covariance of the counts' errors, which lie along
    few directions. The counts are then found in that metric, not by rounding, and both steps are
    repeated with these counts.

    Args:
        head: the gradient, with ``weight`` (and ``bias``) of the model. Without ``bias_gradient``
            it is estimated, see `rgap.labels.unbiased`.

    Returns:
        The estimate; ``estimates`` are the real-valued counts. ``confidence`` is the share of
        the likelihood that goes to counts with the same number for that class, with errors
        widened to what the fit leaves unexplained. ``reason`` flags logits that scatter by more
        than 1, where it is still too sure: a trained network.

    Raises:
        ValueError: no ``weight``.

    Source: this library; compare Ma et al. 2023.

    Example:
        >>> import torch
        >>> W, x = torch.eye(3).double() / 4, torch.eye(3).double() / 9 + 2
        >>> k = torch.softmax(x @ W.T, 1) - torch.eye(3)[[0, 0, 2]]
        >>> best(HeadGradient(k.T @ x / 3, k.mean(0), 3, W)).labels
        tensor([0, 0, 2])
    """
    found = bias_sums(head)
    if isinstance(found, str):
        return LabelEstimate.undecided(head.classes, METHOD, ASSUMPTIONS, found)
    sums, reason = found
    guessed = head.bias_gradient is None
    fit = _fit(head, sums, guessed)
    for _ in range(REFITS):
        lattice = search(fit.estimates, fit.covariance, head.batch_size)
        fit = _fit(head, sums, guessed, lattice.counts.double())
        away = lattice.counts - fit.estimates
        excess = float(away @ torch.linalg.solve(fit.covariance, away)) / (head.classes - 1)
        # Errors larger than the fit's own account of them (Birge's ratio).
        fit = replace(fit, covariance=fit.covariance * max(excess, 1.0))
    lattice = search(fit.estimates, fit.covariance, head.batch_size)
    if fit.spread > WIDE:
        wide = f"logits scatter by {fit.spread:.1f} within the batch: the counts are a guess"
        reason = f"{reason}; {wide}" if reason else wide
    return LabelEstimate.of(
        lattice.counts, lattice.confidence, METHOD, ASSUMPTIONS, reason, fit.estimates
    )


def _fit(head: HeadGradient, sums: Tensor, guessed: bool, known: Tensor | None = None) -> Fit:
    """Iterate the two equations, counts free or held at ``known``; sums ``guessed`` or sent."""
    weight, bias = head.head_parameters()
    batch, sharp = head.batch_size, head.sharpness
    cotangents = sums - head.loss.label_smoothing * batch / head.classes
    rows = head.rows @ weight.T
    counts = nearest_simplex(solve(head, sums), batch) if known is None else known
    apart = torch.zeros_like(rows)  # logits of class means minus those of the batch's mean
    shared = torch.zeros_like(rows)  # sum_k n_k P_kj (m_k - m)
    for step in range(STEPS):
        occurs = counts > 0.0
        noise = sharp * counts + FLOOR
        information = (cotangents.square() / noise).sum()
        mean = (cotangents / noise) @ (rows - shared) / information
        # Shrunk by count / noise: a class of half a sample has half a mean.
        moved = (torch.outer(cotangents, mean) + shared - rows) * (counts / noise**2)[:, None]
        apart = moved if step == 0 else (apart + moved) / 2.0
        held, logits = counts[occurs], mean + bias + apart[occurs]
        scatter = _scatter(held, apart[occurs])
        probabilities = _mean_softmax(logits, scatter, held)
        estimates = (held @ probabilities - sums) / sharp
        bent = held @ (probabilities - torch.softmax(logits, dim=1)) / sharp
        if known is None:
            counts = nearest_simplex(estimates, batch)
        shared = (counts[occurs, None] * probabilities).T @ apart[occurs]
    p = torch.softmax(mean + bias, dim=0)
    moves = batch * (scatter * p - torch.outer(scatter @ p, p)) / sharp
    alone = SPREAD**2 + (DOUBT * bent) ** 2 + (SIZES**2 * counts if guessed else 0.0)
    covariance = moves.T @ moves / information + torch.diag(alone)
    spread = (scatter - (scatter @ p)[:, None]).norm(dim=0).max()
    return Fit(estimates, covariance, float(spread))


def _scatter(counts: Tensor, apart: Tensor) -> Tensor:
    """A root of the covariance of one sample's logits, [at most 8, C].

    Class means of n_j samples scatter by 1/n_j of it, about K - 1 times for K classes.
    """
    classes = max(float((counts > 0.3).sum()) - 1.0, 1.0)
    roots = (counts / classes).sqrt()[:, None] * apart
    # The Gram matrix is K by K and its eigenvectors always converge; s V^T = U^T roots.
    _, u = torch.linalg.eigh(roots @ roots.T)
    chosen: Tensor = u[:, -DIRECTIONS:].T @ roots
    return chosen


def _mean_softmax(logits: Tensor, scatter: Tensor, counts: Tensor) -> Tensor:
    """Mean softmax over the samples of every class around its mean, [K, C].

    A cubature of two points per direction; a class of n samples scatters by 1 - 1/n around its
    own mean, so a single sample not at all.
    """
    within = (1.0 - 1.0 / counts.clamp_min(1.0)).sqrt()
    points = scatter * len(scatter) ** 0.5
    points = torch.cat([points, -points])
    return torch.softmax(logits[:, None] + within[:, None, None] * points, dim=-1).mean(dim=1)
