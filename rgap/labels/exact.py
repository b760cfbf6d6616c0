"""The exact identity: counts from recovered features, certified by whole numbers."""

from __future__ import annotations

import torch
from scipy.linalg import lstsq
from torch import Tensor

from rgap.labels.gradient import HeadGradient
from rgap.labels.integers import nearest_counts
from rgap.labels.result import LabelEstimate

__all__ = ["exact"]

METHOD = "exact"
ASSUMPTIONS = (
    "the features are those of the client's batch",
    "one gradient, cross-entropy without class weights",
)
# Half-way between two counts would be 0.5; a quarter leaves no doubt which one is meant.
FARTHEST = 0.25


def exact(head: HeadGradient) -> LabelEstimate:
    """Counts from ``(1 - e) n_j = sum_i p_ij - (s db_j + e B / C)`` at known features.

    The identity holds exactly, repeats included, for any batch size and features of any sign. The
    right-hand side comes out as whole numbers only if features, loss and model are the client's:
    the distance to them certifies the counts.

    Without a bias gradient the identity holds for every mixture of the rows:
    ``(1 - e) Y^T X v = (P - e/C)^T X v - s dW v``; any v with ``X v = 1`` gives the counts, and
    exists if the features are linearly independent (or some feature is constant).

    Args:
        head: the gradient, with ``weight``, ``bias`` and the batch's ``features`` [B, d].

    Returns:
        The estimate; ``estimates`` are the right-hand sides. ``confidence`` is 1 − 2·(distance
        from the count). Undecided without features, for an average over local steps, where
        some number is further than 0.25 from a count, and where no v exists.

    Raises:
        ValueError: no ``weight``.

    Source: the cotangent of the cross-entropy summed over the batch; iDLG, LLG and iLRG
    approximate it.

    Example:
        >>> import torch
        >>> W, x = torch.eye(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        >>> k = (torch.softmax(x @ W.T, 1) - torch.eye(3)[[2, 0, 2, 2]]) / 4
        >>> exact(HeadGradient(k.T @ x, k.sum(0), 4, W, features=x)).counts
        tensor([1, 0, 3])
    """
    if head.features is None:
        return _open(
            head,
            "the features of the batch are needed; write features=rgap.invert(model, update)."
            "features[layer] with the last layer's name, where these are determined",
        )
    if head.local_steps > 1:
        return _open(
            head,
            f"an average over {head.local_steps} local steps: the weights moved between them, and "
            "the identity holds for one gradient",
        )
    features = head.features.detach().double().cpu()
    expected = head.probabilities(features).sum(dim=0)
    if head.bias_gradient is not None:
        estimates = (expected - head.sums) / head.sharpness
    else:
        mixture = _ones(features)
        if mixture is None:
            return _open(
                head,
                "the head has no bias gradient and its features are linearly dependent: only "
                "mixtures of the counts are determined",
            )
        smoothed = head.loss.label_smoothing * head.batch_size / head.classes
        estimates = (expected - head.rows @ mixture - smoothed) / head.sharpness
    counts = nearest_counts(estimates, head.batch_size)
    distance = float((estimates - counts).abs().max())
    if distance > FARTHEST:
        return _open(
            head,
            f"the identity gives numbers up to {distance:.2g} from counts: features, labels' loss "
            "or weights are not the client's",
        )
    return LabelEstimate.rounded(estimates.cpu(), counts.cpu(), METHOD, ASSUMPTIONS)


def _open(head: HeadGradient, reason: str) -> LabelEstimate:
    return LabelEstimate.undecided(head.classes, METHOD, ASSUMPTIONS, reason)


def _ones(features: Tensor) -> Tensor | None:
    """The v of least norm with ``X v = 1``, or None."""
    ones = features.new_ones(len(features))
    solution = lstsq(features.numpy(), ones.numpy(), lapack_driver="gelsy")[0]
    v = torch.from_numpy(solution)
    return v if float((features @ v - ones).abs().max()) < 1e-6 else None
