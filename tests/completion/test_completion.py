"""Where no stage determines the data: a prior fills what is open, or all equations decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from allocations import smallest_routes
from cases import picture, small_conv
from operators import known_part
from torch import Tensor, nn

import rgap
from rgap import Status, capture, invert
from rgap.completion.complete import grey, inside
from rgap.constraints import gradient_constraint
from rgap.constraints.known_input import Bounded, KnownPart, PlainRows, Whole
from rgap.constraints.ranks import stage_joint_rank, weight_row_spaces
from rgap.jacobian.module_update import ClientLoss, KnownFeatures, ModuleUpdate
from rgap.jacobian.smoothing import soften
from rgap.network.chain import parse
from rgap.precision import UNKNOWN, Estimate, Precision
from rgap.recursion.reached import Reached
from rgap.testing import dense, dense_test, dot_test
from rgap.update.losses import Loss

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
    part = known_part(affine, u, k)
    active = torch.ones_like(z, dtype=torch.bool)
    rank = stage_joint_rank(
        affine, gradient_constraint(affine, k), weight_row_spaces(affine, active)
    )
    assert rank.nullity > 0 and part.equations == rank.rank
    assert float(part.misfit(u).norm()) < 1e-9
    rows = dense(part.push, u)  # [equations, unknowns]
    kept = part.weights > 0
    plain = rows[kept] / part.weights[kept, None]
    assert torch.allclose(plain @ plain.T, torch.eye(len(plain), dtype=F64), atol=1e-7)
    dot_test(part.push, part.pull, u, slack=1e3)  # rows are orthonormalised


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
    update = ModuleUpdate(model, sent, ClientLoss(Loss(), targets), tuple(x.shape))
    assert float(update.at(x).residual.norm()) < 1e-9
    point = update.at(x + 0.1)
    jacobian = point.jacobian()
    assert jacobian is not None
    v = torch.randn_like(x)
    ahead, behind = update.at(x + 0.1 + 1e-5 * v), update.at(x + 0.1 - 1e-5 * v)
    slope = (ahead.residual - behind.residual) / 2e-5
    assert torch.allclose(jacobian @ v.flatten(), slope, atol=1e-6 * float(slope.abs().max()))
    dense_test(point.push, jacobian, x, adjoint=point.pull, slack=1e2)  # a pass each, two routes


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
    source = KnownFeatures("2", tuple(u.shape), Whole(u.detach()), u.grad)
    update = ModuleUpdate(model, sent, source, tuple(x.shape))
    assert set(update.gradients) == {"0.weight", "0.bias"}
    assert update.equations == u.numel() + sum(g.numel() for g in update.gradients.values())
    assert float(update.at(x).residual.norm()) < 1e-9
    assert float(update.at(x + 0.1).residual.norm()) > 1e-2


def gelu_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1), nn.GELU(), nn.Conv2d(4, 4, 3, 1, 1), nn.Tanh(), nn.Flatten(),
        nn.Linear(144, 5),
    ).eval()  # fmt: skip


def test_gelu_has_no_inverse_and_all_equations_together_decide() -> None:
    model, x = gelu_network(), picture((2, 6, 6), 1)
    update = capture(model, x, LABEL, dtype=F64)
    assert invert(model, update).status is Status.UNSUPPORTED
    recovery = invert(model, update, complete=True)
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None and recovery.error_bound is not None
    assert float((recovery.inputs - x).abs().max()) <= recovery.error_bound
    assert recovery.labels is not None and recovery.labels.tolist() == [3]


def pair(activation: str) -> tuple[nn.Module, Tensor, rgap.Update]:
    """Two pictures in one gradient: 86 equations or fewer for 144 unknowns."""
    model = small_conv(activation, channels=2, stride=2, size=6).double()
    x, labels = smooth_picture(size=6, batch=2), torch.tensor([0, 1])
    return model, x, capture(model, x, labels, dtype=F64)


@pytest.mark.parametrize("activation", ["sigmoid", "leaky_relu"])
def test_a_completion_keeps_what_is_determined_and_says_what_it_chose(activation: str) -> None:
    model, x, update = pair(activation)
    plain = invert(model, update)
    assert plain.status is Status.UNDERDETERMINED and plain.inputs is None
    recovery = invert(model, update, complete=True)
    assert recovery.status is Status.COMPLETED, recovery.reason
    assert recovery.inputs is not None and recovery.inputs.shape == x.shape
    assert recovery.labels is not None and recovery.labels.tolist() == [0, 1]
    assert recovery.predicted_error is None and recovery.error_bound is None
    assert "chosen by the prior" in recovery.reason and recovery.candidates == ()
    assert any("a prior chose" in text for text in recovery.warnings)
    assert recovery.residual is not None and recovery.residual < 1e-5
    near = float((recovery.inputs - x).square().mean())
    assert near < 0.8 * float((x - 0.5).square().mean()), "better than grey"


def pooled() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, 1, 1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    ).eval()


def test_max_pooling_below_known_features_is_completed() -> None:
    """The places of the winners come out too: the picture is the client's to six digits."""
    model, x = pooled(), smooth_picture()
    update = capture(model, x, LABEL, dtype=F64)
    assert invert(model, update).status is Status.UNSUPPORTED
    recovery = invert(model, update, complete=True)
    assert recovery.status is Status.COMPLETED, recovery.reason
    assert recovery.inputs is not None and recovery.residual is not None
    assert recovery.residual < 1e-6
    assert float((recovery.inputs - x).abs().max()) < 1e-6


