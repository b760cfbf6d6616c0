"""The mixture of a layer, and what every sample of it satisfies on its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from batched import batch_of, true_roots
from cases import KINDS, mlp, pictures
from torch import Tensor, nn

from rgap.jacobian.batch_loss import BatchLoss
from rgap.network.chain import Chain
from rgap.network.reshape import Rearrange
from rgap.precision import Precision
from rgap.separation.batch import Batch
from rgap.separation.errors import cotangents
from rgap.separation.mixture import mixture, relative_rounding
from rgap.separation.pair import Between, steps_between
from rgap.separation.softmax.equations import AtHead
from rgap.separation.subspace import Consistency, restricted
from rgap.update.losses import Loss

F64 = torch.float64
Y = torch.tensor([1, 3, 3, 0])


class Shuffled(nn.Module):
    """A permutation between two fully connected layers, as attention blocks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.act, self.upper = nn.Linear(48, 24), nn.GELU(), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.lower(x.flatten(1))).reshape(-1, 2, 3, 4)
        return self.upper(y.permute(0, 3, 1, 2).flatten(1))


def shuffled() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Shuffled().double().eval()


PAIRS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: mlp(name, 3, widths=(24,))) for name in KINDS},
    "shuffled": shuffled,
    "two activations": lambda: nn.Sequential(
        *mlp("tanh", 1, widths=(24,))[:3], nn.GELU(), *mlp("tanh", 1, widths=(24,))[3:]
    ),
}  # fmt: skip


def between(batch: Batch) -> Between:
    steps = steps_between(batch.chain, 0)
    assert not isinstance(steps, str), steps
    return Between.of(batch.mixture(0), batch.mixture(1), steps, batch.precision)


@pytest.fixture(params=list(PAIRS))
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Batch, Tensor, Between]:
    model = PAIRS[request.param]()
    x = pictures(4, 5)
    batch = batch_of(model, x, Y)
    return model, batch, x, between(batch)


@pytest.fixture(params=[0.0, 0.1], ids=["plain", "smoothed"])
def head(request: pytest.FixtureRequest) -> tuple[Batch, Tensor, AtHead]:
    model, x = mlp("relu", 4, widths=(), classes=9), pictures(4, 6)
    batch = batch_of(model, x, Y, Loss(label_smoothing=request.param))
    pool = torch.arange(9)
    at = AtHead.of(batch.mixture(0), request.param, pool, 9, batch.precision)
    return batch, x, at.labelled(Y)


def autograd(consistency: Consistency, q: Tensor) -> Tensor:
    """∂f/∂q row by row, [S, m, R]."""
    whole = torch.func.jacrev(consistency.value)(q)
    rows = torch.arange(len(q))
    picked: Tensor = whole[rows, :, rows]
    return picked


def test_singular_coordinates_hold_the_batch(
    pair: tuple[nn.Module, Batch, Tensor, Between],
) -> None:
    _, batch, x, _ = pair
    mixed = batch.mixture(0)
    assert mixed.rank == 4
    roots = true_roots(batch, x)
    assert torch.allclose(roots @ mixed.right.T, x.flatten(1), atol=1e-11)
    assert torch.allclose(roots @ mixed.weights, torch.ones(4, dtype=F64), atol=1e-10)
    values = torch.linalg.svdvals(mixed.gradient)
    assert mixed.ratio == pytest.approx(float(values[3] / values[0]), rel=1e-8)


def test_duals_are_one_on_their_own_sample_and_zero_on_others(
    pair: tuple[nn.Module, Batch, Tensor, Between],
) -> None:
    model, batch, x, _ = pair
    mixed = batch.mixture(0)
    z = next(m for m in model.modules() if isinstance(m, nn.Linear))
    kept: list[Tensor] = []
    handle = z.register_full_backward_hook(lambda *a: kept.append(a[2][0].detach()))
    nn.functional.cross_entropy(model(x.requires_grad_()), Y).backward()
    handle.remove()
    model.zero_grad()
    duals = mixed.dual(kept[0])
    assert torch.allclose(true_roots(batch, x.detach()) @ duals.T, torch.eye(4).double(), atol=1e-9)
    assert float(mixed.outside(kept[0]).max()) < 1e-11
    assert torch.allclose(duals.sum(0), mixed.weights, rtol=1e-8)


