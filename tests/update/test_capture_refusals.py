"""What capture refuses, by name, and what it must not refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import normed
from torch import Tensor, nn

from rgap import check
from rgap.update.capture import capture
from rgap.update.update import Update

INPUTS = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(11))
TARGETS = torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Dropout(0.5), "Dropout"),
        (nn.Dropout2d(0.1), "Dropout2d"),
        (nn.AlphaDropout(0.1), "AlphaDropout"),
        (nn.RReLU(), "RReLU"),
    ],
)
def test_train_mode_is_refused_by_name(layer: nn.Module, name: str) -> None:
    network = nn.Sequential(nn.Sequential(layer), nn.Flatten(), nn.Linear(108, 5))
    with pytest.raises(ValueError, match=rf"0\.0 \({name}\) is in train mode.*model.eval\(\)"):
        capture(network, INPUTS, TARGETS)
    capture(network.eval(), INPUTS, TARGETS)


def test_train_mode_without_such_layers_is_fine() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(108, 5)).train()
    capture(network, INPUTS, TARGETS)
    assert network.training


def test_functional_randomness_is_refused_and_leaves_the_random_state() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(108, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.dropout(x.flatten(1), 0.3, training=True))
            return out

    noisy = Noisy()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="drew random numbers"):
        capture(noisy, INPUTS, TARGETS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        (INPUTS[:0], ValueError, "at least one sample"),
        (torch.full_like(INPUTS, float("nan")), ValueError, "inputs has NaN or infinity in 216"),
        (torch.full_like(INPUTS, float("inf")), ValueError, "inputs has NaN or infinity"),
        ((255 * INPUTS).byte(), TypeError, r"inputs.float\(\) / 255"),
        (INPUTS.cfloat(), TypeError, "expected real numbers, got torch.complex64"),
        (INPUTS[0, 0, 0], ValueError, "batch dimension"),
        (INPUTS.numpy(), TypeError, r"torch.as_tensor\(inputs\)"),
        (torch.rand(2, 3, 9, 9), ValueError, r"failed in 5 \(Linear\(in_features=16"),
        (torch.rand(2, 1, 6, 6), ValueError, r"failed in 0 \(Conv2d\(3, 4"),
    ],
)
def test_bad_inputs(inputs: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        capture(normed(dropout=True).eval(), inputs, TARGETS)


def test_a_sample_without_a_batch_dimension() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 6), nn.Flatten(1)).eval()
    with pytest.raises(ValueError, match="unsqueeze"):
        capture(network, INPUTS[0], TARGETS)


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        (torch.tensor([0]), ValueError, r"expects shape \(2,\)"),
        (torch.tensor([0, 5]), ValueError, "class indices 0 to 4"),
        (torch.tensor([0.0, 1.0]), TypeError, "class indices"),
        ([0, 1], TypeError, r"torch.tensor\(targets\)"),
    ],
)
def test_bad_targets(targets: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        capture(normed(dropout=True).eval(), INPUTS, targets)


def test_frozen_parameters_are_left_out_and_the_others_stay_what_they_are() -> None:
    network = normed(dropout=True).eval()
    whole = capture(network, INPUTS, TARGETS).gradients
    network[0].requires_grad_(False)
    update = capture(network, INPUTS, TARGETS)
    assert list(update.gradients) == [name for name in whole if not name.startswith("0.")]
    assert all(torch.equal(g, whole[name]) for name, g in update.gradients.items())
    assert check(network, update).ok
    network.requires_grad_(False)
    with pytest.raises(ValueError, match=r"every parameter .* frozen.*requires_grad_\(True\)"):
        capture(network, INPUTS, TARGETS)


def test_tied_weights_have_one_gradient_the_sum() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 108), nn.Tanh(), nn.Linear(108, 108))
    network[3].weight = network[1].weight
    update = capture(network, INPUTS, TARGETS)
    expected = torch.autograd.grad(
        F.cross_entropy(network(INPUTS), TARGETS), list(network.parameters())
    )
    assert list(update.gradients) == ["1.weight", "1.bias", "3.bias"]
    for found, gradient in zip(update.gradients.values(), expected, strict=True):
        assert torch.equal(found, gradient)


class Returns(nn.Module):
    """A linear head whose output goes through ``f``."""

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head = nn.Linear(108, 5)
        self.f = f

    def forward(self, x: Tensor) -> Any:
        return self.f(self.head(x.flatten(1)))


@pytest.mark.parametrize(
    ("f", "error", "match"),
    [
        (lambda z: (z, z), TypeError, "returned a tuple"),
        (lambda z: z.detach(), ValueError, "does not depend on its parameters"),
        (lambda z: z / 0, ValueError, "the output of Returns has NaN or infinity"),
        (lambda z: z.sum(), ValueError, "expected 2 outputs"),
        (lambda z: (z - z).sqrt(), ValueError, "'head.weight' has NaN"),
    ],
)
def test_bad_outputs(f: Callable[[Tensor], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        capture(Returns(f), INPUTS, TARGETS)


@pytest.mark.parametrize(
    ("network", "error", "match"),
    [
        (nn.Flatten(), ValueError, "has no parameters"),
        (nn.LazyLinear(3), ValueError, "not initialised yet"),
        (nn.Linear(3, 3, device="meta"), ValueError, "meta device"),
        (nn.Linear(3, 3, dtype=torch.cfloat), TypeError, "complex64"),
        (F.relu, TypeError, "expected a torch.nn.Module"),
    ],
)
def test_bad_models(network: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        capture(network, torch.rand(2, 3), TARGETS)


def test_bad_dtype() -> None:
    with pytest.raises(TypeError, match="floating dtype"):
        capture(nn.Linear(3, 3), torch.rand(2, 3), TARGETS - 1, dtype=torch.int32)


def test_a_false_value_range_is_pointed_out() -> None:
    network = normed(dropout=True).eval()
    with pytest.warns(UserWarning, match="value_range=None"):
        capture(network, 2 * INPUTS, TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert capture(network, 2 * INPUTS, TARGETS, value_range=None).value_range is None
        update: Update = capture(network, 2 * INPUTS, TARGETS, value_range=(0, 2))
    assert update.value_range == (0.0, 2.0)


class Stepped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(self.low(x) // 0.25)


def test_a_backward_pass_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match="backward pass of Stepped failed"):
        capture(Stepped().eval(), torch.rand(1, 4), torch.tensor([1]))
