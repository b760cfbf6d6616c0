"""Weight decay: beneath the rank of the batch a gradient is a multiple of the weights.

``G + λW`` with G of rank B: what singular vectors beyond B see of it is λ times what they see of W,
up to ``O(λ²)``, in every layer with the same λ.  Taken off, the vectors are nearer to those of G;
a few steps reach the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.finding import Finding, Kind
from rgap.diagnosis.noise import CLEAR, FEWEST, STATED, Floor
from rgap.remedy import Remedy

LEFT = 0.4  # of what is beneath, where the decay is taken off; of noise nearly all of it stays
SAME = 0.02  # relative difference of λ between layers
STEPS = 6
NOTHING = 1e-300  # in place of the square of weights of zero, which explain nothing beneath


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
    size = evidence.batch
    dense = {n: gradients[n] for n in weights}
    shared = sum(float((dense[n] * w).sum()) for n, w in weights.items())
    whole = shared / max(NOTHING, sum(float(w.square().sum()) for w in weights.values()))
    first = [_beneath(dense[n], w, size) for n, w in weights.items()]
    best: tuple[float, float] | None = None
    for start in (0.0, whole):  # the second where the decay is larger than the gradient
        rate = start
        for _ in range(STEPS):
            seen = [_beneath(dense[n] - rate * w, w, size) for n, w in weights.items()]
            rate += sum(s.product for s in seen) / sum(s.size for s in seen)
        seen = [_beneath(dense[n] - rate * w, w, size) for n, w in weights.items()]
        rates = [rate + s.product / s.size for s in seen]
        left = max(a.rest / max(b.rest, NOTHING) for a, b in zip(seen, first, strict=True))
        if (
            max(rates) - min(rates) <= SAME * abs(rate)
            and left <= LEFT
            and (not best or left < best[1])
        ):
            best = rate, left
    if best is None:
        return [], gradients
    rate, left = best
    said = (
        f"beneath rank {evidence.batch} the gradient of '{high[0].name}' is {rate:.4g} times its "
        f"weights, up to {left:.1e} of what is there, and so in {len(high)} layers"
        f"{Remedy('; Update.from_delta(..., weight_decay=) undoes it too', '')}"
    )
    line = Remedy(
        f"dataclasses.replace(update, gradients={{n: g - {rate:.9g} * "
        "model.get_parameter(n).detach() for n, g in update.gradients.items()})",
        f"--weight-decay {rate:.9g}",
    )
    strength = min(f.level / f.rounding for f in high)
    own = {n: evidence.model.get_parameter(n).detach().to(g) for n, g in gradients.items()}
    return [Finding(Kind.DECAY, rate, said, str(line), strength)], {
        n: g - rate * own[n] for n, g in gradients.items()
    }


@dataclass(frozen=True)
class Seen:
    """What the singular vectors beyond the batch see.

    Attributes:
        product: ⟨R, W⟩.
        size: ‖W‖².
        rest: ‖R‖.
    """

    product: float
    size: float
    rest: float


def _beneath(gradient: Tensor, weight: Tensor, batch: int) -> Seen:
    rows, columns = (gradient != 0).any(1), (gradient != 0).any(0)
    gradient, weight = gradient[rows][:, columns], weight[rows][:, columns]
    if min(gradient.shape, default=0) - batch < FEWEST:
        return Seen(0.0, 1.0, 0.0)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    rest = torch.diag(values[batch:])
    seen = left[:, batch:].T @ weight @ right[batch:].T
    size = max(NOTHING, float(seen.square().sum()))
    return Seen(float((rest * seen).sum()), size, float(rest.norm()))
