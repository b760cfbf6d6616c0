"""A picture that known features, gradients and a prior suggest where nothing meets the update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import rgap
from rgap.completion.features import Suggestion, coarse
from rgap.constraints.known_input import Whole
from rgap.inversion import fallback
from rgap.jacobian.module_update import ClientLoss, KnownFeatures
from rgap.priors import prior_of

SHAPE = (3, 32, 32)
RANGE = (0.0, 1.0)


class Case:
    """Photographs through the small VGG, and what a layer of it takes in."""

    def __init__(self, batch: int) -> None:
        self.model = rgap.models.vgg(seed=1)
        self.x, self.labels = rgap.photos.load(batch), torch.arange(batch)
        self.update = rgap.capture(self.model, self.x, self.labels, dtype=torch.float64)
        self.gradients = dict(self.update.gradients)
        self.model.double()

    def known(self, layer: str) -> KnownFeatures:
        """Its input and the cotangent there."""
        held: dict[str, Tensor] = {}
        module = self.model.get_submodule(layer)
        hook = module.register_forward_hook(lambda _, given, out: held.update(u=given[0], z=out))
        loss = torch.nn.functional.cross_entropy(
            self.model(self.x.clone().requires_grad_()), self.labels
        )
        hook.remove()
        (k,) = torch.autograd.grad(loss, held["u"])
        u = held["u"].detach()
        return KnownFeatures(layer, tuple(u.shape), Whole(u), k)

    def wanted(self, seconds: float) -> Suggestion:
        """A batch of photographs."""
        prior = prior_of("natural", SHAPE, RANGE)
        return Suggestion((len(self.x), *SHAPE), prior, RANGE, seconds)

    def off(self, found: Tensor) -> float:
        """Mean square error."""
        assert found.shape == self.x.shape and bool((found >= 0).all() and (found <= 1).all())
        return float((found - self.x).square().mean())


@pytest.mark.parametrize("batch", [1, 2])
def test_features_from_lower_down_lead_nearer_than_those_from_above(batch: int) -> None:
    case = Case(batch)
    grey = case.off(torch.full_like(case.x, 0.5))
    above, below = (
        case.off(coarse(case.model, case.gradients, case.known(layer), case.wanted(6.0)))
        for layer in ("fc1", "conv5")
    )
    assert below < above < grey and below < 0.6 * grey


def test_features_that_are_not_quite_right_lead_near() -> None:
    case = Case(1)
    grey, known = case.off(torch.full_like(case.x, 0.5)), case.known("conv5")
    assert isinstance(known.known, Whole)
    noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(0)).double()
    u = known.known.value + 0.05 * known.known.value.std() * noise
    near = replace(known, known=Whole(u), cotangent=torch.zeros_like(u))
    top = case.known("fc1")
    found = case.off(coarse(case.model, case.gradients, top, case.wanted(4.0), near))
    assert found < 0.6 * grey


def test_the_loss_alone_suggests_a_picture_too() -> None:
    case = Case(1)
    source = ClientLoss(case.update.loss, case.labels)
    found = case.off(coarse(case.model, case.gradients, source, case.wanted(8.0)))
    assert found < case.off(torch.full_like(case.x, 0.5))


def test_a_completion_begins_at_the_lowest_features_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, begun = Case(1), list[KnownFeatures]()
    right = case.known("conv5").known
    assert isinstance(right, Whole)

    def spy(
        _: object, __: object, known: KnownFeatures, wanted: Suggestion, near: object
    ) -> Tensor:
        begun.append(known)
        assert near is None
        return wanted.start(0).double()

    monkeypatch.setattr(fallback, "coarse", spy)
    update = replace(case.update, labels=case.labels)
    rgap.invert(case.model, update, complete=True, time_limit=6.0)
    [known] = begun
    assert known.layer == "conv5" and isinstance(known.known, Whole)
    assert torch.allclose(known.known.value, right.value, atol=1e-9)
    assert torch.allclose(known.cotangent, case.known("conv5").cotangent, atol=1e-9)
