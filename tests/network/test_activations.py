"""Activations against torch.nn, automatic differentiation and their own inverses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.network import activations as act
from rgap.network.modules import build
from rgap.precision import Precision

EPS = torch.finfo(torch.float64).eps

INVERTIBLE: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "leaky_relu steep": lambda: nn.LeakyReLU(3.0),
    "prelu": lambda: nn.PReLU(init=0.1),
    "prelu channels": lambda: _channels(),
    "rrelu": lambda: nn.RReLU(0.1, 0.3),
    "elu": nn.ELU,
    "elu alpha": lambda: nn.ELU(0.3),
    "selu": nn.SELU,
    "celu": lambda: nn.CELU(0.7),
    "softplus": nn.Softplus,
    "softplus beta": lambda: nn.Softplus(beta=2.5, threshold=25.0),
    "softsign": nn.Softsign,
    "logsigmoid": nn.LogSigmoid,
}
CLOSED: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardtanh": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardshrink": nn.Hardshrink,
    "softshrink": nn.Softshrink,
    "tanhshrink": nn.Tanhshrink,
    "threshold": lambda: nn.Threshold(0.1, 0.2),
}


def _channels() -> nn.Module:
    module = nn.PReLU(3)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.05, 0.5, 1.5]))
    return module


def pair(name: str) -> tuple[nn.Module, act.Activation]:
    """The module in float64 and eval mode, and its activation for inputs [B, 3, 40]."""
    module = (INVERTIBLE | CLOSED | {"relu": nn.ReLU})[name]().double().eval()
    names = {id(p): n for n, p in module.named_parameters()}
    activation = build(module, "a", (3, 40), names)
    assert isinstance(activation, act.Activation)
    return module, activation


def points(scale: float = 3.0) -> Tensor:
    """[5, 3, 40] random numbers, none of them at a kink."""
    z = torch.randn(5, 3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return z * scale + 1e-3


def derivative(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
    return slope


def round_trip_error(op: act.Activation, z: Tensor) -> Tensor:
    """|inverse(forward(z)) − z| over what one rounding of x = φ(z) costs, EPS |x|/φ'(z)."""
    x = op.forward(z)
    cost = EPS * (x.abs() / op.derivative(z) + z.abs() + 1e-300)
    return (op.inverse(x) - z).abs() / cost


