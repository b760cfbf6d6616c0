"""Parameters sent where gradients are expected.

Weights after training differ from those before by ``η g``: their cosine with the model's own is
near 1, and so is the ratio of the norms.  A gradient is nowhere near.
"""

from __future__ import annotations

from math import inf

from torch import nn

from rgap.arithmetic.doubles import blocks
from rgap.diagnosis.finding import Finding, Kind
from rgap.remedy import Remedy
from rgap.update.update import Update

ALIKE = 0.9  # cosine; the gradient of a network is within about 0.3 of its weights
RATIO = 1.5  # of the norms


def sent(model: nn.Module, update: Update) -> Finding | None:
    """The finding, or None."""
    inner, own, theirs = 0.0, 0.0, 0.0
    for name, parameter in model.named_parameters():
        for weights, sent in zip(blocks(parameter), blocks(update.gradients[name]), strict=True):
            w, g = weights.double().cpu(), sent.double().cpu()
            inner, own, theirs = inner + float(w @ g), own + float(w @ w), theirs + float(g @ g)
    if own == 0.0 or theirs == 0.0:
        return None
    cosine, ratio = inner / (own * theirs) ** 0.5, (theirs / own) ** 0.5
    if cosine < ALIKE or not 1 / RATIO < ratio < RATIO:
        return None
    said = (
        f"the cosine with the model's own weights is {cosine:.6f}, the ratio of the norms "
        f"{ratio:.4f}"
    )
    line = Remedy("rgap.Update.from_delta(model, update.gradients, lr=0.01)", "--after-step 0.01")
    return Finding(Kind.PARAMETERS, cosine, said, f"{line} with the client's rate", inf)
