"""Lines of solutions: samples whose own equations leave a direction open.

Where φ is linear between two samples, every point of the line through them satisfies the equations
of both: ``f(q)`` moves inside the span of their own images.  That is so for samples that share a
whole pattern of active units of a piecewise linear φ, and to working precision for samples that are
nearly alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.network.activations.piecewise import Activation
from rgap.separation.between import Between
from rgap.separation.subspace import Consistency, restricted

FLAT = 1e-8  # σ of a direction that no equation of a root sees, relative
BLURRED = 3.0  # times the error of P that such a direction may seem to be seen by
MOST = 1e-2  # relative σ above which a direction counts as seen, whatever the error of P


def open_directions(consistency: Consistency, q: Tensor) -> int:
    """How many directions the equations leave open at q [R], up to the error of P."""
    samples = consistency.samples
    whole = restricted(consistency, samples.weights, samples.weights.new_zeros(0, samples.rank))
    if whole.directions.shape[1] == 0:
        return 0
    slope = consistency.derivative(q[None], whole.directions)[1][0]
    values = torch.linalg.svdvals(consistency.project(slope.T))
    blur = float(consistency.blur.max()) * consistency.basis.shape[0] ** 0.5
    # Against f's own slope: where all samples share one pattern nothing is left of it.
    largest = float(torch.linalg.matrix_norm(slope, 2))
    return int((values < max(FLAT, min(BLURRED * blur, MOST)) * largest).sum())


def on_line(consistency: Consistency, q: Tensor) -> bool:
    """True if q [R] lies on a line of solutions, or at its end: a kink, open from one side."""
    points = torch.cat([q[None], consistency.across_kinks(q)])
    return any(open_directions(consistency, point) > 0 for point in points)


def lines(consistency: Between, roots: Tensor) -> str:
    """Which of the roots lie on lines of solutions, and why; "" if none does.

    Args:
        consistency: of the roots.
        roots: rows q, [F, R].
    """
    on = sum(on_line(consistency, q) for q in roots)
    if not on:
        return ""
    bent = [op for op in consistency.steps if isinstance(op, Activation)]
    if all(op.homogeneous for op in bent):  # piecewise linear
        between = ", ".join(f"'{op.name}' ({op.kind})" for op in bent)
        why = (
            f"samples that share a whole pattern of active units of {between}, which is linear "
            "between them"
        )
    else:
        why = "samples that are alike to this precision"
    return (
        f"{on} of {len(roots)} points that satisfy the equations lie on lines of such points: {why}"
    )
