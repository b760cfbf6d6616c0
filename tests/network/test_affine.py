"""Affine maps against their torch.nn modules and automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Geometry as Case
from reference import layers
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.network.affine import Affine, Geometry, convolution, linear
from rgap.network.chain import parse
from rgap.network.geometry import sides_of
from rgap.network.modules import build
from rgap.testing import dot_test

TOL = 1e-12  # float64, sums of at most a few hundred products of size one
EASY = settings(max_examples=40, deadline=None)


def affine_of(module: nn.Module, shape: tuple[int, ...]) -> Affine:
    piece = build(module, "m", shape, {id(p): name for name, p in module.named_parameters()})
    assert isinstance(piece, Affine)
    return piece


def tensors(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module, x: Tensor, k: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Autograd's x and parameter gradients of ⟨module(x), k⟩."""
    x = x.clone().requires_grad_()
    found = torch.autograd.grad((module(x) * k).sum(), [x, *module.parameters()])
    return found[0], list(found[1:])


def compare(module: nn.Module, affine: Affine, x: Tensor, seed: int) -> None:
    """Forward, adjoint and both parameter gradients of ``affine`` are those of ``module``."""
    z = module(x).detach()
    torch.testing.assert_close(affine.forward(x), z, atol=TOL, rtol=TOL)
    assert z.shape[1:] == affine.out_shape
    k = tensors(tuple(z.shape), seed + 1)
    pulled, own = gradients(module, x, k)
    torch.testing.assert_close(affine.adjoint(k), pulled, atol=TOL, rtol=TOL)
    torch.testing.assert_close(affine.weight_gradient(x, k), own[0], atol=TOL, rtol=TOL)
    if affine.bias is not None:
        torch.testing.assert_close(affine.bias_gradient(k), own[1], atol=TOL, rtol=TOL)
    dot_test(affine.linear, affine.adjoint, x, name=str(module), seed=seed)


@EASY
@given(layers())
def test_layers_equal_their_modules(case: Case) -> None:
    x = tensors((case.batch, *case.shape), case.seed % 1000)
    affine = affine_of(case.module, case.shape)
    compare(case.module, affine, x, case.seed % 1000)
    assert affine.weight_name == "weight"
    assert affine.bias_name == (None if case.module.bias is None else "bias")


@st.composite
def bordered(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...], str]:
    """A convolution behind a border of zeros, as a module or as a functional call."""
    dims = draw(st.integers(1, 3))
    sides = tuple(draw(st.integers(0, 2)) for _ in range(2 * dims))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    space = tuple(draw(st.integers(3, 5)) for _ in range(dims))
    padding = tuple(draw(st.integers(0, 1)) for _ in range(dims))
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    pad = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)[dims - 1]
    conv = make(2, 2, kernel, stride, padding).double()
    how = draw(st.sampled_from(["module", "call", "both"]))
    border = pad(sides)
    if how == "module":
        return nn.Sequential(border, conv), (2, *space), how
    return Bordered(border if how == "both" else nn.Identity(), sides, conv), (2, *space), how


class Bordered(nn.Module):
    def __init__(self, border: nn.Module, sides: tuple[int, ...], conv: nn.Module) -> None:
        super().__init__()
        self.border, self.sides, self.conv = border, sides, conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(self.border(x), self.sides))


@EASY
@given(bordered(), st.integers(0, 99))
def test_a_border_of_zeros_is_padding_of_the_convolution(
    case: tuple[nn.Module, tuple[int, ...], str], seed: int
) -> None:
    model, shape, _ = case
    stage = parse(model, shape).stages[0]
    assert stage.lead == ()
    assert stage.in_shape == shape
    compare(model, stage.affine, tensors((2, *shape), seed), seed)


@pytest.mark.parametrize("value", [0.5, -1.0])
def test_a_border_of_another_value_stays_a_step(value: float) -> None:
    model = nn.Sequential(nn.ConstantPad2d((1, 0, 2, 1), value), nn.Conv2d(1, 2, 3)).double()
    stage = parse(model, (1, 4, 4)).stages[0]
    assert [op.kind for op in stage.lead] == ["pad"]
    x = tensors((2, 1, 4, 4), 0)
    torch.testing.assert_close(stage.forward(x)[0], model(x).detach())


