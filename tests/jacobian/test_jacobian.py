"""The linearised update against automatic differentiation, with the head's cotangent fixed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import ACTIVATIONS, small_conv, small_mlp
from torch import Tensor, nn

from rgap.jacobian.linearisation import Linearisation, ParameterRows
from rgap.jacobian.weights import row_weights
from rgap.network.chain import parse
from rgap.precision import Estimate, Precision
from rgap.testing import dot_test


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 3, 3),
        nn.ELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 4),
    )


def normed() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.BatchNorm2d(4),
        nn.SELU(),
        nn.Flatten(),
        nn.Linear(144, 3),
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def sloped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.PReLU(4, init=0.3), nn.Flatten(), nn.Linear(144, 5), nn.PReLU(),
        nn.Linear(5, 3),
    )  # fmt: skip


def scaled_input() -> nn.Module:
    """A batch norm and a pool before the first layer with weights, two activations in a row."""
    model = nn.Sequential(
        nn.BatchNorm2d(2), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Softsign(),
        nn.Flatten(), nn.Linear(27, 4),
    )  # fmt: skip
    with torch.no_grad():
        model[0].running_var.fill_(0.3)
        model[0].running_mean.fill_(0.2)
    return model


def lines() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(2), nn.Conv1d(2, 3, 5, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(60, 2)
    )


def convolutional_head() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 3, 6), nn.Flatten())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "strided": strided,
    "pooled": pooled,
    "normed": normed,
    "sloped": sloped,
    "scaled input": scaled_input,
    "lines": lines,
    "convolutional head": convolutional_head,
    "mlp": lambda: small_mlp("relu", inputs=128),
    "bias-less": lambda: small_conv("tanh", bias=False, size=8),
    **{f"conv {name}": (lambda name=name: small_conv(name, channels=3)) for name in ACTIVATIONS},
}


@pytest.fixture(params=list(NETWORKS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Linearisation]:
    torch.manual_seed(0)
    model = NETWORKS[request.param]().double().eval()
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    chain = parse(model, (2, 8, 8))
    assert chain.complete, chain.barrier
    kappa = torch.randn(3, *chain.stages[-1].affine.out_shape, dtype=torch.float64)
    return model, Linearisation(chain, x, kappa)


def reference(model: nn.Module, linear: Linearisation) -> Callable[[Tensor], ParameterRows]:
    """x ↦ ∂⟨κ, f(x)⟩/∂θ by autograd, for the weights and biases of linear and conv layers.

    In the shapes of the stages: a convolution with one place is a matrix there.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    wanted = linear.gradients()

    def gradient(x: Tensor) -> ParameterRows:
        def value(p: dict[str, Tensor]) -> Tensor:
            out = torch.func.functional_call(model, p, (x,))
            return (out.flatten(1) * linear.kappa.flatten(1)).sum()

        found = torch.func.grad(value)(parameters)
        return {name: found[name].reshape(own.shape) for name, own in wanted.items()}

    return gradient


def test_gradients_are_autograds(case: tuple[nn.Module, Linearisation]) -> None:
    model, linear = case
    expected = reference(model, linear)(linear.x)
    found = linear.gradients()
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    assert len(found) == sum(1 + (m.bias is not None) for m in layers)
    for name, gradient in found.items():
        assert gradient.numel() == dict(model.named_parameters())[name].numel()
        assert torch.allclose(gradient, expected[name], rtol=1e-10, atol=1e-12), name


def same_rows(found: dict[str, Tensor], i: int, expected: dict[str, Tensor]) -> None:
    """Row i of every product is that parameter's derivative."""
    for name, row in found.items():
        assert torch.allclose(row[i], expected[name], rtol=1e-9, atol=1e-11), name


def test_jvp_is_autograds(case: tuple[nn.Module, Linearisation]) -> None:
    model, linear = case
    directions = torch.randn(4, *linear.x.shape, dtype=torch.float64)
    found = linear.jvp(directions)
    gradient = reference(model, linear)
    for i, direction in enumerate(directions):
        same_rows(found, i, torch.func.jvp(gradient, (linear.x,), (direction,))[1])


def test_power_is_the_mean_square_of_each_filters_rows(
    case: tuple[nn.Module, Linearisation],
) -> None:
    _, linear = case
    directions = torch.randn(3, *linear.x.shape, dtype=torch.float64)
    shift = torch.randn(3, *linear.kappa.shape, dtype=torch.float64)
    rows, found = linear.jvp(directions, shift), linear.power(directions, shift)
    assert found.keys() == rows.keys()
    for name, row in rows.items():
        expected = row.square().reshape(*row.shape[:2], -1).mean(2)
        assert torch.allclose(found[name], expected, rtol=1e-9, atol=1e-12), name


def test_jvp_in_the_cotangent_is_the_gradient_there(
    case: tuple[nn.Module, Linearisation],
) -> None:
    """G is linear in κ: its derivative along δ is the gradient with δ in place of κ."""
    _, linear = case
    shift = torch.randn(2, *linear.kappa.shape, dtype=torch.float64)
    still = torch.zeros(2, *linear.x.shape, dtype=torch.float64)
    found = linear.jvp(still, shift)
    for i, delta in enumerate(shift):
        same_rows(found, i, Linearisation(linear.chain, linear.x, delta).gradients())


