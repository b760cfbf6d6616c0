"""Two scales of one picture that send the same update: a homogeneous chain with one logit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap import Recovery, Status, Update, capture, invert

BINARY = "binary_cross_entropy_with_logits"


def chain(picture: Tensor, logit: float) -> nn.Module:
    """No biases and a LeakyReLU: f(sx) = s f(x) for s > 0; the head is scaled to the logit."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.LeakyReLU(0.2), nn.Flatten(),
        nn.Linear(216, 1, bias=False),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        model[3].weight.mul_(logit / float(model(picture)))
    return model


PICTURE = 0.1 + 0.8 * torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def case(logit: float) -> tuple[nn.Module, Update]:
    model = chain(PICTURE, logit)
    return model, capture(model, PICTURE, torch.ones(1), BINARY, dtype=torch.float64)


def distance(inputs: Tensor | None) -> float:
    assert inputs is not None
    return float((inputs - PICTURE).abs().max())


def replayed(model: nn.Module, update: Update, recovery: Recovery) -> list[float]:
    gaps = []
    for candidate in recovery.candidates:
        own = capture(
            model, candidate.inputs, candidate.labels.double(), BINARY, dtype=torch.float64,
            value_range=None,
        )  # fmt: skip
        gaps += [
            float((own.gradients[n] - g).norm() / g.norm()) for n, g in update.gradients.items()
        ]
    return gaps


@pytest.mark.parametrize("logit", [1.0, 1.5])
def test_both_scales_are_candidates_and_both_send_the_update(logit: float) -> None:
    model, update = case(logit)
    recovery = invert(model, update)
    assert recovery.status is Status.AMBIGUOUS
    assert len(recovery.candidates) == 2
    assert min(distance(c.inputs) for c in recovery.candidates) < 1e-9
    assert max(distance(c.inputs) for c in recovery.candidates) > 0.1
    assert max(replayed(model, update, recovery)) < 1e-12


def test_a_stated_range_refutes_the_scale_that_leaves_it() -> None:
    model, update = case(1.0)  # the other root of t(σ(t) − 1) is 1.6 times as large
    recovery = invert(model, update, value_range=(0.0, 1.0))
    assert recovery.status is Status.EXACT, recovery.reason
    assert distance(recovery.inputs) < 1e-9
    assert "others would send this update too, with values outside [0, 1]" in recovery.reason


def test_a_stated_range_does_not_choose_between_two_that_stay_inside() -> None:
    model, update = case(1.5)  # the other root is 0.7 times as large
    assert invert(model, update, value_range=(0.0, 1.0)).status is Status.AMBIGUOUS


def test_a_stated_range_that_no_candidate_keeps_contradicts_the_update() -> None:
    model, update = case(1.0)
    recovery = invert(model, update, value_range=(0.0, 0.01))
    assert recovery.status is Status.INCONSISTENT
    assert "stated value_range [0, 0.01]" in recovery.reason
    assert recovery.inputs is None


def test_the_range_of_the_update_alone_is_not_believed_that_far() -> None:
    """Normalised data leave [0, 1] and are declared in it by readers that cannot know."""
    shifted = 2 * PICTURE - 1
    model = chain(shifted, 0.01)
    update = capture(model, shifted, torch.ones(1), BINARY, dtype=torch.float64, value_range=None)
    declared = Update(
        **{f: getattr(update, f) for f in update.__dataclass_fields__} | {"value_range": (0.0, 1.0)}
    )
    recovery = invert(model, declared)
    assert recovery.status is Status.EXACT
    assert recovery.inputs is not None
    assert float((recovery.inputs - shifted).abs().max()) < 1e-8
