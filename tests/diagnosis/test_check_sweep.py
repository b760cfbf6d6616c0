"""Genuine updates have no finding; a mistake is named, or what no equation tells from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import mistakes
import mistakes_table
import pytest
import torch
from genuine_updates import BINARY, drawn, own
from mistakes import case, changed, clipped, moved, noisy, scaled
from torch import nn
from torch.nn import functional as F

from rgap import Loss, Update, capture, check
from rgap.diagnosis import Kind
from rgap.diagnosis.finding import MENDING


@pytest.mark.parametrize("part", range(3))
def test_a_genuine_update_has_no_finding(part: int) -> None:
    for seed in range(part, 36, 3):
        model, update = drawn(seed)
        found = check(model, update)
        wrong = [f for f in found.findings if f.kind is not Kind.NAMES]
        assert not wrong, (seed, update.loss, found.explain())


@pytest.mark.parametrize("part", range(2))
def test_a_genuine_update_of_a_batch_nobody_counted_has_no_finding(part: int) -> None:
    for seed in range(part, 40, 2):
        model, update = drawn(seed)
        found = check(model, replace(update, batch_size=None))
        wrong = [f for f in found.findings if f.kind is not Kind.NAMES]
        assert not wrong, (seed, update.batch_size, update.loss, found.explain())


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


@pytest.mark.cases(5)
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
            assert name == "lenet", "two fully connected layers tell the samples apart"
            assert classes < 3 or kind is Kind.WEIGHTS, "a head of few rows shows no spectrum"
            assert kind.claim in found.explain()


@pytest.mark.parametrize(
    ("act", "steps", "declared"), [(nn.Tanh, 2, 4), (nn.ReLU, 4, 4), (nn.ReLU, 2, 2)]
)
def test_steps_on_other_samples_are_no_other_mistake(
    act: type[nn.Module], steps: int, declared: int
) -> None:
    """They have the rank of one step on all samples, so that hardly an equation shows them."""
    for network in ("mlp", "lenet"):
        given = case(network, 4, act=act)
        if steps == declared:
            genuine = check(given.model, given.update)
            assert genuine.ok and Kind.STEPS not in genuine.untested  # every sample fits
        sent = mistakes.trained_locally(given, steps, 0.05, apart=True)
        found = check(given.model, replace(sent, batch_size=declared))
        if found.best is None:
            assert Kind.STEPS in found.untested
            assert "steps (those on other samples" in found.explain()
        else:
            assert Kind.STEPS in (found.best.kind, *found.best.rivals), found.explain()


NOISED = [("lenet", 1, 2), ("normed", 1, 2), ("normed", 4, 2)]


@pytest.mark.parametrize("mistake", ["noise", "steps", "decay", "weights"])
def test_what_no_equation_tells_apart_is_not_claimed(mistake: str) -> None:
    for network, size, classes in NOISED:
        trial = mistakes_table.Trial(mistake, network, size, classes, trained=True, seed=0)
        found = trial.outcome()[2].best
        assert found is not None
        if found.kind in trial.kinds and mistake != "weights":
            continue
        assert found.kind is Kind.UNDECIDED, (trial, found.sentence)
        free = "of one k" in found.evidence  # of an identity that holds under any weights
        assert {*trial.kinds, *(() if free else (Kind.WEIGHTS,))} <= set(found.rivals)
        for kind in found.rivals:
            assert kind.claim in found.claim
            assert f"{MENDING[kind]} (if {kind})" in found.remedy
        assert Kind.UNDECIDED not in check(*trial.made()).untested


SPREAD = list(mistakes_table.trials(1))[::53]  # every mistake, on another network each
UNSTATED = list(mistakes_table.trials(2, stated=False))[::97]


@pytest.mark.parametrize("part", range(3))
def test_the_first_finding_is_never_another_mistake(part: int) -> None:
    for trial in [*SPREAD, *UNSTATED][part::3]:
        end, first, found = trial.outcome()
        assert end != "wrong", (trial, first, found.explain())
        assert end != "silent" or trial.mistake not in mistakes_table.ALWAYS, (trial, trial.kinds)


FACTORED = ["weight", "focal_loss", "nll_loss", "sigmoid_focal_loss"]


# A function of one's own takes the whole batch: it has no factor of a sample.
@pytest.mark.cases(6)
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


def test_zeros_of_integers_are_not_taken_for_pruning() -> None:
    """Rounding to 8 bits empties the small entries of an outer product, not in whole rows."""
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(50, 24), nn.Tanh(), nn.Linear(24, 40), nn.ReLU(),
            nn.Linear(40, 10),
        )  # fmt: skip
        update = capture(model, torch.rand(1, 2, 5, 5), torch.tensor([seed % 10]))

        def integers(g: torch.Tensor) -> torch.Tensor:
            step = g.abs().max() / 127
            return (g / step).round() * step

        best = check(model, changed(update, integers)).best
        assert best is not None and "8-bit integers" in best.evidence, (seed, best)
