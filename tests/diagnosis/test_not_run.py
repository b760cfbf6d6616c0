"""A check never says that nothing is wrong where a trial did not run, and replays what it can."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Update, capture, check
from rgap.diagnosis import Kind


class Joined(nn.Module):
    """Two branches, added or multiplied, below a head."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join
        self.first, self.inner, self.head = nn.Linear(27, 20), nn.Linear(20, 20), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        h = torch.tanh(self.first(x.flatten(1)))
        return self.head(self.join(h, torch.tanh(self.inner(h))))


class Tokens(nn.Module):
    """An embedding below a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        return self.head(self.words(x).mean(1))


def stacked() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(27, 24), nn.Tanh(), nn.Linear(24, 20), nn.Softplus(),
        nn.Linear(20, 6),
    )  # fmt: skip


def sent(model: nn.Module, size: int) -> Update:
    x = torch.rand(size, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return capture(model.eval(), x, torch.tensor([2, 0, 5])[:size])


def words(model: nn.Module, update: Update, **options: float) -> str:
    found = check(model, update, **options)  # type: ignore[arg-type]
    assert found.ok and found.unrun, found.explain()
    assert "Nothing found" not in found.explain()
    assert "Not all trials ran" in found.explain()
    return " ".join(found.unrun)


@pytest.mark.parametrize("shape", [(3, 32), (3, 5, 5), (27, 2)])
@pytest.mark.parametrize("given", [True, False])
def test_a_wrong_shape_is_an_error(shape: tuple[int, ...], given: bool) -> None:
    model = stacked()
    update = sent(model, 1)
    stated = {"input_shape": shape} if given else {}
    with pytest.raises(ValueError, match=r"input_shape=\(.*would fit"):
        check(model, update if given else replace(update, input_shape=shape), **stated)


def test_what_did_not_run_is_said() -> None:
    net = Tokens()
    gradients = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    told = words(net, Update(gradients, batch_size=1, input_shape=(5,)))
    assert "embedding takes whole numbers" in told
    explained = check(net, Update(gradients, batch_size=1, input_shape=(5,))).explain()
    assert ".." not in explained
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(4, 6))  # fmt: skip
    update = sent(model, 3)
    assert "write batch_size=" in words(model, replace(update, batch_size=None))
    assert "time_limit=" in words(model, update, time_limit=1e-9)
    assert "4 local steps" in words(model, replace(update, local_steps=4))
    silent = replace(update, gradients={n: 0 * g for n, g in update.gradients.items()})
    assert any("every gradient is zero" in why for why in check(model, silent).unrun)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("build", [stacked, lambda: Joined(torch.add), lambda: Joined(torch.mul)])
def test_weights_between_data_and_head_are_replayed(
    build: Callable[[], nn.Module], size: int
) -> None:
    torch.manual_seed(3)
    model = build()
    update = sent(model, size)
    assert check(model, update).ok
    other = copy.deepcopy(model)
    list(other.parameters())[2].data.mul_(1.05)
    found = check(other, update)
    if size > 1 and isinstance(model, Joined):
        assert found.ok and Kind.WEIGHTS in found.untested  # nothing tells these samples apart
        return
    assert found.best is not None and Kind.WEIGHTS in (found.best.kind, *found.best.rivals)


@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("build", [stacked, lambda: Joined(torch.add)])
def test_steps_of_rmsprop_are_not_called_noise_alone(
    build: Callable[[], nn.Module], steps: int
) -> None:
    torch.manual_seed(3)
    model = build()
    before = sent(model, 3)
    twin = copy.deepcopy(model)
    rule = torch.optim.RMSprop(twin.parameters(), lr=1e-2)
    x = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        rule.zero_grad()
        nn.functional.cross_entropy(twin(x), torch.tensor([2, 0, 5])).backward()
        rule.step()
    update = Update.from_delta(model, twin, 1e-2, batch_size=3, input_shape=(3, 3, 3))
    best = check(model, update).best
    assert best is not None and Kind.OPTIMISER in (best.kind, *best.rivals), best
    scale = max(float(g.abs().max()) for g in before.gradients.values())
    noisy = {n: g + 0.01 * scale * torch.randn_like(g) for n, g in before.gradients.items()}
    best = check(model, replace(before, gradients=noisy)).best
    assert best is not None and best.kind is Kind.NOISE and not best.rivals


def test_two_gradients_of_one_layer_have_one_cotangent() -> None:
    torch.manual_seed(3)
    model = Joined(torch.add)
    update = sent(model, 1)
    wrong = {n: g * (1 + 0.02 * torch.randn_like(g)) if "bias" in n else g
             for n, g in update.gradients.items()}  # fmt: skip
    best = check(model, replace(update, gradients=wrong)).best
    assert best is not None and best.kind is Kind.UNDECIDED and Kind.NOISE in best.rivals
    assert Kind.WEIGHTS not in best.rivals and "of one k" in best.evidence
