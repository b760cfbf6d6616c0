"""Updates that were rounded on their way, recognised by their values.

A gradient that went through float16, bfloat16 or 8-bit integers and came back as float32 looks
like any other, but its entries lie on a coarse grid.  A number of one format is found in a coarser
one by chance with probability 2^−(bits between them), 2^−13 for float32 in float16.  The tensors of
an update share its format: where all of them show it a distinct value or two are evidence enough,
whatever tensors they stand in, and more are asked for where only some do.  Gradients that are small
fractions for another reason (weights of zero, pictures of few levels) leave many of its last bits
unused; of numbers that were rounded one half ends in 0, a quarter in 00, and all n of them in z
zeros with probability 2^−nz.  Integers of b bits reach the end of their range only where they were
scaled to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd, inf, log2

import torch
from scipy.special import nbdtrc
from torch import Tensor

from rgap.arithmetic.doubles import blocks
from rgap.arithmetic.rounding import UNIFORM, coherence, spacing

__all__ = ["Rounded", "recognise", "stored"]

FORMATS = (torch.bfloat16, torch.float16, torch.float32)  # coarsest first
EVIDENCE = 12.0  # bits: values lie on a coarser floating grid by chance with probability 2^-12,
FOR_INTEGERS = 24.0  # on one of integers with 2^-24, for 26 of these are looked at
ZEROS = 4  # last bits of a value of evidence that may be zero; of a rounded one more are with 2^-5
USED = 0.25  # least share of evidence in all values, and of a last bit that is 1 in it (about half)
BY_CHANCE = 2  # values by which evidence may fall short of that second share
UNUSED = 8.0  # bits that all distinct values leave unused together: rounded ones do with 2^-8
MANY = 16  # values of evidence needed where not all tensors show the format
LEVELS = 12  # distinct integers needed where not all tensors show them, or they have less than
FEW_BITS = 8  # these bits: small fractions fill their range too
LOSS_SCALE = 24  # largest power of two that a loss is scaled by in mixed precision
FIRST = 32  # values that refute nearly every step
LOOKED = 4096  # values of a tensor among which they are counted
WIDTHS = range(4, 17)  # bits of integers that are looked for
OFF = 4.0  # spacings of the carrying format by which a multiple of the step may be off
_SCALED = " over a loss scale"


@dataclass(frozen=True)
class Rounded:
    """What the values of an update say of the format that they went through.

    Attributes:
        kind: ``"float16"``, ``"float16 over a loss scale"``, ``"bfloat16"``, ``"float32"``, or
            ``"8-bit integers"`` and so on.
        dtype: the floating format; None for integers.
        noise: standard deviation of the rounding of each entry, by parameter name, for the tensors
            that show it.
        evidence: distinct values that tell the format from a finer one.
    """

    kind: str
    dtype: torch.dtype | None
    noise: Mapping[str, Tensor]
    evidence: int

    @property
    def scaled(self) -> bool:
        """True if the numbers are those of a format only times a power of two."""
        return self.kind.endswith(_SCALED)

    @property
    def words(self) -> str:
        """What is assumed, for a reader."""
        return (
            f"the values are those of {self.kind} ({len(self.noise)} tensors, {self.evidence} "
            "distinct values that show it): their rounding counts as noise of the update"
        )


def recognise(gradients: Mapping[str, Tensor]) -> Rounded | None:
    """The coarse format that an update went through; None where nothing shows one.

    Args:
        gradients: by parameter name, as sent.

    >>> g = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> recognise({"w": g}) is None
    True
    >>> recognise({"w": g.half().float()}).kind, recognise({"w": g.bfloat16().float()}).kind
    ('float16', 'bfloat16')
    >>> step = g.abs().max() / 127
    >>> recognise({"w": (g / step).round() * step}).kind
    '8-bit integers'
    """
    for dtype in FORMATS:
        shown = _floating(gradients, dtype)
        if shown is not None:
            return shown
    return _integers(gradients)


def stored(gradients: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Standard deviation of the rounding of tensors that are kept in a format of less precision.

    Args:
        gradients: by parameter name, as sent.
        dtype: that the client computed in.

    Returns:
        By name, of the tensors in a coarser format than that, or than float32.

    >>> sent = stored({"w": torch.ones(1).half(), "b": torch.ones(1)}, torch.float32)
    >>> [(name, f"{std.item():.1e}") for name, std in sent.items()]
    [('w', '2.8e-04')]
    """
    eps = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    coarse = {n: g for n, g in gradients.items() if torch.finfo(g.dtype).eps > eps}
    return {n: _rounding(g, g.dtype) for n, g in coarse.items()}