def test_outside_is_the_sine_of_the_angle() -> None:
    batch = batch_of(mlp("gelu", 0), pictures(3, 1), Y[:3])
    mixed = batch.mixture(0)
    k = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    gap = k - k @ mixed.left @ mixed.left.T
    assert torch.allclose(mixed.outside(k), gap.norm(dim=1) / k.norm(dim=1), rtol=1e-12)
    assert float(mixed.outside(torch.zeros(1, 32, dtype=F64))) == 0.0


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rank_is_the_number_of_different_pictures(copies: int, dtype: torch.dtype) -> None:
    x = pictures(3, 8, dtype).repeat(copies, 1, 1, 1)
    batch = batch_of(mlp("gelu", 5, dtype=dtype), x, torch.tensor([0, 2, 2]).repeat(copies))
    assert batch.mixture(0).rank == 3
    assert batch.mixture(1).rank == 3


def test_no_bias_no_weights() -> None:
    batch = batch_of(mlp("gelu", 0, bias=False), pictures(3, 1), Y[:3])
    with pytest.raises(ValueError, match="'1' has no bias"):
        _ = batch.mixture(0).weights


def test_zero_gradient() -> None:
    batch = batch_of(mlp("gelu", 0), pictures(2, 1), Y[:2])
    stage = batch.chain.stages[0]
    nothing = torch.zeros(32, 48, dtype=F64)
    mixed = mixture(stage, nothing, torch.zeros(32, dtype=F64), Precision(F64))
    assert mixed.rank == 0 and mixed.ratio == 0.0 and mixed.entry_noise == 0.0


def test_relative_noise_is_what_rounding_adds() -> None:
    """A random gradient rounded to float32 is within the promised spectral norm, and near it."""
    g = torch.randn(60, 90, generator=torch.Generator().manual_seed(1), dtype=F64)
    met = torch.linalg.matrix_norm(g.float().double() - g, 2) / torch.linalg.matrix_norm(g)
    promised = relative_rounding((60, 90), Precision(torch.float32))
    assert 0.02 * promised < float(met) < promised


def test_stated_noise_is_no_rank_however_large_it_is() -> None:
    """Three samples in noise of every size: never a fourth, and none where noise is all there is.

    The cutoff stands on the norm of the noise itself: over that of the matrix as Frobenius takes
    it, a gradient of many equal singular values would hide the noise.
    """
    stage = batch_of(mlp("gelu", 0), pictures(2, 1), Y[:2]).chain.stages[0]
    rng = torch.Generator().manual_seed(2)
    parts = torch.linalg.qr(torch.randn(600, 3, generator=rng, dtype=F64)).Q
    clean = parts @ torch.linalg.qr(torch.randn(64, 3, generator=rng, dtype=F64)).Q.T
    for sigma in (1e-12, 1e-6, 1e-3, 1e-2, 0.1, 1.0):
        sent = clean + sigma * torch.randn(600, 64, generator=rng, dtype=F64)
        found = mixture(stage, sent, None, Precision(F64, noise=sigma))
        norm, size = sigma * (600**0.5 + 64**0.5), float(torch.linalg.matrix_norm(sent, 2))
        assert found.rank == (3 if norm < 0.2 else 0 if norm > 0.5 else found.rank)
        assert found.noise == pytest.approx(norm / size, rel=0.1)


def test_dimensions(pair: tuple[nn.Module, Batch, Tensor, Between]) -> None:
    _, _, _, consistency = pair
    assert consistency.equations == 24 - 4
    samples = consistency.samples
    whole = restricted(consistency)
    assert whole.directions.shape == (4, 3)
    assert float((samples.weights @ whole.directions).abs().max()) < 1e-9 * float(
        samples.weights.norm()
    )
    basis = consistency.basis
    assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=F64), atol=1e-12)


