"""Combinations of a head's equations against all of them, and their slope against autograd."""

from __future__ import annotations

import pytest
import torch
from batched import batch_of
from cases import mlp, pictures
from torch import Tensor

from rgap.separation.batch import Separated
from rgap.separation.mixture import Mixture
from rgap.separation.softmax import sketch as sketches
from rgap.separation.softmax.equations import AtHead
from rgap.separation.softmax.separate import likely, separate_head
from rgap.separation.softmax.sketch import Sketch
from rgap.separation.subspace import restricted
from rgap.update.losses import Loss

F64 = torch.float64
CLASSES = 60
LABELS = [3, 50, 50, 7, 22]


def posed(smoothing: float) -> tuple[AtHead, Mixture, Tensor]:
    """A head of sixty classes, its equations and the true rows."""
    x, y = pictures(len(LABELS), 1), torch.tensor(LABELS)
    model = mlp("gelu", 2, widths=(24,), classes=CLASSES)
    batch = batch_of(model, x, y, Loss(label_smoothing=smoothing))
    head = batch.mixture(1)
    at = AtHead.of(head, smoothing, *likely(head), batch.precision).labelled(y)
    roots = batch.chain.stages[0].forward(x)[1].flatten(1) @ head.right
    return at, head, roots


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("away", [0.0, 10.0])
def test_slope_against_autograd(smoothing: float, away: float) -> None:
    """Exact at a sample, where p − y lies in the range of G, and far from any."""
    at, head, roots = posed(smoothing)
    generator = torch.Generator().manual_seed(0)
    q = roots + away * roots.norm() * torch.randn(roots.shape, generator=generator, dtype=F64)
    along = torch.linalg.qr(torch.randn(head.rank, 3, generator=generator, dtype=F64)).Q
    small = at.sketched().within(along)
    assert small.sketch is not None and small.rows < at.rows
    _, found = small.projected(q, along)
    for row, own, label in zip(q, found, LABELS, strict=True):
        alone = small.labelled(torch.tensor([label]))
        reference = torch.func.jacrev(lambda v, a=alone: a.project(a.value(v[None]))[0])(row)
        assert torch.allclose(own, reference @ along, rtol=1e-7, atol=1e-9 * float(own.abs().max()))


def test_the_slope_of_a_sample_serves_near_it_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that are shared know nothing of what p − y has beside the range of G."""
    at, head, roots = posed(0.0)
    q = 30.0 * roots
    along = torch.eye(head.rank, dtype=F64)
    _, right = at.sketched().projected(q, along)
    monkeypatch.setattr(sketches, "HELD", 1e9)
    _, shared = at.sketched().projected(q, along)
    assert float((shared - right).norm()) > 1e-3 * float(right.norm())


def test_combinations_lie_beside_the_range_and_keep_norms() -> None:
    at, head, roots = posed(0.0)
    small = at.sketched()
    assert small.sketch is not None
    rows = small.sketch.rows
    assert float((rows.T @ head.left).abs().max()) < 1e-12
    assert float(rows.sum(0).abs().max()) < 1e-11
    assert float(small.project(small.value(roots)).norm()) < 1e-9
    draw = torch.randn(400, CLASSES, generator=torch.Generator().manual_seed(5), dtype=F64)
    draw = draw - draw.mean(1, keepdim=True)
    share = small.project(draw).square().sum() / at.project(draw).square().sum()
    assert 0.9 < float(share) < 1.1


def test_fewer_directions_take_fewer_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same sketch, with the same norms and nothing in the range of G."""
    monkeypatch.setattr(sketches, "FEWEST", 2)
    at, head, roots = posed(0.0)
    base = at.sketched()
    assert base.sketch is not None and base.whole is not None
    small = base.within(torch.eye(head.rank, dtype=F64)[:, :2])
    assert small.rows < base.whole.rows.shape[1] < at.rows
    assert float(small.project(small.value(roots)).norm()) < 1e-9
    draw = torch.randn(400, CLASSES, generator=torch.Generator().manual_seed(5), dtype=F64)
    draw = draw - draw.mean(1, keepdim=True)
    share = small.project(draw).square().sum() / at.project(draw).square().sum()
    assert 0.8 < float(share) < 1.25
    left = restricted(base)
    assert isinstance(left.consistency, AtHead) and left.consistency.sketch is base.whole


def test_few_equations_are_all_kept() -> None:
    at, head, _ = posed(0.0)
    few = 4 * head.rank
    assert Sketch.of(torch.linalg.qr(head.left[:few]).Q, at.matrix[:few]) is None
    assert at.sketch is None and at.sketched().sketch is not None


def test_cost_and_roots_of_combinations() -> None:
    """Both vanish at the samples alone, and the combinations weigh what all equations do."""
    at, _, roots = posed(0.0)
    whole, part = restricted(at), restricted(at.sketched())
    t = whole.coordinates(roots)
    assert float(part.cost(t).max()) < 1e-22
    ratio = part.cost(t + 0.1) / whole.cost(t + 0.1)
    assert bool((ratio > 0.1).all()) and bool((ratio < 10.0).all())


@pytest.mark.parametrize("labels", [[5] * 6, [1, 9, 9, 30, 41, 41]])
def test_a_batch_is_separated_with_combinations(labels: list[int]) -> None:
    x, y = pictures(6, 4), torch.tensor(labels)
    batch = batch_of(mlp("tanh", 5, widths=(24,), classes=CLASSES), x, y)
    head = batch.mixture(1)
    at = AtHead.of(head, 0.0, *likely(head), batch.precision)
    assert at.sketched().sketch is not None
    found = separate_head(batch, head)
    assert isinstance(found, Separated), found
    truth = batch.chain.stages[0].forward(x)[1].flatten(1)
    gaps = torch.cdist(found.features.value, truth)
    assert sorted(gaps.argmin(1).tolist()) == list(range(6))
    assert float(gaps.amin(1).max()) < 1e-8 * float(truth.norm(dim=1).max())
    assert found.head.targets.argmax(1).tolist() == y[gaps.argmin(1)].tolist()
