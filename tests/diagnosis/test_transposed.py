"""Transposed convolutions, whose weight is [C, F/g, *k]: genuine updates, and batch norm's mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.diagnosis.axes import by_filter, by_input

SIZES = [(3, 3, 1), (3, 5, 1), (4, 4, 2), (4, 1, 1), (4, 6, 2)]


def network(sizes: tuple[int, int, int], bias: bool, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    inputs, outputs, groups = sizes
    norm = nn.BatchNorm2d(outputs)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.2, 3)  # type: ignore[union-attr]
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 2, groups=groups, bias=bias), norm, nn.Sigmoid(),
        nn.Flatten(), nn.Linear(outputs * 36, 10),
    ).double()  # fmt: skip


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> rgap.Update:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    sent = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return rgap.Update(sent, batch_size=len(x), input_shape=tuple(x.shape[1:]))


@pytest.mark.cases(4)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_genuine_is_silent_and_train_mode_is_named(sizes: tuple[int, int, int], bias: bool) -> None:
    for seed in range(2):
        model = network(sizes, bias, seed).eval()
        x, y = torch.rand(3, sizes[0], 5, 5, dtype=torch.float64), torch.tensor([2, 7, 7])
        assert rgap.check(model, gradient(model, x, y)).ok
        twin = network(sizes, bias, seed).train()
        told = rgap.check(model, gradient(twin, x, y))
        assert told.best is not None and told.best.kind.value == "mode", told


@pytest.mark.parametrize("groups", [1, 2])
def test_axes_of_every_kind_of_layer(groups: int) -> None:
    """⟨W_f, ∂L/∂W_f⟩ of a linear layer is ⟨z_f, ∂L/∂z_f⟩, summed over its positions."""
    torch.manual_seed(0)
    for module, shape in (
        (nn.Linear(4, 6, bias=False), (2, 4)),
        (nn.Conv2d(4, 6, 3, groups=groups, bias=False), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False), (2, 4, 5, 5)),
    ):
        module.double()
        z = module(torch.rand(*shape, dtype=torch.float64))
        k = torch.rand_like(z)
        (z * k).sum().backward()
        weight, grad = module.weight.detach(), module.weight.grad
        assert grad is not None
        own = by_filter(module, weight * grad).sum(1)
        assert torch.allclose(own, (z.detach() * k).transpose(0, 1).flatten(1).sum(1))
        if groups == 1:
            assert len(by_input(module, weight)) == 4
