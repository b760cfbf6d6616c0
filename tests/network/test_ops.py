"""Steps without weights: forward, inverse, adjoint and pull against dense references."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.network.modules import build
from rgap.network.pooling import LinearMap, Opaque
from rgap.network.probing import Unsupported, linear_function, rearrangement
from rgap.network.reshape import Op, Pad, Rearrange, Reshape
from rgap.network.scaling import BatchNorm, Scale
from rgap.testing import dense_test, dot_test


def tensors(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Op:
    op = rearrangement(function, "r", "rearrange", shape)
    assert isinstance(op, Op)
    return op


def norm(shape: tuple[int, ...], *, affine: bool = True, dead: tuple[int, ...] = ()) -> BatchNorm:
    """A batch norm of random statistics, with γ = 0 in the channels ``dead``."""
    make = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
    module = make[len(shape)](shape[0], affine=affine).double().eval()
    with torch.no_grad():
        module.running_mean.copy_(tensors((shape[0],), 1))
        module.running_var.copy_(tensors((shape[0],), 2).square() + 0.1)
        if affine:
            module.weight.copy_(tensors((shape[0],), 3))
            module.bias.copy_(tensors((shape[0],), 4))
            module.weight[list(dead)] = 0.0
    op = build(module, "norm", shape, {id(p): f"norm.{n}" for n, p in module.named_parameters()})
    assert isinstance(op, BatchNorm)
    op.reference = module  # type: ignore[attr-defined]
    return op


def module_op(module: nn.Module, shape: tuple[int, ...]) -> Op:
    op = build(module.double().eval(), "m", shape, {})
    assert isinstance(op, Op)
    return op


# name → (step, the function that it stands for, whether it can be inverted)
CASES: dict[str, tuple[Op, Callable[[Tensor], Tensor], bool]] = {
    "flatten": (Reshape("f", "flatten", (2, 3), (6,)), lambda x: x.flatten(1), True),
    "unflatten": (module_op(nn.Unflatten(1, (2, 3)), (6,)), lambda x: x.reshape(-1, 2, 3), True),
    "squeeze to a number": (moved(lambda x: x[:, 0], (1,)), lambda x: x[:, 0], True),
    "permute": (
        moved(lambda x: x.permute(0, 2, 3, 1), (2, 3, 4)), lambda x: x.permute(0, 2, 3, 1), True,
    ),
    "flip": (moved(lambda x: x.flip(2), (2, 3)), lambda x: x.flip(2), True),
    "roll": (moved(lambda x: x.roll(1, 1), (5,)), lambda x: x.roll(1, 1), True),
    "slice": (moved(lambda x: x[:, ::2], (5,)), lambda x: x[:, ::2], False),
    "repeat": (moved(lambda x: x.repeat(1, 3), (4,)), lambda x: x.repeat(1, 3), True),
    "lossy index": (
        moved(lambda x: x[:, [0, 0, 2]], (3,)), lambda x: x[:, [0, 0, 2]], False,
    ),
    "pixel shuffle": (
        module_op(nn.PixelShuffle(2), (8, 2, 3)), lambda x: F.pixel_shuffle(x, 2), True,
    ),
    "upsample": (
        module_op(nn.Upsample(scale_factor=2), (2, 2, 3)),
        lambda x: F.interpolate(x, scale_factor=2), True,
    ),
    "pad": (Pad("p", (2, 3, 3), (1, 0, 2, 1), 0.5), lambda x: F.pad(x, (1, 0, 2, 1), value=0.5),
            True),
    "crop": (Pad("p", (5,), (-1, 2)), lambda x: F.pad(x, (-1, 2)), False),
    "avg_pool1d": (module_op(nn.AvgPool1d(2), (2, 6)), lambda x: F.avg_pool1d(x, 2), False),
    "avg_pool2d": (
        module_op(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 6, 5)),
        lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), False,
    ),
    "avg_pool3d": (module_op(nn.AvgPool3d(2), (1, 4, 2, 2)), lambda x: F.avg_pool3d(x, 2), False),
    "avg_pool to more": (
        module_op(nn.AvgPool2d(2, 1, 1), (2, 3, 2)), lambda x: F.avg_pool2d(x, 2, 1, 1), True,
    ),
    "adaptive": (
        module_op(nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 4)),
        lambda x: F.adaptive_avg_pool2d(x, (2, 3)), False,
    ),
    "mean": (
        linear_function(lambda x: x.mean((2, 3)), "m", "mean", (3, 4, 2)),
        lambda x: x.mean((2, 3)), False,
    ),
    "sum": (
        linear_function(lambda x: x.sum(1), "m", "sum", (3, 4)), lambda x: x.sum(1), False,
    ),
    "scale": (
        Scale("s", "mul", (3, 2), tensors((3, 1), 5), tensors((3, 2), 6)),
        lambda x: x * tensors((3, 1), 5) + tensors((3, 2), 6), True,
    ),
    **{
        f"batch norm {len(shape)}": (norm(shape), norm(shape).reference, True)  # type: ignore[attr-defined]
        for shape in ((4,), (4, 3), (4, 3, 2), (4, 2, 2, 2))
    },
    "batch norm plain": (
        norm((4, 3), affine=False), norm((4, 3), affine=False).reference, True,  # type: ignore[attr-defined]
    ),
    "batch norm dead": (norm((4, 3), dead=(1,)), norm((4, 3), dead=(1,)).reference, False),  # type: ignore[attr-defined]
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps_compute_what_they_stand_for(name: str) -> None:
    op, function, _ = CASES[name]
    x = tensors((3, *op.in_shape))
    y = function(x).detach()
    torch.testing.assert_close(op.forward(x), y)
    assert tuple(y.shape[1:]) == op.out_shape
    assert op.affine
    torch.testing.assert_close(op.linear(x), y - op.forward(torch.zeros_like(x)))


@pytest.mark.parametrize("name", CASES)
def test_adjoints_pass_the_dot_test_and_are_autograds(name: str) -> None:
    op, function, _ = CASES[name]
    x, k = tensors((3, *op.in_shape)), tensors((3, *op.out_shape), 1)
    dense_test(op.linear, function, x[:1], adjoint=op.adjoint, name=name)
    dot_test(op.linear, op.adjoint, x, name=name)
    z = x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad((function(z) * k).sum(), z)
    torch.testing.assert_close(op.pull(x, k), pulled)


@pytest.mark.parametrize("name", CASES)
def test_inverses_undo_forward_or_refuse(name: str) -> None:
    op, _, invertible = CASES[name]
    x = tensors((3, *op.in_shape))
    y = op.forward(x)
    if invertible:
        assert op.barrier is None
        torch.testing.assert_close(op.inverse(y), x, atol=1e-9, rtol=1e-9)
    else:
        with pytest.raises(ValueError, match=rf"'{op.name}'"):
            op.inverse(y)


@pytest.mark.parametrize("name", CASES)
def test_steps_work_on_stacks_of_batches(name: str) -> None:
    """The Jacobian and the error columns carry leading dimensions through every step."""
    op, _, _ = CASES[name]
    x = tensors((2, 3, *op.in_shape))
    if not isinstance(op, Pad):
        torch.testing.assert_close(op.forward(x)[1], op.forward(x[1]))
    torch.testing.assert_close(op.linear(x)[1], op.linear(x[1]))
    k = tensors((2, 3, *op.out_shape))
    torch.testing.assert_close(op.adjoint(k)[1], op.adjoint(k[1]))


@pytest.mark.parametrize("name", ["flatten", "permute", "avg_pool2d", "pixel shuffle"])
def test_other_shapes_are_refused(name: str) -> None:
    op, _, _ = CASES[name]
    wrong = torch.zeros(2, *op.in_shape[:-1], op.in_shape[-1] + 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., .*got \[2"):
        op.forward(wrong)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_index_is_moved_and_read_back(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    size = prod(shape)
    index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
    op = Rearrange("r", "getitem", shape, index)
    x, k = tensors((2, *shape)), tensors((2, len(index)), 1)
    torch.testing.assert_close(op.forward(x), x.reshape(2, -1)[:, index])
    dense = torch.zeros(len(index), size, dtype=torch.float64)
    dense[torch.arange(len(index)), index] = 1
    torch.testing.assert_close(op.adjoint(k), (k @ dense).reshape(2, *shape))
    if len(set(index.tolist())) == size:
        assert torch.equal(op.inverse(op.forward(x)), x)
    else:
        with pytest.raises(ValueError, match="'r'"):
            op.inverse(op.forward(x))


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
def test_batch_norm_parameter_gradients_are_autograds(shape: tuple[int, ...]) -> None:
    op = norm(shape)
    module: nn.Module = op.reference  # type: ignore[attr-defined]
    x, k = tensors((3, *shape)), tensors((3, *shape), 1)
    expected = torch.autograd.grad((module(x) * k).sum(), list(module.parameters()))
    torch.testing.assert_close(op.weight_gradient(x, k), expected[0])
    torch.testing.assert_close(op.bias_gradient(k), expected[1])
    assert (op.weight_name, op.bias_name) == ("norm.weight", "norm.bias")


def test_batch_norm_of_scale_zero_names_its_channels() -> None:
    op = norm((4, 3), dead=(1, 3))
    assert op.barrier is not None
    assert "scale 0 in channel 1 and 1 more" in op.barrier
    assert norm((4, 3), affine=False).weight_name is None


def test_multiplying_by_zero_is_a_barrier_too() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert Scale("s", "mul", (), zero, zero).barrier is not None
    assert Scale("s", "mul", (2, 2), zero + 1, zero).barrier is None


@pytest.mark.parametrize(
    ("module", "shape", "words"),
    [
        (nn.MaxPool2d(2), (1, 4, 4), "keeps the winner but not its place"),
        (nn.AdaptiveMaxPool1d(2), (1, 4), "keeps the winner"),
        (nn.LPPool2d(2.0, 2), (1, 4, 4), "keeps a norm"),
        (nn.Softmax(1), (4,), "leaves a constant added to its inputs open"),
        (nn.LogSoftmax(-1), (4,), "leaves a constant"),
        (nn.LocalResponseNorm(2), (4, 3, 3), "norm of its own input"),
    ],
)
def test_lossy_steps_are_computed_and_named(
    module: nn.Module, shape: tuple[int, ...], words: str
) -> None:
    op = module_op(module, shape)
    assert isinstance(op, Opaque) and not op.affine
    x = tensors((3, *shape)).abs()
    torch.testing.assert_close(op.forward(x), module(x))
    k = tensors((3, *op.out_shape), 1)
    z = x.clone().requires_grad_()
    torch.testing.assert_close(op.pull(x, k), torch.autograd.grad((module(z) * k).sum(), z)[0])
    with pytest.raises(ValueError, match=words):
        op.inverse(op.forward(x))
    with pytest.raises(TypeError, match=r"write pull\(x, k\)"):
        op.adjoint(k)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.transpose(0, 1), (7,)),
        (lambda x: x.flatten(), (2, 3)),
        (lambda x: x.reshape(-1, 2), (4,)),
        (lambda x: x[:3], (4,)),
        (lambda x: x.flip(0), (4,)),
    ],
)
def test_mixed_samples_are_refused(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    with pytest.raises(Unsupported, match="mixes the batch dimension"):
        rearrangement(function, "r", "reshape", shape)


def test_means_over_the_batch_are_refused() -> None:
    with pytest.raises(Unsupported, match="mixes the samples"):
        linear_function(lambda x: x - x.mean(0), "m", "mean", (4,))


def test_pools_of_deficient_rank_are_named() -> None:
    # As many outputs as inputs, but a window of 2 over a circle of 2 sees one sum twice.
    op = LinearMap("p", "pool", (1, 2), lambda x: (x + x.flip(2)) / 2)
    assert op.barrier is not None and "no full column rank" in op.barrier


def test_steps_move_to_a_device_with_their_tensors() -> None:
    op = norm((4, 3)).to("meta")
    assert op.scale.is_meta and op.mean.is_meta


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.AdaptiveMaxPool2d(1), (3, 1, 1)),
        (nn.AdaptiveAvgPool2d(1), (3, 1, 1)),
        (nn.AdaptiveAvgPool1d(4), (2, 4)),
        (nn.MaxPool2d(1), (3, 4, 5)),
        (nn.MaxPool2d(2, padding=1), (3, 1, 1)),
        (nn.AvgPool3d(1), (2, 2, 2, 2)),
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), (3, 1, 1)),
    ],
)
def test_a_pool_of_single_entries_is_no_step(pool: nn.Module, shape: tuple[int, ...]) -> None:
    assert build(pool, "pool", shape, {}) is None


@pytest.mark.parametrize("pool", [nn.MaxPool2d(1, stride=2), nn.AvgPool2d(1, stride=2)])
def test_a_pool_of_single_entries_that_leaves_some_out_is_a_slice(pool: nn.Module) -> None:
    step = build(pool, "pool", (2, 5, 4), {})
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    assert isinstance(step, Rearrange) and torch.equal(step.forward(x), x[:, :, ::2, ::2])


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(2), nn.AvgPool2d(2, 1, 1)])
def test_a_pool_with_a_window_of_several_entries_stays_one(pool: nn.Module) -> None:
    assert build(pool, "pool", (2, 3, 3), {}).kind.endswith("pool2d")
    assert not isinstance(build(pool, "pool", (2, 3, 3), {}), Rearrange)


@pytest.mark.parametrize("take", [torch.mean, torch.sum])
def test_a_mean_over_one_place_is_a_reshape(take: Callable[..., Tensor]) -> None:
    step = linear_function(lambda x: take(x, (2, 3)), "mean", "mean", (4, 1, 1))
    assert isinstance(step, Reshape) and step.out_shape == (4,)
