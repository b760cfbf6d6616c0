"""A factor on a batch's update: common, or one a sample; λ, targets and inputs come back."""

from dataclasses import replace

import pytest
import torch
from cases import dense
from torch import Tensor, nn

import rgap
from rgap import Loss, Status, Update
from rgap.head.target import _Heard, _scaled
from rgap.inversion.batch_rows import in_order
from rgap.precision import Estimate, Precision

MANY = "binary_cross_entropy_with_logits"


def pair(classes: int, seed: int) -> nn.Sequential:
    """Fully connected layers, two in a row."""
    return dense(12, 24, 24, classes, seed=seed).double()


def convolutions(seed: int) -> nn.Sequential:
    """One fully connected layer only, under a softmax."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Sigmoid(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(256, 10),
    ).double()  # fmt: skip


def batch(classes: int, size: int, seed: int, several: bool = False) -> tuple[Tensor, Tensor]:
    """Data and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 12, generator=generator, dtype=torch.float64)
    shape = (size, classes) if several else (size,)
    return x, torch.randint(0, 2 if several else max(classes, 2), shape, generator=generator)


def test_targets_with_their_factors_are_compared_all_at_once() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 6, dtype=torch.float64)
    loss = Loss(MANY, reduction="sum", pos_weight=(2.5,))
    options = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 6)
    error = 1e-9 * torch.randn(24, 1, 6, dtype=torch.float64)
    k = 0.7 * loss.cotangent(z, options[37:38])
    precision = Precision(torch.float64)
    heard = _Heard.of(Estimate(z, error), Estimate(k, error), loss, precision, options)
    sizes = heard.many.square().sum(1)
    gaps, apart = heard.gaps((heard.many @ k[0]) / sizes)
    for place, own in enumerate(heard.many):
        factor = float(own @ k[0] / sizes[place])
        if factor > 0:
            assert float(gaps[place]) == pytest.approx(float((own - k[0] / factor).abs().max()))
        cosines = heard.many @ own / (sizes * sizes[place]).sqrt()
        nearest = max(float(c) for at, c in enumerate(cosines) if at != place)
        sine = (1.0 - max(nearest, 0.0) ** 2) ** 0.5
        assert float(apart[place]) == pytest.approx(sine * float(own.norm()), rel=1e-6)
    told = list(_scaled(heard.z, heard.k, loss, precision))
    assert len(told) < 8 and told[0].fits and told[0].scale == pytest.approx(0.7)
    assert told[0].labels.tolist() == options[37:38].long().tolist()
    assert not any(reading.fits for reading in told[1:])


def times(update: Update, factor: float) -> Update:
    """The update times a factor, without its labels."""
    gradients = {name: factor * g for name, g in update.gradients.items()}
    return replace(update, gradients=gradients, labels=None)


def sample_by_sample(
    model: nn.Module, x: Tensor, y: Tensor, loss: str | Loss, factors: Tensor
) -> Update:
    """The mean of the samples' own gradients, each with its factor, as after clipping."""
    total: dict[str, Tensor] = {}
    for i, factor in enumerate((factors / len(x)).tolist()):
        own = rgap.capture(model, x[i : i + 1], y[i : i + 1], loss).gradients
        total = {n: factor * g + total.get(n, 0.0) for n, g in own.items()}
    return replace(rgap.capture(model, x, y, loss), gradients=total, labels=None)


def rows(recovery: rgap.Recovery, x: Tensor, y: Tensor) -> Tensor:
    """Which sample each row is; inputs within the bound, labels beside them."""
    assert recovery.inputs is not None
    assert recovery.labels is not None
    assert recovery.error_bound is not None
    gap = (recovery.inputs[:, None] - x[None]).flatten(2).abs().amax(2)
    assert float(gap.amin(1).max()) <= recovery.error_bound
    index = gap.argmin(1)
    assert sorted(index.tolist()) == list(range(len(x)))
    assert torch.equal(recovery.labels, y[index].to(recovery.labels))
    return index


