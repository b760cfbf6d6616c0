"""The head's cotangent of a batch, and the update linearised with it, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import small_conv, small_mlp
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.jacobian.batch_loss import BatchLoss, loss_scale
from rgap.jacobian.linearisation import Linearisation, ParameterRows
from rgap.network.chain import parse
from rgap.precision import Precision
from rgap.testing import dot_test
from rgap.update.losses import Loss

CE, BCE, MSE = "cross_entropy", "binary_cross_entropy_with_logits", "mse_loss"


@dataclass(frozen=True)
class Case:
    """A loss, its raw targets for C classes, and how often each picture occurs."""

    loss: Loss
    classes: int
    targets: Callable[[int, int], Tensor]
    copies: tuple[int, ...]

    def build(self) -> tuple[BatchLoss, Tensor]:
        """The batch loss, and targets as PyTorch takes them."""
        raw = self.targets(len(self.copies), self.classes)
        dense = raw if raw.is_floating_point() else F.one_hot(raw, self.classes).double()
        return BatchLoss(self.loss, dense, torch.tensor(self.copies, dtype=torch.float64)), raw


def classes_of(rows: int, classes: int) -> Tensor:
    return (2 * torch.arange(rows) + 1) % classes


def soft(rows: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64).softmax(1)


def bits(rows: int, classes: int) -> Tensor:
    return (torch.arange(rows * classes).reshape(rows, classes) % 3 == 0).double()


def values(rows: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64)


CASES = {
    "cross-entropy": Case(Loss(), 5, classes_of, (1, 1, 1)),
    "copies": Case(Loss(), 5, classes_of, (3, 1, 2)),
    "smoothing": Case(Loss(label_smoothing=0.1), 5, classes_of, (1, 2, 1)),
    "smoothing of a sum": Case(Loss(reduction="sum", label_smoothing=0.3), 4, classes_of, (2, 1)),
    "sum": Case(Loss(reduction="sum"), 5, classes_of, (2, 1, 1, 4)),
    "soft": Case(Loss(targets="probability"), 4, soft, (1, 1, 1)),
    "soft, smoothed": Case(Loss(targets="probability", label_smoothing=0.2), 4, soft, (1, 2)),
    "one logit": Case(Loss(BCE), 1, bits, (1, 2, 1)),
    "many logits": Case(Loss(BCE), 4, bits, (1, 3)),
    "binary sum": Case(Loss(BCE, reduction="sum"), 3, bits, (2, 2)),
    "squared": Case(Loss(MSE), 3, values, (1, 1, 2)),
    "squared sum": Case(Loss(MSE, reduction="sum"), 3, values, (1, 2)),
    "one picture": Case(Loss(), 3, classes_of, (1,)),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def client(case: Case, raw: Tensor) -> Callable[[Tensor], Tensor]:
    """The client's scalar loss of the outputs [R, C] with every copy a row of its own."""
    index = torch.arange(len(case.copies)).repeat_interleave(torch.tensor(case.copies))
    options = {"reduction": case.loss.reduction}
    if case.loss.name == CE:
        options["label_smoothing"] = case.loss.label_smoothing
    function = getattr(F, case.loss.name)

    def value(outputs: Tensor) -> Tensor:
        total: Tensor = function(outputs[index], raw[index], **options)
        return total

    return value


def outputs_of(case: Case, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(case.copies), case.classes)
    return 2.0 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_cotangent_is_autograds(case: Case) -> None:
    head, raw = case.build()
    z = outputs_of(case)
    expected = torch.func.grad(client(case, raw))(z)
    assert torch.allclose(head.cotangent(z), expected, rtol=1e-12, atol=1e-15)


def test_curvature_is_autograds(case: Case) -> None:
    head, raw = case.build()
    z = outputs_of(case)
    directions = torch.stack([outputs_of(case, s) for s in (1, 2, 3)])
    hessian = torch.func.hessian(client(case, raw))(z)
    expected = torch.einsum("aibj,sbj->sai", hessian, directions)
    assert torch.allclose(head.curvature(z, directions), expected, rtol=1e-11, atol=1e-15)


def test_curvature_is_symmetric(case: Case) -> None:
    head, _ = case.build()
    z = outputs_of(case)
    a, b = outputs_of(case, 1), outputs_of(case, 2)
    ha, hb = head.curvature(z, torch.stack([a, b]))
    assert float((ha * b).sum()) == pytest.approx(float((a * hb).sum()), rel=1e-12)


