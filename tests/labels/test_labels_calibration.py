"""What the confidence of ``best`` says is so: balanced, random and skewed batches.

``benchmarks/studies/calibration.py`` does the same on more kinds of networks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.labels import LabelEstimate, best, estimate, head_gradient
from rgap.labels.cubature import MeanSoftmax
from rgap.labels.posterior import Contrasts

SURE = 0.95
BINARY = "binary_cross_entropy_with_logits"


def network(logits: int, activation: type[nn.Module], seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 32), activation(), nn.Linear(32, logits))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        labels = torch.randint(max(logits, 2), (32,))
        loss = value(model(samples(labels)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def samples(labels: Tensor) -> Tensor:
    """Numbers around a centre that belongs to the label."""
    centres = torch.rand(10, 20, generator=torch.Generator().manual_seed(5))
    return (torch.rand(len(labels), 20) + centres[labels]) / 2


def value(outputs: Tensor, labels: Tensor) -> Tensor:
    if outputs.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(outputs[:, 0], labels.float())
    return F.cross_entropy(outputs, labels)


def read(
    model: nn.Module, inputs: Tensor, labels: Tensor, logits: int
) -> tuple[LabelEstimate, bool]:
    loss = "cross_entropy" if logits > 1 else BINARY
    update = rgap.capture(model, inputs, labels if logits > 1 else labels.float(), loss)
    found = estimate(model, update)
    truth = torch.bincount(labels, minlength=max(logits, 2))
    return found, found.counts is not None and torch.equal(found.counts, truth)


@pytest.mark.parametrize(
    ("logits", "batch", "seeds"), [(2, 4, 10), (2, 8, 10), (1, 8, 10), (3, 6, 6), (10, 40, 2)]
)
def test_balanced_batches_are_read_as_such(logits: int, batch: int, seeds: int) -> None:
    """The bias gradient is near 0: rows divided by it say nothing of the features."""
    right = 0
    for seed in range(seeds):
        model = network(logits, nn.ReLU, seed, 0)
        labels = torch.arange(batch) % max(logits, 2)
        found, fine = read(model, torch.rand(batch, 20), labels, logits)
        right += fine
        assert fine or found.least < SURE
    assert right >= 0.95 * seeds


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("steps", [0, 40])
def test_of_the_sure_answers_nearly_all_are_right(activation: type[nn.Module], steps: int) -> None:
    sure = right = 0
    for seed, (logits, batch) in enumerate([(2, 8), (1, 6), (3, 7), (2, 16), (10, 12)]):
        model = network(logits, activation, 100 + seed, steps)
        classes = max(logits, 2)
        for weights in (torch.ones(classes), torch.rand(classes) ** 4 + 1e-3):
            labels = torch.multinomial(weights, batch, replacement=True)
            inputs = samples(labels) if steps else torch.rand(batch, 20)
            found, fine = read(model, inputs, labels, logits)
            sure += found.least >= SURE
            right += fine and found.least >= SURE
    assert right >= sure - 1, f"{right} of {sure}"
    assert steps or sure >= 5


def test_slopes_of_the_mean_softmax_are_its_derivative() -> None:
    torch.manual_seed(0)
    basis, bias = torch.randn(5, 4).double(), torch.randn(5).double()
    centres, shares = torch.randn(3, 4).double(), torch.rand(3).double()
    roots, weights = torch.randn(4, 4).double(), torch.rand(3).double()

    def means(shift: Tensor) -> Tensor:
        return MeanSoftmax(basis, bias, centres + shift, shares, roots).mean

    step = 1e-5 * torch.eye(4).double()
    slopes = torch.stack([means(h) - means(-h) for h in step], -1) / 2e-5
    soft = MeanSoftmax(basis, bias, centres, shares, roots)
    torch.testing.assert_close(soft.along(roots), slopes @ roots, atol=1e-8, rtol=0)
    torch.testing.assert_close(
        soft.slope(weights), torch.einsum("k,kcq->cq", weights, slopes), atol=1e-8, rtol=0
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_scatter_that_runs_away_does_not_decide(seed: int) -> None:
    """In batches of one class: a large scatter makes the mean uncertain, and so itself larger."""
    model = network(3, nn.Tanh, 300 + seed, 0)
    labels = torch.full((6,), seed % 3)
    update = rgap.capture(model, torch.randn(6, 20), labels, value_range=None)
    head = head_gradient(model, update)
    truth = torch.bincount(labels, minlength=3)
    contrasts = Contrasts(head, head.sums)
    expected = float(contrasts.scatter.trace() / len(contrasts.scatter)) ** 0.5
    fits = contrasts.fit() + contrasts.fit(truth)
    assert max(fits, key=lambda fit: fit.weight).spread < 5 * expected
    found = best(head)
    assert found.counts is not None
    assert torch.equal(found.counts, truth) or found.least < SURE


def test_hundreds_of_classes_are_read_without_a_slope_for_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 200))
    labels = torch.randint(200, (16,))
    found = estimate(model, rgap.capture(model, torch.rand(16, 20), labels))
    assert found.labels is not None and torch.equal(found.labels, labels.sort().values)
    assert found.least > SURE