def _rounding(g: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Standard deviation of rounding to numbers of a format, over a power of two."""
    wide = torch.promote_types(g.dtype, torch.float32)
    std = torch.empty(g.shape, dtype=wide, device=g.device)
    for part, own in zip(blocks(g), blocks(std), strict=True):
        own.copy_(UNIFORM / scale * spacing(part.double() * scale, dtype))
    return _following(g, std)


def _following(g: Tensor, noise: Tensor) -> Tensor:
    """Rounding, wider where most entries went to zero: their errors follow the gradient."""
    if g.ndim < 2:
        return noise
    return noise * coherence(g == 0, (g == 0).flatten(1).all(1)).to(noise)


def _floating(gradients: Mapping[str, Tensor], dtype: torch.dtype) -> Rounded | None:
    """Tensors all of whose values are numbers of ``dtype`` although theirs is finer."""
    eps = torch.finfo(dtype).eps
    fine = {name: g for name, g in gradients.items() if torch.finfo(g.dtype).eps < eps}
    shift = _shift(fine, dtype)
    scale = 2.0**shift
    exact = {name: g for name, g in fine.items() if _numbers_of(g, dtype, scale)}
    if not exact:
        return None
    bits = min(log2(eps / torch.finfo(g.dtype).eps) for g in exact.values())
    sizes = _union([_distinct(g) * scale for g in exact.values()])
    last = _last_bit(sizes / spacing(sizes, dtype))
    count, used = int((last <= 2**ZEROS).sum()), int((last == 1).sum())
    needed = EVIDENCE / bits if len(exact) == len(fine) else MANY
    if count < max(needed, USED * len(sizes)) or used < USED * count - BY_CHANCE:
        return None
    if len(last) * log2(float(last.min())) >= UNUSED:
        return None  # ratios of small integers
    if len(exact) < len(fine) and _left_over(last):
        return None
    noise = {name: _rounding(g, dtype, scale) for name, g in exact.items()}
    kind = str(dtype).removeprefix("torch.") + (_SCALED if shift else "")
    return Rounded(kind, dtype, noise, count)


def _left_over(last: Tensor) -> bool:
    """True if the values end in more zeros than rounded ones do, but for a chance of 2^-UNUSED.

    Of n that were rounded, T zeros in all have the negative binomial law with p = 1/2.  More of
    them has what rounding leaves of a sum that is zero, as ∂b is below a normalisation.

    Args:
        last: the power of two that the last bit of every value stands for that is not 0.
    """
    zeros = float(last.double().log2().sum())
    return bool(nbdtrc(zeros - 1.0, len(last), 0.5) < 2.0**-UNUSED)


def _shift(gradients: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Power of two that a loss was scaled by while its gradients were numbers of a format.

    Mixed precision divides by it afterwards, below what the format can hold.  The smallest that
    explains the values is taken, whose grid is the coarsest: the client's may be larger.
    """
    if dtype != torch.float16 or not gradients:
        return 0
    few = [_few(g) for g in gradients.values()]
    largest = max(float(part.abs().max()) for part in few if part.numel())
    if not 0 < largest < inf:
        return 0
    top = min(LOSS_SCALE, int(log2(torch.finfo(dtype).max) - log2(largest)))
    few = [part for part in few if top > 0 and _numbers(part * 2.0**top, dtype)]
    return next((k for k in range(top + 1) if all(_numbers(p * 2.0**k, dtype) for p in few)), 0)


def _integers(gradients: Mapping[str, Tensor]) -> Rounded | None:
    """Multiples of one step a tensor, the largest of them that of a signed or unsigned integer.

    The width that most tensors show is that of all: one without negative values holds seven bits of
    the eight of its neighbours.
    """
    ends = {name: _ends(g) for name, g in gradients.items()}
    moved = {name: g for name, g in gradients.items() if any(ends[name])}
    likely = {name: _likely_steps(g, *ends[name]) for name, g in moved.items()}
    best: Rounded | None = None
    for width in WIDTHS:
        steps = {
            name: step
            for name, g in moved.items()
            if (step := _step(g, likely[name].get(width, ()), *ends[name])) is not None
        }
        if not steps or (best is not None and len(steps) <= len(best.noise)):
            continue
        # the largest is a multiple whatever the others are
        levels = len(_union([_levels(gradients[n], step)[:-1] for n, step in steps.items()]))
        bits = min(log2(s / (2 * _slack(gradients[n], *ends[n]))) for n, s in steps.items())
        shared = len(steps) == len(moved) and width >= FEW_BITS
        needed = 0 if shared else min(LEVELS, 2 ** (width - 1) - 3)
        if levels >= max(needed, FOR_INTEGERS / bits):
            noise = {
                n: _following(gradients[n], torch.full_like(gradients[n], UNIFORM * step))
                for n, step in steps.items()
            }
            best = Rounded(f"{width}-bit integers", None, noise, levels)
    return best


def _numbers_of(g: Tensor, dtype: torch.dtype, scale: float) -> bool:
    """Every value of a tensor is a number of a coarser format: a few of them first, then all."""
    return all(_numbers(part * scale, dtype) for part in (_few(g), *blocks(g)))


def _numbers(part: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(part.to(dtype).to(part.dtype), part)


def _ends(g: Tensor) -> tuple[float, float]:
    """Smallest and largest value of a tensor."""
    low, high = g.detach().aminmax()
    return float(low), float(high)


def _likely_steps(g: Tensor, low: float, high: float) -> dict[int, list[float]]:
    """By bits of n, steps of which a few values of a tensor are multiples ``step · n``."""
    largest, slack = max(abs(low), abs(high)), _slack(g, low, high)
    signed = [(width, largest / (2 ** (width - 1) - 1)) for width in WIDTHS]
    unsigned = [(width, (high - low) / (2**width - 1)) for width in WIDTHS]
    pairs = [(width, step) for width, step in (*signed, *unsigned) if slack < step / 8]
    steps = torch.tensor([step for _, step in pairs], dtype=torch.float64, device=g.device)
    values, likely = _few(g).double(), dict[int, list[float]]()
    # The first few values refute nearly all of them.
    for part in (values[:FIRST], values):
        met = _multiples(part, steps[:, None], slack).all(1)
        pairs = [pair for pair, holds in zip(pairs, met.tolist(), strict=True) if holds]
        steps = steps[met]
    for width, step in pairs:
        likely.setdefault(width, []).append(step)
    return likely


def _step(g: Tensor, likely: Iterable[float], low: float, high: float) -> float | None:
    """The first of some steps that all values of a tensor are multiples of."""
    slack = _slack(g, low, high)
    for step in likely:
        if all(bool(_multiples(part.double(), step, slack).all()) for part in blocks(g)):
            return step
    return None


def _multiples(values: Tensor, step: Tensor | float, slack: float) -> Tensor:
    """True where a value is a multiple of a step, as far as the carrying format can tell."""
    return (values - step * (values / step).round()).abs() <= slack


def _slack(g: Tensor, low: float, high: float) -> float:
    """Distance from a multiple of a step that the carrying format explains."""
    return float(OFF * torch.finfo(g.dtype).eps * max(abs(low), abs(high)))


def _few(g: Tensor) -> Tensor:
    """About ``LOOKED`` values from all over a tensor: they refute nearly every format.

    The stride has no factor in common with the size: one of whole rows stays in one column, and
    that of an input that was off is zero.
    """
    flat = g.detach().reshape(-1)
    stride = max(1, flat.numel() // LOOKED)
    while gcd(stride, flat.numel()) > 1:
        stride += 1
    return flat[::stride]


def _levels(g: Tensor, step: float) -> Tensor:
    """Distinct multiples of a step beside zero: what is far below it says nothing of integers.

    None where all are multiples of a longer one: thirds end 85 steps of the 255 of nine bits.
    """
    multiples = (_distinct(g) / step).round()
    levels: Tensor = torch.unique(multiples[multiples > 0])
    return levels if gcd(*levels.long().tolist()) == 1 else levels[:0]


def _distinct(g: Tensor) -> Tensor:
    """Distinct sizes of a few entries that are not zero, float64."""
    sizes = _few(g).abs().double()
    distinct: Tensor = torch.unique(sizes[sizes > 0])
    return distinct


def _union(parts: list[Tensor]) -> Tensor:
    """Distinct values of all tensors together."""
    union: Tensor = torch.unique(torch.cat([part.cpu() for part in parts]))
    return union


def _last_bit(whole: Tensor) -> Tensor:
    """The power of two that the last bit of whole numbers stands for which is not 0."""
    return whole.long() & -whole.long()
