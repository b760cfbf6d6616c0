"""Targets at every position of a map: read from a fully connected head, or named as open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import Loss, Status


def net(outputs: int, *behind: nn.Module, bias: bool = True, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(18, 24), nn.Tanh(), nn.Linear(24, outputs, bias=bias)]
    return nn.Sequential(*layers, *behind).double()


def picture(seed: int, count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 3, 3, generator=generator, dtype=torch.float64)


def drawn(loss: Loss, outputs: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if loss.name == "mse_loss":
        return torch.randn(1, *outputs, generator=generator, dtype=torch.float64)
    if loss.targets == "probability":
        return torch.rand(1, *outputs, generator=generator, dtype=torch.float64).softmax(1)
    if loss.name == "cross_entropy":
        return torch.randint(outputs[0], (1, *outputs[1:]), generator=generator)
    return torch.randint(2, (1, *outputs), generator=generator)


@pytest.mark.parametrize("outputs", [(3, 2, 4), (5, 7)])
@pytest.mark.parametrize(
    "loss",
    [
        Loss(), Loss(reduction="sum"), Loss(label_smoothing=0.1), Loss(targets="probability"),
        Loss("mse_loss"), Loss("binary_cross_entropy_with_logits"),
    ],
    ids=lambda loss: f"{loss.name}-{loss.reduction}-{loss.targets}-{loss.label_smoothing}",
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_one_sample_with_a_target_at_every_position(
    loss: Loss, outputs: tuple[int, ...], bias: bool
) -> None:
    size = torch.Size(outputs).numel()
    model = net(size, nn.Unflatten(1, outputs), bias=bias, seed=size)
    x, y = picture(size), drawn(loss, outputs, size)
    found = rgap.invert(model, rgap.capture(model, x, y, loss=loss))
    assert found.status is Status.EXACT, found.reason
    assert found.inputs is not None and found.labels is not None and found.error_bound is not None
    assert float((found.inputs - x).abs().max()) <= found.error_bound
    assert found.labels.shape == y.shape
    assert torch.allclose(found.labels.double(), y.double(), rtol=0, atol=1e-9)


def test_stated_labels_of_a_map_are_tested() -> None:
    model, x = net(24, nn.Unflatten(1, (3, 2, 4))), picture(1)
    y = drawn(Loss(), (3, 2, 4), 1)
    update = rgap.capture(model, x, y)
    assert rgap.invert(model, update, labels=y).status is Status.EXACT
    assert rgap.invert(model, update, labels=(y + 1) % 3).status is Status.INCONSISTENT


@pytest.mark.parametrize("loss", [Loss(weight=(1.0, 2.0, 3.0)), Loss("focal_loss")])
def test_inputs_alone_where_no_formula_reads_the_map(loss: Loss) -> None:
    model, x = net(24, nn.Unflatten(1, (3, 2, 4))), picture(2)
    found = rgap.invert(model, rgap.capture(model, x, drawn(Loss(), (3, 2, 4), 2), loss=loss))
    assert found.certified == {"inputs"} and "targets not certified" in found.reason
    assert found.inputs is not None and torch.allclose(found.inputs, x, rtol=0, atol=1e-10)


def test_a_decoder_above_leaves_the_targets_open() -> None:
    model = net(24, nn.Unflatten(1, (3, 2, 4)), nn.Conv2d(3, 4, 3, padding=1).double())
    x = picture(3)
    found = rgap.invert(model, rgap.capture(model, x, drawn(Loss(), (4, 2, 4), 3)))
    assert found.certified == {"inputs"} and "targets not certified" in found.reason
    assert found.inputs is not None and torch.allclose(found.inputs, x, rtol=0, atol=1e-10)


def test_several_samples_below_a_map() -> None:
    """Two layers tell them apart; their order is not in the update."""
    model, x = net(24, nn.Unflatten(1, (3, 2, 4))), picture(4, 3)
    y = torch.randint(3, (3, 2, 4), generator=torch.Generator().manual_seed(4))
    found = rgap.invert(model, rgap.capture(model, x, y))
    assert found.certified == {"inputs"} and found.inputs is not None
    apart = torch.cdist(found.inputs.flatten(1), x.flatten(1))
    assert float(apart.amin(1).max()) < 1e-10 and sorted(apart.argmin(1).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_alone_are_refused_by_name(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    update = rgap.capture(model, picture(5, batch), torch.zeros(batch, 2, 2).long())
    found = rgap.invert(model, update)
    assert found.status is Status.UNSUPPORTED
    assert "the last layer '2' is a conv2d" in found.reason and "rgap.match" in found.reason


def test_a_map_without_a_bias_is_refused_by_name() -> None:
    model = net(24, nn.Unflatten(1, (3, 2, 4)), bias=False)
    model[1] = nn.Linear(18, 24, bias=False).double()
    found = rgap.invert(model, rgap.capture(model, picture(6), drawn(Loss(), (3, 2, 4), 6)))
    assert found.status is Status.UNSUPPORTED and "target at every position" in found.reason
