"""Batch norm in train mode: captured, matched, read and checked as the client computed it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_mode import SHAPE, buffers, mixing_conv, mixing_mlp, untouched

import rgap
from rgap.diagnosis.finding import Kind
from rgap.jacobian.module_update import ClientLoss
from rgap.labels import estimate
from rgap.matching.objective import Objective
from rgap.matching.presets import PRESETS


def batch(count: int) -> tuple[Tensor, Tensor]:
    """Photographs of 8×8, each of a class of its own."""
    return F.avg_pool2d(rgap.photos.load(count).float(), 4), torch.arange(count)


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
def test_a_capture_is_the_gradient_of_a_client(count: int, dtype: torch.dtype | None) -> None:
    network, (x, y) = mixing_conv(), batch(count)
    before = buffers(network)
    update = rgap.capture(network, x, y, dtype=dtype)
    assert untouched(network, before)
    client = copy.deepcopy(network).to(dtype or torch.float32)
    F.cross_entropy(client(x.to(dtype)), y).backward()
    for name, parameter in client.named_parameters():
        assert torch.equal(update.gradients[name], parameter.grad)
    assert all(torch.equal(sent, before[name]) for name, sent in update.buffers.items())
    evaluated = rgap.capture(network.eval(), x, y, dtype=dtype)
    gap = evaluated.gradients["0.weight"] - update.gradients["0.weight"]
    assert float(gap.norm()) > 0.1 * float(evaluated.gradients["0.weight"].norm())


@pytest.mark.parametrize("name", [n for n, preset in PRESETS.items() if not preset.domains])
@pytest.mark.parametrize("restarts", [1, 5])
def test_every_method_meets_the_truth(name: str, restarts: int) -> None:
    """At the batch itself the objective's distance is 0, whether starts run alone or together."""
    network, (x, y) = mixing_conv(), batch(2)
    before = buffers(network)
    update = rgap.capture(network, x, y, dtype=torch.float64)
    preset = replace(PRESETS[name], variation=0.0, size=0.0, group=0.0, statistics=0.0)
    where = preset.coordinates((0.0, 1.0))
    source = ClientLoss(update.loss, y)
    objective = Objective(network, update.gradients, source, x.shape, preset, where)
    true = ((x.double() - where.centre) / where.unit).flatten()
    rows = torch.stack([true + 0.1 * number for number in range(restarts)])
    with objective.kernels():
        values, slopes = objective(rows)
    assert float(values[0]) < 1e-12 and bool(slopes.isfinite().all())
    assert restarts == 1 or float(values[1]) > 1e-6
    found = rgap.match(network, update, labels=y, method=name, iterations=2, restarts=restarts)
    assert found.iterations == 2 and untouched(network, before)


@pytest.mark.cases(1)
@pytest.mark.parametrize(("count", "decibels"), [(2, 45.0), (4, 35.0)])
def test_a_batch_is_matched(count: int, decibels: float) -> None:
    """60 dB at B = 2 and 43 at B = 4, in eval mode 122 and 57: ε alone fixes a factor."""
    network, (x, y) = mixing_conv(), batch(count)
    before = buffers(network)
    update = rgap.capture(network, x, y, dtype=torch.float64)
    found = rgap.match(network, update, labels=y, iterations=60)
    assert found.status is rgap.Status.COMPLETED and found.inputs is not None
    error = (found.inputs - x).square().flatten(1).mean(1)
    assert float(-10 * error.log10().max()) > decibels
    assert untouched(network, before)


def test_local_steps_take_the_statistics_of_each_step() -> None:
    network, (x, y) = mixing_conv(), batch(4)
    client = copy.deepcopy(network)
    optimiser = torch.optim.SGD(client.parameters(), lr=0.1)
    before = {n: p.detach().clone() for n, p in client.named_parameters()}
    for rows in (slice(0, 2), slice(2, 4)):
        optimiser.zero_grad()
        F.cross_entropy(client(x[rows]), y[rows]).backward()
        optimiser.step()
    after = {n: p.detach().clone() for n, p in client.named_parameters()}
    update = rgap.Update.from_delta(before, after, 0.1, steps=2)
    update = replace(update, batch_size=4, input_shape=SHAPE)
    local = rgap.LocalTraining(rate=0.1, size=2)
    found = rgap.match(network, update, labels=y, start=x.double(), local=local, iterations=1)
    assert found.misfit < 1e-6
    mlp, single = mixing_mlp(), rgap.LocalTraining(rate=0.1, size=1)
    sent = rgap.Update(
        {n: torch.ones_like(p) for n, p in mlp.named_parameters()},
        batch_size=2, input_shape=(12,), local_steps=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="write a batch of B >= 2"):
        rgap.match(mlp, sent, labels=torch.tensor([0, 1]), local=single)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_labels_are_read_off_the_last_layer(count: int) -> None:
    network, x = mixing_conv(), torch.rand(count, *SHAPE)
    y = torch.tensor([3, 3, 7, 0, 9])[:count]
    before = buffers(network)
    read = estimate(network, rgap.capture(network, x, y))
    assert read.labels is not None and torch.equal(read.labels, y.sort().values)
    assert untouched(network, before)


@pytest.mark.parametrize("network", [mixing_conv(), mixing_mlp()], ids=["conv", "mlp"])
def test_a_check_compares_the_mode_with_that_of_the_model(network: nn.Sequential) -> None:
    shape = SHAPE if isinstance(network[0], nn.Conv2d) else (12,)
    x, y = torch.rand(4, *shape), torch.arange(4)
    trained = rgap.capture(network.train(), x, y)
    evaluated = rgap.capture(network.eval(), x, y)
    assert rgap.check(network.eval(), evaluated).ok
    [found] = rgap.check(network.eval(), trained).findings
    assert found.kind is Kind.MODE and "model.train()" in found.remedy
    before = buffers(network.train())
    assert rgap.check(network, trained).ok
    [found] = rgap.check(network, evaluated).findings
    assert found.kind is Kind.MODE and "model.eval()" in found.remedy
    assert untouched(network, before)


def test_a_check_says_nothing_where_no_affine_map_tells_the_mode() -> None:
    network = nn.Sequential(
        nn.Linear(12, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5)
    ).train()
    update = rgap.capture(network, torch.rand(3, 12), torch.arange(3))
    found = rgap.check(network, update)
    assert found.ok and Kind.WEIGHTS not in found.tested
    assert any("train mode" in line for line in found.unrun)


def test_dropout_in_train_mode_is_still_refused() -> None:
    network = nn.Sequential(*mixing_mlp(), nn.Dropout(0.5)).train()
    with pytest.raises(ValueError, match="draws random numbers"):
        rgap.capture(network, torch.rand(2, 12), torch.arange(2))
