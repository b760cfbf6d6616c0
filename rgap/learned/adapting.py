"""An inverse for weights that have moved, without training it again.

Gradients of the same pictures at the old and the new weights are alike up to a map that is nearly
linear where the weights have moved little.  It is fitted by ridge regression, straight to what the
first layer of the networks makes of the old gradients,

    min_V ‖Z′ Vᵀ − Z Wᵀ‖² + λ ‖V‖²,    V = ((Z′Z′ᵀ + λ)⁻¹ Z Wᵀ)ᵀ Z′,

with Z and Z′ [N, m] the standardised hashed gradients at both, and V takes the place of W.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rgap.learned.fingerprint import Fingerprint
from rgap.learned.fitting import Fitting, Pool, batches
from rgap.learned.gradients import HashedGradient
from rgap.learned.inverse import Inverse
from rgap.learned.networks import first_layer
from rgap.learned.schedule import Schedule
from rgap.learned.standard import Standard
from rgap.learned.training import held_out, measured, require_labels, require_pictures
from rgap.matching.checkpoint import Ended
from rgap.network.agreement import refuse_unready
from rgap.progress import Progress, Shown
from rgap.update.preflight import require_targets

__all__ = ["adapt"]

MOST = 2048  # rows of the regression: a matrix of so many is factored once for every λ
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # λ, in units of the mean diagonal of Z′Z′ᵀ
HELD = 0.1  # share of the pictures that the new report is of
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
            pictures of another shape, with NaN or too few, labels that do not belong to the loss.

    The report is that of the new weights, on a share of the pictures that the regression is not
    made from; its seconds are those of the regression.

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
    inverse.fingerprint.require(before, moved=True)
    far = inverse.fingerprint.distance(Fingerprint.of(before))
    if far > 0.0:
        raise ValueError(
            "before: expected the weights that the inverse was trained for, got others at a "
            f"relative distance of {far:.2g}; write adapt(inverse, before, after, ...), the old "
            "model first"
        )
    inverse.fingerprint.require(after, moved=True)
    refuse_unready(after)
    require_pictures(pictures, inverse.client.value_range)
    if tuple(pictures.shape[1:]) != inverse.client.shape:
        raise ValueError(
            f"pictures: expected samples of shape {list(inverse.client.shape)}, got "
            f"{list(pictures.shape[1:])}; give pictures like those of the training"
        )
    known = require_labels(labels, len(pictures))
    require_targets(after, inverse.client.loss, known, inverse.client.shape)
    began, seed, sizes = time.perf_counter(), inverse.client.seed, inverse.design.batch_sizes
    held, (low, high) = held_out(len(pictures), HELD, inverse.design), inverse.client.value_range
    with Progress(progress) as show:

        def parted(model: nn.Module) -> tuple[Pool, Pool]:
            source = HashedGradient.of(model, inverse.client, inverse.design)
            rows = source.rows(pictures, known, show.stage)
            unit = ((pictures - low) / (high - low)).to(rows)
            return Pool(rows, unit, inverse.client.loss).parted(held, seed)

        (old, _), (new, back) = parted(before), parted(after)
        standard, draw = measured(new, inverse.design, seed), torch.Generator().manual_seed(seed)
        total = len(pictures) - held
        count = min(MOST, total * len(sizes)) // len(sizes)
        drawn = [batches(total, size, count, draw) for size in sizes]

        def rows(own: Pool, by: Standard, places: Sequence[int]) -> Tensor:
            hashed = (own.drawn(index)[0] for index in drawn)
            return torch.cat([by.rows(h, at) for h, at in zip(hashed, places, strict=True)])

        def moved(network: nn.Sequential, places: Sequence[int]) -> nn.Sequential:
            show.stage("regression")
            was, now = rows(old, inverse.standard, places), rows(new, standard, places)
            return _refitted(network, was, now)

        guess = inverse.counter
        network = moved(inverse.network, range(len(sizes)))
        counter = None if guess is None else moved(guess, [0] * len(sizes))
    seconds, plan = time.perf_counter() - began, Schedule(seed=seed)
    judged = Fitting(inverse.design, plan, standard, network, counter, new, back)
    report = replace(judged.report(Ended.DONE), steps=inverse.report.steps, seconds=seconds)
    return replace(
        inverse, fingerprint=Fingerprint.of(after), standard=standard, network=network,
        counter=counter, report=report,
    )  # fmt: skip


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
