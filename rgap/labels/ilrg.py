"""iLRG: counts from a linear system in which every class has its own mean feature."""

from __future__ import annotations

import torch
from scipy.linalg import lstsq
from torch import Tensor

from rgap.labels.gradient import HeadGradient
from rgap.labels.integers import nearest_counts
from rgap.labels.result import LabelEstimate
from rgap.labels.unbiased import bias_sums

__all__ = ["class_probabilities", "ilrg"]

METHOD = "ilrg"
ASSUMPTIONS = (
    "the mean feature of class j is dW_j / db_j",
    "the softmax of a class's mean is the mean of its softmaxes",
)


def ilrg(head: HeadGradient) -> LabelEstimate:
    """Counts n from ``[1^T; P^T - I] n = [B; B db]`` with ``P_j = softmax(W dW_j / db_j + b)``.

    Row j of the weight gradient over entry j of the bias gradient is a weighted mean of the
    features, taken for the mean of class j; the identity ``n = sum_i p_i - B db`` then becomes a
    linear system for n, solved by least squares and projected on the nearest counts that add up
    to B (the published repair of rounded counts does not give those).

    Args:
        head: the gradient, with ``weight`` (and ``bias``) of the model. Without ``bias_gradient``
            it is estimated, see `rgap.labels.unbiased`.

    Returns:
        The estimate; ``estimates`` is the least-squares n. ``confidence`` is ``1 - 2 |distance|``
        of it to the counts, not below 0.

    Raises:
        ValueError: no ``weight``.

    Source: Ma et al. 2023, iLRG.

    Example:
        >>> import torch
        >>> W, x = torch.eye(3).double() / 4, torch.eye(3).double() / 9 + 2
        >>> k = torch.softmax(x @ W.T, 1) - torch.eye(3)[[0, 0, 2]]
        >>> ilrg(HeadGradient(k.T @ x / 3, k.mean(0), 3, W)).labels
        tensor([0, 0, 2])
    """
    read = bias_sums(head)
    if isinstance(read, str):
        return LabelEstimate.undecided(head.classes, METHOD, ASSUMPTIONS, read)
    sums, reason = read
    estimates = solve(head, sums).cpu()
    counts = nearest_counts(estimates, head.batch_size)
    return LabelEstimate.rounded(estimates, counts, METHOD, ASSUMPTIONS, reason)


def solve(head: HeadGradient, sums: Tensor) -> Tensor:
    """The least-squares counts [C], not rounded."""
    p = class_probabilities(head, sums)
    eye = torch.eye(head.classes, dtype=p.dtype, device=p.device)
    system = torch.cat([torch.ones_like(p[:1]), p.T - head.sharpness * eye])
    right = torch.cat([sums.new_tensor([float(head.batch_size)]), sums])
    # By QR with pivots: the divide-and-conquer SVD fails to converge on some of these systems,
    # whose rows for absent classes are nearly alike.
    solution = lstsq(system.numpy(), right.numpy(), lapack_driver="gelsy")[0]
    return torch.from_numpy(solution)


def class_probabilities(head: HeadGradient, sums: Tensor) -> Tensor:
    """``softmax(W dW_j / db_j + b)`` for every class j, [C, C]; x = 0 where db_j is."""
    smoothed = head.loss.label_smoothing * head.batch_size / head.classes
    divisor = (sums - smoothed)[:, None]
    # An entry below the rounding of the largest one is rounding itself.
    eps = torch.finfo(head.weight_gradient.dtype).eps
    lost = divisor.abs() <= eps * divisor.abs().max()
    return head.probabilities(head.rows / torch.where(lost, torch.inf, divisor))
