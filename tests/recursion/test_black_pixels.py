"""Pictures with exactly black pixels: rows of 0, and steps whose constants hide small errors."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from rgap import Status, capture, invert
from rgap.network.chain import parse
from rgap.network.modules import build
from rgap.network.scaling import BatchNorm, Scale
from rgap.precision import Estimate, Precision
from rgap.recursion.stage import solve_stage
from rgap.recursion.steps import through

F64, F32 = torch.float64, torch.float32
SIZE = (6, 4)


def drawn(kind: str, batch: int, channels: int, seed: int) -> Tensor:
    """A picture of random values, part of which is black, or nearly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, channels, *SIZE, generator=generator, dtype=F64)
    if kind == "framed":
        inside = torch.zeros(SIZE, dtype=F64)
        inside[1:-1, 1:-1] = 1.0
        return x * inside
    if kind == "binary":
        return (x > 0.5).to(F64)
    x[..., SIZE[1] // 2 if kind.startswith("half") else 0 :] *= 1e-13 if "dark" in kind else 0.0
    return x


def network(
    kernel: int, act: type[nn.Module], norm: bool, bias: bool, channels: int, seed: int
) -> nn.Sequential:
    torch.manual_seed(seed)
    filters = 96
    layers: list[nn.Module] = [nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=bias)]
    if norm:
        own = nn.BatchNorm2d(filters)
        own.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
        own.running_var.uniform_(0.3, 2)  # type: ignore[union-attr]
        nn.init.uniform_(own.weight, -1.5, 1.5)
        nn.init.normal_(own.bias, 0, 0.3)
        layers.append(own)
    head = nn.Linear(filters * SIZE[0] * SIZE[1], 10)
    return nn.Sequential(*layers, act(), nn.Flatten(), head).eval()


def nearest(found: Tensor, x: Tensor) -> float:
    """Largest error, samples in either order."""
    return min(float((found - other).abs().max()) for other in (x, x.flip(0)))


@pytest.mark.cases(3)
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("kind", ["framed", "half black", "half dark", "binary", "black"])
def test_black_pixels_contradict_nothing(kind: str, dtype: torch.dtype) -> None:
    exact = 0
    cases = [(k, a, n, True, 1) for k, a, n in product((1, 3), (nn.ReLU, nn.LeakyReLU), (0, 1))]
    cases += [(3, nn.ReLU, 0, False, 3), (3, nn.LeakyReLU, 1, False, 3), (1, nn.ReLU, 1, True, 3)]
    for seed, (kernel, act, norm, bias, channels) in enumerate(cases):
        for batch in (1, 2):
            model = network(kernel, act, bool(norm), bias, channels, seed).to(dtype)
            x = drawn(kind, batch, channels, seed).to(dtype)
            labels = torch.tensor([3, 5])[:batch]
            recovery = invert(model, capture(model, x, labels, dtype=dtype))
            said = f"{kernel} {act.__name__} {norm} {bias} {channels} {batch}: {recovery.reason}"
            assert recovery.status in (Status.EXACT, Status.UNDERDETERMINED), said
            if recovery.status is not Status.EXACT:
                copies = kind == "black" and (batch == 2 or not bias)  # or nothing sent
                # Without a bias, outputs of dark pixels have the sign that rounding gives them.
                open_ = kind == "half dark" and not bias and "of a kink" in recovery.reason
                assert copies or open_, said
                continue
            exact += 1
            assert recovery.inputs is not None and recovery.error_bound is not None
            assert nearest(recovery.inputs, x.double()) <= recovery.error_bound, said
    assert exact >= (
        len(cases) - 2 if kind == "black" else 2 * len(cases) - 2 * (kind == "half dark")
    ), exact


def test_a_shift_hides_no_small_error() -> None:
    scale, shift = torch.tensor([0.7, -1.3], dtype=F64), torch.tensor([0.3, 4e3], dtype=F64)
    op = Scale("norm", "scale", (2,), scale, shift)
    small = torch.tensor([[1e-17, -3e-30]], dtype=F64)
    assert torch.equal(op.inverse_linear(small), small / scale)
    known = Estimate(torch.ones(1, 2, dtype=F64), small[None].repeat(24, 1, 1))
    passed = through((op,), known, known, Precision(F64))
    assert isinstance(passed, tuple)
    assert bool((passed[0].std > 0.0).all())


def test_what_a_batch_norm_cancels_is_known_to_its_terms() -> None:
    """Output near 0 of terms near 1: the client's sum is off by the rounding of these."""
    precision = Precision(F32)
    width = 4000
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(width).eval()
    norm.running_mean.normal_()  # type: ignore[union-attr]
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    net = nn.Sequential(nn.Linear(3, width), norm, nn.LeakyReLU(), nn.Linear(width, 2))
    tail = parse(net.to(F64), (3,)).stages[0].tail
    [op] = [step for step in tail if isinstance(step, BatchNorm)]
    y = torch.full((1, width), 1e-5, dtype=F64)
    z = op.inverse(y).to(F32)
    sent = norm.to(F32)(z).detach().double()
    exact = Estimate(sent, precision.normal(0.0 * sent))
    passed = through((op,), exact, exact, precision)
    assert isinstance(passed, tuple)
    back, gap = passed[0], (passed[0].value - z.double()).abs()
    assert bool((gap <= 8.0 * back.std).all())
    assert float(gap.square().mean()) >= 0.01 * float(back.std.square().mean())
    terms = op.terms(z.double())
    assert terms is not None
    assert bool((3.0 * terms >= op.forward(z.double()).square()).all())


def test_rows_of_zero_are_no_better_known_than_they_are_solved_for() -> None:
    """Filters that are alive on black pixels only: their rows miss by our own rounding."""
    module = nn.Conv2d(1, 40, 3, padding=1, bias=False).to(F64)
    affine = build(module, "layer", (1, *SIZE), {id(p): n for n, p in module.named_parameters()})
    torch.manual_seed(1)
    x = drawn("half black", 1, 1, 0)
    k = torch.randn(1, 40, *SIZE, dtype=F64)
    k[:, :20, :, : SIZE[1] // 2 + 1] = 0.0
    for dtype in (F64, F32):
        precision = Precision(dtype)
        exact = Estimate(k, precision.normal(0.0 * k))
        z = affine.forward(x)
        known = Estimate(z, precision.rounding(z))
        gradient = affine.weight_gradient(x, k)
        for budget in (1e9, 0.0):
            step = solve_stage(affine, gradient, known, exact, precision, budget)
            assert step.solution.value is not None
            assert step.misfit < 3.0, (dtype, budget, step.misfit)
            gap = (step.solution.value.value - x).abs()
            assert float(gap.max()) <= 10.0 * float(step.solution.value.std.max())


def test_two_starts_at_nothing_prove_nothing() -> None:
    """A gradient of 0 from a layer with fewer equations than unknowns, without a matrix."""
    module = nn.Conv2d(3, 2, 3, 2, 1, bias=False).to(F64)
    affine = build(module, "layer", (3, 8, 8), {id(p): n for n, p in module.named_parameters()})
    torch.manual_seed(0)
    k = torch.randn(1, *affine.out_shape, dtype=F64)
    precision = Precision(F32)
    known = [Estimate(v, precision.rounding(v)) for v in (0.0 * k, k)]
    step = solve_stage(affine, 0.0 * affine.weight, *known, precision, budget=0.0)
    assert step.solution.value is None
