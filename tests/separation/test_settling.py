"""A point that is still on its way is no sample: it settles, or it is refused."""

from __future__ import annotations

import pytest
import torch
from batched import batch_of
from cases import mlp, pictures
from torch import Tensor

from rgap.inversion.polish import Equations, polish
from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.weights import Fit, row_weights
from rgap.limits import FITS
from rgap.precision import Estimate
from rgap.separation import peeling
from rgap.separation.batch import Batch
from rgap.separation.errors import Spread, spread
from rgap.separation.mixture import Mixture
from rgap.separation.peeling import _polished
from rgap.separation.softmax.equations import AtHead
from rgap.separation.softmax.separate import likely
from rgap.separation.subspace import Restricted, restricted
from rgap.update.losses import Loss

LABELS = torch.tensor([7, 7, 7, 23])
CLASSES = 40


def posed() -> tuple[Batch, Mixture, AtHead, Restricted, Tensor]:
    """A head's equations, one class a row, and the true rows."""
    x = pictures(len(LABELS), 3)
    batch = batch_of(mlp("gelu", 4, widths=(24,), classes=CLASSES), x, LABELS)
    head = batch.mixture(1)
    at = AtHead.of(head, 0.0, *likely(head), batch.precision).labelled(LABELS)
    whole = restricted(at)
    roots = batch.chain.stages[0].forward(x)[1].flatten(1) @ head.right
    return batch, head, at, whole, whole.rows(whole.coordinates(roots))


def spread_from(roots: Tensor) -> Spread:
    batch, _, at, *_ = posed()
    targets = torch.eye(CLASSES, dtype=torch.float64)[LABELS]
    copies = torch.ones(len(LABELS), dtype=torch.float64)
    loss = BatchLoss(Loss(), targets, copies)
    return spread(at, roots, batch.chain, loss, batch.precision)


def test_a_root_that_is_not_there_yet_is_solved_to_the_end() -> None:
    *_, roots = posed()
    near = roots.clone()
    near[1] += 0.05 * (roots[0] - roots[1])
    found = spread_from(near)
    assert found.restless == 0.0
    error = found.features.error.flatten(2).square().mean(0).sqrt().norm(dim=1)
    truth = posed()[0].chain.stages[0].forward(pictures(len(LABELS), 3))[1].flatten(1)
    off = (found.features.value.flatten(1) - truth).norm(dim=1)
    assert bool((off < 6.0 * error).all()), (off, error)


def test_a_root_that_ends_at_another_one_is_told() -> None:
    """Started next to sample 0, the row of sample 1 becomes a second sample 0."""
    *_, roots = posed()
    twice = roots.clone()
    twice[1] = roots[0] + 0.05 * (roots[1] - roots[0])
    assert spread_from(twice).restless > 0.0


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_point_in_a_valley_is_not_at_rest(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step of the solver, the mean of two samples is no root, a sample is one."""
    monkeypatch.setattr(peeling, "POLISHING", 0)
    monkeypatch.setattr(peeling, "LIKELY", float("inf"))
    monkeypatch.setattr(Restricted, "refined", lambda self, t: t)
    *_, whole, roots = posed()
    point = roots + share * (roots.roll(1, 0) - roots)
    alone = whole.some(torch.arange(1))
    _, fits, still = _polished(alone, point[:1])
    assert fits.tolist() == [0] and still == [share == 0.0]


def test_a_settled_start_that_misses_is_polished_after_all() -> None:
    """Beyond what reproduces the update its own error is no excuse: the polish goes on."""
    batch, *_ = posed()
    x = pictures(len(LABELS), 3)
    loss = BatchLoss(
        Loss(),
        torch.eye(CLASSES, dtype=torch.float64)[LABELS],
        torch.ones(len(LABELS), dtype=torch.float64),
    )
    draw = torch.randn(9, *x.shape, generator=torch.Generator().manual_seed(0)).double()
    start = Estimate(x + 1e-9 * draw[0], 1e-12 * draw[1:])
    point = Linearisation(batch.chain, start.value, loss)
    weights = row_weights(point, loss.known(point.outputs, batch.precision), batch.precision)
    before = Fit(point, batch.gradients, weights).misfit
    update = Equations(batch.chain, batch.gradients, batch.precision)
    done = polish(update, start, loss, lambda r: r, settled=True)
    assert done.iterations > 0 and done.misfit < 0.5 * before
    kept = polish(update, start, loss, None, settled=True)
    assert kept.iterations == 0 and kept.misfit > FITS
