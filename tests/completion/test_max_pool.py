"""Max-pools passed by their winners, and pictures from features where that ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import picture
from torch import Tensor, nn

import rgap
from rgap import Status, capture, invert
from rgap.completion import features
from rgap.completion.features import Suggestion, coarse
from rgap.completion.max_pool import PooledStage, find_winners
from rgap.constraints.known_input import Where, Whole
from rgap.inversion import fallback
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
    assert found is not None
    placed, pulled = found
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
    return model, dict(sent), KnownFeatures("2", tuple(u.shape), Whole(u.detach()), u.grad)


def test_every_tensor_and_the_features_have_the_same_say() -> None:
    x = picture((2, 6, 6), 1).double()
    model, sent, source = silu(x)
    update = ModuleUpdate(model, sent, source, tuple(x.shape))
    other = (0.9 * x).requires_grad_()
    u = model[:2](other)
    value = (source.cotangent * u).sum()
    slopes = torch.autograd.grad(value, model[:2].parameters())
    own = dict(zip(("0.weight", "0.bias"), slopes, strict=True))
    parts = {n: ((own[n] - sent[n]).norm() / sent[n].norm()).square() for n in own}
    assert isinstance(source.known, Whole)
    apart = ((u - source.known.value).norm() / source.known.value.norm()).square().detach()
    assert torch.allclose(update.apart(other), torch.stack([*parts.values()]).mean() + apart)
    assert torch.allclose(update.only(["0.bias"]).apart(other), parts["0.bias"] + apart)
    assert torch.allclose(update.only([]).apart(other), apart)
    outer = ModuleUpdate(model, sent, ClientLoss(Loss(), LABEL), tuple(x.shape))
    assert float(outer.apart(x.requires_grad_()).detach()) < 1e-12


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (3.0, 3.01)])
@pytest.mark.parametrize("known", [True, False])
def test_a_suggestion_is_near_what_the_update_says(known: bool, low: float, high: float) -> None:
    x = rgap.photos.load(1, 6)[:, :2]
    model, sent, inside = silu(x)
    source = inside if known else ClientLoss(Loss(), LABEL)
    units = nn.Sequential(nn.Identity(), *model)  # data in other units through the same network
    units[0].register_forward_pre_hook(lambda _, given: ((given[0] - low) / (high - low),))
    sent = {f"{int(n[0]) + 1}{n[1:]}": g for n, g in sent.items()}
    source = replace(inside, layer="3") if known else source
    wanted = Suggestion(tuple(x.shape), TotalVariation(1.0 / (high - low)), (low, high), 3.0)
    found = (coarse(units, sent, source, wanted) - low) / (high - low)
    assert found.dtype == F64 and bool(((found > -1e-6) & (found < 1.0 + 1e-6)).all())
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


@pytest.mark.parametrize("good", [True, False])
def test_the_candidate_is_the_batch_that_sends_the_nearer_update(
    good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pooled(channels=2)
    x = picture((2, 6, 6), 1)
    drawn = x.double() if good else torch.full_like(x, 50.0).double()
    monkeypatch.setattr(fallback, "coarse", lambda *_, **__: drawn)
    found = invert(model, capture(model, x, LABEL, dtype=F64), complete=True, time_limit=0.3)
    assert found.status is Status.UNSUPPORTED and found.nearest is not None
    assert torch.equal(found.nearest, drawn) == good
    assert ("gradients one by one" in found.reason) == good
    assert (found.candidates[0].residual < 1e-12) == good


def test_full_layers_above_a_convolution_say_of_its_output_what_features_do() -> None:
    def sent(model: nn.Module) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in model.named_parameters()}

    flat = sent(rgap.models.lenet5(seed=0))
    assert features._layers(flat)[0] == [n for n in flat if not n.startswith("conv1")]
    assert features._layers(flat)[1:] == [["conv1.weight", "conv1.bias"]]
    assert not features._averaged(flat, 0) and not features._averaged(flat, 120)
    averaged = sent(rgap.models.resnet(seed=0))
    assert features._averaged(averaged, 0) and len(features._layers(averaged)) > 5
    below = {name: g for name, g in averaged.items() if not name.startswith("head")}
    assert features._averaged(below, 64) and not features._averaged(below, 64 * 8 * 8)
    full = sent(rgap.models.mlp(seed=0))
    assert features._averaged(full, 0)
    assert all(len(layer) == 2 for layer in features._layers(full))
