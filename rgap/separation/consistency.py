"""What every sample of a mixture satisfies on its own: subspace consistency.

Some function f of the sample must lie in a known subspace with orthonormal basis P:
``(I − PPᵀ) f(q) = 0`` for x = V q.  Below a second fully connected layer f is that layer's input
and P the row space of its gradient; at a softmax head f is the cotangent p − e_c and P the range of
the head's gradient.  Nothing is inverted, so any activation serves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.activations import Activation
from rgap.network import Chain, Stage
from rgap.ops import Op, Rearrange, Reshape
from rgap.precision import Precision

from .mixture import Mixture

VANISHED = 1e-40  # ‖f‖² below which f is nothing


@dataclass(frozen=True)
class Consistency(ABC):
    """f and P.

    Attributes:
        samples: the mixture whose rows q are looked for.
        basis: P, [m, p], orthonormal columns.
        blur: standard error of the entries of each column of P, [p].
        unit: relative rounding of the entries of f.
    """

    samples: Mixture
    basis: Tensor
    blur: Tensor
    unit: float

    @property
    @abstractmethod
    def source(self) -> Stage:
        """The stage whose gradient P comes from."""

    @abstractmethod
    def value(self, q: Tensor) -> Tensor:
        """f(q), [S, R] → [S, m]."""

    @abstractmethod
    def derivative(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """f(q) [S, m] and ∂f/∂q [S, m, R]."""

    def begin(self, count: int, idle: int, generator: torch.Generator) -> Consistency:
        """The equations for ``count`` fresh starts after ``idle`` rounds that found nothing."""
        return self

    def at(self, index: Tensor) -> Consistency:
        """The equations of some of the starts."""
        return self

    def kinds(self, count: int) -> Tensor:
        """A number for the equations of each of ``count`` starts, equal where they are, [count]."""
        return torch.zeros(count, dtype=torch.long)

    @abstractmethod
    def push(self, x: Tensor, dx: Tensor) -> Tensor:
        """∂f of samples x [S, n] along dx, of any direction, not only of the mixture's."""

    @abstractmethod
    def rounding(self, x: Tensor, precision: Precision) -> Tensor:
        """Standard error of the client's own evaluation of f at samples x [S, n], [S, m]."""

    @abstractmethod
    def basis_errors(
        self, k: Tensor, f: Tensor, precision: Precision
    ) -> Callable[[Tensor], Tensor]:
        """A draw of the error of Pᵀ [p, m], given the draw E of the error of G.

        Args:
            k: cotangents at the layer that P comes from, [R, ...].
            f: [R, m].
            precision: of the update.
        """

    def project(self, f: Tensor) -> Tensor:
        """(I − PPᵀ) f, [..., m]."""
        return f - (f @ self.basis) @ self.basis.T

    def tolerance(self, f: Tensor) -> Tensor:
        """The relative cost that rounding alone explains, [S, m] → [S]."""
        share = f @ self.basis
        blurred = (share * self.blur).square().sum(1) * self.equations / _size(f)
        return blurred + (4.0 * self.unit) ** 2

    @property
    def equations(self) -> int:
        """Independent equations a sample has to satisfy."""
        return self.basis.shape[0] - self.basis.shape[1]


