"""Max-pools passed by their winners, and pictures from features where that ends."""

from __future__ import annotations

import pytest
import torch
from cases import picture
from torch import Tensor, nn

import rgap
from rgap import Status, capture, invert
from rgap.completion.features import Suggestion, coarse
from rgap.completion.max_pool import PooledStage, find_winners
from rgap.constraints.known_input import Standardised, Where
from rgap.jacobian.module_update import ClientLoss, KnownFeatures, ModuleUpdate
from rgap.jacobian.smoothing import rounded
from rgap.network.chain import parse
from rgap.precision import UNKNOWN, Estimate, Precision
from rgap.solvers.priors import TotalVariation
from rgap.update.losses import Loss

F64 = torch.float64
LABEL = torch.tensor([3])


def pooled(channels: int = 32, seed: int = 2) -> nn.Module:
    """Two convolutions, a max-pool, two fully connected layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, channels, 3, 1, 1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9 * channels, 16), nn.ReLU(), nn.Linear(16, 5),
    ).double().eval()  # fmt: skip


def test_a_max_pool_is_passed_where_the_layer_below_names_its_winners() -> None:
    wide, x = pooled(channels=20), picture((2, 6, 6), 1)
    known = invert(wide, capture(wide, x, LABEL, dtype=F64))  # by the values below the pool alone
    assert known.inputs is None or float((known.inputs - x).abs().max()) < 1e-12
    model = pooled(channels=16)  # too few of them that are not zero: the winners say more
    found = invert(model, capture(model, x, LABEL, dtype=F64), time_limit=120.0)
    assert found.status is Status.EXACT, found.reason
    assert found.inputs is not None and found.error_bound is not None
    assert float((found.inputs - x).abs().max()) <= found.error_bound


def test_values_stand_where_the_winners_are_and_nothing_is_said_elsewhere() -> None:
    model, x = pooled(), picture((2, 6, 6), 1).double()
    chain = parse(model, (2, 6, 6))
    gradients = {n: g.double() for n, g in capture(model, x, LABEL).gradients.items()}
    before = model[:4](x).detach()
    after = model[4](before).requires_grad_()
    nn.functional.cross_entropy(model[5:](after), LABEL).backward()
    assert after.grad is not None
    precision = Precision(F64)
    value, slope = after.detach(), after.grad
    output = Estimate(value, precision.rounding(value))
    cotangent = Estimate(slope, precision.rounding(slope))
    pool = chain.stages[2].lead[0]
    found = find_winners(model, PooledStage(chain, 2, pool, output, cotangent), gradients, 20.0)
    assert found is not None and found.passed is not None
    assert torch.allclose(found.input, model[:2](x), atol=1e-8)
    placed, pulled = found.passed
    assert torch.allclose(pool.forward(placed.value), value, atol=1e-12)
    on = placed.known & (placed.value > 0)
    assert torch.allclose(placed.value[on], before[on], atol=1e-8)
    assert bool((placed.error[:, ~placed.known] == UNKNOWN).all()) and not bool(placed.known.all())
    assert torch.allclose(pulled.value * (before > 0), pool.pull(before, slope) * (before > 0))


@pytest.mark.parametrize(("index", "surplus"), [(1, 0.0), (2, 100.0)])
def test_no_search_at_the_data_or_with_few_equations(index: int, surplus: float) -> None:
    model = pooled()
    chain = parse(model, (2, 6, 6))
    gradients = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    pool = chain.stages[2].lead[0]
    zero = torch.zeros(1, *pool.out_shape, dtype=F64)
    known = Estimate(zero, zero[None])
    stage = PooledStage(chain, index, pool, known, known)
    assert not find_winners(model, stage, gradients, 1.0, surplus=surplus)


def test_a_frozen_layer_below_names_no_winners() -> None:
    model, x = pooled(channels=2), picture((2, 6, 6), 1)
    model[2].weight.requires_grad_(False)
    found = invert(model, capture(model, x, LABEL, dtype=F64), complete=True, time_limit=1.0)
    assert found.status is Status.UNSUPPORTED and "max_pool2d" in found.reason


def test_where_counts_and_compares_known_entries_alone() -> None:
    where = Where(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    assert where.equations == 1
    assert where.misfit(torch.tensor([3.0, 7.0])).tolist() == [2.0, 0.0]


def test_channels_are_measured_in_their_own_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 3, 4, 4, generator=generator, dtype=F64)
    value[:, 1] = 100.0 + 0.01 * value[:, 1]
    value[:, 2] = 7.0
    known = Standardised.of(value.flatten(1), 3)
    parts = (known.scale * value.flatten(1)).reshape(2, 3, -1)
    assert torch.allclose(parts[:, :2].std((0, 2), correction=0), torch.ones(2, dtype=F64))
    assert bool((parts[:, 2] == 0).all()) and known.equations == 2 * 2 * 16 and known.places == 16
    averages = Standardised.of(value[:, :, 0, 0], 3)
    assert averages.places == 1 and len(averages.scale.unique()) == 1


def silu(x: Tensor) -> tuple[nn.Module, dict[str, Tensor], KnownFeatures]:
    """A network with a known layer inside."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, 5),
    ).double()  # fmt: skip
    sent = capture(model.eval(), x, LABEL).gradients
    u = model[:2](x).detach().requires_grad_()
    nn.functional.cross_entropy(model[2:](u), LABEL).backward()
    assert u.grad is not None
    known = Standardised.of(u.detach(), 6)
    return model, dict(sent), KnownFeatures("2", tuple(u.shape), known, u.grad)


