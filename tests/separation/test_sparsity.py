"""The sparsity route against the truth: samples up to order, refusals with numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rgap
from rgap.separation.sparsity.separate import (
    SparseOptions,
    SparseSeparation,
    sparse_separation,
)


def batch(
    size: int,
    *,
    width: int = 60,
    inputs: int = 40,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    equal: bool = False,
) -> tuple[nn.Linear, Tensor, Tensor, dict[str, Tensor]]:
    """A network of three layers, a batch of its inputs, the cotangents and the gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, inputs, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.zeros(size, dtype=torch.long) if equal else torch.arange(size) % 10
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(inputs, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        ).to(dtype)
    return model[0], x, *gradients(model, x, labels)


def gradients(model: nn.Sequential, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cotangents of the first layer and the gradients, by autograd."""
    z = model[0](x)
    z.retain_grad()
    nn.functional.cross_entropy(model[1:](z), labels).backward()
    return z.grad, {n: p.grad for n, p in model[0].named_parameters()}


def separate(layer: nn.Linear, grads: dict[str, Tensor], rank: int, watch=None, **options):
    return sparse_separation(
        grads["weight"], grads["bias"], layer.weight.detach(), layer.bias.detach(), rank,
        SparseOptions(**options), watch,
    )  # fmt: skip


def assert_same(result: SparseSeparation, x: Tensor, k: Tensor, tolerance: float) -> None:
    """Every sample once, inputs and cotangents in one order."""
    assert result.inputs is not None, result.reason
    assert result.agreement == 1.0
    x, k = x.double(), k.double()
    order = torch.cdist(result.inputs, x).argmin(1)
    assert sorted(order.tolist()) == list(range(len(x)))
    assert float((result.inputs - x[order]).norm(dim=1).div(x[order].norm(dim=1)).max()) < tolerance
    assert float((result.cotangents - k[order]).abs().max() / k.abs().max()) < tolerance


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-4)], ids=["f64", "f32"]
)
def test_samples_up_to_order(size: int, equal: bool, dtype: torch.dtype, tolerance: float) -> None:
    layer, x, k, grads = batch(size, seed=size, dtype=dtype, equal=equal)
    result = separate(layer, grads, size, unit=torch.finfo(dtype).eps / 2, seconds=60)
    assert_same(result, x, k, tolerance)
    errors = torch.cdist(result.inputs, x.double()).amin(1) / x.double().norm(dim=1).min()
    assert float(errors.max()) <= 30 * result.error + 1e-13


def test_uniform_draws_find_the_same_samples() -> None:
    layer, x, k, grads = batch(5, seed=3)
    result = separate(layer, grads, 5, guided=False, seconds=60)
    assert result.trials > 0
    assert_same(result, x, k, 1e-9)


def test_photographs() -> None:
    model = rgap.models.mlp((120, 120), 10, "relu", seed=0).double()
    pictures = rgap.photos.load(4, 16).repeat_interleave(2, 2).repeat_interleave(2, 3)
    update = rgap.capture(model, pictures, torch.tensor([3, 3, 1, 0]))
    weight, bias = list(update.gradients.values())[:2]
    layer = next(m for m in model if isinstance(m, nn.Linear))
    result = separate(layer, {"weight": weight, "bias": bias}, 4, seconds=60)
    assert result.inputs is not None, result.reason
    distance = torch.cdist(result.inputs, pictures.flatten(1))
    assert float(distance.amin(0).max()) < 1e-8


def test_one_answer_for_one_seed_and_untouched_random_state() -> None:
    layer, _, _, grads = batch(4)
    before = torch.get_rng_state()
    first, second = (separate(layer, grads, 4, seed=5) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)
    assert first.trials == second.trials
    assert torch.equal(before, torch.get_rng_state())


def test_picture_twice_counts_once_with_the_sum_of_its_cotangents() -> None:
    layer, x, _, _ = batch(3)
    doubled = torch.cat([x, x[:1]])
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(60, 10)).double()
    layer.zero_grad()
    k, grads = gradients(model, doubled, torch.tensor([0, 1, 2, 5]))
    together = torch.cat([k[:1] + k[3:], k[1:3]])
    assert_same(separate(layer, grads, 3, seconds=60), x, together, 1e-9)


@pytest.mark.parametrize("rank", [3, 5])
def test_wrong_rank_is_refused_with_the_singular_values(rank: int) -> None:
    layer, _, _, grads = batch(4)
    result = separate(layer, grads, rank)
    assert result.inputs is None
    assert result.cotangents is None
    assert f"has rank 4 in the update's precision, not {rank}" in result.reason


def test_dead_units_change_nothing() -> None:
    size = 4
    layer, x, _, _ = batch(size)
    with torch.no_grad():
        layer.bias[::3] = -100.0  # off in every sample
    torch.manual_seed(1)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(60, 10)).double()
    layer.zero_grad()
    k, grads = gradients(model, x, torch.arange(size))
    assert not grads["weight"][::3].any()
    assert_same(separate(layer, grads, size, seconds=60), x, k, 1e-9)


def test_without_relu_nothing_is_returned() -> None:
    """A smooth activation leaves no zeros: a mixture must not pass for a sample."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 10)).double()
    _, grads = gradients(model, x, torch.arange(3))
    result = separate(model[0], grads, 3, seconds=1)
    assert result.inputs is None
    assert result.agreement < 1.0


def test_signs_that_do_not_fit_are_refused() -> None:
    """The zeros are there, but not where this layer's weights put them."""
    grads = batch(3)[3]
    other = batch(3, seed=9)[0]
    result = separate(other, grads, 3, seconds=1)
    assert result.inputs is None
    assert result.agreement < 0.9


def test_single_sample_with_other_signs_is_refused() -> None:
    _, _, _, grads = batch(1)
    result = separate(batch(1, seed=9)[0], grads, 1)
    assert result.inputs is None
    assert "of the signs of z" in result.reason


def test_limits_are_named_with_what_was_reached() -> None:
    layer, _, _, grads = batch(12, inputs=30, width=40)
    timed = separate(layer, grads, 12, seconds=0.2)
    assert timed.inputs is None
    assert timed.seconds < 5
    assert "of 12 after" in timed.reason
    assert "0.2 s" in timed.reason
    counted = separate(layer, grads, 12, trials=1)
    assert counted.inputs is None
    assert "limit: 1 subsets" in counted.reason


def test_no_bias_gradient() -> None:
    layer, _, _, grads = batch(3)
    result = sparse_separation(grads["weight"], None, layer.weight.detach(), None, 3)
    assert result.inputs is None
    assert "no bias gradient" in result.reason


def test_bias_gradient_of_another_layer() -> None:
    layer, _, _, grads = batch(3)
    wrong = {"weight": grads["weight"], "bias": batch(3, seed=4)[3]["bias"]}
    result = separate(layer, wrong, 3)
    assert result.inputs is None
    assert "not in the range" in result.reason


def test_zero_gradient() -> None:
    layer, _, _, grads = batch(3)
    result = separate(layer, {n: torch.zeros_like(g) for n, g in grads.items()}, 3)
    assert result.inputs is None
    assert "is zero" in result.reason


def test_arguments() -> None:
    layer, _, _, grads = batch(3)
    with pytest.raises(ValueError, match=r"rank: expected .* from 1 to 40"):
        separate(layer, grads, 0)
    with pytest.raises(ValueError, match=r"rank: expected"):
        separate(layer, grads, 41)
    with pytest.raises(ValueError, match="bias_gradient: expected shape"):
        separate(layer, {"weight": grads["weight"], "bias": grads["bias"][1:]}, 3)
    with pytest.raises(ValueError, match="two matrices of one shape"):
        separate(layer, {"weight": grads["weight"].T, "bias": grads["bias"]}, 3)
    with pytest.raises(ValueError, match="NaN"):
        separate(layer, {"weight": grads["weight"] * torch.nan, "bias": grads["bias"]}, 3)


def test_scale_of_the_gradient_does_not_matter() -> None:
    layer, x, k, grads = batch(3)
    for scale in (1e-120, 1e120):
        result = separate(layer, {n: g * scale for n, g in grads.items()}, 3, seconds=60)
        assert_same(result, x, k * scale, 1e-9)


def test_progress_is_told() -> None:
    layer, _, _, grads = batch(4)
    lines: list[str] = []
    separate(layer, grads, 4, watch=lines.append)
    assert lines
    assert lines[-1].startswith("sparse directions:")


@settings(max_examples=15)
@given(
    size=st.integers(1, 5),
    width=st.integers(40, 90),
    inputs=st.integers(8, 60),
    seed=st.integers(0, 1000),
)
def test_any_width(size: int, width: int, inputs: int, seed: int) -> None:
    layer, x, k, grads = batch(size, width=width, inputs=inputs, seed=seed)
    result = separate(layer, grads, size, seconds=20)
    if result.inputs is None:  # never silently: the reason carries numbers
        assert any(c.isdigit() for c in result.reason)
        assert result.agreement < 1.0
    else:
        assert_same(result, x, k, 1e-7)
