"""Heads that do not see where a sample is: alike rows, as before training, and what they send."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap import Loss, Status, capture, invert
from rgap.head.features import HeadFailure, solve_head
from rgap.network.chain import parse
from rgap.precision import Precision


def network(seed: int, inputs: int, hidden: int, classes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    below = [nn.Linear(inputs, hidden), nn.Tanh()] if hidden else []
    return nn.Sequential(*below, nn.Linear(hidden or inputs, classes)).double().eval()


@pytest.mark.parametrize(("rows", "hidden", "labels", "smoothing"), [
    ("all", 30, [1, 1, 1, 2], 0.1), ("all", 0, [0, 1, 1, 0], 0.3), ("all", 6, [2, 2, 3], 0.3),
    ("two", 30, [2, 2], 0.9), ("zero", 30, [2, 2, 1, 1], 0.9),
])  # fmt: skip
def test_samples_of_one_label_that_a_head_does_not_tell_apart_contradict_nothing(
    rows: str, hidden: int, labels: list[int], smoothing: float
) -> None:
    """κ of one label is the same, or parallel, for every sample: any mixture of them is a root."""
    model = network(len(labels), 8, hidden, 3 if rows == "two" else 4)
    head = model[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        if rows == "zero":
            head.weight.zero_()
            head.bias.zero_()
        else:
            head.weight[: 2 if rows == "two" else None] = head.weight[:1].clone()
            head.bias[1] = head.bias[0]
    loss = Loss(label_smoothing=smoothing)
    x = torch.rand(len(labels), 8, dtype=torch.float64)
    recovery = invert(model, capture(model, x, torch.tensor(labels), loss))
    assert recovery.status is not Status.INCONSISTENT, recovery.reason


def test_a_head_that_tells_samples_apart_still_contradicts_a_wrong_batch_size() -> None:
    model = network(0, 8, 30, 6)
    x, y = torch.rand(3, 8, dtype=torch.float64), torch.tensor([1, 1, 2])
    update = capture(model, x, y, Loss(label_smoothing=0.1))
    assert invert(model, update).status is Status.EXACT
    assert invert(model, update, batch_size=2).status is Status.INCONSISTENT


@pytest.mark.parametrize("classes", [2, 4, 5])
@pytest.mark.parametrize("hidden", [0, 10])
def test_balanced_labels_before_training_send_no_bias_gradient(classes: int, hidden: int) -> None:
    """∂b = Σ (1/C − y)/B is zero for one sample of each class: said, not computed with."""
    model = network(0, 12, hidden, classes)
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(classes, 12, dtype=torch.float64)
    update = capture(model, x, torch.arange(classes))
    name = list(update.gradients)[-1]
    update.gradients[name].zero_()  # rounding of 1/5 aside
    assert bool(update.gradients[name.replace("bias", "weight")].any())
    recovery = invert(model, update)
    assert recovery.status is Status.UNDERDETERMINED
    assert recovery.inputs is None
    assert "or of its bias is zero" in recovery.reason


def zero_columns(seed: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head without a bias, and what one sample with units that were off sends to it."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(16, 3, bias=False).double()
    head.weight.data = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    x = torch.rand(1, 16, generator=generator, dtype=torch.float64)
    x = x * (torch.rand(16, generator=generator) > 0.5)
    nn.functional.cross_entropy(head(x), torch.tensor([1])).backward()
    assert head.weight.grad is not None
    return head, x, head.weight.grad.float().bfloat16().double()


def test_features_of_units_that_were_off_are_zero() -> None:
    """A singular vector has 1e-17 there, which is many errors above 0: the unit would be on."""
    for seed in range(20):
        head, x, gradient = zero_columns(seed)
        stage = parse(head, (16,)).stages[-1]
        noise = {"weight": gradient.abs() * 2**-9}
        found = solve_head(stage, gradient, None, Loss(), Precision(torch.float64, entries=noise))
        assert not isinstance(found, HeadFailure)
        for candidate in found:
            assert torch.equal(candidate.features.value == 0, x == 0)
