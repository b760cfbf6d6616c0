"""Our estimate: the likeliest counts under three hypotheses of what the batch is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.labels.gradient import HeadGradient
from rgap.labels.integers import nearest_counts
from rgap.labels.lattice import costs_of, search, swaps
from rgap.labels.posterior import Contrasts, Posterior
from rgap.labels.result import LabelEstimate
from rgap.labels.unbiased import bias_sums

__all__ = ["best"]

IMPOSSIBLE = 10.0  # times the batch size, which bounds Σ p − n, that noise may leave of it
METHOD = "best"
ASSUMPTIONS = (
    "the mean of the batch's logits is within about two scatters of that on dummy data",
    "their logits scatter by less than about 1",
)
WIDE = 1.0
UNLIKELY, MOVES = 60.0, 2000  # chi-squared beyond the best, and how many in all, from one place


def best(head: HeadGradient) -> LabelEstimate:
    """The likeliest counts, with the sum of the softmaxes estimated from the rows and a prior.

    The identity ``n = sum_i p_i - s db`` is exact; all that is open is the batch's mean logits, and
    how they scatter.  Two sources tell of the mean: the rows of the weight gradient, which are
    ``s db_j`` times the mean feature plus the scatter of the samples, and the network's own answers
    to dummy data.  A batch near its expectation, such as a balanced one, has ``db`` near 0 and rows
    that are all scatter: there dummy data decide.  Elsewhere the rows do.  See
    `rgap.labels.posterior`.

    How much the rows say depends on the counts: of a batch of one class they are the mean feature
    itself, and so a wrong guess of one class would prove itself.  The errors are therefore taken
    under three hypotheses (the counts by the identity with dummy data's mean softmax, those found
    along with the mean, and whole numbers nearest to these), each with the batch's mean as near to
    that of dummy data as chance has it, half a standard deviation off, and two.  The odds of counts
    are the mean of the odds under each, weighted by how well it agrees with the rows.

    Args:
        head: the gradient, with ``weight`` (and ``bias``) of the model, and ``probes`` for the
            prior.  Without ``bias_gradient`` it is estimated, see `rgap.labels.unbiased`.

    Returns:
        The estimate; ``estimates`` are the real-valued counts.  ``confidence`` is the probability
        that goes to counts with the same number for that class.  ``reason`` flags logits that
        scatter by more than 1: a trained network.

    Raises:
        ValueError: no ``weight``.

    Source: this library; compare Ma et al. 2023; the averaging of models: Hoeting et al. 1999.

    Example:
        >>> import torch
        >>> W, x = torch.eye(3).double() / 4, torch.eye(3).double() / 9 + 2
        >>> k = torch.softmax(x @ W.T, 1) - torch.eye(3)[[0, 0, 2]]
        >>> best(HeadGradient(k.T @ x / 3, k.mean(0), 3, W, probes=x)).labels
        tensor([0, 0, 2])
    """
    read = bias_sums(head)
    if isinstance(read, str):
        return LabelEstimate.undecided(head.classes, METHOD, ASSUMPTIONS, read)
    sums, reason = read
    most = float(sums.abs().max())
    if not most <= IMPOSSIBLE * head.batch_size:
        why = (
            f"the head's gradient is of a size that no probabilities send: an entry of Σ p − n is "
            f"{most:.1e}, at a batch size of {head.batch_size} it is at most that"
        )
        return LabelEstimate.undecided(head.classes, METHOD, ASSUMPTIONS, why)
    contrasts, batch = Contrasts(head, sums), head.batch_size
    plain = nearest_counts(contrasts.plain(), batch)
    try:
        free = contrasts.fit()
    except RuntimeError:  # of a decomposition, whose matrix is not finite
        why = "the head's gradient is of a size that no probabilities at its weights send"
        return LabelEstimate.undecided(head.classes, METHOD, ASSUMPTIONS, why)
    top = max(free, key=lambda fit: fit.weight)
    nearest = search(top.estimates, top.covariance, batch)
    hypotheses = [plain] if torch.equal(plain, nearest) else [plain, nearest]
    fits = free + [fit for known in hypotheses for fit in contrasts.fit(known)]
    pool = _pool([plain, *(search(f.estimates, f.covariance, batch) for f in fits)], fits)
    weights = torch.softmax(torch.tensor([f.weight for f in fits], device="cpu").double(), 0)
    odds = weights @ torch.stack([_odds(pool, fit) for fit in fits])
    counts = pool[odds.argmax()]
    confidence = odds @ (pool == counts).double()
    if max(fit.spread for fit in fits) > WIDE:
        wide = f"logits scatter by {top.spread:.1f} within the batch: the counts are a guess"
        reason = f"{reason}; {wide}" if reason else wide
    return LabelEstimate.of(
        counts, confidence.clamp(0.0, 1.0), METHOD, ASSUMPTIONS, reason, top.estimates
    )


def _odds(pool: Tensor, fit: Posterior) -> Tensor:
    """Probability of each of the counts of ``pool`` among them, [N].

    Where even the best is further off than its errors allow, chi-squared above its C - 1 degrees
    of freedom, the errors are taken as larger by so much.  Source: Birge 1932.
    """
    away = pool.double() - fit.estimates
    costs = (away * torch.linalg.solve(fit.covariance, away.T).T).sum(1)
    misfit = costs.min() / (len(fit.estimates) - 1)
    return torch.softmax(-costs / (2.0 * misfit.clamp_min(1.0)), 0)


def _pool(tops: list[Tensor], fits: list[Posterior]) -> Tensor:
    """Counts, and what one label moved to another class makes of them, [N, C].

    Moves that are beyond odds of ``exp(-UNLIKELY / 2)`` under every hypothesis are left out, and of
    very many all but the likeliest.
    """
    distinct = torch.unique(torch.stack(tops), dim=0)
    precisions = [torch.linalg.inv(fit.covariance) for fit in fits]
    costs = [costs_of(distinct, f.estimates, p) for f, p in zip(fits, precisions, strict=True)]
    pool = [distinct]
    for k, counts in enumerate(distinct):
        beyond = torch.stack([
            cost[k] - cost.min() + swaps(counts, fit.estimates, precision)
            for fit, precision, cost in zip(fits, precisions, costs, strict=True)
        ]).amin(0)  # fmt: skip
        places = beyond.flatten().argsort()[:MOVES]
        places = places[beyond.flatten()[places] < UNLIKELY]
        moved = counts.repeat(len(places), 1)
        index = torch.arange(len(places), device=counts.device)
        moved[index, places // len(counts)] += 1
        moved[index, places % len(counts)] -= 1
        pool.append(moved)
    every: Tensor = torch.unique(torch.cat(pool), dim=0)
    return every
