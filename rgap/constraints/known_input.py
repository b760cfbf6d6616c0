"""What is known of a layer's input: all of it, some of it, or equations that it satisfies.

Every class here is one kind of knowledge as residuals for Gauss–Newton (:class:`Equations`):

- :class:`Whole` and :class:`Where`: the values of all entries, or of some.
- :class:`KnownPart`: an orthonormal basis ``C u = c`` of both blocks of a stage.  With K = U S Vᵀ,
  the gradient rows fix the coordinates Vᵀu of every channel, and the weight rows, projected on the
  rest, those along the eigenvectors of ``W(I − VVᵀ)Wᵀ``: every equation that there is once, with
  unit weight, however badly the blocks themselves are conditioned.
- :class:`PlainRows`: ``K u = G`` and ``W u = z − b`` as they are, each block over the norm of its
  right-hand side, where such a basis would be too large.
- :class:`Bounded`: one of these, and ``z ≤ 0`` for the units of a ReLU that are off.  Such a unit
  gives no equation; the residual ``max(z, 0)`` is 0 where the inequality holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from rgap.constraints import WeightConstraint, gradient_constraint, gradient_rows, weight_constraint
from rgap.network.affine import Affine
from rgap.precision import Estimate, Precision
from rgap.solvers.kronecker import Kronecker
from rgap.solvers.rank import numerical_rank, resolve_rcond

CHUNK = 64  # null vectors of K whose images under W are formed at once
WEAK = 1e-10  # relative eigenvalue of the projected Gram matrix below which nothing is known


class Equations(Protocol):
    """Equations for the input of a layer."""

    @property
    def equations(self) -> int:
        """How many."""

    @property
    def expected(self) -> float:
        """Squared misfit that the errors of the right-hand side explain."""

    def misfit(self, u: Tensor) -> Tensor:
        """Weighed residual at u [B, *in_shape], flat."""


@dataclass(frozen=True)
class Whole:
    """All of a layer's input is known: ``u = û``.

    Attributes:
        value: û, [B, *in_shape].
        expected: squared misfit that the error of û explains.
    """

    value: Tensor
    expected: float = 0.0

    @property
    def equations(self) -> int:
        """As many as unknowns."""
        return self.value.numel()

    def misfit(self, u: Tensor) -> Tensor:
        """The difference u − û, flat."""
        return (u - self.value).flatten()


@dataclass(frozen=True)
class Where:
    """Known entries of a pool's output: ``u[known] = û[known]``.

    Attributes:
        value: û, [B, *out_shape].
        known: where it is known; below a ReLU that was off it is not.
        expected: squared misfit that the error of û explains; none is allowed for.
    """

    value: Tensor
    known: Tensor
    expected: float = 0.0

    @property
    def equations(self) -> int:
        """As many as known entries."""
        return int(self.known.sum())

    def misfit(self, u: Tensor) -> Tensor:
        """The difference where û is known, 0 elsewhere, flat."""
        return ((u - self.value) * self.known).flatten()


@dataclass(frozen=True)
class KnownPart:
    """Equations ``C u = c`` with orthonormal rows, each weighed by what is known of its error.

    Attributes:
        affine: of the stage.
        coupling: its W.
        active: 1 for weight rows whose z is known, else 0, [B·outputs].
        basis: V by group, [groups, P, r], columns beyond a group's rank are 0.
        rest: D Qᵀ, eigenvectors over singular values, [r', B·outputs].
        table: what the gradient rows say, Vᵀu, [C, r].
        values: what the weight rows say of the rest, [r'].
        weights: of the equations, [C·r + r'], at most 1.
        expected: squared misfit that the errors of c explain.
    """

    affine: Affine
    coupling: WeightConstraint
    active: Tensor
    basis: Tensor
    rest: Tensor
    table: Tensor
    values: Tensor
    weights: Tensor
    expected: float = 0.0

    @classmethod
    def of(
        cls, affine: Affine, gradient: Tensor, z: Estimate, k: Estimate, precision: Precision
    ) -> KnownPart:
        """The equations of a stage.

        Args:
            affine: the stage's affine map.
            gradient: ∂L/∂W as sent.
            z: its pre-activation with the ensemble of its errors.
            k: the cotangent there.
            precision: of the update.
        """
        batch = len(z.value)
        kronecker = gradient_constraint(affine, k.value)
        groups, rows, size = kronecker.matrix.shape
        left, spectrum, right = torch.linalg.svd(kronecker.matrix, full_matrices=False)
        noise = matrix_noise(kronecker, k, precision)
        cutoff = resolve_rcond(None, (rows, size), noise=noise)
        kept = torch.zeros_like(spectrum)
        for g, values in enumerate(spectrum):
            kept[g, : numerical_rank(values, size, cutoff).rank] = 1.0
        basis = right.mT * kept[:, None, :]
        inverse = kept / spectrum.clamp_min(1e-300)
        sent = gradient_rows(affine, gradient).reshape(groups, -1, rows)
        table = (sent @ left * inverse[:, None, :]).flatten(0, 1)
        entry = entry_error(affine, gradient, k, precision)
        blur = (entry * inverse).repeat_interleave(affine.in_shape[0] // groups, 0)
        coupling = weight_constraint(affine, batch)
        active = z.known.flatten().to(z.value)
        constant = affine.forward(z.value.new_zeros(1, *affine.in_shape))
        start = cls(affine, coupling, active, basis, table[:0], table, table[:0, 0], table[:0, 0])
        target = (z.value - constant).flatten() * active
        gram = start.projected_gram()
        values, vectors = torch.linalg.eigh(gram)
        strong = values > WEAK * values.amax().clamp_min(1e-300)
        rest = (vectors[:, strong] / values[strong].sqrt()).T
        gap = target - coupling.apply(start.lifted(table)[None])[0] * active
        std = (z.std.flatten() * active).nan_to_num(0.0, posinf=0.0)
        weight_blur = (rest.square() @ std.square()).sqrt()
        part = cls(affine, coupling, active, basis, rest, table, rest @ gap, table[:0, 0])
        return part.weighed(torch.cat([blur.flatten(), weight_blur]))

    def weighed(self, std: Tensor) -> KnownPart:
        """The same with weights 1/√(s² + s̄²), relative to the best-known equation."""
        known = torch.cat([self._kept.flatten(), torch.ones_like(self.values)]) > 0
        typical = float(std[known].square().mean().sqrt()) if bool(known.any()) else 1.0
        weights = 1.0 / (1.0 + (std / max(typical, 1e-300)).square()).sqrt() * known
        return replace(self, weights=weights, expected=float((std * weights).square().sum()))

    @property
    def equations(self) -> int:
        """Independent equations."""
        return int(self._kept.sum()) + len(self.values)

    def push(self, u: Tensor) -> Tensor:
        """Weighed C u of an input [B, *in_shape]."""
        table = self.coupling.unfold(u)[0]
        first = self._coordinates(table)
        rest = self.rest @ (
            self.coupling.apply((table - self.lifted(first))[None])[0] * self.active
        )
        return torch.cat([first.flatten(), rest]) * self.weights

    def pull(self, y: Tensor) -> Tensor:
        """Its transpose, [B, *in_shape]."""
        y = y * self.weights
        count = self.table.numel()
        first, rest = y[:count].reshape(self.table.shape), y[count:]
        table = self.lifted(first) + self.lowered(rest)
        return self.coupling.fold(table[None]).reshape(-1, *self.affine.in_shape)

    def misfit(self, u: Tensor) -> Tensor:
        """Weighed C u − c."""
        return self.push(u) - torch.cat([self.table.flatten(), self.values]) * self.weights

    def lifted(self, table: Tensor) -> Tensor:
        """V of coordinates [C, r], [C, P]."""
        groups, size, rank = self.basis.shape
        return (table.reshape(groups, -1, rank) @ self.basis.mT).reshape(-1, size)

    def lowered(self, rest: Tensor) -> Tensor:
        """(I − VVᵀ)Wᵀ(D Qᵀ)ᵀ of coordinates [r'], [C, P]."""
        table = self.coupling.adjoint(((rest @ self.rest) * self.active)[None])[0]
        return table - self.lifted(self._coordinates(table))

    def projected_gram(self) -> Tensor:
        """W(I − VVᵀ)Wᵀ of the weight rows that are known, [B·outputs, B·outputs]."""
        eye = torch.eye(len(self.active), dtype=self.active.dtype, device=self.active.device)
        parts = []
        for rows in torch.split(eye * self.active, CHUNK):
            table = self.coupling.adjoint(rows)
            table = torch.stack([one - self.lifted(self._coordinates(one)) for one in table])
            parts.append(self.coupling.apply(table) * self.active)
        gram = torch.cat(parts)
        return (gram + gram.T) / 2

    @property
    def _kept(self) -> Tensor:
        """Which coordinates of the gradient rows exist, [C, r]."""
        exist = (self.basis.square().sum(1) > 0.5).to(self.table)
        return exist.repeat_interleave(len(self.table) // len(self.basis), 0)

    def _coordinates(self, table: Tensor) -> Tensor:
        groups, size, rank = self.basis.shape
        return (table.reshape(groups, -1, size) @ self.basis).reshape(-1, rank)


@dataclass(frozen=True)
class PlainRows:
    """Gradient and weight rows of a stage, each block with its own scale.

    Attributes:
        affine: of the stage.
        gradient: ∂L/∂W as sent.
        k: cotangent at its output, [B, *out_shape].
        z: its pre-activation, [B, *out_shape].
        active: 1 where z is known.
        scales: of the two blocks.
        expected: squared misfit that the errors of the right-hand sides explain.
    """

    affine: Affine
    gradient: Tensor
    k: Tensor
    z: Tensor
    active: Tensor
    scales: tuple[float, float]
    expected: float = 0.0

    @classmethod
    def of(
        cls, affine: Affine, gradient: Tensor, z: Estimate, k: Estimate, precision: Precision
    ) -> PlainRows:
        """The rows of a stage; arguments as for ``KnownPart.of``."""
        active = z.known.to(z.value)
        sizes = [float(gradient.norm()), float((z.value * active).norm())]
        scales = [1.0 / size if size > 0 else 0.0 for size in sizes]
        rows = entry_error(affine, gradient, k, precision) ** 2 * gradient.numel()
        gaps = float((z.std * active).nan_to_num(0.0, posinf=0.0).square().sum())
        expected = rows * scales[0] ** 2 + gaps * scales[1] ** 2
        return cls(affine, gradient, k.value, z.value, active, (scales[0], scales[1]), expected)

    @property
    def equations(self) -> int:
        """An upper bound on the independent ones."""
        return self.gradient.numel() + int(self.active.sum())

    def misfit(self, u: Tensor) -> Tensor:
        """K u − G and W u + b − z, each over the norm of its right-hand side, flat."""
        rows = (self.affine.weight_gradient(u, self.k) - self.gradient) * self.scales[0]
        gap = (self.affine.forward(u) - self.z) * self.active * self.scales[1]
        return torch.cat([rows.flatten(), gap.flatten()])


@dataclass(frozen=True)
class Bounded:
    """Equations of a stage, and ``(W u + b)_i ≤ 0`` for the units that are off.

    Attributes:
        rows: the equations.
        affine: of the stage.
        scales: 1/‖W_i‖ for a unit that is off, 0 for one that is on, [B, *out_shape].
    """

    rows: Equations
    affine: Affine
    scales: Tensor

    @classmethod
    def of(cls, rows: Equations, affine: Affine, off: Tensor) -> Bounded:
        """The inequalities of the units in ``off`` [B, *out_shape], each over the norm of its row.

        Args:
            rows: the equations of the units that are on.
            affine: of the stage.
            off: True for a unit that is off.
        """
        ones = affine.weight.new_ones(1, *affine.in_shape)
        norms = affine.squared().forward(ones).sqrt().clamp_min(1e-300)
        return cls(rows, affine, off.to(norms) / norms)

    @property
    def equations(self) -> int:
        """Those of the units that are on."""
        return self.rows.equations

    @property
    def expected(self) -> float:
        """That of the equations: a true inequality has no residual."""
        return self.rows.expected

    def misfit(self, u: Tensor) -> Tensor:
        """The residual of the equations, then by how far each inequality is missed."""
        over = (self.affine.forward(u) * self.scales).clamp_min(0)
        return torch.cat([self.rows.misfit(u), over.flatten()])


def matrix_noise(kronecker: Kronecker, k: Estimate, precision: Precision) -> float:
    """Norm of the error of K over the norm of K, for rank decisions."""
    _, rows, size = kronecker.matrix.shape
    scale = float(kronecker.spectra.max())
    entry = float(k.error.square().mean().sqrt() + precision.unit * k.value.square().mean().sqrt())
    return entry * (rows**0.5 + size**0.5) / scale if scale > 0 else 0.0


def entry_error(affine: Affine, gradient: Tensor, k: Estimate, precision: Precision) -> float:
    """Standard error of an entry of the gradient rows, as far as rounding and k explain it."""
    size = float(gradient.square().mean().sqrt())
    inside = float(k.std.square().mean().sqrt() / k.value.square().mean().sqrt().clamp_min(1e-300))
    carried = min(inside, 1.0) * size / float(prod(affine.out_shape[1:])) ** 0.5
    added = precision.noise_rms(affine.weight_name, gradient)  # one weight serves all filters
    return float(precision.unit * size + added + carried)
