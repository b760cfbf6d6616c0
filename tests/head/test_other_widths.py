"""Steps behind the head that change how many outputs there are: a status, never a shape error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import Loss, Recovery, Status, Update


class Step(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)


STEPS: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "slice": (6, 5, lambda x: x[:, 1:]),
    "pad": (4, 5, lambda x: nn.functional.pad(x, (0, 1))),
    "cat": (4, 6, lambda x: torch.cat([x, x.new_full((len(x), 2), 0.5)], 1)),
    "pool": (8, 4, lambda x: nn.functional.avg_pool1d(x[:, None], 2)[:, 0]),
    "groups": (8, 4, lambda x: x.reshape(len(x), -1, 2).sum(2)),
}
BINARY = "binary_cross_entropy_with_logits"
LOSSES: dict[str, Callable[[int], Loss]] = {
    "classes": lambda _: Loss(),
    "weights": lambda c: Loss(weight=tuple(1.0 + 0.5 * i for i in range(c))),
    "focal": lambda _: Loss("focal_loss"),
    "soft": lambda _: Loss(targets="probability"),
    "values": lambda _: Loss("mse_loss"),
    "labels": lambda _: Loss(BINARY),
    "positive": lambda _: Loss(BINARY, pos_weight=(2.0,)),
}


def sent(step: str, kind: str, batch: int) -> tuple[nn.Module, Tensor, Tensor, Update]:
    width, outputs, behind = STEPS[step]
    torch.manual_seed(batch)
    layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, width), Step(behind)]
    model = nn.Sequential(*layers).double().eval()
    x, loss = torch.rand(batch, 5, dtype=torch.float64), LOSSES[kind](outputs)
    if kind in ("soft", "values"):
        y = torch.rand(batch, outputs, dtype=torch.float64).softmax(1)
    elif loss.name == BINARY:
        y = torch.randint(2, (batch, outputs))
    else:
        y = torch.randint(outputs, (batch,))
    return model, x, y, rgap.capture(model, x, y, loss=loss)


def tampered(update: Update) -> Update:
    torch.manual_seed(0)
    moved = {name: g + 1e-5 * torch.randn_like(g) for name, g in update.gradients.items()}
    return replace(update, gradients=moved)


@pytest.mark.parametrize("place", range(5))  # labels of several outputs stand below
def test_every_loss_behind_steps_of_another_width(place: int) -> None:
    kind, batch = list(LOSSES)[place], 2 + place % 2
    place = 3 * place + batch  # steps and lies in turn
    model, x, _, update = sent(list(STEPS)[place % len(STEPS)], kind, batch)
    honest = place % 2 == 0
    found = rgap.invert(model, update if honest else tampered(update))
    assert isinstance(found, Recovery)
    if not honest:
        assert "targets" not in found.certified, found.reason
        return
    assert found.status is not Status.INCONSISTENT, found.reason
    if "inputs" in found.certified:
        assert found.inputs is not None and found.error_bound is not None
        gaps = (found.inputs[:, None] - x).abs().amax(2)
        assert float(gaps.amin(1).max()) <= found.error_bound


@pytest.mark.parametrize(
    ("kind", "step"),
    [("weights", "slice"), ("weights", "pad"), ("labels", "slice"), ("labels", "pad"),
     ("positive", "slice")],
)  # fmt: skip
def test_targets_of_a_batch_have_the_width_of_the_outputs(kind: str, step: str) -> None:
    model, x, y, update = sent(step, kind, 2)
    found = rgap.invert(model, update)
    assert found.status is (Status.EXACT if step == "slice" else Status.UNDERDETERMINED)
    if step == "slice":  # a pad leaves a direction of each target open
        assert found.inputs is not None and found.labels is not None
        order = (found.inputs[:, None] - x).abs().amax(2).argmin(1)
        assert torch.equal(found.labels.long(), y[order])


@pytest.mark.parametrize("step", ["slice", "pad"])
def test_a_rank_above_the_batch_is_told_behind_steps(step: str) -> None:
    model, _, _, update = sent(step, "classes", 2)
    assert rgap.invert(model, tampered(update)).status is Status.INCONSISTENT


@pytest.mark.parametrize("step", ["slice", "pad"])
def test_real_valued_targets_are_not_read_off_a_bias_of_another_width(step: str) -> None:
    model, _, y, update = sent(step, "values", 1)
    bias = update.gradients["2.bias"]
    lie = {**update.gradients, "2.bias": bias + 0.3 * torch.randn_like(bias)}
    found = rgap.invert(model, replace(update, gradients=lie), labels=y)
    assert found.status is not Status.EXACT


@pytest.mark.parametrize("kind", ["classes", "labels"])
@pytest.mark.parametrize("shape", [(4,), (3, 2)])
def test_a_longest_cotangent_bounds_all(kind: str, shape: tuple[int, ...]) -> None:
    loss = replace(LOSSES[kind](shape[0]), reduction="sum")
    torch.manual_seed(0)
    z = 30.0 * torch.randn(200, *shape, dtype=torch.float64)
    several = loss.name == BINARY
    y = torch.randint(2, z.shape) if several else torch.randint(4 - len(shape[1:]), z[:, 0].shape)
    longest = float(loss.cotangent(z, y).flatten(1).norm(dim=1).max())
    assert 0.5 * loss.longest(z) < longest <= loss.longest(z) * (1.0 + 1e-12)
