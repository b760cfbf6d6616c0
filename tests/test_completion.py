"""Where no stage determines the data: a prior fills what is open, or all equations decide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import picture, small_conv
from torch import Tensor, nn

import rgap
from rgap import Status, capture, invert
from rgap.completion import Whole, grey
from rgap.losses import Loss
from rgap.module_update import Inside, ModuleUpdate, Outside
from rgap.network import parse
from rgap.precision import Known, Precision
from rgap.systems import gradient_constraint
from rgap.systems.known_part import KnownPart
from rgap.systems.ranks import stage_joint_rank, weight_row_spaces

F64 = torch.float64
X = picture((2, 8, 8), 1)
LABEL = torch.tensor([3])


def smooth_picture(channels: int = 2, size: int = 8, batch: int = 1) -> Tensor:
    """Pictures with edges and flat parts, [batch, channels, size, size]."""
    photos = rgap.photos.load(batch, size, dtype=F64)
    return photos[:, :channels]


def stage_of(batch: int, seed: int = 0) -> tuple[rgap.network.Chain, Tensor, Tensor, Tensor]:
    """A deficient convolution with its true input, pre-activation and a random cotangent."""
    chain = parse(small_conv("sigmoid", channels=3, stride=2, seed=seed).double(), (2, 8, 8))
    affine = chain.stages[0].affine
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(batch, *affine.in_shape, generator=generator, dtype=F64)
    k = torch.randn(batch, *affine.out_shape, generator=generator, dtype=F64)
    return chain, u, affine.forward(u), k


@pytest.mark.parametrize("batch", [1, 2])
def test_the_known_part_is_the_row_space_of_both_blocks(batch: int) -> None:
    chain, u, z, k = stage_of(batch)
    affine = chain.stages[0].affine
    precision = Precision(F64)
    part = KnownPart.of(
        affine,
        affine.weight_gradient(u, k),
        Known(z, precision.rounding(z)),
        Known(k, precision.rounding(k)),
        precision,
    )
    active = torch.ones_like(z, dtype=torch.bool)
    rank = stage_joint_rank(
        affine, gradient_constraint(affine, k), weight_row_spaces(affine, active)
    )
    assert rank.nullity > 0 and part.equations == rank.rank
    assert float(part.misfit(u).norm()) < 1e-9
    eye = torch.eye(u.numel(), dtype=F64).reshape(-1, *u.shape)
    rows = torch.stack([part.push(e) for e in eye], 1)  # [equations, unknowns]
    kept = part.weights > 0
    plain = rows[kept] / part.weights[kept, None]
    assert torch.allclose(plain @ plain.T, torch.eye(len(plain), dtype=F64), atol=1e-7)
    y = torch.randn(len(rows), dtype=F64)
    assert torch.allclose(part.pull(y).flatten(), rows.T @ y, atol=1e-10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "max-pool": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(2, (4, 2)), nn.Flatten(3), nn.Flatten(1, 2),
        nn.TransformerEncoderLayer(16, 2, 8, 0.0, batch_first=True),
        nn.Flatten(), nn.Linear(128, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_products_of_any_module_are_those_of_its_jacobian(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().double().eval()
    x = picture((2, 8, 8), 2, batch=2).double()
    targets = torch.tensor([1, 4])
    sent = capture(model, x, targets).gradients
    update = ModuleUpdate(model, sent, Outside(Loss(), targets), tuple(x.shape))
    assert float(update.at(x).residual.norm()) < 1e-9
    point = update.at(x + 0.1)
    jacobian = torch.autograd.functional.jacobian(update.rows, x + 0.1).flatten(1)
    v, r = torch.randn_like(x), torch.randn(len(jacobian), dtype=F64)
    assert torch.allclose(point.push(v), jacobian @ v.flatten(), rtol=1e-8, atol=1e-10)
    assert torch.allclose(point.pull(r).flatten(), jacobian.T @ r, rtol=1e-8, atol=1e-10)


def test_what_is_known_inside_replaces_the_layers_above() -> None:
    """⟨cotangent, u⟩ has the gradients below that the loss has."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GELU(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)
    ).double()
    x = X.double()
    sent = {n: g.double() for n, g in capture(model.eval(), x, LABEL).gradients.items()}
    u = model[1](model[0](x)).detach().requires_grad_()
    torch.nn.functional.cross_entropy(model[2:](u), LABEL).backward()
    assert u.grad is not None
    source = Inside("2", tuple(u.shape), Whole(u.detach()), u.grad)
    update = ModuleUpdate(model, sent, source, tuple(x.shape))
    assert set(update.gradients) == {"0.weight", "0.bias"}
    assert update.equations == u.numel() + sum(g.numel() for g in update.gradients.values())
    assert float(update.at(x).residual.norm()) < 1e-9
    assert float(update.at(x + 0.1).residual.norm()) > 1e-2


