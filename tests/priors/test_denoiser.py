"""The learned denoiser against autograd and dense matrices, and the one shipped."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from torch import Tensor

from rgap.photos import load
from rgap.priors import prior_of
from rgap.priors.denoiser import FILE, WEIGHTS, DenoiserPrior, Features, denoising, shipped
from rgap.solvers.priors import natural

F64 = torch.float64


def random_features(seed: int, channels: int = 3) -> Features:
    draw = torch.Generator().manual_seed(seed)
    sizes = [(4, channels, 4), (5, 4, 3), (3, 5, 3)]
    kernels = [torch.randn(o, i, k, k, generator=draw, dtype=F64) for o, i, k in sizes]
    biases, tilts = (
        [torch.randn(size[0], generator=draw, dtype=F64) for size in sizes] for _ in range(2)
    )
    return Features(kernels, biases, tilts)


def pictures(seed: int = 0, channels: int = 3, batch: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, 7, 6, generator=draw, dtype=F64)


def dense_features(prior: DenoiserPrior, x: Tensor) -> Tensor:
    """Layer by layer, by modules."""
    sigma, own = prior.sigma, prior.features
    u = (x - x.mean((1, 2, 3), keepdim=True)) / (sigma * prior.width)
    told = torch.tensor(sigma / 0.05, dtype=F64).log()
    for number, kernel in enumerate(own.kernels):
        out, into, side, _ = kernel.shape
        layer = torch.nn.Conv2d(into, out, side, 1 if number else 2, 1, dtype=F64)
        layer.weight.data = kernel
        layer.bias.data = own.biases[number] + told * own.tilts[number]
        u = layer(u)
        if number < len(own.kernels) - 1:
            u = torch.nn.ELU()(u)
    return u


@pytest.mark.parametrize("seed", range(5))
def test_value_gradient_and_curvature_against_autograd(seed: int) -> None:
    prior = DenoiserPrior(random_features(seed), weight=2.0, width=3.0).smoothed(0.2)
    x = 3.0 * pictures(seed)
    expected = dense_features(prior, x).square().sum() / x.numel()
    assert torch.allclose(prior.value(x), expected, rtol=1e-12)
    jacobian = torch.autograd.functional.jacobian(lambda u: dense_features(prior, u), x)
    j = jacobian.reshape(-1, x.numel())
    f = dense_features(prior, x).flatten()
    slope = (2.0 / x.numel() * j.T @ f).view_as(x)
    assert torch.allclose(prior.gradient(x), slope, rtol=1e-9, atol=1e-9)
    v = pictures(seed + 9)
    bent = (2.0 / x.numel() * j.T @ (j @ v.flatten())).view_as(x)
    assert torch.allclose(prior.curvature(x)(v), bent, rtol=1e-9, atol=1e-9)


def test_the_denoised_is_the_gradient_step() -> None:
    prior, x = DenoiserPrior(random_features(0), weight=5.0, width=2.0).smoothed(0.1), pictures()
    own = x.clone().requires_grad_()
    (step,) = torch.autograd.grad(prior.value(own) * x.numel() / 5.0, own)
    assert torch.allclose(prior.denoised(x), x - 0.1**2 * step, rtol=1e-9, atol=1e-9)


def test_brightness_costs_nothing_and_units_do_not_matter() -> None:
    features, x = random_features(1), pictures()
    prior = DenoiserPrior(features)
    assert torch.allclose(prior.value(x + 0.3), prior.value(x), rtol=1e-9)
    wide = DenoiserPrior(features, width=255.0)
    assert torch.allclose(wide.value(255.0 * x), prior.value(x), rtol=1e-9)


def test_grey_pictures_are_those_of_three_channels_alike() -> None:
    features, x = random_features(2), pictures(channels=1)
    whole, grey = DenoiserPrior(features), DenoiserPrior(features.grey())
    alike = x.expand(-1, 3, -1, -1)
    for size in (0.03, 0.1):  # noise of a grey picture is that of three channels in their mean
        own, wide = grey.smoothed(size), whole.smoothed(3**0.5 * size)
        assert torch.allclose(own.value(x), 3.0 * wide.value(alike), rtol=1e-9)
        slope = wide.gradient(alike).sum(1, keepdim=True)
        assert torch.allclose(own.gradient(x), 3.0 * slope, rtol=1e-9, atol=1e-12)


def test_a_file_gives_back_the_network() -> None:
    features, x = random_features(3), pictures()
    same = Features.of(features.tensors())
    assert torch.equal(DenoiserPrior(same).value(x), DenoiserPrior(features).value(x))


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1, 0.2])
def test_what_is_shipped_takes_noise_away(sigma: float) -> None:
    assert len((resources.files("rgap.data") / FILE).read_bytes()) < 1_000_000
    draw = torch.Generator().manual_seed(0)
    clean = load(32)
    noise = sigma * torch.randn(clean.shape, generator=draw, dtype=F64)
    for channels in (1, 3) if sigma > 0.02 else (3,):
        x, n = (t if channels == 3 else t.mean(1, keepdim=True) for t in (clean, noise))
        size = float(n.square().mean().sqrt())  # the mean of three channels has less of it
        left = DenoiserPrior(shipped(channels)).smoothed(size).denoised(x + n) - x
        assert float(left.square().mean()) < 0.9 * size**2


def test_by_name_it_is_added_to_the_prior_of_differences() -> None:
    x = load(1)
    whole = prior_of("denoiser", (3, 32, 32), (0.0, 1.0))
    differences, learned = natural(3).value(x), DenoiserPrior(shipped()).value(x)
    assert torch.allclose(whole.value(x), WEIGHTS[0] * differences + WEIGHTS[1] * learned)
    assert torch.isfinite(denoising(1, 2.0).gradient(load(1).mean(1, keepdim=True))).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"1 or 3 channels, got 2; write prior='natural'"):
        prior_of("denoiser", (2, 32, 32), None)
    with pytest.raises(ValueError, match=r"at least 4 pixels a side, got samples of \[3, 3, 32\]"):
        prior_of("denoiser", (3, 3, 32), None)
    with pytest.raises(ValueError, match=r"at least 4×4 pixels, got \[1, 3, 3, 32\]"):
        DenoiserPrior(random_features(0)).value(torch.zeros(1, 3, 3, 32))
    own = random_features(0)
    with pytest.raises(ValueError, match=r"as many kernels as biases and tilts, got 3, 1 and 3"):
        Features(own.kernels, own.biases[:1], own.tilts)