@pytest.mark.parametrize("name", [*INVERTIBLE, *CLOSED, "relu"])
def test_forward_and_derivatives_are_torchs(name: str) -> None:
    module, op = pair(name)
    z = points()
    torch.testing.assert_close(op.forward(z), module(z).detach(), atol=1e-15, rtol=1e-14)
    slope = derivative(module, z)
    torch.testing.assert_close(op.derivative(z), slope.detach(), atol=1e-15, rtol=1e-12)
    k = points(1.0).flip(0)
    torch.testing.assert_close(op.pull(z, k), (k * slope).detach(), atol=1e-15, rtol=1e-12)
    second = torch.zeros_like(z)
    # piecewise linear: PyTorch's slope is a constant, or has no derivative at all (hardsigmoid)
    if slope.requires_grad and name != "hardsigmoid":
        second = derivative(lambda t: derivative(module, t), z).detach()
    torch.testing.assert_close(op.second_derivative(z), second, atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_slopes_come_from_the_output(name: str) -> None:
    _, op = pair(name)
    z = points(2.0)
    x = op.forward(z)
    torch.testing.assert_close(op.slope(x), op.derivative(z), atol=1e-14, rtol=1e-9)
    # d slope/dx = φ''(z)/φ'(z)
    bend = op.second_derivative(z) / op.derivative(z)
    # celu: PyTorch's derivative rounds α to float32, so this quotient is not quite d slope/dx
    rtol = 1e-6 if name == "celu" else 1e-8
    torch.testing.assert_close(op.slope_derivative(x), bend, atol=1e-12, rtol=rtol)


@pytest.mark.parametrize(
    "module", [nn.ELU(0.3, inplace=True), nn.SELU(inplace=True), nn.CELU(0.7, inplace=True)]
)
def test_slopes_in_place_are_those_of_the_overwritten_output(module: nn.Module) -> None:
    op = build(module, "a", (3, 40), {})
    assert isinstance(op, act.Activation) and op.slope_from_output
    z = points()
    slope = derivative(lambda t: module(t * 1.0), z)
    torch.testing.assert_close(op.derivative(z), slope.detach(), atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(op.slope(op.forward(z)), op.derivative(z), atol=1e-15, rtol=1e-12)
    apart = build(type(module)(), "a", (3, 40), {})
    assert isinstance(apart, act.Activation) and not apart.slope_from_output


@pytest.mark.parametrize("name", [*INVERTIBLE, "gelu", "silu", "mish"])
def test_the_rounding_of_a_slope_is_that_of_how_it_is_computed(name: str) -> None:
    """In float32, at an input without error: how far autograd's slope is from that in float64."""
    module, op = pair(name)
    reach = 1e4 if name == "softsign" else 100.0
    z = torch.linspace(-reach, reach, 1201).expand(1, 3, -1)
    sent, at = derivative(module.float(), z).detach().double(), z.double()
    precision = Precision(torch.float32)
    units = 2.0 * op.derivative(at).abs()
    if reach == 100.0:
        units = units * (1 + at.abs())  # the product in the exponent is rounded
    terms = op.slope_terms(at)
    if terms is not None:
        units = units + 2.0 * terms
    if op.slope_from_output:
        y = op.forward(at)
        units = units + (op.slope_derivative(y) * y).abs()
    off = (sent - op.derivative(at)).abs()
    # standard errors: the largest of these numbers is up to twice as long
    assert (off <= 2.0 * precision.unit * units + precision.floor).all()


@pytest.mark.parametrize("name", INVERTIBLE)
def test_inverse_undoes_forward_as_well_as_conditioning_allows(name: str) -> None:
    _, op = pair(name)
    for scale in (1e-9, 1e-3, 1.0, 4.0):
        assert round_trip_error(op, points(scale)).max() < 16


@pytest.mark.parametrize(
    ("name", "reach"),
    [
        ("sigmoid", (-700.0, 34.0)),  # σ(z) = 1 − e^{−z} rounds to 1 from 37 on
        ("tanh", (-17.0, 17.0)),
        ("elu", (-34.0, 1e6)),
        ("selu", (-34.0, 1e6)),
        ("celu", (-24.0, 1e6)),
        ("softplus", (-700.0, 1e6)),
        ("softplus beta", (-280.0, 1e6)),
        ("softsign", (-1e6, 1e6)),
        ("logsigmoid", (-1e6, 700.0)),
        ("leaky_relu", (-1e9, 1e9)),
        ("prelu channels", (-1e9, 1e9)),
    ],
)
def test_inverse_holds_deep_into_saturation(name: str, reach: tuple[float, float]) -> None:
    _, op = pair(name)
    low, high = reach
    z = torch.cat([torch.linspace(low, high, 80), torch.linspace(max(low, -40), min(high, 40), 40)])
    z = z.double().reshape(1, 1, 120).expand(1, 3, 120)
    z = z[..., (z[0, 0] - 20).abs() > 0.1] if name == "softplus" else z
    assert round_trip_error(op, z).max() < 16


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(INVERTIBLE)), st.floats(-30, 16))
def test_inverse_at_any_number(name: str, z: float) -> None:
    _, op = pair(name)
    at = torch.full((1, 3, 1), z, dtype=torch.float64)
    # softplus: the outputs in (20, 20 + 2e-9] belong to two inputs
    assert round_trip_error(op, at).max() < 16


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "elu", "softplus", "softsign", "logsigmoid"])
def test_inverse_of_a_rounded_output_is_finite_and_monotone(name: str) -> None:
    _, op = pair(name)
    low, high = op.domain
    edge = [v for v in (low, high) if math.isfinite(v)]
    assert edge
    for value in edge:
        outside = torch.tensor([value - 1e-3, value, value + 1e-3], dtype=torch.float64)
        z = op.inverse(outside)
        assert z.isfinite().all()
        assert (z.diff() >= 0).all()


@pytest.mark.parametrize("name", [*INVERTIBLE, "relu"])
def test_no_slope_is_negative_outside_the_domain(name: str) -> None:
    """An output that noise moved out of the domain is saturated: its slope is next to nothing."""
    _, op = pair(name)
    x = torch.linspace(-3, 3, 601, dtype=torch.float64).reshape(1, 1, -1).expand(1, 3, -1)
    slope = op.slope(x)
    assert (slope >= 0).all() and slope.isfinite().all()
    low, high = op.domain
    outside = (x <= low) | (x >= high)
    assert bool(outside.any()) == any(math.isfinite(end) for end in (low, high))
    assert (slope[outside] < 1e-15).all()


@pytest.mark.parametrize("name", INVERTIBLE)
def test_domain_holds_every_output(name: str) -> None:
    _, op = pair(name)
    low, high = op.domain
    x = op.forward(points(4.0))
    assert (x > low).all() and (x < high).all()
    for end, far in ((low, -1e4), (high, 1e4)):
        if math.isfinite(end):
            limit = op.forward(torch.full((1, 3, 1), far, dtype=torch.float64))
            assert (limit - end).abs().max() < 2e-4


@pytest.mark.parametrize("name", [*INVERTIBLE, "relu"])
def test_flags_say_what_the_function_is(name: str) -> None:
    _, op = pair(name)
    z = points()
    assert op.odd == bool(torch.allclose(op.forward(-z), -op.forward(z), atol=1e-15))
    assert op.homogeneous == bool(torch.allclose(op.forward(2.5 * z), 2.5 * op.forward(z)))
    assert op.one_sided == (name == "relu")


def test_mish_bends_nowhere_above_its_overflow() -> None:
    _, op = pair("mish")
    z = torch.tensor([[709.0, 711.0, 1e4, -1e4]], dtype=torch.float64)
    assert torch.equal(op.second_derivative(z), torch.zeros_like(z))


