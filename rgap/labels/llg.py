"""LLG and LLG*: one sample of a class lowers the sum of its row by about the same impact m."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.labels.gradient import HeadGradient
from rgap.labels.gradinversion import signs_unknown
from rgap.labels.result import LabelEstimate

__all__ = ["llg", "llg_star"]

ASSUMPTIONS = (
    "features of one sign (at least 0)",
    "every sample moves its class by the same impact",
    "no label smoothing",
)
DUMMY = "features as large as those of dummy data"


def llg(head: HeadGradient) -> LabelEstimate:
    """Counts from the sums of the weight gradient's rows, with the impact taken from themselves.

    With features ``x >= 0`` the row sums ``g_j = sum_i (p_ij - y_ij) |x_i|_1`` are modelled as
    ``g_j = n_j m``. A negative sum proves that j occurs, and the negative sums of B samples give
    ``m = (1 + 1/C) / B * sum_{g_j < 0} g_j``, where 1 + 1/C makes up for the positive part p. After
    one label for each proved class, the rest goes one by one to the smallest remaining sum.

    Args:
        head: the gradient; ``bias_gradient`` is not used.

    Returns:
        The estimate; ``estimates`` is ``g / m``. ``confidence`` is ``1 - 2 |g_j / m - n_j|``, not
        below 0. Undecided where the features may be negative or no sum is negative.

    Source: Wainakh et al. 2022, LLG.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.2], [0.1, 1.0], [0.5, 0.6]])
        >>> k = torch.tensor([[0.3, -0.7, 0.4], [0.3, -0.6, 0.3], [-0.7, 0.4, 0.3]]) / 3
        >>> llg(HeadGradient(k.T @ x, None, 3, probes=x)).labels
        tensor([0, 1, 1])
    """
    why = _unfit(head)
    if why:
        return LabelEstimate.undecided(head.classes, "llg", ASSUMPTIONS, why)
    sums = head.rows.sum(dim=1)
    impact = float(sums.clamp_max(0.0).sum()) * (1.0 + 1.0 / head.classes) / head.batch_size
    return _assigned(head, sums, impact, torch.zeros_like(sums), "llg", ASSUMPTIONS)


def llg_star(head: HeadGradient) -> LabelEstimate:
    """`llg` with impact and offsets measured on dummy data in the client's model.

    The dummy batches of class c say what one sample adds to its own row, ``(p_c - 1) |x|_1``, and
    to the others, the offset ``s_j``. Both have closed forms in the dummy features, so no dummy
    gradient is computed:
    ``m = (1 + 1/C) / C * sum_c mean_x (p_c - 1) |x|_1`` and ``s_j = B mean_x p_j |x|_1``.

    Args:
        head: the gradient, with ``weight`` and with the features of dummy data as ``probes``.

    Returns:
        The estimate; ``estimates`` is ``(g - s) / m``. ``confidence`` is 1 − 2·(distance from the
        count), not below 0. Undecided as `llg`, and without the model.

    Source: Wainakh et al. 2022, LLG* (the white-box attacker without auxiliary data).

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.2], [0.1, 1.0], [0.5, 0.6]])
        >>> k = torch.softmax(x @ torch.eye(2), 1) - torch.eye(2)[[0, 1, 1]]
        >>> head = HeadGradient(k.T @ x / 3, None, 3, torch.eye(2), probes=x)
        >>> llg_star(head).labels
        tensor([0, 1, 1])
    """
    assumptions = (*ASSUMPTIONS, DUMMY)
    why = _unfit(head)
    if not why and (head.weight is None or head.probes is None):
        why = "the head's weight and its features on dummy data are needed"
    if why or head.probes is None:
        return LabelEstimate.undecided(head.classes, "llg_star", assumptions, why)
    size = head.probes.detach().double().sum(dim=1, keepdim=True)
    probabilities = head.probabilities(head.probes)
    impact = float(((probabilities - 1.0) * size).mean()) * (1.0 + 1.0 / head.classes)
    offsets = (probabilities * size).mean(dim=0) * head.batch_size
    return _assigned(head, head.rows.sum(dim=1), impact, offsets, "llg_star", assumptions)


def _unfit(head: HeadGradient) -> str:
    if head.nonnegative is not True:
        return signs_unknown(head)
    if not bool(head.rows.any()):
        return "the weight gradient is zero"
    return "label smoothing changes the impact of a sample" if head.loss.label_smoothing else ""


def _assigned(
    head: HeadGradient,
    sums: Tensor,
    impact: float,
    offsets: Tensor,
    method: str,
    assumptions: tuple[str, ...],
) -> LabelEstimate:
    """One label for every negative sum, the rest one by one to the smallest."""
    if not impact < 0.0:
        return LabelEstimate.undecided(
            head.classes, method, assumptions, "no row has a negative sum: no impact to count with"
        )
    counts = torch.zeros(head.classes, dtype=torch.long, device="cpu")
    proved = (sums < 0).nonzero().flatten()
    # More proofs than samples: the stated batch size is too small, and the smallest come first.
    proved = proved[sums[proved].argsort()][: head.batch_size]
    counts[proved.cpu()] = 1
    left = sums - offsets
    left[proved] -= impact
    for _ in range(head.batch_size - len(proved)):
        smallest = int(left.argmin())
        counts[smallest] += 1
        left[smallest] -= impact
    negative = int((sums < 0).sum())
    reason = (
        f"{negative} classes have a negative row, more than B = {head.batch_size} samples can give"
        if negative > head.batch_size
        else ""
    )
    estimates = ((sums - offsets) / impact).cpu()
    return LabelEstimate.rounded(estimates, counts, method, assumptions, reason)
