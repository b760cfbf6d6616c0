"""Inputs of layers that are handed out of an update whose last layer was altered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Loss, Recovery, Update, capture, invert

F64, F32 = torch.float64, torch.float32


def pooled(classes: int = 10, dtype: torch.dtype = F64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(128, classes),
    ).to(dtype).eval()  # fmt: skip


def biasless(dtype: torch.dtype = F64) -> nn.Sequential:
    """Its last layer sends no bias gradient, that below it does."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 10, bias=False),
    ).to(dtype).eval()  # fmt: skip


def sample(dtype: torch.dtype = F64) -> Tensor:
    return torch.rand(1, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(7))


def sent(
    model: nn.Sequential, target: Tensor, loss: Loss | None = None, dtype: torch.dtype = F64
) -> Update:
    return capture(model, sample(dtype), target, loss or Loss(), dtype=dtype)


def altered(update: Update, change: Callable[[str, Tensor], Tensor]) -> Update:
    return replace(update, gradients={n: change(n, g) for n, g in update.gradients.items()})


def assert_true(model: nn.Sequential, recovery: Recovery, dtype: torch.dtype = F64) -> None:
    assert recovery.features
    for name, value in recovery.features.items():
        true = model[: int(name)](sample(dtype)).detach().double()
        gap = float((value - true).square().mean().sqrt())
        assert gap <= 10.0 * recovery.features_error[name], (name, gap)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("factor", [1.01, 1.1, 2.0, 0.5, -1.0])
@pytest.mark.parametrize("changed", ["4.weight", "4.bias"])
def test_a_factor_on_one_tensor_of_the_head_is_noticed(
    changed: str, factor: float, dtype: torch.dtype
) -> None:
    model = pooled(dtype=dtype)
    update = sent(model, torch.tensor([3]), dtype=dtype)
    other = altered(update, lambda n, g: factor * g if n == changed else g)
    recovery = invert(model, other)
    assert not recovery.features
    assert any("no features are certified" in note for note in recovery.warnings), recovery.warnings
    assert_true(model, invert(model, update), dtype)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("changed", ["4.weight", "4.bias"])
def test_so_is_one_below_a_head_without_a_bias(changed: str, dtype: torch.dtype) -> None:
    model = biasless(dtype)
    update = sent(model, torch.tensor([3]), dtype=dtype)
    assert_true(model, invert(model, update), dtype)
    for factor in (1.01, 0.5, -1.0):
        other = altered(update, lambda n, g, f=factor: f * g if n == changed else g)
        assert not invert(model, other).features


@pytest.mark.parametrize("factor", [0.01, 1.5, 32.0])
def test_a_factor_on_the_whole_update_leaves_the_inputs_what_they_are(factor: float) -> None:
    model = pooled()
    update = altered(sent(model, torch.tensor([3])), lambda _, g: factor * g)
    assert_true(model, invert(model, update))


def test_pruned_rows_that_are_alike_are_noticed() -> None:
    """The two rows of a head of two classes are each other's negative, and pruned alike."""
    kept = 0
    for seed in range(5):
        model = pooled(classes=2, seed=seed)
        update = sent(model, torch.tensor([1]))
        assert_true(model, invert(model, update))
        few = {n: g.abs() < g.abs().quantile(0.3) for n, g in update.gradients.items()}
        recovery = invert(model, altered(update, lambda n, g, f=few: g.masked_fill(f[n], 0.0)))
        if recovery.features:  # what was pruned of the head was 0 already
            kept += 1
            assert_true(model, recovery)
    assert kept < 3


@pytest.mark.parametrize(
    ("classes", "name", "target"),
    [
        (1, "binary_cross_entropy_with_logits", torch.ones(1, 1)),
        (4, "binary_cross_entropy_with_logits", torch.tensor([[1.0, 0.0, 0.0, 1.0]])),
        (5, "mse_loss", torch.tensor([[0.1, -0.4, 0.7, 0.2, 0.0]])),
        (5, "soft", torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.1]])),
    ],
)
def test_genuine_heads_of_every_loss_still_tell_their_input(
    classes: int, name: str, target: Tensor
) -> None:
    model = pooled(classes)
    loss = Loss("cross_entropy", targets="probability") if name == "soft" else Loss(name)
    assert_true(model, invert(model, sent(model, target.double(), loss)))
