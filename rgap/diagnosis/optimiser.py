"""Optimisers that are not SGD: their first step has one magnitude, whatever the gradient's.

Adam, Adamax, Adagrad, RMSprop, Rprop, Lion and signSGD move an entry by ``η g/(|g| + ε)``, up to
a factor: the difference of the weights over the rate is a sign but where ``|g|`` is about ε, its
magnitude the same in every tensor.  Several steps add signs that mostly agree: the largest entries
are about T times that magnitude in every tensor, and most entries are near; RMSprop, whose second
step is larger than its third, leaves fewer.  LAMB scales each tensor by itself.  Entries of a
gradient, and its layers', differ by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from torch import Tensor

from rgap.diagnosis.finding import Finding, Kind
from rgap.remedy import Remedy
from rgap.update.update import Update

FEWEST = 16  # entries of a tensor, and
TENSORS = 2  # tensors with as many that are looked at
ROWS = 3  # of a single tensor, which two outputs and a binary input give one magnitude too
ALIKE = 0.05  # relative distance of an entry from the magnitude of the others
MOST = 0.9  # of the entries, that are so near
FULL = 0.5  # of the largest entry of a tensor, above which entries are counted
# Largest ratio of the largest entries of any two tensors, and least share of entries above FULL: of
# one step that weight decay shifts, and of several.  A gradient does not keep both bounds of either
# (``python -m benchmarks.sweeps.check --genuine 400`` counts those that do).
ALIGNED = ((1.02, 0.2), (1.5, 0.6))
LOUD = 1.0 / ALIKE  # times its noise, above which an entry's magnitude is seen as well as that
_MEANS = "optimizer.state[p]['exp_avg'] / (1 - beta1)"
_AFTER = (
    " on the client after Adam's first step, or have it take one of torch.optim.SGD: no equation "
    "gives magnitudes back that the optimiser divided by"
)
LINE = Remedy(
    f"rgap.Update({{n: {_MEANS} for n, p in model.named_parameters()}}){_AFTER}",
    f"{_MEANS} of every parameter into the update{_AFTER}",
)


@dataclass(frozen=True)
class Sizes:
    """Magnitudes of a tensor's entries.

    Attributes:
        name: of the parameter.
        peak: the largest.
        middle: the median.
        near: share of the entries near the median.
        full: share of the entries above half of the largest.
        count: entries that are seen.
    """

    name: str
    peak: float
    middle: float
    near: float
    full: float
    count: int


def read(update: Update) -> Finding | None:
    """The finding; None for a gradient, for too few entries, and for exact signs."""
    noise = update.noise or {}
    sizes = [s for n, g in update.gradients.items() if (s := _sizes(n, g, noise)) is not None]
    if len(sizes) < TENSORS and not _tall(update, sizes):
        return None
    count = sum(s.count for s in sizes)
    near = sum(s.near * s.count for s in sizes) / count
    full = sum(s.full * s.count for s in sizes) / count
    middles, peaks = [s.middle for s in sizes], [s.peak for s in sizes]
    if all(s.near >= MOST and FULL * s.peak < s.middle for s in sizes):
        said = (
            f"{100 * near:.1f} % of {count} entries have one magnitude, {sizes[0].middle:.4g} in "
            f"'{sizes[0].name}' and {min(middles):.4g} to {max(middles):.4g} in {len(sizes)} "
            "tensors, as steps have of Adam, RMSprop, Adagrad, Lion or the sign of the gradient"
        )
        return Finding(Kind.OPTIMISER, middles[0], said, str(LINE), inf)
    ratio = max(peaks) / min(peaks)
    if len(sizes) > TENSORS and any(ratio <= r and full >= s for r, s in ALIGNED):
        said = (
            f"the largest entry of each of {len(sizes)} tensors is {min(peaks):.4g} to "
            f"{max(peaks):.4g}, and {100 * full:.0f} % of {count} entries are above half of that, "
            "as steps have of Adam, RMSprop, Adagrad or Lion, which divide by the magnitude of "
            "the gradient"
        )
        return Finding(Kind.OPTIMISER, max(peaks), said, str(LINE), inf)
    return None


def _sizes(name: str, g: Tensor, noise: Mapping[str, Tensor]) -> Sizes | None:
    """Of the entries that stand out of their noise; None for too few."""
    values = g.detach().abs().flatten().double()  # where noise of half precision is none either
    floor = noise[name].to(values).flatten() * LOUD if name in noise else 0.0
    values = values[values > floor]
    if len(values) < FEWEST:
        return None
    peak, middle = float(values.max()), float(values.median())
    near = float(((values - middle).abs() <= ALIKE * middle).double().mean())
    full = float((values > FULL * peak).double().mean())
    return Sizes(name, peak, middle, near, full, len(values))


def _tall(update: Update, sizes: list[Sizes]) -> bool:
    """True for a single tensor whose magnitudes say something: it has rows enough."""
    rows = [len(update.gradients[s.name]) for s in sizes if update.gradients[s.name].ndim > 1]
    return bool(rows) and rows[0] >= ROWS
