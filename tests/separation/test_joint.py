"""The polish of all samples together: its normal matrix against the dense one, its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batched import batch_of
from cases import mlp, pictures
from torch import Tensor, nn
from torch.nn import functional as F

from rgap import capture, invert
from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.linearisation import Linearisation
from rgap.network.chain import parse
from rgap.recovery import Status
from rgap.separation.batch import Batch
from rgap.separation.polish import LARGEST, Joint, normal_matrix, polish_jointly
from rgap.update.losses import Loss

F64 = torch.float64


def dense(point: Linearisation, weights: dict[str, Tensor]) -> Tensor:
    """JᵀWJ, one column of J at a time."""
    size = point.x.numel()
    columns = []
    for i in range(size):
        direction = torch.zeros(size, dtype=F64)
        direction[i] = 1.0
        rows = point.jvp(direction.reshape(1, *point.x.shape))
        columns.append(torch.cat([(rows[n] * weights[n])[0].flatten() for n in weights]))
    jacobian = torch.stack(columns, 1)
    return jacobian.T @ jacobian


@pytest.mark.cases(9)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(6,), (7, 5), (5, 6, 4)])
@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
def test_normal_matrix_is_dense_jtwj(activation: str, widths: tuple[int, ...], bias: bool) -> None:
    model = mlp(activation, 2, widths=widths, bias=bias)
    x = pictures(3, 2).flatten(1)
    chain = parse(model, (48,))
    targets = F.one_hot(torch.tensor([1, 1, 4]), 5).double()
    head = BatchLoss(Loss(), targets, torch.tensor([1.0, 2.0, 1.0], dtype=F64))
    point = Linearisation(chain, x, head)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (
            0.1 + torch.rand(len(g), generator=generator, dtype=F64)
        ).reshape(-1, *([1] * (g.ndim - 1)))
        for name, g in point.gradients().items()
    }  # fmt: skip
    expected = dense(point, weights)
    found = normal_matrix(point, weights)
    assert float(expected.norm()) > 0  # not every unit is off
    assert torch.equal(found, found.T)
    assert float((found - expected).norm()) < 1e-13 * float(expected.norm())


def separated(
    size: int, dtype: torch.dtype = F64, activation: str = "gelu"
) -> tuple[Batch, Tensor, BatchLoss]:
    """A batch, the true coordinates Q of its samples, and their loss."""
    model = mlp(activation, 11, dtype=dtype)
    x, y = pictures(size, 4, dtype), torch.arange(size) % 3
    batch = batch_of(model, x, y)
    roots = x.double().flatten(1) @ batch.mixture(0).right
    targets = F.one_hot(y, 5).double()
    return batch, roots, BatchLoss(batch.loss, targets, torch.ones(size, dtype=F64))


def polished(batch: Batch, roots: Tensor, head: BatchLoss) -> Joint:
    samples = batch.mixture(0)
    across = torch.zeros(batch.precision.samples, len(roots), 48, dtype=F64)
    joint = polish_jointly(batch, samples, roots, head, across)
    assert joint is not None
    return joint


@pytest.mark.parametrize("size", [2, 5])
def test_the_polish_ends_at_the_truth(size: int) -> None:
    batch, roots, head = separated(size)
    noise = torch.randn(roots.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    joint = polished(batch, roots + 1e-6 * noise, head)
    error = (joint.roots - roots).norm() / roots.norm()
    assert float(error) < 1e-12
    assert joint.misfit < 10.0
    assert joint.worst < 1e-9


@pytest.mark.parametrize("activation", ["gelu", "tanh", "relu"])
def test_the_errors_have_the_size_of_the_error(activation: str) -> None:
    """Gradients truly computed in float32: the ensemble is neither blind nor without hope."""
    ratios = []
    for size in (2, 3, 4):
        batch, roots, head = separated(size, torch.float32, activation)
        joint = polished(batch, roots, head)
        assert joint.errors is not None and joint.errors.shape[1:] == roots.shape
        predicted = joint.errors.square().mean().sqrt()
        ratios.append(float((joint.roots - roots).square().mean().sqrt() / predicted))
    assert max(ratios) < 4.0
    assert min(ratios) > 0.02


def test_a_wrong_target_shows_in_the_misfit() -> None:
    batch, roots, head = separated(3)
    absent = F.one_hot(torch.tensor([0, 1, 4]), 5).double()
    wrong = replace(head, targets=absent)
    assert polished(batch, roots, head).misfit < 10.0
    assert polished(batch, roots, wrong).misfit > 1e6


def freed(seed: int, activation: str, off: float) -> tuple[Joint, Tensor]:
    """The polish of a squared loss, whose targets it frees, from roots that are off; the truth."""
    model = mlp(activation, seed, dtype=F64)
    generator = torch.Generator().manual_seed(seed - 11)
    x, y = pictures(3, 4, F64), torch.rand(3, 5, dtype=F64, generator=generator)
    batch = batch_of(model, x, y, "mse_loss")
    roots = x.flatten(1) @ batch.mixture(0).right
    noise = torch.randn(roots.shape, generator=generator.manual_seed(1), dtype=F64)
    joint = polished(batch, roots + off * noise, BatchLoss(batch.loss, y, torch.ones(3, dtype=F64)))
    assert joint.free
    return joint, roots


def test_steps_across_kinks_are_shortened_until_they_settle() -> None:
    """At two of three seeds at least: where kinks are many, rounding says which way is taken."""
    settled = 0
    for case in ((22, "leaky_relu", 0.6), (14, "leaky_relu", 0.1), (17, "relu", 0.1)):
        joint, roots = freed(*case)
        right = float((joint.roots - roots).norm() / roots.norm()) < 1e-12
        assert right or not joint.misfit < 10.0
        settled += right
    assert settled >= 2


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("off", [1e-3, 0.1])
def test_steps_that_end_before_their_optimum_are_as_far_off_as_what_is_left(
    activation: str, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rgap.separation.polish.FACTORS", 1)
    monkeypatch.setattr("rgap.separation.polish.CHORDS", 1)
    for seed in (11, 12, 13):
        joint, roots = freed(seed, activation, off)
        assert joint.misfit > 1e6
        claimed = joint.errors.square().sum(2).mean(0).sqrt()
        assert bool(((joint.roots - roots).norm(dim=1) < 1.3 * claimed).all())
        assert joint.worst > 1e-10


def test_too_many_samples_are_left_as_they_are() -> None:
    batch, roots, head = separated(3)
    samples = batch.mixture(0)
    rank = replace(samples.triplets.rank, rank=LARGEST + 1)
    large = replace(samples, triplets=replace(samples.triplets, rank=rank))
    across = torch.zeros(batch.precision.samples, 3, 48, dtype=F64)
    assert polish_jointly(batch, large, roots, head, across) is None


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_kernel_over_its_whole_input_has_noise_in_its_own_shape(dims: int) -> None:
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    size = {1: 25, 2: 5, 3: 3}[dims]
    net = nn.Sequential(conv(1, 16, size), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)).eval()
    x = torch.rand(2, 1, *[size] * dims)
    update = capture(net, x, torch.arange(2))
    half = {name: g.half() for name, g in update.gradients.items()}
    found = invert(net, replace(update, gradients=half))
    assert found.exact
    order = found.labels.argsort()
    assert float((found.inputs[order] - x).abs().max()) <= found.error_bound


def batch_below(*steps: nn.Module, widths: tuple[int, int] = (16, 32), n: int = 32) -> nn.Module:
    """Two 1×1 convolutions on one place, steps above them, a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, widths[0], 1), nn.ReLU(),
        nn.Conv2d(widths[0], widths[1], 1), nn.LeakyReLU(), *steps, nn.Flatten(), nn.Linear(n, 10),
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "n"),
    [
        ((nn.AdaptiveMaxPool2d(1),), 32),
        ((nn.AdaptiveAvgPool2d(1),), 32),
        ((nn.Flatten(), nn.Unflatten(1, (16, 2)), nn.MaxPool1d(2)), 16),
        ((nn.Flatten(), nn.Unflatten(1, (16, 2)), nn.AdaptiveMaxPool1d(1)), 16),
        ((nn.Softmax(1),), 32),
    ],
    ids=["max of one", "mean of one", "max", "adaptive max", "softmax"],
)
def test_samples_are_polished_below_steps_that_are_no_activation(
    steps: tuple[nn.Module, ...], n: int
) -> None:
    """A pool has a derivative; of a softmax between two layers none is known, so it is left out."""
    model, x = batch_below(*steps, n=n), torch.rand(2, 1, 3, 3, dtype=F64)
    recovery = invert(model, capture(model, x, torch.tensor([1, 2])))
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None and recovery.error_bound is not None
    gap = min(float((recovery.inputs - x[list(p)]).abs().max()) for p in ((0, 1), (1, 0)))
    assert gap <= recovery.error_bound < 1e-3