def test_vjp_is_autograds(case: tuple[nn.Module, Linearisation]) -> None:
    model, linear = case
    rows = {
        name: torch.randn(3, *g.shape, dtype=torch.float64)
        for name, g in linear.gradients().items()
    }
    found = linear.vjp(rows)
    assert found.shape == (3, *linear.x.shape)
    _, pull = torch.func.vjp(reference(model, linear), linear.x)
    for i in range(3):
        (expected,) = pull({name: row[i] for name, row in rows.items()})
        assert torch.allclose(found[i], expected, rtol=1e-9, atol=1e-11)


def test_adjoint(case: tuple[nn.Module, Linearisation]) -> None:
    """⟨J v, y⟩ = ⟨v, Jᵀ y⟩."""
    _, linear = case
    dot_test(linear.jvp, linear.vjp, linear.x[None])


def test_directions_are_independent(case: tuple[nn.Module, Linearisation]) -> None:
    _, linear = case
    v = torch.randn(3, *linear.x.shape, dtype=torch.float64)
    together = linear.jvp(v)
    for i in range(3):
        alone = linear.jvp(v[i : i + 1])
        for name, row in alone.items():
            assert torch.allclose(row[0], together[name][i], rtol=1e-12, atol=1e-14)


def test_squares_are_the_dense_sum_of_squared_terms(
    case: tuple[nn.Module, Linearisation],
) -> None:
    """Σ (k u)² over all terms of each gradient entry, by unfolding every layer by hand."""
    model, linear = case
    found = linear.squares()
    inputs, cotangents = {}, {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):

            def note(m: nn.Module, args: tuple[Tensor], out: Tensor, name: str = name) -> None:
                inputs[name] = (m, args[0].detach())
                out.register_hook(lambda k, name=name: cotangents.__setitem__(name, k))

            handles.append(module.register_forward_hook(note))
    out = model(linear.x)
    (out.flatten(1) * linear.kappa.flatten(1)).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    checked = 0
    for name, (module, u) in inputs.items():
        k = cotangents[name]
        twin = type(module)(**_options(module)).double()
        # The gradient of a layer with u² and k² in place of u and k sums exactly these squares.
        twin(u.square()).backward(k.square())
        for what in ("weight", "bias"):
            parameter = getattr(twin, what)
            if parameter is None:
                continue
            own = found[f"{name}.{what}"].reshape(parameter.shape)
            assert torch.allclose(own, parameter.grad, rtol=1e-10), name
            checked += 1
    assert checked == len(found)


def _options(module: nn.Module) -> dict[str, object]:
    if isinstance(module, nn.Linear):
        names = ("in_features", "out_features")
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                 "groups")  # fmt: skip
    return {**{n: getattr(module, n) for n in names}, "bias": module.bias is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_injected_rounding_has_the_size_of_true_rounding(dtype: torch.dtype) -> None:
    """The spread of the injected update against what computing in ``dtype`` really does."""
    model = small_conv("sigmoid", channels=4, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(1, 2, 8, 8, generator=generator, dtype=torch.float64).to(dtype).double()
    kappa = torch.randn(1, 5, generator=generator, dtype=torch.float64).to(dtype).double()
    linear = Linearisation(parse(model, (2, 8, 8)), x, kappa)
    still = torch.zeros(24, *x.shape, dtype=torch.float64)
    spread = linear.jvp(still, inject=Precision(dtype))
    assert any(bool(row.any()) for row in spread.values())
    if dtype == torch.float64:
        assert max(float(row.abs().max()) for row in spread.values()) < 1e-12
        return
    low = small_conv("sigmoid", channels=4, seed=1)
    for p, q in zip(low.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.double(), q), "the weights are float32 numbers in both"
    out = low(x.float())
    out.backward(kappa.float())
    exact = linear.gradients()
    own = linear.squares()
    for name, parameter in low.named_parameters():
        assert parameter.grad is not None
        made = float((parameter.grad.double() - exact[name]).square().mean().sqrt())
        summed = Precision(dtype).sum_std(own[name])
        predicted = float((spread[name].square().mean(0) + summed.square()).mean().sqrt())
        assert made / predicted < 3, (name, made, predicted)
        if name != "fc.bias":  # kappa itself, a float32 number: nothing is rounded
            assert made / predicted > 0.02, (name, made, predicted)


def test_rows_are_weighed_by_the_spread_of_many_draws() -> None:
    """One unit's rounding is a factor on its row: a single draw near 0 would leave it no error."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(64)
    norm.running_var[:] = 1e-6  # type: ignore[index]
    head = nn.Linear(64, 5)
    chain = parse(nn.Sequential(nn.Linear(8, 64), norm, nn.Softplus(), head).eval().double(), (8,))
    point = Linearisation(chain, torch.rand(1, 8, dtype=torch.float64), torch.ones(1, 5).double())
    kappa = Estimate(point.kappa, torch.zeros(8, 1, 5, dtype=torch.float64))
    stds = [
        1 / row_weights(point, kappa, Precision(torch.float32, seed=seed))["0.weight"].flatten()
        for seed in range(6)
    ]
    every = torch.stack(stds)
    # eight normal draws: below a fifth of the truth with chance 2e-5 each, one draw with 16%
    assert float((every / every.square().mean(0).sqrt()).min()) > 0.2
