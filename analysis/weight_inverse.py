"""The weights of one layer, inverted: null space, pseudo-inverse and rank of ``u ↦ W u``."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from rgap.affine import Affine
from rgap.solvers.rank import Rank, numerical_rank, resolve_rcond
from rgap.solvers.subspace import full_column_rank
from rgap.systems import weight_constraint

SAFE = 1e4  # condition up to which the normal equations lose nothing that refinement cannot mend


class WeightInverse:
    """Factors W of one sample once; every sample of the batch shares it.

    Injective weights of moderate condition go through the Cholesky factor of WᵀW with two steps of
    refinement, onto ones through WWᵀ, all others through the singular value decomposition.

    Args:
        affine: the layer.
        rcond: relative cutoff, None for the default.
        noise: relative error of the weights.
        dtype: precision in which they are known.
    """

    def __init__(
        self,
        affine: Affine,
        rcond: float | None = None,
        noise: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.affine = affine
        self.size, self.outputs = prod(affine.in_shape), prod(affine.out_shape)
        self._lower: Tensor | None = None
        self._pseudo: Tensor | None = None
        self._null: Tensor | None = None
        injective = self.outputs >= self.size
        gram = self._gram(injective)
        ends = full_column_rank(gram)
        short = len(gram)
        if ends is not None and ends[0] < SAFE * ends[1]:
            self.rank = Rank(short, self.size, 0.0, float("inf"), *ends, short)
            self._injective = injective
            self._lower = torch.linalg.cholesky(gram)
            return
        dense = self._dense()
        u, s, vh = torch.linalg.svd(dense, full_matrices=True)
        self.rank = numerical_rank(
            s, self.size, resolve_rcond(rcond, tuple(dense.shape), dtype, noise)
        )
        r = self.rank.rank
        self._pseudo = (vh[:r].T / s[:r]) @ u[:, :r].T
        self._null = vh[r:]

    @property
    def onto(self) -> bool:
        """Every z is W u of some u."""
        return self.rank.rank == self.outputs

    def null(self) -> Tensor:
        """Orthonormal basis of {u: W u = 0}, [nullity, *in_shape]."""
        if self.rank.nullity == 0:
            return self.affine.weight.new_zeros(0, *self.affine.in_shape)
        if self._null is None:
            q = torch.linalg.qr(self._dense().T, mode="complete").Q
            self._null = q[:, self.rank.rank :].T.contiguous()
        return self._null.reshape(-1, *self.affine.in_shape)

    def solve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(W⁺ z, z − W W⁺ z) for z [S, *out_shape]."""
        u = self._once(z)
        for _ in range(2 if self._lower is not None else 1):
            u = u + self._once(z - self.affine.linear(u))
        return u, z - self.affine.linear(u)

    def _once(self, z: Tensor) -> Tensor:
        shape = (len(z), *self.affine.in_shape)
        if self._pseudo is not None:
            return (z.flatten(1) @ self._pseudo.T).reshape(shape)
        assert self._lower is not None
        if self._injective:
            right = self.affine.adjoint(z).flatten(1).T
            return torch.cholesky_solve(right, self._lower).T.reshape(shape)
        inner = torch.cholesky_solve(z.flatten(1).T, self._lower).T
        return self.affine.adjoint(inner.reshape(len(z), *self.affine.out_shape))

    def _gram(self, injective: bool) -> Tensor:
        affine = self.affine
        if not injective:
            unit = torch.eye(self.outputs, dtype=torch.float64).reshape(-1, *affine.out_shape)
            return affine.linear(affine.adjoint(unit)).flatten(1)
        coupling = weight_constraint(affine, 1)
        gram = torch.zeros(self.size, self.size, dtype=torch.float64)
        channels = affine.in_shape[0]
        view = gram.view(channels, -1, channels, self.size // channels)
        coupling.add_gram(torch.ones(coupling.rows, dtype=torch.float64), view)
        return gram

    def _dense(self) -> Tensor:
        unit = torch.eye(self.size, dtype=torch.float64).reshape(-1, *self.affine.in_shape)
        return self.affine.linear(unit).flatten(1).T.contiguous()
