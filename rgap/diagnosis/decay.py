"""Weight decay: beneath the rank of the batch a gradient is a multiple of the weights.

``G + λW`` with G of rank B: what singular vectors beyond B see of it is λ times what they see of W,
up to ``O(λ²)``, in every layer with the same λ.  Taken off, the vectors are nearer to those of G;
a few steps reach the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.finding import Finding, Kind
from rgap.diagnosis.noise import CLEAR, FEWEST, STATED, Floor

ALONG = 0.9  # cosine with the weights; of noise it is 1/4 at most
SAME = 0.02  # relative difference of λ between layers
STEPS = 6


def read(evidence: Evidence, layers: list[Floor]) -> tuple[list[Finding], dict[str, Tensor]]:
    """The finding, and the gradients without the decay."""
    gradients = dict(evidence.gradients)
    if not layers or evidence.batch is None:
        return [], gradients
    evidence.tested.add(Kind.DECAY)
    high = [f for f in layers if f.level > max(CLEAR * f.rounding, STATED * f.stated)]
    if len(high) < len(layers):
        return [], gradients
    weights = {
        f"{f.name}.weight": evidence.model.get_parameter(f"{f.name}.weight").detach().double()
        for f in high
    }
    rate, cosine = 0.0, 1.0
    for step in range(STEPS):
        seen = [_beneath(gradients[n] - rate * w, w, evidence.batch) for n, w in weights.items()]
        if step == 0:
            cosine = min((c for _, _, c in seen), key=abs)
            rates = [product / size for product, size, _ in seen]
            near = max(rates) - min(rates) <= SAME * max(abs(r) for r in rates)
            if abs(cosine) < ALONG or not near:
                return [], gradients
        rate += sum(p for p, _, _ in seen) / sum(s for _, s, _ in seen)
    said = (
        f"beneath rank {evidence.batch} the gradient of '{high[0].name}' is {rate:.4g} times its "
        f"weights (cosine {abs(cosine):.4f}), and so in {len(high)} layers; "
        "Update.from_delta(..., weight_decay=) undoes it too"
    )
    line = (
        f"dataclasses.replace(update, gradients={{n: g - {rate:.9g} * "
        "model.get_parameter(n).detach() for n, g in update.gradients.items()})"
    )
    strength = min(f.level / f.rounding for f in high)
    own = {n: evidence.model.get_parameter(n).detach().to(g) for n, g in gradients.items()}
    return [Finding(Kind.DECAY, rate, said, line, strength)], {
        n: g - rate * own[n] for n, g in gradients.items()
    }


def _beneath(gradient: Tensor, weight: Tensor, batch: int) -> tuple[float, float, float]:
    """⟨R, W⟩, ‖W‖² and their cosine, both seen by the singular vectors beyond the batch."""
    rows, columns = (gradient != 0).any(1), (gradient != 0).any(0)
    gradient, weight = gradient[rows][:, columns], weight[rows][:, columns]
    if min(gradient.shape, default=0) - batch < FEWEST:
        return 0.0, 1.0, 0.0
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    rest = torch.diag(values[batch:])
    seen = left[:, batch:].T @ weight @ right[batch:].T
    product, size = float((rest * seen).sum()), float(seen.square().sum())
    return product, size, product / max((size * float(rest.square().sum())) ** 0.5, 1e-300)
