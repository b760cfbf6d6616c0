"""A prior of photographs that was learned once: patches as shapes at any contrast.

A patch of a photograph is a brightness, which is free, and a rest r of zero mean with one of K
shapes at one of J contrasts,

    p(r) = max_k Σ_j w_kj N(r; 0, σ_j² C_k + ν² 1).

The prior is ``−log p`` of every patch, overlapping ones too, per entry.  A shape says how pixels
and colours hang together; its contrast is whatever the patch has, so that an edge in the dark and
one in the sun are one shape, and pictures of other kinds are met by some shape at some contrast.
ν rounds off what is finer than what it was learned on, or than a search is looking for.

Source: likelihoods of all patches of a picture, and one Gaussian for each at a time, are Zoran and
Weiss's (EPLL, 2011); mixtures of scales are Portilla, Strela, Wainwright and Simoncelli's (2003).
The two together, and added to a prior of differences, are ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from typing import NamedTuple

import torch
from safetensors.torch import load as parsed
from torch import Tensor
from torch.nn.functional import fold, unfold

from rgap.solvers.priors import Operator, Prior, Sum, natural

__all__ = ["PatchPrior", "Shapes", "photographic", "shipped"]

FLOOR = 1e-5  # of a variance, beside 1 for a patch of contrast σ_j
WEIGHTS = 10.0, 3.0  # of differences, where they alone have 1, and of patches: photographs 0 to 7
FILE = "patches.safetensors"
LEAST = 6  # pixels a side of a picture: those of a patch that is shipped


@dataclass(frozen=True, eq=False)
class Shapes:
    """What patches look like, and how often.

    Attributes:
        bases: eigenvectors of C_k in columns, [K, n, n], n = channels · side².
        variances: its eigenvalues, [K, n].
        contrasts: σ_j, in widths of the range of values, [J].
        weights: w_kj, [K, J]; they sum to 1.
        channels: of a picture.
        noise: ν of the pictures that it was learned on, in widths of the range.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    bases: Tensor
    variances: Tensor
    contrasts: Tensor
    weights: Tensor
    channels: int
    noise: float

    def __post_init__(self) -> None:
        shapes, n = self.variances.shape
        wanted = {"bases": [shapes, n, n], "weights": [shapes, len(self.contrasts)]}
        for name, shape in wanted.items():
            got = list(getattr(self, name).shape)
            if got != shape:
                raise ValueError(
                    f"{name}: expected {shape} for {shapes} shapes of {n} entries at "
                    f"{len(self.contrasts)} contrasts, got {got}"
                )
        if self.channels * self.side**2 != n:
            raise ValueError(
                f"channels: expected square patches, channels · side² = {n}, got {self.channels}"
            )

    @property
    def side(self) -> int:
        """Of a patch, in pixels."""
        return math.isqrt(self.variances.shape[1] // self.channels)

    @classmethod
    def of(
        cls, covariances: Tensor, contrasts: Tensor, weights: Tensor, channels: int, noise: float
    ) -> Shapes:
        """From C_k, [K, n, n]."""
        variances, bases = torch.linalg.eigh(covariances.double())
        variances = variances.clamp_min(FLOOR)
        return cls(bases, variances, contrasts.double(), weights.double(), channels, noise)

    def grey(self) -> Shapes:
        """The same of the mean of the channels: what is normal stays so under a linear map."""
        pixels = self.side**2
        mean = torch.eye(pixels, dtype=torch.float64).repeat(1, self.channels) / self.channels
        roots = mean @ self.bases * self.variances.sqrt()[:, None]
        return Shapes.of(roots @ roots.mT, self.contrasts, self.weights, 1, self.noise)


class _Members(NamedTuple):
    """Patches of one shape.

    Attributes:
        basis: of the shape, [n, n].
        entries: along it, [members, n].
        penalty: the sum of their −log p.
        bends: 1/(σ_j² λ + ν²), in the mean over contrasts as they are likely, [members, n].
    """

    basis: Tensor
    entries: Tensor
    penalty: Tensor
    bends: Tensor


@dataclass(frozen=True, eq=False)
class PatchPrior:
    """``−log p`` of all patches of x, [B, C, H, W], in the mean over patches and their entries.

    Attributes:
        shapes: of what it was learned on.
        weight: a factor.
        width: of the range of values.
        smoothing: ν, in units of x; at least that of the shapes.

    Raises:
        ValueError: x has other channels, or is smaller than a patch.

    >>> from rgap.photos import load
    >>> prior, photo = PatchPrior(shipped()), load(1)
    >>> shuffled = photo.flatten(2)[..., torch.randperm(1024)].view_as(photo)
    >>> bool(prior.value(photo) < prior.value(shuffled))
    True
    """

    shapes: Shapes
    weight: float = 1.0
    width: float = 1.0
    smoothing: float = 0.0

    def value(self, x: Tensor) -> Tensor:
        """The penalty."""
        patches = self._patches(x)
        _, members = self._assigned(patches)
        total = torch.stack([m.penalty for m in members]).sum()
        return (total * self._factor(patches)).to(x)

    def gradient(self, x: Tensor) -> Tensor:
        """``Σ Pᵀ (σ² C + ν² 1)⁻¹ P x`` with the mean over contrasts of the inverse."""
        return self.value_and_gradient(x)[1]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from patches that are told apart once."""
        patches = self._patches(x)
        back, members = self._assigned(patches)
        pulled = torch.cat([(m.entries * m.bends) @ m.basis.T for m in members])[back]
        total = torch.stack([m.penalty for m in members]).sum()
        factor = self._factor(patches)
        return (total * factor).to(x), self._placed(pulled, x) * factor

    def curvature(self, x: Tensor) -> Operator:
        """That with shapes and contrasts as they are at x: touches the value from above there."""
        patches = self._patches(x)
        back, members = self._assigned(patches)
        order, factor = torch.argsort(back), self._factor(patches)
        sizes = [len(m.entries) for m in members]

        def apply(v: Tensor) -> Tensor:
            parts = torch.split(self._patches(v)[order], sizes)
            bent = [
                (p @ m.basis * m.bends) @ m.basis.T for p, m in zip(parts, members, strict=True)
            ]
            return self._placed(torch.cat(bent)[back], v) * factor

        return apply

    def smoothed(self, size: float) -> PatchPrior:
        """The density of patches with noise of this size."""
        return replace(self, smoothing=max(size, self.smoothing))

    def _factor(self, patches: Tensor) -> float:
        return self.weight / patches.numel()

    def _patches(self, x: Tensor) -> Tensor:
        """Less their brightness, in widths of the range, [patches, n]."""
        shapes = self.shapes
        if x.ndim != 4 or x.shape[1] != shapes.channels or min(x.shape[2:]) < shapes.side:
            raise ValueError(
                f"PatchPrior: expected pictures [B, {shapes.channels}, H, W] of at least "
                f"{shapes.side}×{shapes.side} pixels, got {list(x.shape)}; write prior='natural'"
            )
        patches = unfold(x / self.width, shapes.side).transpose(1, 2).flatten(0, 1)
        return patches - patches.mean(1, keepdim=True)

    def _placed(self, patches: Tensor, like: Tensor) -> Tensor:
        """The transpose of :meth:`_patches`."""
        patches = patches - patches.mean(1, keepdim=True)
        columns = patches.view(len(like), -1, patches.shape[1]).transpose(1, 2)
        return (fold(columns, like.shape[2:], self.shapes.side) / self.width).to(like)

    def _spreads(self) -> Tensor:
        """Variances ``σ_j² λ_ki + ν²``, [K, n, J]."""
        noise = max(self.shapes.noise, self.smoothing / self.width)
        return self.shapes.variances[:, :, None] * self.shapes.contrasts.square() + noise**2

    def _assigned(self, patches: Tensor) -> tuple[Tensor, list[_Members]]:
        """Patches by their likeliest shape, and where each of them is among these."""
        spreads, shapes = self._spreads().to(patches.device), self.shapes
        levels = shapes.weights.to(spreads).log() - 0.5 * spreads.log().sum(1)
        best = patches.new_full((len(patches),), -torch.inf, dtype=torch.float32)
        shape = torch.zeros(len(patches), dtype=torch.long, device=patches.device)
        rough, bases = patches.float(), shapes.bases.to(spreads)
        for k, basis in enumerate(bases.float()):
            near = _likelihoods(rough @ basis, spreads[k].float(), levels[k].float()).logsumexp(1)
            shape = torch.where(near > best, k, shape)
            best = torch.maximum(near, best)
        order = torch.argsort(shape, stable=True)
        counts = torch.bincount(shape, minlength=len(bases)).tolist()
        parts = torch.split(patches[order], counts)
        members = list(_members(parts, bases, spreads, levels))
        return torch.argsort(order), members


def _members(
    parts: tuple[Tensor, ...], bases: Tensor, spreads: Tensor, levels: Tensor
) -> Iterator[_Members]:
    """Of every shape that a patch has."""
    for k, part in enumerate(parts):
        if len(part):
            basis = bases[k].to(part)
            entries, spread = part @ basis, spreads[k].to(part)
            near = _likelihoods(entries, spread, levels[k].to(part))
            bends = near.softmax(1) @ (1.0 / spread).T
            yield _Members(basis, entries, -near.logsumexp(1).sum(), bends)


def _likelihoods(entries: Tensor, spread: Tensor, level: Tensor) -> Tensor:
    """``log w_kj N`` up to the factor (2π)^{−n/2}, [members, J]."""
    return level - 0.5 * entries.square() @ (1.0 / spread)


@functools.cache
def shipped(channels: int = 3) -> Shapes:
    """Those that come with the package; ``rgap/data/LEARNED.md`` says what they were learned on.

    Args:
        channels: 3, or 1 for their mean.

    Raises:
        ValueError: other channels.
    """
    if channels == 1:
        return shipped().grey()
    if channels != 3:
        raise ValueError(
            f"the prior 'patches' is of pictures with 1 or 3 channels, got {channels}; write "
            "prior='natural'"
        )
    stored = parsed((resources.files("rgap.data") / FILE).read_bytes())
    roots = stored["roots"].double()
    covariances = roots @ roots.mT
    weights = stored["weights"]
    return Shapes.of(covariances, stored["contrasts"], weights, 3, float(stored["noise"]))


def photographic(channels: int, width: float = 1.0) -> Prior:
    """The prior of differences with ten times its weight, and that of patches.

    Differences keep what is no photograph from being drawn like one; a search that lets the weight
    fall begins that much nearer to what is likely.

    Args:
        channels: of the data, 1 or 3.
        width: of the range of their values.
    """
    differences, patches = WEIGHTS
    learned = PatchPrior(shipped(channels), patches, width)
    return Sum([natural(channels, width, differences), learned])