@pytest.mark.cases(6)
@pytest.mark.parametrize("factor", [0.5, 0.3137, 3.0, 65536.0])
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_common_factor(classes: int, factor: float) -> None:
    model, (x, y) = pair(classes, seed=classes), batch(classes, 3, seed=17)
    loss = MANY if classes == 1 else "cross_entropy"
    recovery = rgap.invert(model, times(rgap.capture(model, x, y, loss), factor))
    assert recovery.status is Status.EXACT, recovery.reason
    rows(recovery, x, y)
    assert recovery.scale == pytest.approx(factor, rel=1e-9)
    assert f"{factor:.6g} times that of the declared loss" in recovery.reason


@pytest.mark.parametrize("factor", [0.3137, 2.0])
def test_common_factor_at_a_softmax_head_alone(factor: float) -> None:
    model = convolutions(seed=1)
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.tensor([4, 1])
    recovery = rgap.invert(model, times(rgap.capture(model, x, y), factor))
    assert recovery.status is Status.EXACT, recovery.reason
    rows(recovery, x, y)
    assert recovery.scale == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize(
    ("loss", "classes"),
    [("cross_entropy", 3), ("cross_entropy", 10), (MANY, 14), (Loss("focal_loss", gamma=2.0), 5)],
)
def test_factor_of_each_sample(loss: str | Loss, classes: int) -> None:
    model, (x, y) = pair(classes, seed=4), batch(classes, 3, seed=2, several=loss == MANY)
    factors = torch.tensor([0.7, 0.21, 1.0], dtype=torch.float64)
    recovery = rgap.invert(model, sample_by_sample(model, x, y, loss, factors))
    assert recovery.status is Status.EXACT, recovery.reason
    index = rows(recovery, x, y)
    assert isinstance(recovery.scale, Tensor)
    torch.testing.assert_close(recovery.scale, factors[index], rtol=1e-8, atol=0)


@pytest.mark.parametrize("classes", [1, 2])
def test_one_direction_tests_no_factor(classes: int) -> None:
    """The cotangents of two classes are parallel: a factor of each sample is as good as any."""
    loss = MANY if classes == 1 else "cross_entropy"
    model, (x, y) = pair(classes, seed=6), batch(classes, 3, seed=3)
    factors = torch.tensor([0.7, 0.21, 1.0], dtype=torch.float64)
    recovery = rgap.invert(model, sample_by_sample(model, x, y, loss, factors))
    assert recovery.certified == {"inputs"}, recovery.reason
    assert recovery.labels is None
    assert recovery.scale is None
    assert "tests no factor" in recovery.reason


@pytest.mark.parametrize(
    "loss",
    [
        Loss("cross_entropy", weight=(1.0, 2.0, 0.5, 1.0, 3.0)),
        Loss("focal_loss", gamma=2.0),
        Loss(MANY, pos_weight=(2.0, 1.0, 0.5, 1.0, 3.0)),
    ],
)
def test_targets_of_a_batch_under_other_losses(loss: Loss) -> None:
    model = pair(5, seed=8)
    x, y = batch(5, 3, seed=9, several=loss.name == MANY)
    update = replace(rgap.capture(model, x, y, loss), labels=None)
    recovery = rgap.invert(model, update)
    assert recovery.status is Status.EXACT, recovery.reason
    rows(recovery, x, y)
    assert recovery.scale == 1.0


def test_stated_labels_give_the_order() -> None:
    model, (x, y) = pair(5, seed=8), batch(5, 4, seed=12)
    update = rgap.capture(model, x, y, Loss("focal_loss", gamma=2.0))
    recovery = rgap.invert(model, update, labels=y)
    assert recovery.labels is not None
    assert torch.equal(recovery.labels, y)
    wrong = rgap.invert(model, update, labels=(y + 1) % 5)
    assert "contradict" in wrong.reason
    assert in_order(torch.tensor([1, 2]), torch.tensor([1, 3, 2])) is None


def test_another_model_is_no_factor() -> None:
    """The replay decides: weights that differ a little are not explained by any factor."""
    model, (x, y) = pair(10, seed=4), batch(10, 3, seed=2)
    update = times(rgap.capture(model, x, y), 0.5)
    with torch.no_grad():
        model[1].weight *= 1.001
    assert "targets" not in rgap.invert(model, update).certified