def test_one_picture_with_two_labels_has_their_average_as_its_target() -> None:
    z = outputs_of(CASES["cross-entropy"])[:1]
    head = BatchLoss(Loss(), torch.tensor([[0.5, 0, 0, 0.5, 0]]).double(), torch.tensor([2.0]))
    expected = torch.func.grad(lambda v: F.cross_entropy(v.expand(2, 5), torch.tensor([0, 3])))(z)
    assert torch.allclose(head.cotangent(z), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("loss", "batch", "classes", "expected"),
    [
        (Loss(), 4, 10, 1 / 4),
        (Loss(reduction="sum"), 4, 10, 1.0),
        (Loss(BCE), 4, 1, 1 / 4),
        (Loss(BCE), 4, 3, 1 / 12),
        (Loss(MSE), 2, 5, 1 / 10),
        (Loss(MSE, reduction="sum"), 2, 5, 1.0),
    ],
)
def test_scale(loss: Loss, batch: int, classes: int, expected: float) -> None:
    assert loss_scale(loss, batch, classes) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_of_kappa_is_that_of_the_clients_softmax(dtype: torch.dtype) -> None:
    """A thousand heads evaluated in ``dtype``: the predicted spread is about the true one."""
    z = 3.0 * torch.randn(1000, 6, generator=torch.Generator().manual_seed(5)).to(dtype)
    targets = F.one_hot(torch.arange(1000) % 6, 6).double()
    head = BatchLoss(Loss(), targets, torch.ones(1000, dtype=torch.float64))
    known = head.known(z.double(), Precision(dtype, samples=8))
    exact = head.cotangent(z.double())
    assert torch.equal(known.value, exact)
    if dtype == torch.float64:
        assert 1e-21 < float(known.std.mean()) < 1e-17  # in units of 1/1000
        return
    sent = torch.func.grad(lambda v: F.cross_entropy(v, torch.arange(1000) % 6))(z).double()
    ratio = float((sent - exact).square().mean().sqrt() / known.std.square().mean().sqrt())
    assert 0.1 < ratio < 2.0


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 9), nn.GELU(), nn.Linear(9, 5)),
    "relu": lambda: small_mlp("relu", widths=(12, 9)),
    "tanh": lambda: small_mlp("tanh", widths=(12,), bias=False),
    "conv": lambda: small_conv("sigmoid", channels=3, size=4),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 6),
        nn.Tanh(), nn.Linear(6, 5),
    ),
}  # fmt: skip


@pytest.fixture(params=list(NETWORKS))
def linear(request: pytest.FixtureRequest) -> tuple[nn.Module, Linearisation, Loss, Tensor]:
    torch.manual_seed(0)
    model = NETWORKS[request.param]().double().eval()
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    loss, y = Loss(label_smoothing=0.1), torch.tensor([4, 1, 1])
    head = BatchLoss(loss, F.one_hot(y, 5).double(), torch.tensor([1.0, 2.0, 1.0]))
    return model, Linearisation(parse(model, (2, 4, 4)), x, head), loss, y


def sent(model: nn.Module, loss: Loss, y: Tensor) -> Callable[[Tensor], ParameterRows]:
    """The client's gradient as a function of the data, the second picture twice, by autograd."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    index = torch.tensor([0, 1, 1, 2])

    def gradient(x: Tensor) -> ParameterRows:
        def value(p: ParameterRows) -> Tensor:
            out = torch.func.functional_call(model, p, (x[index],))
            return F.cross_entropy(out, y[index], label_smoothing=loss.label_smoothing)

        found: ParameterRows = torch.func.grad(value)(parameters)
        return found

    return gradient


Built = tuple[nn.Module, Linearisation, Loss, Tensor]


def test_gradients_with_the_loss_are_autograds(linear: Built) -> None:
    model, point, loss, y = linear
    expected = sent(model, loss, y)(point.x)
    found = point.gradients()
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-10, atol=1e-14), name


def test_jvp_with_the_loss_is_autograds(linear: Built) -> None:
    model, point, loss, y = linear
    directions = torch.randn(3, *point.x.shape, dtype=torch.float64)
    found = point.jvp(directions)
    for i, direction in enumerate(directions):
        _, expected = torch.func.jvp(sent(model, loss, y), (point.x,), (direction,))
        for name, row in found.items():
            assert torch.allclose(row[i], expected[name], rtol=1e-9, atol=1e-13), name


def test_jvp_with_the_loss_is_the_finite_difference(linear: Built) -> None:
    _, point, _, _ = linear
    v = torch.randn(1, *point.x.shape, dtype=torch.float64)
    step = 1e-6
    up, down = (point.moved(point.x + s * step * v[0]).gradients() for s in (1, -1))
    for name, row in point.jvp(v).items():
        expected = (up[name] - down[name]) / (2 * step)
        assert float((row[0] - expected).norm()) < 1e-6 * float(row.norm()) + 1e-10, name


def test_vjp_with_the_loss_is_the_transpose(linear: Built) -> None:
    model, point, loss, y = linear
    dot_test(point.jvp, point.vjp, point.x[None])
    rows = {name: torch.randn(3, *g.shape).to(g) for name, g in point.gradients().items()}
    back = point.vjp(rows)
    _, pull = torch.func.vjp(sent(model, loss, y), point.x)
    for i in range(3):
        (expected,) = pull({n: rows[n][i] for n in rows})
        assert torch.allclose(back[i], expected, rtol=1e-9, atol=1e-12)
