"""An inverse for weights that have moved, without training it again.

Gradients of the same pictures at the old and the new weights are alike up to a map that is nearly
linear where the weights have moved little.  It is fitted by ridge regression, straight to what the
first layer of the networks makes of the old gradients,

    min_V ‖Z′ Vᵀ − Z Wᵀ‖² + λ ‖V‖²,    V = ((Z′Z′ᵀ + λ)⁻¹ Z Wᵀ)ᵀ Z′,

with Z and Z′ [N, m] the standardised hashed gradients at both, and V takes the place of W.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.learned.fingerprint import Fingerprint
from rgap.learned.fitting import Pool, batches
from rgap.learned.gradients import HashedGradient
from rgap.learned.inverse import Inverse
from rgap.learned.networks import first_layer
from rgap.learned.standard import Standard
from rgap.learned.training import measured, require_pictures
from rgap.network.agreement import refuse_unready
from rgap.progress import Progress, Shown

__all__ = ["adapt"]

MOST = 2048  # rows of the regression: a matrix of so many is factored once for every λ
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # λ, in units of the mean diagonal of Z′Z′ᵀ
TRIED = 8  # of so many rows one tells which λ is best


def adapt(
    inverse: Inverse,
    before: nn.Module,
    after: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    *,
    progress: Shown = False,
) -> Inverse:
    """An inverse for other weights of the same model, by one ridge regression.

    It costs the gradients of the pictures at both weights and a few factorisations.  How much error
    is left after how many steps of a client is measured by ``python -m benchmarks.studies.learned
    --rows moved``; where the weights have moved far, go on with ``train(start=...)``.

    Args:
        inverse: trained for ``before``.
        before: the model with the old weights.
        after: with the new ones.
        pictures: like those that it was trained with, ``[P, *shape]``.
        labels: a target for each.
        progress: as for :func:`rgap.learned.train`.

    Raises:
        ValueError: models that are not of one architecture, ``before`` not that of the inverse,
            pictures of another shape or with NaN.

    >>> import rgap
    >>> from rgap.learned import Design, Schedule, train
    >>> old, new = (rgap.models.mlp((8,), 4, input_shape=(1, 3, 3), seed=seed) for seed in (0, 1))
    >>> x, y = torch.rand(40, 1, 3, 3), torch.arange(40) % 4
    >>> quick = Schedule(steps=4, updates=8, every=2)
    >>> found = train(old, x, y, design=Design(hash_size=32, hidden=8), schedule=quick)
    >>> moved = adapt(found, old, new, x, y)
    >>> moved.pictures(new, rgap.capture(new, x[:1], y[:1])).shape
    torch.Size([1, 1, 3, 3])
    """
    inverse.fingerprint.require(before, moved=False)
    inverse.fingerprint.require(after, moved=True)
    refuse_unready(after)
    require_pictures(pictures, inverse.client.value_range)
    if tuple(pictures.shape[1:]) != inverse.client.shape:
        raise ValueError(
            f"pictures: expected samples of shape {list(inverse.client.shape)}, got "
            f"{list(pictures.shape[1:])}; give pictures like those of the training"
        )
    known = validation.labels(labels, len(pictures))
    assert known is not None
    with Progress(progress) as show:
        old, new = (
            Pool(
                HashedGradient.of(model, inverse.client, inverse.design).rows(
                    pictures, known, show.stage
                ),
                pictures,
                inverse.client.loss,
            )
            for model in (before, after)
        )
        standard = measured(new, inverse.design, inverse.client.seed)
        sizes, draw = inverse.design.batch_sizes, torch.Generator().manual_seed(inverse.client.seed)
        count = min(MOST, len(pictures) * len(sizes)) // len(sizes)
        drawn = [batches(len(pictures), size, count, draw) for size in sizes]

        def rows(own: Pool, by: Standard, places: Sequence[int]) -> Tensor:
            hashed = (own.drawn(index)[0] for index in drawn)
            return torch.cat([by.rows(h, at) for h, at in zip(hashed, places, strict=True)])

        def moved(network: nn.Sequential, places: Sequence[int]) -> nn.Sequential:
            show.stage("regression")
            was, now = rows(old, inverse.standard, places), rows(new, standard, places)
            return _refitted(network, was, now)

        guess = inverse.counter
        return replace(
            inverse,
            fingerprint=Fingerprint.of(after),
            standard=standard,
            network=moved(inverse.network, range(len(sizes))),
            counter=None if guess is None else moved(guess, [0] * len(sizes)),
        )


def _refitted(network: nn.Sequential, was: Tensor, now: Tensor) -> nn.Sequential:
    """The network with a first layer that makes of rows now what its own made of them before."""
    m, twin = was.shape[1], copy.deepcopy(network)
    weights = first_layer(twin).weight  # behind the m columns of the hash stand those of the size
    aims, gram = was @ weights[:, :m].T, now @ now.T
    tried = torch.arange(len(now), device=now.device) % TRIED == 0
    inner, across = gram[~tried][:, ~tried], gram[tried][:, ~tried]
    gaps = [
        float((across @ _dual(inner, aims[~tried], ridge) - aims[tried]).square().sum())
        for ridge in RIDGES
    ]
    with torch.no_grad():
        weights[:, :m] = _dual(gram, aims, RIDGES[gaps.index(min(gaps))]).T @ now
    return twin


def _dual(gram: Tensor, aims: Tensor, ridge: float) -> Tensor:
    """``(Z′Z′ᵀ + λ)⁻¹ A``, [rows, hidden]."""
    lifted = gram.clone()
    lifted.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.cholesky_solve(aims, torch.linalg.cholesky(lifted))
