"""Heads without a bias: what stands for the bias gradient that was never sent."""

from __future__ import annotations

import math

from scipy.optimize import minimize_scalar
from torch import Tensor

from rgap.labels.gradient import HeadGradient
from rgap.labels.gradinversion import signs_unknown

__all__ = ["bias_sums"]

STEP, PLACES = 0.02, 400  # of the logarithm of a: a factor 3000
FLAG = "no bias: its gradient was estimated from row sums and a class that does not occur"


def bias_sums(head: HeadGradient) -> tuple[Tensor, str] | str:
    """``head.sums`` and a flag, empty with a bias; or why a head without one leaves it open.

    The row sums ``r_j = sum_i (p_ij - y_ij) |x_i|_1`` of features of one sign are the bias gradient
    times their mean size a. In a batch with B < C some class does not occur, and there
    ``B p_j(a) = r_j / a`` with ``p(a) = softmax(a W u)``, u = the mean feature of size 1, while
    every class that occurs has ``B p_j(a) > r_j / a``. So a is the size at which the C - B classes
    that fit best do so best.
    """
    if head.bias_gradient is not None:
        if not bool(head.bias_gradient.any()):
            return "the bias gradient is zero: it underflowed, or the loss was minimal"
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

    absent = head.classes - head.batch_size  # at least so many do not occur

    def misfit(log_size: float) -> float:
        size = math.exp(log_size)
        # Relative, or a size at which the softmax is all but zero would fit every absent class.
        ratio = r / (size * head.batch_size * head.probabilities(size * unit)[0].clamp_min(1e-300))
        return float((1.0 - ratio).abs().sort().values[:absent].square().sum())

    # sum |n_j - B p_j| <= 2 B, so that no smaller size is possible.
    least = math.log(float(r.abs().sum()) / (2.0 * head.batch_size))
    grid = [least + STEP * k for k in range(PLACES)]
    values = [misfit(place) for place in grid]
    k = values.index(min(values))
    if not 0 < k < PLACES - 1:
        return "the head has no bias gradient, and no size of its features fits the model"
    nearest = minimize_scalar(misfit, bounds=(grid[k - 1], grid[k + 1]), method="bounded")
    return r / math.exp(float(nearest.x)), FLAG
