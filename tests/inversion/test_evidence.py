"""What says that equations leave nothing open where no rank was counted, and the rules for it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from allocations import smallest_routes
from torch import nn
from torch.nn import functional as F

import rgap
from rgap.constraints.determined import doubt
from rgap.limits import AGREE, CLEAR, DETERMINED
from rgap.network.modules import build
from rgap.precision import Estimate, Precision
from rgap.recursion.matrix_free import solve_matrix_free
from rgap.recursion.stage import solve_stage
from rgap.solvers.rank import Evidence, EvidenceKind, numerical_rank


def stage_of(module: nn.Module, shape: tuple[int, ...], seed: int = 0):
    """A layer's equations at a random input, in float64."""
    torch.manual_seed(seed)
    module = module.double()
    affine = build(module, "layer", shape, {id(p): n for n, p in module.named_parameters()})
    x = torch.rand(1, *shape).double()
    k = torch.randn(1, *affine.out_shape).double()
    precision = Precision(torch.float64, seed=seed)
    known = [Estimate(v, precision.rounding(v)) for v in (affine.forward(x), k)]
    return affine, affine.weight_gradient(x, k), *known, precision


def test_a_solved_stage_says_what_its_answer_rests_on() -> None:
    affine, *rest = stage_of(nn.Conv2d(2, 6, 3, 1, 1), (2, 6, 6))
    fast = solve_stage(affine, *rest).solution.stats.joint
    slow = solve_stage(affine, *rest, budget=0.0).solution.stats.joint
    assert isinstance(fast, Evidence)
    assert isinstance(slow, Evidence)
    assert (fast.kind, slow.kind) == (EvidenceKind.ERROR, EvidenceKind.AGREEMENT)
    assert fast.unknowns == slow.unknowns == 72
    assert fast.nullity == slow.nullity == 0
    assert fast.value < DETERMINED / CLEAR
    assert slow.value < AGREE
    assert not doubt(fast)
    assert not doubt(slow)


def test_no_gap_is_reported_where_no_singular_value_was_cut() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 4)
    network = nn.Sequential(*layers)
    network, x = network.double(), torch.rand(1, 1, 4, 4, dtype=torch.float64)
    update = rgap.capture(network, x, torch.tensor([1]), dtype=torch.float64)
    for routes in (nullcontext(), smallest_routes()):
        with routes:
            recovery = rgap.invert(network, update)
        assert recovery.exact, recovery.reason
        assert {layer.gap for layer in recovery.layers} == {float("inf")}
        assert {layer.nullity for layer in recovery.layers} == {0}


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_the_chance_of_agreement_with_one_open_direction_is_what_happens(spread: float) -> None:
    """Uniform on [0, 1], as a probability of what happened is, however the columns are scaled."""
    size, chances = 24, []
    torch.manual_seed(1)
    weight = torch.randn(40, size, dtype=torch.float64)
    open_ = torch.nn.functional.normalize(torch.randn(size, dtype=torch.float64), dim=0)
    weight -= torch.outer(weight @ open_, open_)
    weight *= torch.logspace(0, spread, size, dtype=torch.float64)  # some columns are longer
    module = nn.Linear(size, 40)
    module.weight.data = weight
    affine, gradient, z, k, _ = stage_of(module, (size,))
    nothing = Estimate(0.0 * k.value, 0.0 * k.error)
    for seed in range(40):
        precision = Precision(torch.float64, seed=seed)
        found = solve_matrix_free(affine, 0.0 * gradient, z, nothing, precision)
        seen = Evidence(EvidenceKind.AGREEMENT, found.disagreement, AGREE, size)
        chances.append(seen.chance)
    ranks = torch.tensor(chances).sort().values
    gap = (ranks - (torch.arange(40) + 0.5) / 40).abs().max()
    assert gap < 0.27, ranks  # Kolmogorov's statistic, beyond with chance 0.5%


def test_each_kind_has_a_rule_of_its_own() -> None:
    def seen(kind: EvidenceKind, value: float, unknowns: int = 48) -> str:
        return doubt(Evidence(kind, value, DETERMINED, unknowns))

    assert not seen(EvidenceKind.ERROR, 0.99 * DETERMINED / CLEAR)
    assert "known to 1.1e-02 only" in seen(EvidenceKind.ERROR, 1.1 * DETERMINED / CLEAR)
    assert not seen(EvidenceKind.ENTRIES, 0.99 * DETERMINED)
    assert "worst entry" in seen(EvidenceKind.ENTRIES, 1.1 * DETERMINED)
    # Near enough to go on, and two starts would be as near one time in three.
    assert "memory_budget" in seen(EvidenceKind.AGREEMENT, 0.99 * AGREE, 150_528)
    assert not seen(EvidenceKind.AGREEMENT, 1e-6, 150_528)
    values = torch.tensor([1.0, 1e-3, 2e-4]).double()
    assert "leaves 1 of 3" in doubt(numerical_rank(values, 3, 5e-4))
    assert "not clear: 2 or" in doubt(numerical_rank(values, 2, 5e-4))
    assert not doubt(numerical_rank(values, 3, 1e-6))
    assert "without finding out" in doubt(None)


class Gated(nn.Module):
    """No chain; the third output is nearly the first, and the head's own gradient is not sent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        with torch.no_grad():
            self.head.weight[2] = self.head.weight[0] + 1e-3 * self.head.weight[1]
        self.head.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.head(h * torch.sigmoid(self.mid(h)) + h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_target_along_a_direction_that_a_replay_does_not_see(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network, x = Gated().to(dtype), torch.rand(1, 6, dtype=dtype)
    target = torch.tensor([[0.3, -0.2, 1.1]], dtype=dtype)
    sent = {n: p for n, p in network.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(F.mse_loss(network(x), target), list(sent.values()))
    gradients = dict(zip(sent, slopes, strict=True))
    update = rgap.Update(gradients, batch_size=1, loss="mse_loss", input_shape=(6,), dtype=dtype)
    found = rgap.invert(network, update)
    assert "inputs" in found.certified, found.reason
    assert (found.inputs - x).abs().max() <= found.error_bound
    if dtype == torch.float64:
        assert found.exact, found.reason
        assert (found.labels - target).abs().max() < 1e-6
    else:
        assert found.labels is None
        assert "follows from the gradient of 'first.bias' no better" in found.reason