def test_direction_is_one_minus_the_cosine_and_a_share_of_the_features() -> None:
    x = picture((2, 6, 6), 1).double()
    model, sent, source = silu(x)
    update = ModuleUpdate(model, sent, source, tuple(x.shape))
    other = (0.9 * x).requires_grad_()
    u = model[:2](other)
    value = (source.cotangent * u).sum()
    own = torch.cat([g.flatten() for g in torch.autograd.grad(value, model[:2].parameters())])
    theirs = torch.cat([sent[n].double().flatten() for n in ("0.weight", "0.bias")])
    cosine = nn.functional.cosine_similarity(own, theirs, dim=0)
    assert isinstance(source.known, Standardised)
    apart = source.known.misfit(u.detach()).square().mean()
    assert torch.allclose(update.features(other), apart)
    assert torch.allclose(update.direction(other, 0.0), 1.0 - cosine)
    assert torch.allclose(update.direction(other, 2.0), 1.0 - cosine + 2.0 * apart)
    outer = ModuleUpdate(model, sent, ClientLoss(Loss(), LABEL), tuple(x.shape))
    assert float(outer.direction(x.requires_grad_(), 1.0).detach().abs()) < 1e-6


@pytest.mark.parametrize("follow", [True, False])
def test_a_suggestion_is_near_the_known_features(follow: bool) -> None:
    x = rgap.photos.load(1, 6)[:, :2]
    model, sent, source = silu(x)
    prior = TotalVariation()
    arguments = (model, sent, source, Suggestion(tuple(x.shape), prior, (0.0, 1.0), 20.0))
    found = coarse(*arguments, follow=follow)
    assert found.dtype == F64 and bool(((found >= 0) & (found <= 1)).all())
    assert torch.equal(found, coarse(*arguments, follow=follow))
    assert float((found - x).square().mean()) < 0.1 * float((x - 0.5).square().mean())


def test_what_is_rounded() -> None:
    assert rounded(nn.MaxPool2d(2)) and rounded(nn.ReLU())
    assert not rounded(nn.MaxPool2d(2, ceil_mode=True)) and not rounded(nn.SiLU())


def test_where_no_winner_is_found_the_status_stays_and_a_picture_is_suggested() -> None:
    model = pooled(channels=2)
    x = picture((2, 6, 6), 1)
    update = capture(model, x, LABEL, dtype=F64)
    found = invert(model, update, complete=True, time_limit=0.05)
    assert found.status is Status.UNSUPPORTED and found.inputs is None
    assert found.nearest is not None and found.nearest.shape == x.shape
    assert "directions of gradients" in found.reason
