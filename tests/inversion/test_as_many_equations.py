"""Roots that nothing refutes: as many equations as unknowns, and what a sample then may not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import Loss, Status


def _narrow(seed: int, units: int, norm: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    below = [nn.Linear(5, 5), nn.LayerNorm(5)] if norm else []
    layers = [nn.Linear(5, units), nn.Tanh(), nn.Linear(units, 16), nn.Tanh(), nn.Linear(16, 4)]
    return nn.Sequential(*below, *layers).double().eval()


def _inputs_of(model: nn.Sequential, place: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(place).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach())
    )
    model(x)
    handle.remove()
    return seen[0].double()


@pytest.mark.cases(1)
@pytest.mark.parametrize("units", [3, 4])
def test_features_of_a_narrow_pair(units: int) -> None:
    """Two samples, m units: m − 2 equations for one unknown.  Of m = 3 none is a certificate."""
    shown = 0
    for seed in range(16):
        model = _narrow(seed, units, norm=True)
        x, y = torch.rand(2, 5).double(), torch.randn(2, 4).double()
        found = rgap.invert(model, rgap.capture(model, x, y, "mse_loss"))
        shown += bool(found.features)
        for place, value in found.features.items():
            apart = torch.cdist(value.flatten(1), _inputs_of(model, place, x).flatten(1)).amin(1)
            assert float(apart.max()) <= 30.0 * found.features_error[place] + 1e-12, (seed, place)
    assert (shown > 0) == (units > 3)


@pytest.mark.parametrize("norm", [True, False])
def test_check_is_silent_where_roots_are_not_refuted(norm: bool) -> None:
    for seed in range(10):
        model = _narrow(seed, 3, norm)
        sent = rgap.capture(
            model, torch.rand(2, 5).double(), torch.randn(2, 4).double(), "mse_loss"
        )
        assert rgap.check(model, sent).ok, seed


def test_check_is_silent_at_one_layer_of_more_samples_than_inputs() -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 6)).double().eval()
        sent = rgap.capture(model, torch.rand(6, 3).double(), torch.randint(6, (6,)))
        assert rgap.check(model, sent).ok, seed


class Twice(nn.Module):
    """One layer used two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        """tanh(f(tanh(f(x))))."""
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


@pytest.mark.parametrize("build", [Twice, nn.Tanh])
@pytest.mark.parametrize("gap", [1e-6, 1e-2])
def test_targets_near_the_output(build: Callable[[], nn.Module], gap: float) -> None:
    """y = z − κ/2 is as wrong as the client's own logit, which rounds, whatever κ is."""
    exact = 0
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(14, 7), nn.Tanh(), build(), nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 1)
        ).eval()
        with torch.no_grad():
            model[-1].bias.add_(1.0)
        x = torch.rand(1, 14)
        y = model(x).detach() + gap * (1.0 + torch.rand(1, 1))
        found = rgap.invert(model, rgap.capture(model, x, y, "mse_loss"))
        if found.status is Status.EXACT:
            exact += 1
            assert found.labels is not None
            assert found.targets_error_bound is not None
            assert float((found.labels - y).abs().max()) <= found.targets_error_bound, seed
    assert exact


def test_a_range_is_held_against_the_batch_only() -> None:
    """A root that does not reproduce the update may lie anywhere: that is no contradiction."""
    for seed in range(8):
        torch.manual_seed(822 + seed)
        model = nn.Sequential(
            nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 8),
            nn.LayerNorm(8), nn.Linear(8, 2),
        ).double().eval()  # fmt: skip
        x = torch.rand(2, 2, dtype=torch.float64)
        sent = rgap.capture(model, x, torch.tensor([0, 1]), value_range=(-100.0, 100.0))
        found = rgap.invert(model, sent, time_limit=10)
        assert found.status is not Status.INCONSISTENT, (seed, found.reason)


def test_what_a_step_cancels_is_part_of_an_error() -> None:
    """x − tanh x of small x rounds as x does: features above it, and what check expects of them."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(20, 12), nn.Tanhshrink(), nn.Linear(12, 9), nn.Tanhshrink(), nn.Linear(9, 6)
        ).eval()
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        sent = rgap.capture(model, torch.rand(1, 20), torch.tensor([2]), Loss())
        assert rgap.check(model, sent).ok, seed
        found = rgap.invert(model, sent)
        assert found.status is not Status.INCONSISTENT, (seed, found.reason)


def test_class_weights_are_not_read_off_a_batch_of_which_some_are_silent() -> None:
    """Samples whose units are all off send to the head, where they look like those that are not."""
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 12), nn.Hardshrink(0.2), nn.Linear(12, 5),
            nn.Hardshrink(0.2), nn.Linear(5, 1),
        ).double().eval()  # fmt: skip
        y = torch.tensor([[1.0], [1.0], [0.0], [1.0]]).double()
        x = torch.rand(4, 1).double().expand(4, 6).contiguous()
        sent = rgap.capture(model, x, y, "binary_cross_entropy_with_logits")
        assert rgap.check(model, sent).ok, seed
