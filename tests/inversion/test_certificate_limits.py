"""Certificates that a random attack found wrong, each by the smallest case of it."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgap
from rgap import Loss, Status, Update


def sent(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def two_layers(classes: int = 4, wide: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, 24), nn.Sigmoid(), nn.Linear(24, classes))


def nearest(found: Tensor, truth: Tensor) -> float:
    return min(
        float((found[list(p)] - truth.double()).abs().max())
        for p in itertools.permutations(range(len(truth)))
    )


@pytest.mark.parametrize("soft", [True, False])
def test_the_error_of_dense_targets_of_a_batch_is_in_the_bound(soft):
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = two_layers(), torch.rand(2, 32)
        y = torch.rand(2, 4).softmax(1) if soft else torch.randn(2, 4)
        loss = Loss(targets="probability") if soft else Loss("mse_loss")
        found = rgap.invert(model, rgap.capture(model, x, y, loss))
        assert found.exact and nearest(found.inputs, x) <= found.error_bound


@pytest.mark.parametrize("loss", [Loss("mse_loss"), Loss(targets="probability")])
def test_copies_with_different_dense_targets_are_not_one_sample_with_their_mean(loss):
    torch.manual_seed(0)
    model, x = two_layers(3).double(), torch.rand(1, 32).double().repeat(2, 1)
    y = torch.rand(2, 3).double().softmax(1)
    found = rgap.invert(model, Update(sent(model, x, y, loss), loss=loss, input_shape=(32,)))
    assert found.status is Status.UNDERDETERMINED and not found.certified
    assert "different targets" in found.reason


@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_a_batch_of_unknown_size_are_not_certified(size):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 24), nn.Sigmoid(),
        nn.Linear(24, 24), nn.Sigmoid(), nn.Linear(24, 4),
    )  # fmt: skip
    x, y = torch.rand(size, 2, 5, 5), torch.tensor([1, 2][:size])
    found = rgap.invert(model, Update(sent(model, x, y, Loss()), input_shape=(2, 5, 5)))
    assert found.status is Status.UNDERDETERMINED
    assert not found.certified and found.partial is None


def test_an_unknown_loss_leaves_the_inputs_of_a_batch_certified():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Sigmoid(), nn.Linear(24, 24), nn.Sigmoid(),
                          nn.Linear(24, 4))  # fmt: skip
    x, y = torch.rand(2, 6), torch.tensor([1, 2])
    update = Update(sent(model, x, y, Loss()), loss=Loss("unknown"), batch_size=2)
    found = rgap.invert(model, update)
    assert found.certified == {"inputs"}
    assert nearest(found.inputs, x) <= found.error_bound


class Forward(nn.Module):
    def __init__(self, kind: str, width: int = 24) -> None:
        super().__init__()
        self.kind, self.first = kind, nn.Linear(6, width)
        self.rest = nn.Sequential(nn.Sigmoid(), nn.Linear(width, 16), nn.Sigmoid(),
                                  nn.Linear(16, 4))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "bytes" and x.max() > 1.5:
            x = x / 255
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.rest(self.first(x)).float()
        h = self.first(x)
        return self.rest(h + self.first.bias.clone() if self.kind == "bias" else h)


@pytest.mark.parametrize("kind", ["bytes", "bias", "autocast"])
@pytest.mark.parametrize("size", [1, 2])
def test_what_a_forward_does_with_its_data_or_bias_is_not_overlooked(kind, size):
    for seed in range(4):
        torch.manual_seed(seed)
        model = Forward(kind, 2048 if kind == "autocast" and size == 1 else 24)
        x, y = torch.rand(size, 6) * (255 if kind == "bytes" else 1), torch.tensor([1, 2][:size])
        gradients = sent(model, x, y, Loss())
        found = rgap.invert(
            model, Update(gradients, batch_size=size, input_shape=(6,), value_range=None)
        )
        if kind == "autocast" and size == 1:
            assert found.certified == {"inputs"}
            assert nearest(found.inputs, x) <= found.error_bound
        elif kind == "bias" and found.status is Status.EXACT:  # the graph of calls has the sum
            assert nearest(found.inputs, x) <= found.error_bound
            assert found.labels.tolist() == y.tolist()
        else:
            assert found.status is Status.UNSUPPORTED and not found.certified


def test_a_label_beyond_the_outputs_is_not_tried_by_the_check():
    torch.manual_seed(0)
    model = nn.Sequential(*two_layers(3, 20), Slice()).double()
    x, y = torch.rand(1, 20).double(), torch.tensor([1])
    rgap.check(model, rgap.capture(model, x, y)).explain()


class Slice(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return F.softplus(z[:, 1:])


def test_one_row_that_no_target_explains_certifies_nothing():
    """A gradient of one row is of rank one whatever was done to it: only a replay tests it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(17, 1))
    x, loss = torch.rand(1, 17), Loss("sigmoid_focal_loss", alpha=0.25, gamma=2.0)
    update = rgap.capture(model, x, torch.tensor([[1]]), loss)
    assert "inputs" in rgap.invert(model, update).certified
    moved = update.gradients["1.weight"] + 0.05 * model[1].weight.detach()
    changed = dataclasses.replace(update, gradients={**update.gradients, "1.weight": moved})
    found = rgap.invert(model, changed)
    assert not found.certified
    assert found.inputs is None
