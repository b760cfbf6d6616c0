"""Genuine updates have no finding; a mistake is named, or what no equation tells from it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import mistakes
import mistakes_table
import pytest
import torch
from mistakes import case, changed, clipped, moved, noisy, scaled
from torch import Tensor, nn
from torch.nn import functional as F

from rgap import Loss, Update, capture, check
from rgap.diagnosis import Kind

BINARY = "binary_cross_entropy_with_logits"
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.ELU, nn.Softshrink)


def own(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) + 0.1 * outputs.square().mean()


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.multi_margin_loss(outputs, targets)


def drawn(seed: int) -> tuple[nn.Module, Update]:
    """A network, a loss, a batch and what a client without mistakes sends of it."""
    r = random.Random(seed)
    act, classes = r.choice(ACTIVATIONS), r.choice((1, 2, 3, 5, 10))
    size, dtype = r.choice((1, 1, 2, 3, 5)), r.choice((torch.float32, torch.float64))
    losses = ["nll_loss", "focal", "weight", "own", "margin", "cross_entropy", "mse_loss", BINARY]
    name = r.choice(losses) if classes > 1 else r.choice((BINARY, "mse_loss", "sigmoid_focal_loss"))
    narrow = r.choice((2, 6, 24))

    def build() -> nn.Module:
        if r.random() < 0.5:
            parts = [nn.Flatten(), nn.Linear(36, 18), act(), nn.Linear(18, narrow), act()]
        else:
            parts = [nn.Conv2d(1, 4, 3, 2, 1), act(), nn.Flatten(), nn.Linear(36, narrow), act()]
        parts.append(nn.Linear(narrow, classes))
        return nn.Sequential(*parts, *([nn.LogSoftmax(1)] if name == "nll_loss" else []))

    model = mistakes.seeded(build, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 1, 6, 6, generator=generator).to(dtype)
    style = r.choice(("plain", "binary", "wide", "dark"))
    x = {"plain": x, "binary": (x > 0.5).to(dtype), "wide": 20 * x - 10, "dark": x * (x > 0.7)}[
        style
    ]
    y = torch.randint(0, max(classes, 2), (size,), generator=generator)
    if name in (BINARY, "sigmoid_focal_loss"):
        y = torch.randint(0, 2, (size, classes), generator=generator).to(dtype)
    elif name == "mse_loss":
        y = torch.randn(size, classes, generator=generator).to(dtype)
    weight = tuple(r.uniform(0.3, 3.0) for _ in range(classes))
    given: dict[str, Loss] = {
        "own": Loss("own", function=own),
        "margin": Loss("margin", function=margin),
        "weight": Loss(weight=weight),
        "focal": Loss("focal_loss", weight=weight),
    }
    if r.random() < 0.2:
        model[1].requires_grad_(False)
    update = capture(model, x, y, given.get(name, name), value_range=None)
    if r.random() < 0.3:  # a weight difference rounds, and loses what is small
        rate = 10 ** r.uniform(-5, 0)
        before = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        after = {n: p - rate * update.gradients[n] for n, p in before.items()}
        options = {"loss": update.loss, "batch_size": size, "input_shape": (1, 6, 6)}
        update = Update.from_delta(before, after, rate, **options)  # type: ignore[arg-type]
    elif r.random() < 0.2:  # frozen layers sent as zeros
        gradients = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        update = replace(update, gradients=gradients | update.gradients)
    return model, update


@pytest.mark.parametrize("part", range(3))
def test_a_genuine_update_has_no_finding(part: int) -> None:
    for seed in range(part, 36, 3):
        model, update = drawn(seed)
        found = check(model, update)
        wrong = [f for f in found.findings if f.kind is not Kind.NAMES]
        assert not wrong, (seed, update.loss, found.explain())


def half(update: Update) -> Update:
    return changed(update, lambda g: g.half().float())


MISTAKES: dict[Kind, Callable[[mistakes.Case], Update]] = {
    Kind.NOISE: lambda given: noisy(given.update, 1e-3),
    Kind.STEPS: lambda given: mistakes.trained_locally(given, 3, 0.1),
    Kind.SIGN: lambda given: scaled(given.update, -1.0),
    Kind.SCALE: lambda given: scaled(given.update, 2.7),
    Kind.CLIPPING: lambda given: clipped(given.update, 0.05),
    Kind.PRECISION: lambda given: half(given.update),
}


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [
        *(("mlp", 3, 1), ("mlp", 1, 2), ("mlp", 1, 10), ("lenet", 1, 10)),
        *itertools.product(("lenet",), (1, 3), (1, 2)),
    ],
)
def test_a_mistake_is_named_or_what_looks_the_same(name: str, size: int, classes: int) -> None:
    given = case(name, size, BINARY if classes == 1 else "cross_entropy", classes=classes)
    other = moved(given.model, 0.1)
    sent = {kind: (given.model, make(given)) for kind, make in MISTAKES.items()}
    for kind, (model, update) in (sent | {Kind.WEIGHTS: (other, given.update)}).items():
        found = check(model, update)
        if found.best is None:
            assert kind in found.untested, (kind, found.explain())
            assert name == "lenet" and size > 1, "every one is seen where samples are told apart"
            continue
        assert kind in (found.best.kind, *found.best.rivals), (kind, found.explain())
        if found.best.kind is not kind:
            assert classes < 3 and name == "lenet", "a head of few rows shows no spectrum"
            assert kind.claim in found.explain()


SPREAD = list(mistakes_table.trials(1))[::37]  # every mistake, on another network each


@pytest.mark.parametrize("part", range(3))
def test_the_first_finding_is_never_another_mistake(part: int) -> None:
    for trial in SPREAD[part::3]:
        end, first, found = trial.outcome()
        assert end != "wrong", (trial, first, found.explain())
        kinds = mistakes_table.MISTAKES[trial.mistake].kinds
        assert end != "silent" or trial.mistake not in mistakes_table.ALWAYS, (trial, kinds)


FACTORED = ["weight", "focal_loss", "nll_loss", "sigmoid_focal_loss"]


# A function of one's own takes the whole batch: it has no factor of a sample.
@pytest.mark.parametrize(
    ("loss", "size"), [("own", 1), *((loss, size) for loss in FACTORED for size in (1, 3))]
)
def test_a_factor_under_every_loss(loss: str, size: int) -> None:
    model = mistakes.mlp(3, classes=5)
    if loss == "nll_loss":
        model.append(nn.LogSoftmax(1))
    x = torch.rand(size, 2, 6, 6, generator=torch.Generator().manual_seed(5))
    y = torch.tensor([3, 0, 2])[:size]
    if loss == "sigmoid_focal_loss":
        y = F.one_hot(y, 5).float()
    made = {"weight": Loss(weight=(0.5, 1.0, 2.0, 3.0, 0.7)), "own": Loss("own", function=own)}
    update = capture(model, x, y, made.get(loss, Loss.of(loss) if loss not in made else None))
    assert check(model, update).ok
    found = check(model, scaled(update, 2.7)).best
    assert found is not None and found.kind is Kind.SCALE
    assert found.value == pytest.approx(2.7, rel=2e-3)
    found = check(model, scaled(update, -1.0)).best
    assert found is not None and found.kind is Kind.SIGN
