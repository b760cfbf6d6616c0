"""A completion reproduces the update where it says so, and keeps what was determined without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import rgap
from rgap import Status, capture, invert

F64 = torch.float64
MOST = 0.01  # of the update, that a completion may miss


def narrow(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    shape = (2, 16, 16)
    return rgap.models.resnet(2, (4, 6, 8), input_shape=shape, seed=seed).double().eval()


@pytest.mark.parametrize("seed", [0, 1, 2, 507])
def test_a_completion_of_an_update_with_tensors_of_zeros_reproduces_it(seed: int) -> None:
    model, x = narrow(seed), torch.zeros(1, 2, 16, 16, dtype=F64)
    update = capture(model, x, torch.tensor([1]), dtype=F64, share_labels=True, value_range=None)
    assert sum(not bool(g.any()) for g in update.gradients.values()) > 1
    found = invert(model, update, complete=True, time_limit=1.0)
    if found.status is Status.COMPLETED:
        assert found.residual is not None and found.residual <= MOST
    else:
        assert found.inputs is None and found.candidates[0].residual > MOST
        assert "did not find a batch that reproduces the update" in found.reason


@pytest.mark.parametrize("method", ["gauss_newton", "ig"])
def test_a_search_does_not_pass_over_tensors_of_zeros(method: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    with torch.no_grad():
        model[0].bias.fill_(-1.0)
        model[2].weight.mul_(1e-6)  # and hardly depends on the data
    x = torch.zeros(1, 6, dtype=F64)  # no unit is on: the bias of the head alone is not zero
    update = capture(model, x, torch.tensor([1]), dtype=F64, share_labels=True, value_range=None)
    begin = torch.full((1, 6), 20.0, dtype=F64)
    found = rgap.match(model, update, method=method, iterations=1, start=begin)
    met = found.residual is not None and found.residual <= 1e-3
    assert met == (found.status is Status.COMPLETED) == (found.inputs is not None)


@pytest.mark.parametrize(("name", "batch"), [("lenet5", 1), ("lenet5", 2), ("vgg", 1)])
def test_a_completion_keeps_what_is_determined_without_it(name: str, batch: int) -> None:
    model = getattr(rgap.models, name)(seed=0)
    x = rgap.photos.load(batch)
    update = capture(model, x, torch.arange(batch), dtype=F64, share_labels=True)
    plain = invert(model, update)
    found = invert(model, update, complete=True, time_limit=3.0)
    assert plain.features and plain.features.keys() <= found.features.keys()
    for layer, value in plain.features.items():
        assert torch.allclose(found.features[layer], value, rtol=1e-9, atol=1e-9)
    solved = [{r.layer for r in each.layers if r.nullity == 0} for each in (plain, found)]
    assert solved[0] <= solved[1]
    assert found.candidates[0].residual < 1.0 and "in candidates is" in found.reason


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_what_noise_explains_is_asked_of_the_whole_update_too(seed: int, half: bool) -> None:
    """A tensor whose gradient is less than its noise explains no miss of the others."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    update = capture(model, torch.rand(2, 2, 4, 4), torch.tensor([1, 1]))
    noise = 0.0
    if half:
        rounded = {name: g.half() for name, g in update.gradients.items()}
        update = replace(update, gradients=rounded, dtype=torch.float16)
    else:
        entries = torch.cat([g.flatten() for g in update.gradients.values()])
        noise = 5e-4 * float(entries.square().mean().sqrt())
        added = {n: g + noise * torch.randn_like(g) for n, g in update.gradients.items()}
        update = replace(update, gradients=added)
    found = invert(model, update, complete=True, time_limit=2.0, noise=noise)
    if found.status is Status.COMPLETED:
        assert found.residual is not None and found.residual <= MOST


def test_the_winners_of_a_pool_of_a_black_picture_raise_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, bias=False, groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(72, 5),
    ).eval()  # fmt: skip
    update = capture(model, torch.zeros(1, 1, 5, 5), torch.tensor([3]), share_batch_size=False)
    found = invert(model, update, complete=True, time_limit=2.0)
    assert found.status is not Status.EXACT
