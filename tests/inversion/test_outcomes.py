"""What is said of layers: not reached, read off, or solved."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor, nn

import rgap
from rgap import LayerReport
from rgap.recovery import Route
from rgap.solvers.rank import Evidence, EvidenceKind, Rank, numerical_rank
from rgap.solvers.solution import Stats


def nothing(count: int) -> Tensor:
    return torch.empty(0, 9)


def test_a_layer_is_not_reached_read_off_or_solved() -> None:
    report = LayerReport("fc", "linear", 9, unread=3, note="stopped here")
    assert report.route is Route.NOT_REACHED and report.nullity is None and not report.determined
    off = report.read_off(Route.BIAS_ATTACK, nothing, 1e-7)
    assert off.determined and off.gradient_rank == off.joint_rank == 9
    assert (off.gap, off.condition, off.residual, off.seconds) == (inf, 1.0, 0.0, 0.0)
    counted = Rank.agreed(7, 9, gap=1e8, largest=2.0)
    short = report.solved(Stats("cholesky", 9, 4, counted, 2.0, 1e-9), 0.5, nothing, None)
    assert (short.gradient_rank, short.joint_rank, short.nullity, short.gap) == (4, 7, 2, 1e8)
    seen = Evidence(EvidenceKind.ERROR, 1e-9, 1e-3, 9)
    free = report.solved(Stats("lsmr", 9, None, seen, 2.0, 1e-9), 0.5, nothing, 1e-8)
    assert free.determined and free.gradient_rank is None and free.gap == inf
    open_ = report.solved(Stats("lsmr", 9, None, None, 2.0, 1e-9), 0.5, nothing, None)
    assert open_.nullity is None and not open_.determined
    assert {r.note for r in (off, short, free, open_)} == {"stopped here"}


def test_the_rank_of_diagonal_blocks_is_that_of_the_matrix() -> None:
    draw = torch.Generator().manual_seed(0)
    blocks = [torch.randn(4, r, generator=draw) @ torch.randn(r, 5, generator=draw) for r in (2, 3)]
    blocks = [block.double() for block in blocks]
    ranks = [numerical_rank(torch.linalg.svdvals(block), 5, 1e-6) for block in blocks]
    whole = torch.block_diag(*blocks, *blocks)
    summed = Rank.summed(ranks, 2)
    values = torch.linalg.svdvals(whole)
    dense = numerical_rank(values, 20, 1e-6)
    assert (summed.rank, summed.nullity) == (dense.rank, dense.nullity) == (10, 10)
    assert abs(summed.largest - dense.largest) < 1e-12 * dense.largest
    assert abs(summed.smallest - dense.smallest) < 1e-12 * dense.largest
    assert Rank.none(5).nullity == 5 and Rank.full(5).nullity == 0


def test_a_contradiction_names_the_backward_hooks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, 1, 1), nn.Sigmoid(), nn.Conv2d(12, 12, 3, 2, 1), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(12 * 16, 5),
    ).double()  # fmt: skip
    x = rgap.photos.load(1, 8, start=3).double().requires_grad_()
    model[2].register_full_backward_hook(lambda m, i, o: tuple(1.1 * g for g in i))
    update = rgap.capture(model, x.detach(), torch.tensor([1]))
    found = rgap.invert(model, update)
    assert found.status is rgap.Status.INCONSISTENT
    assert "backward hooks run on '2'" in found.reason