@dataclass(frozen=True)
class Between(Consistency):
    """f(q) is the input of the next fully connected layer.

    Attributes:
        steps: what lies between the two affine maps, element by element.
        matrix: M = W V, [m, R].
        shift: b, [m].
        above: the mixture of that layer, whose row space P is.
    """

    steps: tuple[Op, ...]
    matrix: Tensor
    shift: Tensor
    above: Mixture

    @classmethod
    def of(
        cls, lower: Mixture, upper: Mixture, steps: tuple[Op, ...], precision: Precision
    ) -> Between:
        """The consistency of two mixtures with ``steps`` between them."""
        affine = lower.stage.affine
        shift = affine.forward(lower.gradient.new_zeros(1, *affine.in_shape))[0]
        blur = upper.entry_noise / upper.values
        matrix = affine.weight @ lower.right
        return cls(lower, upper.right, blur, precision.unit, steps, matrix, shift, upper)

    @property
    def source(self) -> Stage:
        """The upper layer."""
        return self.above.stage

    def value(self, q: Tensor) -> Tensor:
        """The next layer's input for samples V q."""
        y = q @ self.matrix.T + self.shift
        for op in self.steps:
            y = op.forward(y)
        return y.flatten(1)

    def derivative(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """F and its derivative: one slope an entry, for nothing mixes entries."""
        y, slope, order = self._slopes(q @ self.matrix.T + self.shift)
        return y, slope[:, :, None] * self.matrix[order]

    def push(self, x: Tensor, dx: Tensor) -> Tensor:
        """φ'(z) W dx."""
        affine = self.samples.stage.affine
        z = affine.forward(x.reshape(-1, *affine.in_shape))
        _, slope, order = self._slopes(z.flatten(1))
        dz = affine.linear(dx.reshape(-1, *affine.in_shape)).flatten(1)
        return slope * dz[:, order]

    def rounding(self, x: Tensor, precision: Precision) -> Tensor:
        """Of the sum z, carried through φ, and of φ itself."""
        affine = self.samples.stage.affine
        u = x.reshape(-1, *affine.in_shape)
        y, slope, order = self._slopes(affine.forward(u).flatten(1))
        std = precision.sum_std(affine.squared().linear(u.square())).flatten(1)[:, order]
        return ((slope * std).square() + (y * precision.unit).square()).sqrt()

    def basis_errors(
        self, k: Tensor, f: Tensor, precision: Precision
    ) -> Callable[[Tensor], Tensor]:
        """S⁻¹UᵀE of the layer above, with draws of its own."""
        k = k.flatten(1)
        std = precision.update_std(k.square().T @ f.square(), k.T @ f)

        def draw(_: Tensor) -> Tensor:
            e = precision.normal(std, samples=1)[0]
            return (self.above.left.T @ e) / self.above.values[:, None]

        return draw

    def _slopes(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The steps' output, their slope, and which pre-activation each output comes from."""
        slope = torch.ones_like(y)
        order = torch.arange(y.shape[1], dtype=y.dtype, device=y.device)[None]
        for op in self.steps:
            if isinstance(op, Activation):
                slope = slope * op.derivative(y)
            else:
                slope = op.linear(slope)
                order = op.linear(order) if isinstance(op, (Reshape, Rearrange)) else order
            y = op.forward(y)
        return y.flatten(1), slope.flatten(1), order.flatten().long()


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
    """

    matrix: Tensor
    shift: Tensor
    smoothing: float
    pool: Tensor
    clear: int
    labels: Tensor

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
    def target(self) -> Tensor:
        """Smoothed one-hot targets of the starts, [S, C]."""
        classes = len(self.shift)
        dense = torch.eye(classes).to(self.shift)[self.labels]
        return (1.0 - self.smoothing) * dense + self.smoothing / classes

    def begin(self, count: int, idle: int, generator: torch.Generator) -> AtHead:
        """Classes of the pool in turn, in a random order; the likely ones until they are found."""
        size = self.clear if idle < 2 and self.clear else len(self.pool)
        order = torch.randperm(min(size, len(self.pool)), generator=generator)
        return replace(self, labels=self.pool[order.repeat(count // len(order) + 1)[:count]])

    def kinds(self, count: int) -> Tensor:
        """The class of every start."""
        return self.labels

    def labelled(self, labels: Tensor) -> AtHead:
        """One class a row."""
        return replace(self, labels=labels)

    def at(self, index: Tensor) -> AtHead:
        """The same classes for some of the starts."""
        return replace(self, labels=self.labels[index])

    def value(self, q: Tensor) -> Tensor:
        """The cotangent, up to the loss's scale."""
        return torch.softmax(q @ self.matrix.T + self.shift, 1) - self.target

    def derivative(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(diag p − ppᵀ) M."""
        p = torch.softmax(q @ self.matrix.T + self.shift, 1)
        mean = p @ self.matrix
        return p - self.target, p[:, :, None] * (self.matrix - mean[:, None, :])

    def push(self, x: Tensor, dx: Tensor) -> Tensor:
        """(diag p − ppᵀ) W dx."""
        affine = self.samples.stage.affine
        p = torch.softmax(affine.forward(x), 1)
        dz = affine.linear(dx)
        return p * (dz - (p * dz).sum(1, keepdim=True))

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


@dataclass(frozen=True)
class Restricted:
    """The consistency on the affine subspace q = q₀ + N t, for the solver.

    Attributes:
        consistency: f and P.
        origin: q₀, [R].
        directions: N, [R, n], orthonormal columns.
    """

    consistency: Consistency
    origin: Tensor
    directions: Tensor

    def rows(self, t: Tensor) -> Tensor:
        """Q of t."""
        return self.origin + t @ self.directions.T

    def coordinates(self, q: Tensor) -> Tensor:
        """The t nearest to q."""
        return (q - self.origin) @ self.directions

    def cost(self, t: Tensor) -> Tensor:
        """‖(I − PPᵀ) f‖² / ‖f‖²."""
        f = self.consistency.value(self.rows(t))
        cost = self.consistency.project(f).square().sum(1) / _size(f)
        # A saturated softmax says nothing: p = e_c lies in every subspace.
        return torch.where(_size(f) > VANISHED, cost, torch.full_like(cost, torch.inf))

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cost, Jᵀr and JᵀJ."""
        residual, jacobian = self.linear(t)
        return (
            residual.square().sum(1),
            (residual[:, None, :] @ jacobian)[:, 0],
            jacobian.transpose(1, 2) @ jacobian,
        )

    def linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Residual [S, m] and Jacobian [S, m, n], over ‖f‖.

        J is projected before it is squared: ‖J‖² − ‖PᵀJ‖² cancels where samples are alike.
        """
        f, slope = self.consistency.derivative(self.rows(t))
        jacobian = slope @ self.directions
        basis = self.consistency.basis
        jacobian = jacobian - basis @ (basis.T @ jacobian)
        size = _size(f).sqrt()
        return self.consistency.project(f) / size[:, None], jacobian / size[:, None, None]


def _size(f: Tensor) -> Tensor:
    return f.square().sum(1).clamp_min(1e-300)


def steps_between(chain: Chain, index: int) -> tuple[Op, ...] | str:
    """The steps from stage ``index`` to the next affine map, or why they mix entries."""
    lower, upper = chain.stages[index], chain.stages[index + 1]
    if lower.affine.geometry is not None or upper.affine.geometry is not None:
        return "not two fully connected layers in a row"
    steps = (*lower.tail, *upper.lead)
    for op in steps:
        if not (op.elementwise or isinstance(op, (Reshape, Rearrange))):
            return f"'{op.name}' ({op.kind}) between them mixes entries"
    return steps