def test_gelu_has_no_inverse_and_all_equations_together_decide() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, 1, 1), nn.GELU(), nn.Conv2d(6, 6, 3, 1, 1), nn.Tanh(), nn.Flatten(),
        nn.Linear(384, 5),
    ).eval()  # fmt: skip
    update = capture(model, X, LABEL, dtype=F64)
    assert invert(model, update).status is Status.UNSUPPORTED
    recovery = invert(model, update, complete=True)
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None and recovery.error_bound is not None
    assert float((recovery.inputs - X).abs().max()) <= recovery.error_bound
    assert recovery.labels is not None and recovery.labels.tolist() == [3]


@pytest.mark.parametrize("activation", ["sigmoid", "leaky_relu"])
def test_a_completion_keeps_what_is_determined_and_says_what_it_chose(activation: str) -> None:
    model = small_conv(activation, channels=2, stride=2, seed=0).double()
    x, labels = smooth_picture(batch=2), torch.tensor([0, 1])
    update = capture(model, x, labels, dtype=F64)
    plain = invert(model, update)
    assert plain.status is Status.UNDERDETERMINED and plain.inputs is None
    recovery = invert(model, update, complete=True, time_limit=20.0)
    assert recovery.status is Status.COMPLETED, recovery.reason
    assert recovery.inputs is not None and recovery.inputs.shape == x.shape
    assert recovery.labels is not None and recovery.labels.tolist() == [0, 1]
    assert recovery.predicted_error is None and recovery.error_bound is None
    assert "chosen by the prior" in recovery.reason
    assert any("a prior chose" in text for text in recovery.warnings)
    # Cotangents that jump with the signs of LeakyReLU leave local minima, and the reason says so.
    smooth = activation == "sigmoid"
    assert recovery.residual is not None and recovery.residual < (1e-2 if smooth else 0.2)
    assert ("does NOT reproduce" in recovery.reason) is not smooth
    near = float((recovery.inputs - x).square().mean())
    assert near < 0.8 * float((x - 0.5).square().mean()), "better than grey"


def test_max_pooling_below_known_features_is_completed() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, 1, 1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    x = smooth_picture()
    update = capture(model, x, LABEL, dtype=F64)
    assert invert(model, update).status is Status.UNSUPPORTED
    recovery = invert(model, update, complete=True, time_limit=20.0)
    assert recovery.status in (Status.COMPLETED, Status.EXACT), recovery.reason
    assert recovery.inputs is not None
    assert float((recovery.inputs - x).square().mean()) < 0.5 * float((x - 0.5).square().mean())


def test_a_completion_is_the_same_every_time() -> None:
    model = small_conv("sigmoid", channels=2, stride=2, seed=0)
    update = capture(model, X, LABEL)
    first = invert(model, update, complete=True, seed=3)
    again = invert(model, update, complete=True, seed=3)
    assert first.inputs is not None and again.inputs is not None
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(grey(1, (2, 8, 8), None, 3), grey(1, (2, 8, 8), None, 3))
