"""Consistency of a softmax head: a sample's cotangent p − e_c lies in the range of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.network.chain import Stage
from rgap.precision import Precision
from rgap.separation.mixture import Mixture
from rgap.separation.softmax.sketch import Sketch
from rgap.separation.subspace import Consistency, along_directions, restricted

NEAR = 1e6  # ε of the client: σ_B/σ_1 below which roots come from all equations


@dataclass(frozen=True)
class AtHead(Consistency):
    """f(q) = softmax(W V q + b) − e_c for a class c a start.

    Attributes:
        matrix: M = W V, [C, R].
        shift: b, [C].
        smoothing: the loss's.
        pool: classes that starts are given, the likely ones first.
        clear: how many of them come first.
        labels: class of every start, [S].
        sketch: fewer combinations of the equations, for the search.
        whole: the same along all directions that keep w·q.
    """

    matrix: Tensor
    shift: Tensor
    smoothing: float
    pool: Tensor
    clear: int
    labels: Tensor
    sketch: Sketch | None = None
    whole: Sketch | None = None

    @classmethod
    def of(
        cls, samples: Mixture, smoothing: float, pool: Tensor, clear: int, precision: Precision
    ) -> AtHead:
        """The consistency of a head's own mixture."""
        affine = samples.stage.affine
        shift = affine.forward(samples.gradient.new_zeros(1, *affine.in_shape))[0]
        blur = samples.entry_noise / samples.values
        matrix = affine.weight @ samples.right
        return cls(
            samples,
            samples.left,
            blur,
            precision.unit,
            matrix,
            shift,
            smoothing,
            pool,
            clear,
            pool[:0],
        )

    @property
    def source(self) -> Stage:
        """The head itself."""
        return self.samples.stage

    @property
    def equations(self) -> int:
        """Those of the range, less the sum of the entries, which is 0 on both sides."""
        return super().equations - 1

    @property
    def rows(self) -> int:
        """Entries of a projected f."""
        return super().rows if self.sketch is None else self.sketch.rows.shape[1]

    @property
    def target(self) -> Tensor:
        """Smoothed one-hot targets of the starts, [S, C]."""
        classes = len(self.shift)
        dense = self.shift.new_full((len(self.labels), classes), self.smoothing / classes)
        dense[torch.arange(len(dense), device=dense.device), self.labels] += 1.0 - self.smoothing
        return dense

    def begin(self, count: int, idle: int, generator: torch.Generator) -> AtHead:
        """Classes of the pool in turn, in a random order; the likely ones until they are found."""
        size = self.clear if idle < 2 and self.clear else len(self.pool)
        order = torch.randperm(min(size, len(self.pool)), generator=generator)
        order = order.to(self.pool.device)
        return replace(self, labels=self.pool[order.repeat(count // len(order) + 1)[:count]])

    def kinds(self, count: int) -> Tensor:
        """The class of every start."""
        return self.labels

    def labelled(self, labels: Tensor) -> AtHead:
        """One class a row."""
        return replace(self, labels=labels)

    def sketched(self) -> AtHead:
        """The same with fewer equations, where there are many more than unknowns."""
        sketch = Sketch.of(self.basis, self.matrix)
        if sketch is None:
            return self
        return replace(self, sketch=sketch, whole=sketch.within(restricted(self).directions))

    def within(self, directions: Tensor) -> AtHead:
        """A sketch of fewer combinations does along fewer directions."""
        if self.sketch is None or self.whole is None:
            return self
        if torch.equal(directions, self.whole.directions):
            return replace(self, sketch=self.whole)
        return replace(self, sketch=self.sketch.within(directions))

    def thorough(self) -> AtHead:
        """All equations, where rounding is near the samples' differences."""
        near = self.samples.ratio < NEAR * 2.0 * self.unit
        return replace(self, sketch=None, whole=None) if near else self

    def project(self, f: Tensor) -> Tensor:
        """(I − UUᵀ) f, or combinations of its entries."""
        return super().project(f) if self.sketch is None else f @ self.sketch.rows

    def projected(self, q: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """The value of f and the slope of its projection."""
        if self.sketch is None:
            return super().projected(q, along)
        p, target = torch.softmax(q @ self.matrix.T + self.shift, 1), self.target
        return p - target, self.sketch.slope(p, target)

    def at(self, index: Tensor) -> AtHead:
        """The same classes for some of the starts."""
        return replace(self, labels=self.labels[index])

    def value(self, q: Tensor) -> Tensor:
        """The cotangent, up to the loss's scale."""
        return torch.softmax(q @ self.matrix.T + self.shift, 1) - self.target

    def derivative(self, q: Tensor, along: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(diag p − ppᵀ) M."""
        p = torch.softmax(q @ self.matrix.T + self.shift, 1)
        matrix = along_directions(self.matrix, along)
        return p - self.target, p[:, :, None] * (matrix - (p @ matrix)[:, None, :])

    def pusher(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """(diag p − ppᵀ) W dx."""
        affine = self.samples.stage.affine
        p = torch.softmax(affine.forward(x), 1)

        def push(dx: Tensor) -> Tensor:
            dz = affine.linear(dx)
            return p * (dz - (p * dz).sum(1, keepdim=True))

        return push

    def rounding(self, x: Tensor, precision: Precision) -> Tensor:
        """Of the logits, carried through the softmax, and of p − e_c itself."""
        affine = self.samples.stage.affine
        p = torch.softmax(affine.forward(x), 1)
        std = precision.sum_std(affine.squared().linear(x.square()))
        mixed = (p * std).square() + p.square() * (p * std).square().sum(1, keepdim=True)
        near = torch.maximum(p, self.target) * (2.0 * precision.unit)
        return (mixed + near.square()).sqrt()

    def basis_errors(
        self, k: Tensor, f: Tensor, precision: Precision
    ) -> Callable[[Tensor], Tensor]:
        """S⁻¹VᵀEᵀ: P is the range of the same gradient."""
        return lambda e: (e @ self.samples.right).T / self.samples.values[:, None]