def test_the_truth_is_a_root(pair: tuple[nn.Module, Batch, Tensor, Between]) -> None:
    _, batch, x, consistency = pair
    roots = true_roots(batch, x)
    f = consistency.value(roots)
    assert float(consistency.project(f).norm()) < 1e-10 * float(f.norm())
    whole = restricted(consistency)
    assert bool((whole.cost(whole.coordinates(roots)) < 1e-20).all())
    mixed = roots.mean(0, keepdim=True)  # a mixture satisfies w·q = 1, and is none
    assert float(whole.cost(whole.coordinates(mixed))) > 1e-8


def test_value_is_the_next_layers_input(pair: tuple[nn.Module, Batch, Tensor, Between]) -> None:
    model, batch, x, consistency = pair
    seen: list[Tensor] = []
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    assert torch.allclose(consistency.value(true_roots(batch, x)), seen[0], atol=1e-11)


def test_derivative_is_autograds(pair: tuple[nn.Module, Batch, Tensor, Between]) -> None:
    _, batch, x, consistency = pair
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    q = true_roots(batch, x) + 0.1 * noise
    value, slope = consistency.derivative(q)
    assert torch.allclose(value, consistency.value(q), atol=1e-13)
    assert torch.allclose(slope, autograd(consistency, q), rtol=1e-9, atol=1e-11)


def test_push_is_the_derivative_along_any_direction(
    pair: tuple[nn.Module, Batch, Tensor, Between],
) -> None:
    _, batch, x, consistency = pair
    flat = x.flatten(1)
    dq = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
    inside = dq @ batch.mixture(0).right.T
    slope = consistency.derivative(true_roots(batch, x))[1]
    expected = (slope @ dq[:, :, None])[:, :, 0]
    assert torch.allclose(consistency.pusher(flat)(inside), expected, rtol=1e-8, atol=1e-10)


def test_head_derivative_is_autograds(head: tuple[Batch, Tensor, AtHead]) -> None:
    batch, x, consistency = head
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    q = true_roots(batch, x) + 0.1 * noise
    value, slope = consistency.derivative(q)
    assert torch.allclose(value, consistency.value(q), atol=1e-14)
    assert torch.allclose(slope, autograd(consistency, q), rtol=1e-9, atol=1e-12)
    dq = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    right = batch.mixture(0).right
    pushed = consistency.pusher(q @ right.T)(dq @ right.T)
    assert torch.allclose(pushed, (slope @ dq[:, :, None])[:, :, 0], atol=1e-12)


def test_the_truth_is_a_root_of_its_own_class_at_the_head(
    head: tuple[Batch, Tensor, AtHead],
) -> None:
    batch, x, consistency = head
    roots = true_roots(batch, x)
    f = consistency.value(roots)
    k = cotangents(batch.chain, 0, x.flatten(1), _head_loss(batch))
    assert torch.allclose(f / len(x), k, atol=1e-12)
    assert float(consistency.project(f).norm()) < 1e-10 * float(f.norm())
    assert consistency.equations == 9 - 4 - 1
    wrong = consistency.labelled((Y + 1) % 9)
    gap = wrong.project(wrong.value(roots)).norm(dim=1) / wrong.value(roots).norm(dim=1)
    assert int((gap > 0.05).sum()) >= 3  # class 1 of the last picture occurs in the batch


def test_steps_that_mix_entries_are_named() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 32), nn.Unflatten(1, (2, 4, 4)), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(8, 5),
    ).double().eval()  # fmt: skip
    batch = batch_of(model, pictures(2, 0), Y[:2])
    said = steps_between(batch.chain, 0)
    assert isinstance(said, str) and "mixes entries" in said
    assert any(isinstance(op, Rearrange) for op in steps_between(_chain(shuffled()), 0))


def _chain(model: nn.Module) -> Chain:
    return batch_of(model, pictures(2, 0), Y[:2]).chain


def _head_loss(batch: Batch) -> BatchLoss:
    targets = nn.functional.one_hot(Y, 9).double()
    return BatchLoss(batch.loss, targets, torch.ones(4, dtype=F64))