def test_out_of_time_is_no_completion() -> None:
    model, x, update = pair("sigmoid")
    recovery = invert(model, update, complete=True, time_limit=1e-6)
    assert recovery.status is Status.UNDERDETERMINED and recovery.inputs is None
    assert "the time is up" in recovery.reason and "did not find" in recovery.reason
    (nearest,) = recovery.candidates
    assert nearest.inputs.shape == x.shape and nearest.residual > 1e-3
    with pytest.raises(ValueError, match=r"write time_limit=60\.0"):
        invert(model, update, complete=True, time_limit=-1.0)


class Log(nn.Module):
    """Undefined below 0, where the completion starts: x − 0.7 of a grey picture."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x - 0.7)


def test_not_a_number_ends_in_a_stated_status() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Log(), nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5))
    x = 0.75 + 0.25 * X
    update = capture(model.eval(), x, LABEL, dtype=F64)
    recovery = invert(model, update, complete=True)
    assert recovery.status is Status.UNSUPPORTED and recovery.inputs is None
    assert "not finite at the start" in recovery.reason


def test_without_room_for_a_matrix_the_rows_are_used_as_they_are() -> None:
    chain, u, z, k = stage_of(2)
    affine, precision = chain.stages[0].affine, Precision(F64)
    known = [Estimate(t, precision.rounding(t)) for t in (z, k)]
    rows = PlainRows.of(affine, affine.weight_gradient(u, k), *known, precision)
    assert float(rows.misfit(u).norm()) < 1e-12 and float(rows.misfit(u + 0.1).norm()) > 1e-3
    assert torch.autograd.gradcheck(rows.misfit, (u + 0.1).requires_grad_())
    model, _, update = pair("sigmoid")
    with smallest_routes():
        recovery = invert(model, update, complete=True)
    assert recovery.status is Status.COMPLETED, recovery.reason
    assert recovery.inputs is not None and recovery.residual is not None
    assert recovery.residual < 1e-4


def test_a_unit_that_is_off_is_an_inequality() -> None:
    """Only the units that are off and positive miss it, by their distance from the half-space."""
    chain, u, z, k = stage_of(1)
    affine, precision = chain.stages[0].affine, Precision(F64)
    known = [Estimate(t, precision.rounding(t)) for t in (z, k)]
    rows = PlainRows.of(affine, affine.weight_gradient(u, k), *known, precision)
    off = z < z.median()
    bounded = Bounded.of(rows, affine, off)
    assert bounded.equations == rows.equations and bounded.expected == rows.expected
    over = bounded.misfit(u)[len(rows.misfit(u)) :].reshape(z.shape)
    eye = torch.eye(u.numel(), dtype=F64).reshape(-1, *u.shape[1:])
    norms = affine.linear(eye).square().sum(0).sqrt()
    assert torch.allclose(over, torch.where(off & (z > 0), z, 0.0) / norms)
    assert bool((over[off & (z <= 0)] == 0).all()) and torch.autograd.gradcheck(
        bounded.misfit, (u + 0.1).requires_grad_()
    )


def test_units_of_a_relu_that_are_off_stand_beside_the_equations() -> None:
    """Without them the answer may turn on a unit that the client's picture left off."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, 1), nn.Tanh(), nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(27, 5),
    ).double().eval()  # fmt: skip
    x = smooth_picture(size=6)
    recovery = invert(model, capture(model, x, LABEL, dtype=F64), complete=True)
    assert recovery.status is Status.COMPLETED, recovery.reason
    assert recovery.inputs is not None
    off = model[:3](x) < 0
    assert bool(off.any())
    found = model[:3](recovery.inputs).detach()
    assert float(found[off].max()) < 1e-3 * float(found.abs().max())