def test_softplus_is_the_identity_above_its_threshold() -> None:
    _, op = pair("softplus")
    z = torch.tensor([[20.5, 21.0, 30.0, 800.0]], dtype=torch.float64)
    assert torch.equal(op.forward(z), z)
    assert torch.equal(op.inverse(z), z)
    assert torch.equal(op.slope(z), torch.ones_like(z))
    # the textbook inverse log(e^x − 1) would be off by e^{−20.5} = 1.2e-9 here
    assert (z[0, 0] + torch.log1p(-torch.exp(-z[0, 0])) - z[0, 0]).abs() > 1e-9


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.LeakyReLU(-0.1), r"slope -0\.1.*needs a slope > 0"),
        (nn.PReLU(init=0.0), r"slope 0 .*needs a slope > 0"),
        (nn.PReLU(3, init=-0.5), r"slope -0\.5 in channel 0"),
        (nn.RReLU(-0.2, 0.1), "needs a slope > 0"),
        (nn.ELU(-1.0), "alpha = -1"),
        (nn.Softplus(beta=-1.0), "beta = -1"),
        (nn.Softplus(threshold=2.0), "threshold = 2"),
        *((make(), "no element-wise inverse") for make in CLOSED.values()),
    ],
)
def test_what_has_no_inverse_says_why(module: nn.Module, words: str) -> None:
    module = module.double().eval()
    names = {id(p): n for n, p in module.named_parameters()}
    op = build(module, "a", (3,), names)
    assert isinstance(op, act.Activation)
    assert op.barrier is not None and op.barrier.startswith("'a' (")
    assert "matching the whole update still works" in op.barrier
    z = points()[:, :, 0]
    torch.testing.assert_close(op.forward(z), module(z).detach())
    for method in (op.inverse, op.slope, op.slope_derivative):
        with pytest.raises(ValueError, match=words):
            method(z)


class Own(act.Activation):
    """φ(z) = asinh z, without a word on its inverse."""

    kind_name = "asinh"

    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x)

    def derivative(self, z: Tensor) -> Tensor:
        return (1 + z.square()).rsqrt()

    def second_derivative(self, z: Tensor) -> Tensor:
        return -z * (1 + z.square()) ** -1.5


class Invertible(Own):
    def _inverse(self, x: Tensor) -> Tensor:
        return torch.sinh(x)


def test_an_own_activation_has_an_inverse_or_says_why_not() -> None:
    with pytest.raises(TypeError, match=r"Own: expected an inverse .*_inverse\(self.*barrier="):
        Own("a", (3,))
    z = points()[:, :, 0]
    own = Own("a", (3,), barrier="is kept closed")
    torch.testing.assert_close(own.forward(z), torch.asinh(z))
    op = Invertible("a", (3,))
    torch.testing.assert_close(op.inverse(op.forward(z)), z)
    torch.testing.assert_close(op.slope(op.forward(z)), op.derivative(z))
    for name in ("inverse", "slope", "slope_derivative"):
        with pytest.raises(ValueError, match=r"'a' \(asinh\) is kept closed; "):
            getattr(own, name)(z)


def test_leaky_relu_of_slope_zero_is_relu() -> None:
    op = build(nn.LeakyReLU(0.0), "a", (3,), {})
    assert isinstance(op, act.ReLU) and op.one_sided
    assert act.LeakyReLU("a", (3,), 0.0).barrier is not None


def test_relu_keeps_equalities_and_leaves_zeros_open() -> None:
    op = act.ReLU("a", (3,))
    x = torch.tensor([[0.0, 2.0, 0.5]], dtype=torch.float64)
    assert torch.equal(op.inverse(x), x)
    assert op.slope(x).tolist() == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize("name", ["prelu", "prelu channels"])
def test_prelu_slope_gradients_are_autograds(name: str) -> None:
    module, op = pair(name)
    z, k = points(), points(1.0).flip(0)
    (expected,) = torch.autograd.grad((module(z) * k).sum(), module.weight)
    assert isinstance(op, act.PReLU) and op.weight_name == "weight"
    torch.testing.assert_close(op.weight_gradient(z, k), expected)


def test_kinks_take_pytorchs_side() -> None:
    zero = torch.zeros(1, 3, 1, dtype=torch.float64)
    for name in ("leaky_relu", "prelu channels", "elu", "selu", "celu", "relu", "softsign"):
        module, op = pair(name)
        expected = derivative(module, zero).detach()
        torch.testing.assert_close(op.derivative(zero), expected, msg=name)


def test_inplace_modules_do_not_write_to_their_input() -> None:
    for module in (nn.ReLU6(inplace=True), nn.SiLU(inplace=True), nn.Hardtanh(inplace=True)):
        op = build(module, "a", (3,), {})
        z = points()[:, :, 0]
        before = z.clone()
        op.forward(z)
        assert torch.equal(z, before)
        assert module.inplace
        torch.testing.assert_close(op.forward(z), F.hardtanh(z) if op.kind == "hardtanh" else
                                   type(module)()(z))  # fmt: skip
