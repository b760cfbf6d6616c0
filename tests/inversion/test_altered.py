"""Updates of which one gradient was multiplied: the inputs that would follow are of no batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import Status
from rgap.inversion.altered import UNSEEN

NAMES = ("alone", "tanh above", "no bias below", "convolution below", "norm above", "skip above")


class Skip(nn.Module):
    """No chain: h + tanh(V h) above the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(12, 20), nn.Linear(20, 20)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        return self.head(h + torch.tanh(self.inner(h)))


def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    flat = nn.Flatten()
    made: dict[str, nn.Module] = {
        "alone": nn.Sequential(flat, nn.Linear(12, 10)),
        "tanh above": nn.Sequential(flat, nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 10)),
        "no bias below": nn.Sequential(
            flat, nn.Linear(12, 20, bias=False), nn.LeakyReLU(), nn.Linear(20, 10)
        ),
        "convolution below": nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.LeakyReLU(), flat, nn.Linear(96, 10)
        ),
        "norm above": nn.Sequential(
            flat, nn.Linear(12, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 10)
        ),
        "skip above": Skip(),
    }
    return made[name].double().eval()


def multiplied(update: rgap.Update, name: str, factor: float) -> rgap.Update:
    own = update.gradients
    return replace(update, gradients={n: factor * g if n == name else g for n, g in own.items()})


@pytest.mark.cases(6)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss", ["cross_entropy", "focal_loss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_certificate_of_a_multiple(name: str, loss: str, dtype: torch.dtype) -> None:
    """x = Gᵀ∂b/‖∂b‖² of an altered pair of gradients has the bound of none."""
    seed = int(dtype is torch.float32)
    model = network(name, seed).to(dtype)
    x = torch.rand(1, 1, 3, 4, dtype=dtype)
    sent = rgap.capture(model, x, torch.tensor([seed]), loss=loss)
    assert "inputs" in rgap.invert(model, sent, batch_size=1).certified
    for parameter in sent.gradients:
        for factor in (0.5, 1.01, 3.0):
            found = rgap.invert(model, multiplied(sent, parameter, factor), batch_size=1)
            if found.inputs is None:
                assert not found.certified
                continue
            assert found.error_bound is not None
            off = (found.inputs - x.double()).abs().max()
            assert float(off) <= found.error_bound, (parameter, factor, found.reason)


@pytest.mark.parametrize("name", NAMES[1:])
def test_inputs_stay_certified_under_another_loss(name: str) -> None:
    """What stands above, or below, would show a multiple, so the loss is what is wrong."""
    model = network(name, 3)
    x = torch.rand(1, 1, 3, 4, dtype=torch.float64)
    sent = rgap.capture(model, x, torch.tensor([4]), loss=rgap.Loss(label_smoothing=0.3))
    declared = replace(sent, loss=rgap.Loss("focal_loss"))
    found = rgap.invert(model, declared, batch_size=1)
    assert found.status is not Status.EXACT
    if name in ("no bias below", "convolution below"):  # c x sends what x does, but for the head
        assert not found.certified
    else:
        assert found.certified == {"inputs"}, found.reason
        assert found.inputs is not None and torch.allclose(found.inputs, x, rtol=0, atol=1e-12)


def test_one_layer_alone_says_what_to_write() -> None:
    model = network("alone", 5)
    x = torch.rand(1, 1, 3, 4, dtype=torch.float64)
    sent = rgap.capture(model, x, torch.tensor([4]), loss=rgap.Loss(label_smoothing=0.3))
    found = rgap.invert(model, replace(sent, loss=rgap.Loss()), batch_size=1)
    assert found.status is Status.INCONSISTENT and not found.certified
    assert UNSEEN.format("1") in found.reason
    told = rgap.invert(model, replace(sent, loss="unknown"), batch_size=1)
    assert told.certified == {"inputs"} and told.inputs is not None
    assert torch.allclose(told.inputs, x, rtol=0, atol=1e-12)


def test_features_of_a_head_whose_weight_gradient_is_zero() -> None:
    """x = 0 is what such a gradient says, and the cotangent at z = b contradicts it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.LeakyReLU(), nn.Flatten(),
        nn.Linear(72, 10),
    ).double().eval()  # fmt: skip
    sent = rgap.capture(model, torch.rand(1, 1, 6, 6).double(), torch.tensor([3]))
    found = rgap.invert(model, multiplied(sent, "4.weight", 0.0), batch_size=1)
    assert not found.features
    assert any("no features are certified" in warning for warning in found.warnings)


@pytest.mark.parametrize("factor", [1e10, 1e20, 1e28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_of_a_head_that_is_many_times_too_long(factor: float, dtype: torch.dtype) -> None:
    """A softmax of such logits is one class whatever the input: no target tests it."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1), nn.Tanh(), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8),
    ).to(dtype).eval()  # fmt: skip
    sent = rgap.capture(model, torch.rand(1, 3, 4, 4, dtype=dtype), torch.tensor([1]))
    assert "6" in rgap.invert(model, sent).features
    assert not rgap.invert(model, multiplied(sent, "6.weight", factor)).features


@pytest.mark.parametrize("apart", [1e-3, 1e-4])
def test_near_copies_under_too_small_a_size_are_no_weighed_samples(apart: float) -> None:
    """Two near copies and another in a mean over three weigh 4/3 and 2/3 in one over two."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 10)
        ).eval()
        x = torch.rand(3, 48)
        x[1] = (x[0] + apart * torch.randn(48)).clamp(0, 1)
        sent = rgap.capture(model, x, torch.tensor([4, 4, 3]))
        found = rgap.invert(model, replace(sent, batch_size=2))
        assert found.status is not Status.EXACT


@pytest.mark.parametrize("factor", [1.0, 1.03, 0.5])
def test_inputs_of_a_multiple_where_no_target_tells(factor: float) -> None:
    """Targets are open, so nothing contradicts them; the next layer took in other features."""
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 9), nn.LogSigmoid(), nn.Linear(9, 10)).eval()
        x = torch.rand(1, 16)
        sent = replace(rgap.capture(model, x, torch.tensor([1])), loss=rgap.Loss("unknown"))
        for name in ("0.weight", "0.bias"):
            found = rgap.invert(model, multiplied(sent, name, factor))
            assert ("inputs" in found.certified) == (factor == 1.0), (seed, name, found.reason)
            assert factor == 1.0 or found.inputs is None


def test_an_update_too_small_for_the_client_to_have_rounded_tests_nothing() -> None:
    """Each tensor at its own size near the smallest number; a target at the output makes it."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(16, 30), nn.LeakyReLU(0.2), nn.Linear(30, 20), nn.LayerNorm(20),
            nn.LeakyReLU(0.2), nn.Linear(20, 1),
        ).eval()  # fmt: skip
        x = torch.rand(1, 16)
        sent = rgap.capture(model, x, torch.tensor([[1.2]]), "mse_loss")
        tiny = torch.finfo(torch.float32).tiny
        sizes = {n: tiny * (1.0 if n == "0.weight" else 1e4) for n in sent.gradients}
        shrunk = {n: g * (sizes[n] / g.abs().max()) for n, g in sent.gradients.items()}
        found = rgap.invert(model, replace(sent, gradients=shrunk))
        assert found.status is not Status.EXACT and not found.certified, seed
