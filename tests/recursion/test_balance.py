"""A value that follows from one gradient alone is held against the gradients above its layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import rgap
from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate, Precision
from rgap.recursion import balance
from rgap.recursion.balance import Unbalanced, disagreement_of_gradients

F64 = torch.float64
CLASSES = 3


def network(seed: int, dtype: torch.dtype, normed: bool = True, lone: bool = True) -> nn.Module:
    """More samples than classes: one convolution, or two, whose input follows from its gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)

        def layer(into: int, out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(into, out, 3, stride, 1, bias=not normed)
            return [conv, *([nn.BatchNorm2d(out)] if normed else []), nn.ReLU()]

        inner = [] if lone else layer(32, 48, 2)
        model = nn.Sequential(
            *layer(3, 48 if lone else 32, 4 if lone else 2), *inner, *layer(48, 48, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, CLASSES),
        )  # fmt: skip
        model.train()(rgap.photos.load(16, 12, dtype=torch.float32))
        for norm in model:
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.9, 1.1)
                nn.init.normal_(norm.bias, 0.0, 0.05)
    return model.to(dtype).eval()


def seen(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every layer takes in."""
    values, hooks = dict[str, Tensor](), []
    for name, module in model.named_modules():

        def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            values[name] = args[0].detach().double()

        hooks.append(module.register_forward_pre_hook(note))
    model(x)
    for hook in hooks:
        hook.remove()
    return values


def off(found: Tensor, true: Tensor) -> float:
    """Largest rms distance of a sample from its own, in the nearest order."""
    apart = torch.cdist(true.flatten(1), found.flatten(1)) / true[0].numel() ** 0.5
    rows, columns = linear_sum_assignment(apart.numpy())
    return float(apart[rows, columns].max())


def drawn(seed: int, dtype: torch.dtype, **kind: bool) -> tuple[nn.Module, Tensor, rgap.Update]:
    model, x = network(seed, dtype, **kind), rgap.photos.load(4, 12, start=3 + seed).to(dtype)
    labels = torch.randint(0, CLASSES, (4,), generator=torch.Generator().manual_seed(seed))
    return model, x, rgap.capture(model, x, labels)


@pytest.mark.cases(3)
@pytest.mark.parametrize("lone", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_changed_gradient_gives_no_wrong_feature(
    dtype: torch.dtype, normed: bool, lone: bool
) -> None:
    given, refuted = 0, 0
    for seed in range(1):
        model, x, update = drawn(seed, dtype, normed=normed, lone=lone)
        true = seen(model, x)
        genuine = rgap.invert(model, update, time_limit=0.2)
        assert genuine.status is not rgap.Status.INCONSISTENT, genuine.reason
        given += bool(genuine.features)
        for name in [n for n, g in update.gradients.items() if g.ndim > 1]:
            for factor in (1.001, 0.5):
                changed = {**update.gradients, name: factor * update.gradients[name]}
                found = rgap.invert(model, replace(update, gradients=changed), time_limit=0.2)
                refuted += found.status is rgap.Status.INCONSISTENT
                for layer, value in found.features.items():
                    error = found.features_error[layer]
                    assert off(value, true[layer]) <= 10.0 * error + 1e-12, (seed, name, layer)
    assert given and refuted


def test_the_refutation_names_layer_equation_and_number() -> None:
    model, _, update = drawn(1, F64)
    changed = {**update.gradients, "3.weight": 1.001 * update.gradients["3.weight"]}
    found = rgap.invert(model, replace(update, gradients=changed), time_limit=0.2)
    assert found.status is rgap.Status.INCONSISTENT and not found.features
    assert found.halt is not None and found.halt.stage == "3"
    assert "⟨W, ∂W⟩ of '3' and γ ∂γ + γ μ/σ ∂β of '4' are one number" in found.reason
    assert "standard errors" in found.reason


class Several(nn.Module):
    """A value that two layers read, a bias below a norm, a leaky and a pooled step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, 1, 1, bias=False)
        self.one, self.two = nn.Conv2d(4, 5, 3, 1, 1), nn.Conv2d(4, 5, 1, bias=False)
        self.norm, self.third = nn.BatchNorm2d(5, eps=1e-2), nn.Conv2d(5, 6, 3)
        self.head = nn.Linear(24, 3)
        for what in (self.norm.running_mean, self.norm.bias):
            nn.init.normal_(what)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.normal_(self.norm.weight)

    def values(self, x: Tensor) -> list[Tensor]:
        u = torch.nn.functional.leaky_relu(self.first(x), 0.2)
        z = self.one(u)
        y = self.norm(z) + self.two(u)
        v = torch.relu(y)
        w = self.third(v)
        return [u, z, y, v, w, self.head(nn.functional.max_pool2d(torch.relu(w), 2).flatten(1))]

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x)[-1]


Places = dict[int, Estimate]


def truly(
    model: nn.Module, x: Tensor, labels: Tensor
) -> tuple[Flow, Places, Places, dict[str, Tensor]]:
    """The network with its true values, cotangents and gradients."""
    flow = flow_of(model, tuple(x.shape[1:]))
    assert isinstance(flow, Flow), flow
    values: list[Tensor] = [x.requires_grad_()]
    for node in flow.nodes[1:]:
        values.append(node.forward([values[place] for place in node.sources]))
    slopes = torch.autograd.grad(nn.functional.cross_entropy(values[-1], labels), values)
    own = nn.functional.cross_entropy(model(x), labels)
    sent = torch.autograd.grad(own, list(model.parameters()))
    gradients = dict(zip([n for n, _ in model.named_parameters()], sent, strict=True))

    def known(of: Sequence[Tensor]) -> Places:
        return {
            place: Estimate(v.detach(), v.detach().new_zeros(4, *v.shape))
            for place, v in enumerate(of)
        }

    return flow, known(values), known(slopes), gradients


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_long_sums_of_a_client_are_no_contradiction(
    dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of terms, added up one after the other, round by more than a few of them do."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 512, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(512, 512, 3, 1, 1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10),
    ).to(dtype)  # fmt: skip
    x = rgap.photos.load(2, 4, start=seed, dtype=dtype)
    labels = torch.tensor([4, 9])
    double = copy.deepcopy(model).double()
    flow, values, slopes, _ = truly(double, x.double().clone(), labels)
    sent = rgap.capture(model, x, labels).gradients
    monkeypatch.setattr(balance, "SAFETY", 0.0)
    found = disagreement_of_gradients(
        flow, values, slopes, {n: g.double() for n, g in sent.items()}, Precision(dtype=dtype)
    )
    assert found is not None and 0.2 < found.share < 3.0, found.share  # by the processor's order


@pytest.mark.parametrize("name", ["", "one.weight", "norm.weight", "norm.bias", "third.weight",
                                  "third.bias", "head.weight", "one.bias"])  # fmt: skip
def test_the_sums_are_those_of_autograd(name: str) -> None:
    """Every equation by itself, on true values: it holds, and no longer where a factor changed."""
    torch.manual_seed(0)
    model = Several().double().eval()
    x = torch.randn(3, 2, 6, 6, dtype=F64)
    flow, values, slopes, gradients = truly(model, x, torch.tensor([0, 1, 1]))
    if name:
        gradients[name] = 1.001 * gradients[name]
    found = disagreement_of_gradients(flow, values, slopes, gradients, Precision(dtype=F64))
    assert (found is None) == (not name), found
    if name:
        assert isinstance(found, Unbalanced) and found.share > 1e6
