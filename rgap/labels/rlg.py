"""RLG: which classes occur, from a linear program per class on the gradient's column space."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import svd
from scipy.optimize import linprog

from rgap.labels.gradient import HeadGradient
from rgap.labels.result import LabelEstimate

__all__ = ["rlg"]

METHOD = "rlg"
ASSUMPTIONS = (
    "B <= C - 1, and features that are linearly independent",
    "no label smoothing",
    "a class whose row can be separated occurs (the converse is proved)",
)


def rlg(head: HeadGradient) -> LabelEstimate:
    """The classes that occur, as those whose row can be separated from all others.

    With ``dW = U S V^T`` of rank B the rows of the cotangent lie in the span of U's columns. A
    sample of class c has a cotangent that is negative in entry c alone, so there is an r with
    ``U_c r < 0`` and ``U_j r >= 0`` for all j ≠ c: a linear program per class. Signs of features
    do not matter, and no bias is needed.

    Args:
        head: the gradient; only the weight's is used.

    Returns:
        The estimate: ``present``, and counts and labels where as many classes as samples occur, so
        that none repeats. ``confidence`` is how far the program got, ``-U_c r`` for the best r in
        a box where 1 is the most, for classes found; one minus it for the others. Undecided for
        B >= C, where every class can be separated.

    Source: Dang et al. 2021, RLG.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, -0.2, 0.3], [0.1, 1.0, -0.5]])
        >>> k = torch.tensor([[0.2, -0.7, 0.4, 0.1], [0.3, 0.2, -0.6, 0.1]])
        >>> rlg(HeadGradient(k.T @ x, None, 2)).labels
        tensor([1, 2])
    """
    classes, batch = head.classes, head.batch_size
    if batch >= classes:
        return LabelEstimate.undecided(
            classes,
            METHOD,
            ASSUMPTIONS,
            f"expected B <= C - 1, got B = {batch} and C = {classes}: the gradient's rank is "
            "full and every class can be separated",
        )
    if head.loss.label_smoothing:
        return LabelEstimate.undecided(
            classes,
            METHOD,
            ASSUMPTIONS,
            "label smoothing makes cotangents of absent classes negative",
        )
    basis = _column_space(head)
    if basis.shape[1] == 0:
        return LabelEstimate.undecided(classes, METHOD, ASSUMPTIONS, "the weight gradient is zero")
    shares = [_separation(basis, c) for c in range(classes)]
    reached = torch.tensor(shares, dtype=torch.float64, device="cpu")
    present = reached > 0.5
    confidence = torch.where(present, reached, 1.0 - reached)
    occurring, rank = int(present.sum()), basis.shape[1]
    if occurring == batch:
        return LabelEstimate.of(present.long(), confidence, METHOD, ASSUMPTIONS)
    reason = (
        f"{occurring} class{'es occur' if occurring > 1 else ' occurs'} among {batch} samples: "
        "labels repeat, and how often is not said"
        if 0 < occurring < batch
        else f"{occurring} classes can be separated with {batch} samples"
    )
    if rank < batch:
        reason += f"; the gradient has rank {rank} only"
    return LabelEstimate.undecided(classes, METHOD, ASSUMPTIONS, reason, present, confidence)


def _column_space(head: HeadGradient) -> NDArray[np.float64]:
    """Orthonormal basis of the gradient's column space, [C, rank], rank at most B."""
    rows = head.rows.numpy()
    u, s, _ = svd(rows, full_matrices=False, lapack_driver="gesvd")
    eps = torch.finfo(head.weight_gradient.dtype).eps
    rank = int((s > s[0] * eps * max(rows.shape)).sum()) if s[0] > 0 else 0
    basis: NDArray[np.float64] = u[:, : min(rank, head.batch_size)]
    return basis


def _separation(basis: NDArray[np.float64], label: int) -> float:
    """The largest ``-U_c r`` up to 1 with ``U_j r >= 0`` for j ≠ c; 0 if there is none."""
    others = np.delete(basis, label, axis=0)
    solved = linprog(
        basis[label],
        A_ub=np.vstack([-others, -basis[label : label + 1]]),
        b_ub=np.append(np.zeros(len(others)), 1.0),
        bounds=(None, None),
        method="highs",
    )
    return float(min(max(-solved.fun, 0.0), 1.0)) if solved.status == 0 else 0.0