@pytest.mark.parametrize("pooled", [False, True])
def test_an_entry_that_did_not_win_a_pool_may_have_either_sign(pooled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else []), nn.Conv2d(3, 4, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(4 if pooled else 64, 5),
    ).double().eval()  # fmt: skip
    chain, precision = parse(model, (2, 8, 8)), Precision(F64)
    sent = {n: g.double() for n, g in capture(model, X.double(), LABEL).gradients.items()}
    z = model[0](X.double()).detach()
    error = precision.rounding(z)
    error[:, z < 0] = UNKNOWN
    k = torch.randn(z.shape, dtype=F64) * (z > 0)
    reached = Reached(0, Estimate(k, precision.rounding(k)), None, Estimate(z, error))
    known = inside(chain, reached, sent, precision).known
    assert isinstance(known, KnownPart if pooled else Bounded)


def test_the_prior_keeps_its_weight_where_noise_explains_the_misfit() -> None:
    """Going on to match the noise costs what the prior had gained."""
    model, x, update = pair("sigmoid")
    noise = 0.01 * float(torch.cat([g.flatten() for g in update.gradients.values()]).std())
    generator = torch.Generator().manual_seed(0)
    sent = {
        n: g + noise * torch.randn(g.shape, generator=generator, dtype=F64)
        for n, g in update.gradients.items()
    }
    noisy = replace(update, gradients=sent, labels=torch.tensor([0, 1]))
    told = rgap.match(model, noisy, noise=noise, iterations=14)
    untold = rgap.match(model, noisy, iterations=14)
    source = ClientLoss(Loss(), torch.tensor([0, 1]))
    precision = Precision(F64, noise)
    equations = ModuleUpdate(model, sent, source, tuple(x.shape), precision=precision)
    target = equations.expected(precision)
    truth = equations.misfit(x)
    assert 0.5 * truth < target < 2.0 * truth, "what the noise explains is what the truth misses"
    assert untold.misfit < told.misfit
    assert told.status is Status.COMPLETED and told.inputs is not None
    assert equations.misfit(told.inputs.to(x)) <= target
    near, far = (float((r.nearest - x).square().mean()) for r in (told, untold))
    assert near < 0.5 * far
    with pytest.raises(ValueError, match=r"write noise=0\.0"):
        rgap.match(model, noisy, noise=-1.0)


def test_an_answer_that_misses_a_large_gradient_is_not_explained_by_noise_in_a_small_one() -> None:
    model, x, update = pair("sigmoid")
    sizes = {n: float(g.norm()) for n, g in update.gradients.items()}
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    # Noise as large as the smallest gradient: alone it is all of the sum of normalised residuals.
    noise = sizes[small] / update.gradients[small].numel() ** 0.5
    precision, source = Precision(F64, noise), ClientLoss(Loss(), torch.tensor([0, 1]))
    equations = ModuleUpdate(model, update.gradients, source, tuple(x.shape), precision=precision)
    each, whole = equations.allowed(precision, 50.0 * torch.randn_like(x))
    off = 0.5 * sizes[large]
    assert (off / sizes[large]) ** 2 < 1.0 <= each / 4.0  # what the plain sum would have let pass
    assert (off * equations.scales[large]) ** 2 > each
    assert off**2 / sum(size**2 for size in sizes.values()) > whole


