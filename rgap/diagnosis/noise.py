"""Added noise: what is left of a gradient of low rank is a flat spectrum of the right height.

The gradient of a fully connected layer [m, n] has rank B at most.  Noise of standard deviation σ
leaves (m − B)(n − B) of its entries' energy beneath, ``Σ_{i>B} σ_i² = σ² (m − B)(n − B)``, in a
spectrum whose largest value is σ(√(m − B) + √(n − B)) (Marchenko and Pastur), whereas a mixture of
more samples, or of several steps, ends in a few.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.finding import Finding, Kind

FEWEST = 4  # rows and columns beneath the rank of the batch
CLEAR = 20.0  # times the rounding that noise stands out by
SVD = 4.0  # units of the largest singular value that the others are known to
STATED = 2.0  # times the noise that is known to be there
FLAT = (0.6, 1.6)  # of the largest singular value over that of noise
ALIKE = 4.0  # ratio of the levels of two layers
# Steps of an optimiser that divides by the gradient's magnitude leave a loud flat floor too, and
# entries of a few sizes: their fourth moment over the square of the second is below a bell's 3.
LOUD = 0.25  # σ over the root mean square of all entries, in every layer
BELL = 2.85  # of some layer: noise of such a level says no more


@dataclass(frozen=True)
class Floor:
    """What lies beneath the rank of the batch in one layer.

    Attributes:
        name: of the layer.
        level: σ of one entry.
        edge: the largest singular value beneath over that of noise of this level.
        rounding: σ that rounding explains.
        freedom: (m − B)(n − B).
        rank: singular values above the rounding.
        full: all of them are.
        stated: noise that is known to be in an entry.
        next: the largest singular value beneath over the largest of all.
    """

    name: str
    level: float
    edge: float
    rounding: float
    freedom: int
    rank: int
    full: bool
    stated: float
    next: float

    @property
    def flat(self) -> bool:
        """True for the spectrum of noise: no value is missing and none stands out."""
        return self.full and FLAT[0] < self.edge < FLAT[1]


def floors(evidence: Evidence) -> list[Floor]:
    """Of every fully connected layer with enough rows and columns."""
    batch = evidence.batch or 1
    layers = []
    for call, weight, _ in evidence.dense:
        # Rows of dead units and columns of dark pixels carry neither signal nor, maybe, noise.
        table = weight[(weight != 0).any(1)][:, (weight != 0).any(0)]
        if min(table.shape, default=0) - batch < FEWEST:
            continue
        m, n = table.shape
        values = torch.linalg.svdvals(table)
        beneath = values[batch:]
        freedom = (m - batch) * (n - batch)
        level = float(beneath.square().sum() / freedom) ** 0.5
        edge = level * ((m - batch) ** 0.5 + (n - batch) ** 0.5)
        rounding = 2 * evidence.unit * float(values[0]) / (m * n) ** 0.5 * batch**0.5
        rounding = max(rounding, evidence.unit * evidence.usual.get(call.weight_name, 0.0))
        own = SVD * torch.finfo(torch.float64).eps * float(values[0])
        rounding = max(rounding, own / (m**0.5 + n**0.5))
        seen = int((values > CLEAR * rounding * (m**0.5 + n**0.5)).sum())
        ratio = float(beneath[0]) / edge if edge > 0 else inf
        full = seen == min(m, n)
        stated = evidence.added(call.weight_name)
        longest = evidence.precision.noise_norm(call.weight_name, weight)
        seen = min(seen, int((values > STATED * longest).sum()))
        next_ = float(beneath[0] / values[0])
        layers.append(Floor(call.name, level, ratio, rounding, freedom, seen, full, stated, next_))
    return layers


def read(evidence: Evidence, layers: list[Floor]) -> list[Finding]:
    """One level of noise in every layer that shows one."""
    if not layers or evidence.batch is None:
        return []
    evidence.tested.add(Kind.NOISE)
    high = [f for f in layers if f.level > max(CLEAR * f.rounding, STATED * f.stated)]
    if len(high) < len(layers) or not all(f.flat for f in high):
        return []
    total = sum(f.freedom for f in high)
    level = (sum(f.level**2 * f.freedom for f in high) / total) ** 0.5
    said = (
        f"beneath rank {evidence.batch} the gradient of '{high[0].name}' has a flat spectrum: "
        f"σ = {high[0].level:.4g} in every entry, {high[0].level / high[0].rounding:.2g} times "
        f"its rounding"
    )
    least, most = min(f.level for f in high), max(f.level for f in high)
    if most > ALIKE * least:
        said += f"; in other layers {least:.2g} to {most:.2g}"
        level = most
    line = f"rgap.invert(model, update, noise={level:.3g})"
    strength = min(f.level / f.rounding for f in high)
    tables = [evidence.gradients[f"{f.name}.weight"].square() for f in high]
    loud = all(f.level > LOUD * float(t.mean()) ** 0.5 for f, t in zip(high, tables, strict=True))
    few = any(float(t.square().mean()) < BELL * float(t.mean()) ** 2 for t in tables)
    rivals = (Kind.OPTIMISER,) if loud and few else ()
    return [Finding(Kind.NOISE, level, said, line, strength, rivals)]