AGAIN = {
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


class Again(nn.Module):
    """A border that shows the picture again, by a functional call."""

    def __init__(self, sides: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.sides, self.mode = sides, mode

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.sides, mode=self.mode)


@pytest.mark.parametrize("mode", AGAIN)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("call", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_border_that_shows_the_picture_again(
    mode: str, dims: int, call: bool, padding: int
) -> None:
    sides = (2, 1, 0, 2, 1, 1)[: 2 * dims]
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = make(2, 3, 2, 2, padding).double()
    model = nn.Sequential(Again(sides, mode) if call else AGAIN[mode][dims - 1](sides), conv)
    shape = (2, 4, 3, 5)[: dims + 1]
    stage = parse(model, shape).stages[0]
    x = tensors((2, *shape), 0).requires_grad_()
    z, u = stage.forward(x)[0], x
    torch.testing.assert_close(z, model(x))
    if not padding:  # known: the convolution's own
        assert stage.lead == () and stage.in_shape == shape
        compare(model, stage.affine, x.detach(), 0)
        return
    assert [op.kind for op in stage.lead] == ["pad"]  # zeros around it, that it does not show
    (step,) = stage.lead
    k = tensors((2, *step.out_shape), 1)
    (own,) = torch.autograd.grad((model[0](u) * k).sum(), u)
    torch.testing.assert_close(step.adjoint(k), own)
    torch.testing.assert_close(step.inverse(step.forward(x)), x)


@pytest.mark.parametrize("mode", AGAIN)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_network_with_such_borders_is_inverted(mode: str, batch: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        AGAIN[mode][1](1), nn.Conv2d(2, 16, 3), nn.Tanh(), Again((1, 2, 0, 1), mode),
        nn.Conv2d(16, 16, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(96, 24), nn.Tanh(),
        nn.Linear(24, 10),
    ).eval()  # fmt: skip
    x = torch.rand(batch, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    found = rgap.invert(model, rgap.capture(model, x, torch.arange(batch)))
    assert found.exact and found.inputs is not None and found.error_bound is not None
    assert float((found.inputs - x).abs().max()) <= found.error_bound < 1e-4


def test_a_border_along_the_channels_stays_a_step() -> None:
    model = Bordered(nn.Identity(), (1, 1, 0, 0, 1, 0), nn.Conv2d(3, 2, 2).double())
    stage = parse(model, (2, 3, 3)).stages[0]
    assert [op.kind for op in stage.lead] == ["pad"]
    x = tensors((2, 2, 3, 3), 0)
    torch.testing.assert_close(stage.forward(x)[0], model(x).detach())


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_puts_the_odd_zero_where_torch_does(kernel: int, dilation: int) -> None:
    module = nn.Conv2d(2, 3, kernel, padding="same", dilation=dilation).double()
    compare(module, affine_of(module, (2, 7, 6)), tensors((2, 2, 7, 6), kernel), kernel)
    odd = dilation * (kernel - 1) % 2
    low, high = sides_of("same", (kernel,), (dilation,))[0]
    assert high - low == odd


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_border_that_shows_the_picture_again_is_no_unknown(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=2, padding_mode=mode), nn.Tanh(),
        nn.Conv2d(8, 12, 4, 2, padding="valid", padding_mode=mode), nn.Tanh(), nn.Flatten(),
        nn.Linear(108, 3),
    ).double().eval()  # fmt: skip
    chain = parse(model, (2, 6, 6))
    assert [(stage.lead, stage.in_shape) for stage in chain.stages[:1]] == [((), (2, 6, 6))]
    assert [stage.affine.geometry.border for stage in chain.stages[:2]] == [mode, "zeros"]
    for batch in (1, 2):
        x = torch.rand(batch, 2, 6, 6, dtype=torch.float64)
        found = rgap.invert(model, rgap.capture(model, x, torch.arange(batch)))
        assert found.status.name == "EXACT", found.reason
        assert (found.inputs - x).abs().max() <= found.error_bound < 1e-9


@EASY
@given(layers(), st.data())
def test_maps_are_linear_and_batches_stay_apart(case: Case, data: st.DataObject) -> None:
    affine = affine_of(case.module, case.shape)
    x = tensors((case.batch, *case.shape), 1)
    order = data.draw(st.permutations(range(case.batch)))
    torch.testing.assert_close(affine.forward(x)[order], affine.forward(x[order]))
    torch.testing.assert_close(affine.linear(-3 * x), -3 * affine.linear(x))
    k = tensors((case.batch, *affine.out_shape), 2)
    apart = sum(affine.weight_gradient(x[i : i + 1], k[i : i + 1]) for i in range(case.batch))
    torch.testing.assert_close(affine.weight_gradient(x, k), apart)


@EASY
@given(layers())
def test_variances_add_up_through_the_squared_map(case: Case) -> None:
    affine = affine_of(case.module, case.shape)
    if affine.geometry is not None and affine.geometry.border != "zeros":
        return  # errors of the terms, of which one entry may give two
    size = int(torch.Size(case.shape).numel())
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *case.shape)
    dense = affine.linear(basis)
    variance = tensors((size,), 3).square()
    expected = (dense.square() * variance.reshape(-1, *(1 for _ in dense.shape[1:]))).sum(0)
    got = affine.squared().forward(variance.reshape(1, *case.shape))[0]
    torch.testing.assert_close(got, expected)


def test_parameters_are_copied_in_float64_and_never_aliased() -> None:
    module = nn.Conv2d(1, 2, 3)
    affine = affine_of(module, (1, 4, 4))
    before = affine.weight.clone()
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    assert affine.weight.dtype == affine.bias.dtype == torch.float64
    assert torch.equal(affine.weight, before)
    assert affine.bias.abs().max() > 0


def test_maps_can_be_differentiated_and_mapped() -> None:
    module = nn.Conv2d(2, 3, 2, padding="same").double()  # asymmetric padding
    affine = affine_of(module, (2, 4, 3))
    x, dx = tensors((2, 2, 4, 3), 0), tensors((2, 2, 4, 3), 1)
    _, tangent = torch.func.jvp(affine.forward, (x,), (dx,))
    torch.testing.assert_close(tangent, affine.linear(dx))
    stacked = torch.func.vmap(affine.linear)(torch.stack([x, dx]))
    torch.testing.assert_close(stacked[1], affine.linear(dx))


@pytest.mark.parametrize(
    ("method", "shape"),
    [("linear", (2, 3, 4, 4)), ("adjoint", (2, 2, 4, 4)), ("bias_gradient", (2, 3, 3))],
)
def test_methods_refuse_other_shapes(method: str, shape: tuple[int, ...]) -> None:
    affine = affine_of(nn.Conv2d(2, 3, 3).double(), (2, 4, 4))
    with pytest.raises(ValueError, match=rf"'m' \(conv2d\) {method}: expected \[B, .*got"):
        getattr(affine, method)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: linear("f", torch.zeros(2, 12), None, ("w", None), (3, 2, 2)), "flatten"),
        (lambda: linear("f", torch.zeros(2, 12), None, ("w", None), (5,)), r"expects \[B, 12\]"),
        (
            lambda: convolution("c", torch.zeros(2, 3, 3, 3), None, ("w", None), (1, 8, 8)),
            r"expects \[B, 3, height, width\], got \[B, 1, 8, 8\]",
        ),
        (
            lambda: convolution("c", torch.zeros(2, 3, 3), None, ("w", None), (1, 3, 8)),
            "without the batch dimension",
        ),
        (
            lambda: convolution("c", torch.zeros(2, 3, 5, 5), None, ("w", None), (3, 4, 8)),
            "larger input_shape",
        ),
    ],
)
def test_shapes_that_do_not_fit_say_what_would(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_borders_belong_to_convolutions() -> None:
    affine = affine_of(nn.Linear(4, 2), (4,))
    with pytest.raises(ValueError, match="expected a border along the dimensions"):
        affine.bordered((1, 1))


def test_geometry_counts_positions_and_leftovers() -> None:
    geometry = Geometry((3, 2), (2, 3), ((1, 0), (0, 2)), (2, 1), 1)
    module = nn.Sequential(nn.ZeroPad2d((0, 2, 1, 0)), nn.Conv2d(1, 1, (3, 2), (2, 3), 0, (2, 1)))
    for space in ((5, 4), (6, 5), (8, 9), (9, 6)):
        assert geometry.out_space(space) == tuple(module(torch.zeros(1, 1, *space)).shape[2:])
        used = [
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip(
                geometry.out_space(space), geometry.stride, geometry.dilation, geometry.kernel,
                strict=True,
            )
        ]  # fmt: skip
        padded = [n + low + high for n, (low, high) in zip(space, geometry.padding, strict=True)]
        assert geometry.leftover(space) == tuple(p - u for p, u in zip(padded, used, strict=True))