def test_roots_that_differ_by_a_scale_are_all_certified() -> None:
    """No bias, LeakyReLU, one logit: a second, scaled picture sends the same update."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(4, 2, 3, 1, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(72, 1, bias=False),
    ).double().eval()  # fmt: skip
    x = 0.5 * picture((2, 6, 6), 4).double()
    with torch.no_grad():
        model[5].weight *= 2.0 / model(x)  # logit 2 for label 1: σ(t) − 1 times t has two roots
    sent = capture(model, x, torch.tensor([1.0]), "binary_cross_entropy_with_logits")
    both = invert(model, sent, complete=True)
    assert both.status is Status.UNDERDETERMINED and "2 roots at the head" in both.reason
    recovery = invert(model, sent, complete=True, labels=torch.tensor([1.0]))
    assert recovery.status is Status.AMBIGUOUS, recovery.reason
    errors = [float((c.inputs - x).abs().max()) for c in recovery.candidates]
    assert len(errors) == 2 and min(errors) < 1e-6 < max(errors)


def test_a_completion_is_the_same_every_time() -> None:
    model, _, update = pair("sigmoid")
    first = invert(model, update, complete=True, seed=3)
    again = invert(model, update, complete=True, seed=3)
    assert first.inputs is not None and again.inputs is not None
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(grey(1, (2, 8, 8), None, 3), grey(1, (2, 8, 8), None, 3))


POOLS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.MaxPool2d(2), (3, 8, 8)),
    "overlap": (nn.MaxPool2d((3, 2), (2, 1), (1, 0)), (3, 9, 7)),
    "dilated": (nn.MaxPool2d(2, 2, 1, dilation=2), (2, 8, 8)),
    "sequence": (nn.MaxPool1d(3, 2, 1), (4, 11)),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_sharp_pool_is_the_pool(name: str) -> None:
    pool, shape = POOLS[name]
    x = picture(shape, 0, batch=2).double() - 0.5
    model = nn.Sequential(pool)
    expected, sharpness = model(x), soften(model)
    sharpness.value = 1e7
    assert torch.allclose(model(x), expected, atol=1e-5)
    sharpness.value = 2.0
    blunt = model(x)
    assert bool((blunt < expected + 1e-12).all()) and not torch.allclose(blunt, expected)


def test_noise_that_explains_a_blank_batch_explains_no_answer() -> None:
    model, _, update = pair("sigmoid")
    stated = replace(update, labels=torch.tensor([0, 1]))
    size = float(torch.cat([g.flatten() for g in update.gradients.values()]).std())
    found = rgap.match(model, stated, noise=10.0 * size, iterations=3)
    assert found.status is Status.UNDERDETERMINED and found.inputs is None
    assert "would explain a blank batch too" in found.reason


def test_a_completion_that_ends_at_such_noise_says_so() -> None:
    draw = torch.Generator().manual_seed(0)
    layers = nn.AvgPool2d(2), nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(3, 3)
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    x = torch.rand(1, 1, 6, 6, generator=draw, dtype=torch.float64)
    update = rgap.capture(model, x, torch.tensor([1]), dtype=torch.float64)
    noise = {n: torch.randn(g.shape, generator=draw).to(g) for n, g in update.gradients.items()}
    gradients = {n: g + 0.01 * noise[n] for n, g in update.gradients.items()}
    sent = replace(update, gradients=gradients, labels=torch.tensor([1]))
    found = rgap.invert(model, sent, noise=0.01, complete=True, time_limit=5.0)
    assert found.inputs is None
    assert "the residual is what the noise explains" in found.reason
    assert "would explain a blank batch too: no batch is told from others" in found.reason
