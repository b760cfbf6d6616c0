"""Hashed gradients of many samples at once beside those that a client sends."""

from __future__ import annotations

import pytest
import torch
from small_inverse import SHAPE, client, smooth
from torch import Tensor, nn

import rgap
from rgap.learned.design import Client, Design
from rgap.learned.fitting import batches
from rgap.learned.gradients import HashedGradient, of_batches
from rgap.update.losses import Loss

WHOLE = Design(hash_size=None)


class Asking(nn.Module):
    """A forward that looks at a value, which function transforms forbid."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = client()

    def forward(self, x: Tensor) -> Tensor:
        """Logits, doubled where the picture is bright."""
        outputs: Tensor = self.inner(x)
        return 2 * outputs if float(x.mean()) > 0.5 else outputs


def convolution() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4)
        ).eval()


def source(model: nn.Module, loss: Loss, design: Design = WHOLE) -> HashedGradient:
    names = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    return HashedGradient.of(model, Client(loss, SHAPE, (0.0, 1.0), names, 0), design)


def sent(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    return torch.cat([g.flatten() for g in rgap.capture(model, x, y, loss).gradients.values()])


@pytest.mark.parametrize("build", [client, convolution, Asking])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_they_are_those_that_capture_takes(build: type[nn.Module], reduction: str) -> None:
    model, loss = build().eval(), Loss("cross_entropy", reduction=reduction)
    x, y = smooth(9)
    rows = source(model, loss).rows(x, y)
    for number in range(len(x)):
        own = sent(model, x[number : number + 1], y[number : number + 1], loss)
        torch.testing.assert_close(rows[number], own)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_follows_from_its_samples(reduction: str) -> None:
    model, loss = client(), Loss("cross_entropy", reduction=reduction)
    x, y = smooth(6)
    index = torch.tensor([[0, 3, 5], [2, 2, 1]])
    made = of_batches(source(model, loss).rows(x, y), index, loss)
    for row, own in zip(made, index, strict=True):
        torch.testing.assert_close(row, sent(model, x[own], y[own], loss))


def test_the_model_is_left_as_it_is() -> None:
    model = client()
    model[1].bias.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    source(model, Loss(), Design(conditioned=True)).rows(*smooth(3))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.grad is None
        assert parameter.requires_grad is before[name][1]


def test_conditioned_gradients_do_not_see_the_size_of_a_layer() -> None:
    """Tensors of gradients that noise gives a size of 10 are divided by it."""
    model = client()
    x, y = smooth(200)
    scales = source(model, Loss(), Design(conditioned=True)).scales
    plain = source(model, Loss()).rows(x, y).split([864, 24, 96, 4], 1)
    for scale, part in zip(scales.values(), plain, strict=True):
        assert 0.3 < scale / float(part.square().mean().sqrt()) < 3.0
    update = rgap.capture(model, x[:1], y[:1])
    own = source(model, Loss(), Design(conditioned=True))
    torch.testing.assert_close(own.sent(update.gradients), own.rows(x[:1], y[:1])[0])


def test_batches_hold_different_samples_and_all_of_them_in_turn() -> None:
    index = batches(10, 3, 9, torch.Generator().manual_seed(0))
    assert index.shape == (9, 3)
    assert all(len(set(row.tolist())) == 3 for row in index)
    assert int(torch.bincount(index.flatten(), minlength=10).min()) >= 1
