"""Differences of weights: their rounding, and what the optimiser did beside descending."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rgap.arithmetic.rounding import spacing
from rgap.inversion.invert import invert
from rgap.update.capture import capture
from rgap.update.update import Update

RATES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
SHAPE = (1, 6, 6)


def network(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    lenet = nn.Conv2d(1, 6, 5, 2, 2), nn.Sigmoid(), nn.Conv2d(6, 12, 3, 2, 1), nn.Sigmoid()
    conv = nn.Conv2d(1, 12, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(12, 12, 3, 2, 1)
    steps: dict[str, tuple[nn.Module, ...]] = {
        "mlp": (nn.Flatten(), nn.Linear(36, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(),
                nn.Linear(24, 6)),
        "wide relu": (nn.Flatten(), nn.Linear(36, 2000), nn.ReLU(), nn.Linear(2000, 6)),
        "lenet": (*lenet, nn.Flatten(), nn.Linear(48, 6)),
        "conv": (*conv, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(108, 6)),
        "no bias": (nn.Flatten(), nn.Linear(36, 24, bias=False), nn.LeakyReLU(0.2),
                    nn.Linear(24, 6, bias=False)),
    }  # fmt: skip
    return nn.Sequential(*steps[kind]).eval()


def data(count: int = 1, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=rng), torch.tensor([4, 2, 1][:count])


def stepped(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, lr: float, **options: Any
) -> tuple[nn.Module, torch.optim.SGD]:
    after = copy.deepcopy(model)
    optimizer = torch.optim.SGD(after.parameters(), lr=lr, **options)
    nn.functional.cross_entropy(after(x), y).backward()
    optimizer.step()
    return after, optimizer


# --- the rounding -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=rng, dtype=torch.float64) * 10.0 ** torch.linspace(
        -6, 3, 400
    )
    values = torch.cat([values, torch.tensor([0.0, 1.0, -2.0, 0.5]).double()]).to(dtype)
    found = spacing(values, dtype)
    above = values.double().abs() + found
    assert torch.equal(above.to(dtype).double(), above)  # a number of the format
    between = values.double().abs() + 0.49 * found
    assert torch.equal(between.to(dtype), values.abs())  # and the next one
    if dtype in (torch.float64, torch.float32):
        table = np.spacing(values.abs().numpy()).astype(np.float64)
        assert np.array_equal(found.numpy(), table)


@pytest.mark.parametrize("lr", [1.0, 1e-3, 1e-5])
def test_the_noise_of_a_difference_is_its_error(lr: float) -> None:
    """In every tensor: the rms of the error in units of its own std is 1, none beyond a spacing."""
    model = network("mlp")
    x, y = data()
    truth = capture(model, x, y).gradients
    after, _ = stepped(model, x, y, lr)
    update = Update.from_delta(model, after, lr)
    assert update.noise is not None
    for name, gradient in update.gradients.items():
        moved = gradient != 0
        ratio = ((gradient.double() - truth[name].double()) / update.noise[name].double())[moved]
        assert float(ratio.abs().max()) < 3.5  # half a spacing is 1.7; two roundings at lr = 1
        if len(ratio) > 300:
            assert 0.5 < float(ratio.square().mean().sqrt()) < 1.3


@pytest.mark.parametrize("kind", ["mlp", "wide relu", "lenet", "conv", "no bias"])
def test_an_update_of_any_learning_rate_is_certified_or_said_to_be_too_coarse(kind: str) -> None:
    model, exact = network(kind, 3), 0
    x, y = data()
    rates = RATES if kind in ("mlp", "wide relu") else (1.0, 1e-3, 1e-5)
    for lr in rates:
        after, _ = stepped(model, x, y, lr)
        update = Update.from_delta(model, after, lr, batch_size=1, input_shape=SHAPE)
        found = invert(model, update)
        assert found.status.name in ("EXACT", "UNDERDETERMINED"), (lr, found.reason)
        if found.status.name == "UNDERDETERMINED":
            assert lr < 1e-3
            continue
        exact += 1
        assert found.inputs is not None and found.labels is not None
        assert found.predicted_error is not None and found.error_bound is not None
        gap = found.inputs - x
        assert float(gap.abs().max()) <= found.error_bound
        assert found.labels.tolist() == y.tolist()
        ratio = float(found.predicted_error[0]) / float(gap.square().mean().sqrt())
        assert 0.25 < ratio < (4 if lr < 1 else 8)  # at lr = 1 it is the float32 gradient's own
    assert exact >= len(rates) - 2


def test_two_samples_below_a_pair_from_a_small_learning_rate() -> None:
    model = network("mlp", 1)
    x, y = data(2)
    for lr in (1.0, 1e-3):
        after, _ = stepped(model, x, y, lr)
        update = Update.from_delta(model, after, lr, batch_size=2, input_shape=SHAPE)
        found = invert(model, update)
        assert found.exact, (lr, found.reason)
        order = torch.cdist(found.inputs.flatten(1).float(), x.flatten(1)).argmin(1)
        assert float((found.inputs - x[order]).abs().max()) <= found.error_bound


def test_most_weights_that_did_not_move_are_no_contradiction() -> None:
    """A wide layer at 1e-7: the errors are the gradient itself, and the answer says so."""
    model = network("wide relu", 2)
    x, y = data()
    after, _ = stepped(model, x, y, 1e-7)
    update = Update.from_delta(model, after, 1e-7, batch_size=1, input_shape=SHAPE)
    assert float((update.gradients["1.weight"] == 0).float().mean()) > 0.8
    found = invert(model, update)
    assert found.status.name == "UNDERDETERMINED", found.reason


def test_weights_of_a_coarser_client_round_on_their_way_there_too() -> None:
    """A float64 server and a float32 client: both roundings of every entry are in the noise."""
    before = {
        "w": torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    }
    step = torch.randn(4000, generator=torch.Generator().manual_seed(1)) * 1e-3
    update = Update.from_delta(before, {"w": before["w"].float() - step}, lr=1.0)
    assert update.noise is not None and update.dtype == torch.float32
    ratio = (update.gradients["w"] - step) / update.noise["w"]
    assert 0.8 < float(ratio.square().mean().sqrt()) < 1.2


# --- the optimiser ----------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": 0.05},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    {"maximize": True, "weight_decay": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", ["words", "optimizer", "groups", "state", "ndarrays"])
def test_a_declared_first_step_is_undone(options: dict[str, Any], how: str) -> None:
    model = network("mlp").double()
    x, y = data()
    truth = capture(model, x, y).gradients
    after, optimizer = stepped(model, x.double(), y, 0.1, **options)
    forms: dict[str, dict[str, Any]] = {
        "optimizer": {"optimizer": optimizer},
        "groups": {"optimizer": optimizer.param_groups},
        "state": {"optimizer": optimizer.state_dict()},
    }
    said = forms.get(how, {"lr": 0.1, "optimizer": "SGD", **options})
    if how in ("words", "ndarrays") and "maximize" in options:
        said = {"optimizer": optimizer}  # only an optimiser says that it climbed
    if how == "ndarrays":
        update = Update.from_ndarrays(
            model, [p.detach().numpy() for p in after.parameters()], **said
        )
    else:
        update = Update.from_delta(model, after, **said)
    for name, gradient in update.gradients.items():
        assert torch.allclose(gradient, truth[name], rtol=0, atol=1e-13)


def test_weight_decay_that_is_not_declared_is_no_gradient() -> None:
    model = network("mlp")
    x, y = data()
    after, optimizer = stepped(model, x, y, 0.1, weight_decay=0.05)
    fields: dict[str, Any] = {"batch_size": 1, "input_shape": SHAPE}
    assert invert(model, Update.from_delta(model, after, 0.1, **fields)).status.name != "EXACT"
    declared = invert(model, Update.from_delta(model, after, optimizer=optimizer, **fields))
    assert declared.status.name == "EXACT"
    assert float((declared.inputs - x).abs().max()) <= declared.error_bound


OTHERS = ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Rprop"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimisers_are_refused_by_name(name: str) -> None:
    model = network("mlp")
    optimizer = getattr(torch.optim, name)(model.parameters())
    for given in (name, name.lower(), optimizer, optimizer.param_groups, optimizer.state_dict()):
        with pytest.raises(ValueError, match=r"optimizer: '\w+' cannot be undone.*p\.grad") as said:
            Update.from_delta(model, model, 0.1, optimizer=given)
        assert isinstance(given, list | dict) or name.lower() in str(said.value).lower()


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"momentum": 0.9, "steps": 3}, ValueError, "momentum: with steps=3"),
        ({"weight_decay": 0.9, "steps": 2}, ValueError, "weight_decay: with steps=2"),
        ({"nesterov": True}, ValueError, "nesterov: expected a momentum"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"lr": None}, ValueError, "lr: expected the client's learning rate"),
        ({"lr": float("nan")}, ValueError, "lr: expected a positive"),
        ({"optimizer": 3}, TypeError, "optimizer"),
        ({"optimizer": "mine"}, ValueError, "'mine' cannot be undone"),
        ({"optimizer": [{"lr": 0.1}, {"lr": 0.2}]}, ValueError, "2 groups with different"),
        ({"optimizer": [{"lr": 0.5}]}, ValueError, "lr: stated as 0.1, but the optimiser has 0.5"),
    ],
)
def test_bad_steps_are_named(given: dict[str, Any], error: type[Exception], match: str) -> None:
    model = network("mlp")
    with pytest.raises(error, match=match):
        Update.from_delta(model, model, **{"lr": 0.1, **given})
