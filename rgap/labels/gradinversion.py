"""GradInversion's rule: a class occurs if its row of the weight gradient has a negative entry."""

from __future__ import annotations

import torch

from rgap.labels.gradient import HeadGradient
from rgap.labels.result import LabelEstimate

__all__ = ["gradinversion"]

METHOD = "gradinversion"
ASSUMPTIONS = ("features of one sign (at least 0)", "no label occurs twice", "no label smoothing")


def gradinversion(head: HeadGradient) -> LabelEstimate:
    """The B classes with the smallest entry in their row of the head's weight gradient.

    Row j is ``sum_i (p_ij - y_ij) x_i``. With features ``x >= 0`` every term is non-negative
    except those of samples with label j, so a negative entry proves that j occurs; the rule
    takes the B classes with the smallest minimum over the feature dimension.

    Args:
        head: the gradient; ``bias_gradient`` is not used.

    Returns:
        The estimate. ``confidence`` is 1 for a chosen class whose row has a negative entry (a
        proof), and for a class left out whose row has none; else 0. ``reason`` says how many
        choices had no proof: then labels repeat, which this rule cannot say.
        Undecided where B > C, or where the features may be negative.

    Source: Yin et al. 2021, GradInversion.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.2], [0.1, 2.0]])
        >>> k = torch.tensor([[0.3, -0.7, 0.4], [-0.9, 0.4, 0.5]]) / 2
        >>> gradinversion(HeadGradient(k.T @ x, None, 2, probes=x)).labels
        tensor([0, 1])
    """
    if head.nonnegative is not True:
        return LabelEstimate.undecided(head.classes, METHOD, ASSUMPTIONS, signs_unknown(head))
    if head.loss.label_smoothing:
        return LabelEstimate.undecided(
            head.classes, METHOD, ASSUMPTIONS, "label smoothing gives rows of absent classes signs"
        )
    if not bool(head.rows.any()):
        return LabelEstimate.undecided(
            head.classes, METHOD, ASSUMPTIONS, "the weight gradient is zero"
        )
    lowest = head.rows.min(dim=1).values
    proved = lowest < 0
    if head.batch_size > head.classes:
        return LabelEstimate.undecided(
            head.classes,
            METHOD,
            ASSUMPTIONS,
            f"B = {head.batch_size} samples of C = {head.classes} classes repeat labels",
            present=proved,
            confidence=proved.double(),
        )
    counts = torch.zeros(head.classes, dtype=torch.long, device="cpu")
    counts[lowest.argsort(stable=True)[: head.batch_size].cpu()] = 1
    confidence = (proved.cpu() == (counts > 0)).double()
    unproved = int(((counts > 0) & ~proved.cpu()).sum())
    reason = f"{unproved} of {head.batch_size} labels without proof: some repeat"
    return LabelEstimate.of(counts, confidence, METHOD, ASSUMPTIONS, reason if unproved else "")


def signs_unknown(head: HeadGradient) -> str:
    """Why a method that reads signs of rows is undecided."""
    if head.nonnegative is None:
        return "the sign of the features is unknown; give features or probes of the head's input"
    return "the head's features have both signs, so the signs of its rows say nothing"
