"""Heads without a bias: what stands for the bias gradient that was never sent."""

from __future__ import annotations

from collections.abc import Callable

from scipy.optimize import brentq
from torch import Tensor

from rgap.labels.columns import signs_unknown
from rgap.labels.head import HeadGradient

__all__ = ["bias_sums"]

FLAG = "no bias: its gradient was estimated from row sums and a class that does not occur"


def bias_sums(head: HeadGradient) -> tuple[Tensor, str] | str:
    """``head.sums`` and a flag, empty with a bias; or why a head without one leaves it open.

    The row sums ``r_j = sum_i (p_ij - y_ij) |x_i|_1`` of features of one sign are the bias gradient
    times their mean size a. In a batch with B < C some class does not occur, and there
    ``B p_j(a) = r_j / a`` with ``p(a) = softmax(a W u + b)``, u = the mean feature of size 1; every
    other class has ``B p_j(a) > r_j / a``. So a is the smallest size at which all counts are
    non-negative, refined on the classes whose count is then zero.
    """
    if head.bias_gradient is not None:
        return head.sums, ""
    if head.nonnegative is not True:
        return f"the head has no bias gradient, and {signs_unknown(head)}"
    if head.batch_size >= head.classes:
        return (
            "the head has no bias gradient, and its size shows only in a class that does not "
            f"occur: expected B < C, got B = {head.batch_size} and C = {head.classes}"
        )
    if head.loss.label_smoothing:
        return "the head has no bias gradient, and label smoothing hides which classes are absent"
    r = head.rows.sum(dim=1)
    energy = float(r.square().sum())
    if energy == 0.0:
        return "the head has no bias gradient and its weight gradient is zero"
    unit = (r @ head.rows / energy)[None]

    def surplus(size: float) -> Tensor:
        return head.batch_size * head.probabilities(size * unit)[0] - r / size

    high = float(r.abs().max())
    for _ in range(60):
        if float(surplus(high).min()) >= 0.0:
            break
        high *= 2.0
    else:
        return "the head has no bias gradient, and no size of its features fits the model"
    low = high / 2.0
    while float(surplus(low).min()) >= 0.0 and low > 1e-9 * high:
        low /= 2.0
    size = _root(lambda a: float(surplus(a).min()), low, high) or high
    for _ in range(3):
        absent = surplus(size) < 0.5
        size = _root(lambda a, at=absent: float(surplus(a)[at].sum()), size / 2, size * 2) or size
    return r / size, FLAG


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where f crosses zero between two ends, or 0.0 if it has one sign there."""
    if f(low) * f(high) > 0.0:
        return 0.0
    return float(brentq(f, low, high))
