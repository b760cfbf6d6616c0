"""No finding on genuine updates that look like a mistake: copies, frozen norms, rounded weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.diagnosis import Check, Kind

F64 = torch.float64


def kinds(check: Check) -> list[Kind]:
    return [finding.kind for finding in check.findings]


@pytest.mark.cases(2)
@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("outputs", [1, 2])
def test_copies_under_both_targets_are_not_clipped(outputs: int, batch: int) -> None:
    """m copies of the one and n of the other send m(p − 1) + np, which has any factor."""
    named = 0
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(18, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, outputs)
        ).double()
        x, y = torch.rand(batch, 18, dtype=F64), torch.randint(2, (batch,))
        x[1], y[0], y[1] = x[0], 0, 1
        binary = rgap.Loss("binary_cross_entropy_with_logits")
        loss, targets = (binary, y[:, None].double()) if outputs == 1 else (rgap.Loss(), y)
        update = rgap.capture(model, x, targets, loss)
        assert not kinds(rgap.check(model, update)), seed
        # A factor that no number of copies makes is still found.
        scaled = {name: 0.37 * g for name, g in update.gradients.items()}
        named += bool(kinds(rgap.check(model, rgap.Update(scaled, batch_size=batch, loss=loss))))
    assert named > 3


@pytest.mark.parametrize("constant", [True, False])
def test_a_rounded_difference_of_weights_has_no_factor(constant: bool) -> None:
    """The head has no bias: what its rows leave open of α is relative to α, not to the logits."""
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.SiLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(24, 32, bias=False), nn.SiLU(), nn.Linear(32, 10, bias=False),
        ).eval()  # fmt: skip
        x = torch.rand(1, 1, 6, 6)
        x = x[..., :1, :1].expand_as(x) if constant else x
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        sent = rgap.capture(model, x, torch.randint(10, (1,))).gradients
        after = {n: p - 0.03 * sent[n] for n, p in before.items()}
        update = rgap.Update.from_delta(before, after, 0.03, batch_size=1, input_shape=(1, 6, 6))
        assert not kinds(rgap.check(model, update)), seed


def normed(seed: int, eps: float, bias: bool = False, **second: bool) -> nn.Sequential:
    """Two batch norms with running statistics, in train mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(20, 24, bias=bias), nn.BatchNorm1d(24, eps=eps), nn.ReLU(),
        nn.Linear(24, 16, bias=bias), nn.BatchNorm1d(16, eps=eps, **second), nn.ReLU(),
        nn.Linear(16, 5),
    ).double().train()  # fmt: skip
    with torch.no_grad():
        for _ in range(50):
            model(0.3 * torch.rand(16, 20, dtype=F64))
    return model


def sent(model: nn.Module, x: Tensor) -> rgap.Update:
    """By autograd, in the modes that the model has."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    model.load_state_dict({**model.state_dict(), **buffers})
    return rgap.Update(gradients, buffers=buffers, batch_size=len(x), input_shape=(20,))


@pytest.mark.parametrize("second", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("frozen", [(1,), (4,)])
def test_every_norm_has_a_mode_of_its_own(frozen: tuple[int, ...], second: dict) -> None:
    for seed in range(3):
        model = normed(seed, 1e-5, bias=True, **second)
        for place in frozen:
            model[place].eval()
        x = 0.3 * torch.rand(4, 20, dtype=F64)
        update = sent(model, x)
        assert not kinds(rgap.check(model, update)), seed
        if not second:
            declared = [place for place in (1, 4) if place not in frozen]
            model[declared[0]].eval()
            model[frozen[0]].train()
            assert Kind.MODE in kinds(rgap.check(model, update)), seed


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-2])
@pytest.mark.parametrize("bias", [True, False])
def test_train_mode_is_told_whatever_epsilon(eps: float, bias: bool) -> None:
    for seed in range(4):
        model = normed(seed, eps, bias)
        update = sent(model, 0.3 * torch.rand(4, 20, dtype=F64))
        assert not kinds(rgap.check(model, update)), seed
        found = rgap.check(model.eval(), update)
        assert kinds(found)[:1] == [Kind.MODE], (seed, found.explain())


@pytest.mark.parametrize("outputs", [1, 3])
def test_copies_in_train_mode_miss_no_layer_and_have_no_noise(outputs: int) -> None:
    """Their variance is 0: gradients below the norm are 0 or rounding over √ε, of any rank."""
    for seed in range(4):
        for eps in (1e-12, 1e-5):
            model = normed(seed, eps)
            model[6] = nn.Linear(16, outputs).double()
            x = torch.rand(1, 20, dtype=F64).expand(4, 20).clone()
            loss = rgap.Loss("binary_cross_entropy_with_logits")
            y = torch.randint(2, (4, outputs)).double()
            assert not kinds(rgap.check(model, rgap.capture(model, x, y, loss))), (seed, eps)


def test_a_black_picture_leaves_a_layer_without_a_bias_at_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
                          nn.Linear(8, 4)).double().eval()  # fmt: skip
    model[1].bias.data.uniform_(0.1, 1.0)
    update = rgap.capture(model, torch.zeros(1, 12, dtype=F64), torch.tensor([2]))
    assert not bool(update.gradients["0.weight"].any())
    assert not kinds(rgap.check(model, update))


def test_pictures_that_occur_equally_often_have_no_factor_in_a_sum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double()
    x, y = torch.rand(2, 12, dtype=F64), torch.tensor([1, 4])
    update = rgap.capture(model, x.repeat(3, 1), y.repeat(3), rgap.Loss(reduction="sum"))
    assert not kinds(rgap.check(model, update))


def test_one_value_is_no_evidence_of_a_format() -> None:
    """A black picture and two classes send ±v alone: some of many rates takes v to float16."""
    for seed in range(60):
        torch.manual_seed(seed)
        model = nn.Linear(12, 2)
        update = rgap.capture(model, torch.zeros(1, 12), torch.tensor([seed % 2]))
        assert not kinds(rgap.check(model, update)), seed


@pytest.mark.parametrize("eps", [1.0, 10.0])
def test_an_epsilon_above_every_variance_is_no_eval_mode(eps: float) -> None:
    for seed in range(4):
        model = normed(seed, eps)
        near = 0.3 + 1e-3 * torch.rand(4, 20, dtype=F64)
        assert not kinds(rgap.check(model, sent(model, near))), seed


def test_cotangents_that_cancel_leave_the_rounding_of_each() -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(72, 1),
        ).double()  # fmt: skip
        model[5].weight.data.mul_(1e-3)  # type: ignore[operator, union-attr]
        x = torch.rand(1, 1, 6, 6, dtype=F64).repeat(2, 1, 1, 1)
        y = torch.tensor([[0.0], [1.0]], dtype=F64)
        loss = rgap.Loss("binary_cross_entropy_with_logits")
        model[5].bias.data.zero_()  # type: ignore[operator, union-attr]
        assert not kinds(rgap.check(model, rgap.capture(model, x, y, loss))), seed
