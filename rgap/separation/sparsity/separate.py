"""Sparsity route: samples of a ReLU fully connected layer from the zeros of their cotangents.

``G = Kᵀ X`` has rank B, so with ``G = U S Vᵀ`` every cotangent is ``k_b = G V d_b`` for one
direction d_b, and ``D = [d_1 … d_B]`` gives ``X = D⁻¹ Vᵀ``.  ReLU makes k_b zero wherever the unit
is off (``z_bj ≤ 0``): any B−1 independent rows of ``G V`` at units that are off in sample b have
d_b as their kernel.  Such rows are looked for at random (Dimitrov et al. 2024, "SPEAR", take them
uniformly, one kernel a subset, and need about 2^{B−1} subsets).  Here the eliminations of a tree
of subsets are shared, rows are drawn with a preference for units that are off in the mean picture,
and a direction that is not sparse enough is improved by exchanging rows (``search.py``).

The scales of the directions follow from the bias gradient (``∂b = G V w`` and ``D 1 = w``), and the
forward pass certifies the result: the units with ``k_bj = 0`` must be those with ``z_bj ≤ 0``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan

from torch import Tensor

from rgap.separation.sparsity.coordinates import Layer, coordinates
from rgap.separation.sparsity.samples import assemble
from rgap.separation.sparsity.search import RowSearch

__all__ = ["SparseOptions", "SparseSeparation", "sparse_separation"]


@dataclass(frozen=True, eq=False)
class SparseSeparation:
    """Outcome of the sparsity route.

    Attributes:
        inputs: X, [B, n], up to order; None unless every sign is explained.
        cotangents: K = ∂L/∂Z, [B, m], in the same order; None with ``inputs``.
        agreement: λ, the fraction of (sample, unit) pairs for which k = 0 fits z ≤ 0; 0 if fewer
            than B directions were found.
        trials: subsets of B−1 rows whose kernel was formed.
        seconds: wall time.
        reason: one sentence: what certifies the answer, or what is missing.
        directions: sparse directions found.
        error: predicted largest relative error ‖δx_b‖/‖x_b‖ (nan without an answer).
    """

    inputs: Tensor | None
    cotangents: Tensor | None
    agreement: float
    trials: int
    seconds: float
    reason: str
    directions: int = 0
    error: float = nan


@dataclass(frozen=True)
class SparseOptions:
    """How the zeros are looked for.

    Attributes:
        unit: unit roundoff of the client's arithmetic; an entry of G counts as known up to
            16·unit times the size of its row.
        trials: subsets of B−1 rows to try at most.
        seconds: time limit, None for none.
        seed: of the private generator; the global random state is not touched.
        guided: prefer rows of units that are off in the mean picture; False draws uniformly.
    """

    unit: float = 2**-53
    trials: int = 1 << 27
    seconds: float | None = None
    seed: int = 0
    guided: bool = True


def sparse_separation(
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
    options: SparseOptions | None = None,
    watch: Callable[[str], None] | None = None,
) -> SparseSeparation:
    """Split the mixture ``G = Kᵀ X`` of a fully connected layer before ReLU into samples.

    A picture that occurs several times counts once, with the sum of its cotangents.

    Args:
        weight_gradient: G = ∂L/∂W, [m, n].
        bias_gradient: ∂b = ∂L/∂b, [m].
        weight: W, [m, n].
        bias: b, [m].
        rank: B, the number of different samples, which is the rank of G.
        options: of the search; None for those of :class:`SparseOptions`.
        watch: called with a line on the progress.

    Returns:
        X and K if λ is 1 up to entries too close to zero to decide, otherwise the reason.

    Raises:
        ValueError: shapes that do not fit, a rank below 1, NaN or infinity.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> W = torch.randn(30, 12, generator=g, dtype=torch.float64)
        >>> b, X = torch.zeros(30).double(), torch.randn(3, 12, generator=g).double()
        >>> K = torch.randn(3, 30, generator=g).double() * (X @ W.T > 0)  # ReLU: zero where z ≤ 0
        >>> result = sparse_separation(K.T @ X, K.sum(0), W, b, 3)
        >>> result.agreement, bool(torch.cdist(result.inputs, X).amin(0).max() < 1e-9)
        (1.0, True)
    """
    start, options = time.perf_counter(), options or SparseOptions()
    _check(weight_gradient, bias_gradient, weight, bias, rank)
    layer: Layer | str = (
        "the layer has no bias gradient: the zeros give each sample only up to its scale"
    )
    if bias_gradient is not None and bias is not None:
        layer = coordinates(weight_gradient, bias_gradient, weight, bias, rank, options.unit)
    if isinstance(layer, str):
        return SparseSeparation(None, None, 0.0, 0, time.perf_counter() - start, layer)
    return _searched(layer, options, start, watch)


def _searched(
    layer: Layer, options: SparseOptions, start: float, watch: Callable[[str], None] | None
) -> SparseSeparation:
    """Search until B directions explain every sign, or a limit is reached."""
    search, rank = RowSearch(layer, options.seed, options.guided), len(layer.weights)
    tried, best, done = 0, 0.0, -1
    deadline = inf if options.seconds is None else start + options.seconds
    while True:
        if search.count != done and search.count >= rank:
            done = search.count
            answer = assemble(layer, search.directions)
            best = max(best, answer.agreement)
            if answer.certified:
                reason = (
                    f"the signs of {answer.cotangents.numel()} pre-activations fit, "
                    f"{answer.undecided:.1%} of them too close to zero to tell"
                )
                return SparseSeparation(
                    answer.inputs, answer.cotangents, answer.agreement, tried,
                    time.perf_counter() - start, reason, done, answer.error,
                )  # fmt: skip
        spent, limit = time.perf_counter() - start, tried >= options.trials
        late = options.seconds is not None and spent > options.seconds
        if rank == 1 or limit or late:
            what = f"{options.trials} subsets" if limit else f"{options.seconds or 0:g} s"
            reason = (
                f"{search.count} sparse directions of {rank} after {tried} subsets of {rank - 1} "
                f"rows and {spent:.1f} s (limit: {what}), signs explained: {best:.1%}"
            )
            if rank == 1:  # its one direction is all that there is to find
                reason = f"the zeros of k fit only {best:.1%} of the signs of z"
            return SparseSeparation(None, None, best, tried, spent, reason, search.count)
        tried += search.round(max(rank, done + 1), deadline)
        if watch is not None:
            watch(f"sparse directions: {search.count} of {rank}, {tried} subsets")


def _check(
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
) -> None:
    if weight_gradient.ndim != 2 or weight.shape != weight_gradient.shape:
        raise ValueError(
            f"weight_gradient, weight: expected two matrices of one shape [m, n], got "
            f"{tuple(weight_gradient.shape)} and {tuple(weight.shape)}; write layer.weight.grad, "
            "layer.weight"
        )
    units = weight_gradient.shape[0]
    for name, vector in (("bias_gradient", bias_gradient), ("bias", bias)):
        if vector is not None and vector.shape != (units,):
            raise ValueError(
                f"{name}: expected shape ({units},), one entry a row of the weight, got "
                f"{tuple(vector.shape)}; write layer.bias{'.grad' if 'grad' in name else ''}"
            )
    largest = min(weight_gradient.shape)
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank: expected a number of samples from 1 to {largest}, the smaller side of the "
            f"gradient, got {rank}"
        )
    for tensor in (weight_gradient, bias_gradient, weight, bias):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError("expected finite tensors, got NaN or infinity in one of them")
