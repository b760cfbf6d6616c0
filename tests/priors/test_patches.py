"""The mixture of patches against dense normal densities and autograd, and the one shipped."""

from __future__ import annotations

import math
from importlib import resources

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from rgap.photos import load
from rgap.priors import prior_of
from rgap.priors.patches import FILE, PatchPrior, Shapes, photographic, shipped
from rgap.solvers.priors import natural

F64 = torch.float64


def random_shapes(seed: int, channels: int = 3, side: int = 2, count: int = 3) -> Shapes:
    draw = torch.Generator().manual_seed(seed)
    n = channels * side**2
    roots = torch.randn(count, n, n, generator=draw, dtype=F64)
    weights = torch.rand(count, 2, generator=draw, dtype=F64)
    contrasts = torch.tensor([0.3, 0.05], dtype=F64)
    return Shapes.of(roots @ roots.mT / n, contrasts, weights / weights.sum(), channels, 0.01)


def pictures(seed: int = 0, channels: int = 3, batch: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, 5, 6, generator=draw, dtype=F64)


def dense_value(shapes: Shapes, x: Tensor, noise: float) -> float:
    """Patch by patch, with whole covariance matrices."""
    total, count, side = 0.0, 0, shapes.side
    for picture in x:
        for row in range(picture.shape[1] - side + 1):
            for column in range(picture.shape[2] - side + 1):
                r = picture[:, row : row + side, column : column + side].flatten()
                r, found = r - r.mean(), []
                for basis, variance, w in zip(
                    shapes.bases, shapes.variances, shapes.weights, strict=True
                ):
                    covariance = basis @ variance.diag() @ basis.T
                    near = [
                        MultivariateNormal(
                            torch.zeros_like(r),
                            s**2 * covariance + noise**2 * torch.eye(len(r), dtype=F64),
                        ).log_prob(r)
                        + w[j].log()
                        for j, s in enumerate(shapes.contrasts)
                    ]
                    found.append(float(torch.stack(near).logsumexp(0)))
                total -= max(found) + 0.5 * len(r) * math.log(2.0 * math.pi)
                count += len(r)
    return total / count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_value_is_that_of_normal_densities(channels: int, smoothing: float) -> None:
    shapes, x = random_shapes(0, channels), pictures(1, channels)
    prior = PatchPrior(shapes, weight=2.0).smoothed(smoothing)
    expected = 2.0 * dense_value(shapes, x, max(smoothing, 0.01))
    assert abs(float(prior.value(x)) - expected) < 1e-9 * abs(expected)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_against_autograd(seed: int) -> None:
    prior, x = PatchPrior(random_shapes(seed), width=2.0), pictures(seed).requires_grad_()
    (expected,) = torch.autograd.grad(prior.value(x), x)
    assert torch.allclose(prior.gradient(x.detach()), expected, atol=1e-12)
    value, slope = prior.value_and_gradient(x.detach())
    assert value == prior.value(x.detach()) and torch.allclose(slope, expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_curvature_touches_the_value_from_above(seed: int) -> None:
    """value(x + v) ≤ value(x) + ⟨gradient, v⟩ + ½⟨v, curvature v⟩ for every v."""
    prior, x = PatchPrior(random_shapes(seed)), pictures(seed)
    bend, slope, draw = prior.curvature(x), prior.gradient(x), torch.Generator().manual_seed(seed)
    for size in (1e-3, 0.03, 1.0):
        for _ in range(5):
            v = size * torch.randn(x.shape, generator=draw, dtype=F64)
            above = prior.value(x) + (slope * v).sum() + 0.5 * (v * bend(v)).sum()
            assert float(prior.value(x + v)) <= float(above) + 1e-6 * abs(float(above))


def test_the_curvature_is_symmetric_and_maps_several_at_once() -> None:
    bend = PatchPrior(random_shapes(3)).curvature(pictures())
    u, v = pictures(1), pictures(2)
    assert abs(float((u * bend(v)).sum() - (v * bend(u)).sum())) < 1e-5 * float(u.norm() * v.norm())
    together = torch.vmap(bend)(torch.stack([u, v]))
    assert torch.allclose(together, torch.stack([bend(u), bend(v)]), rtol=1e-5, atol=1e-6)


def test_brightness_costs_nothing_and_units_do_not_matter() -> None:
    shapes, x = random_shapes(1), pictures()
    prior = PatchPrior(shapes)
    assert abs(float(prior.value(x + 0.3) - prior.value(x))) < 1e-10
    wide = PatchPrior(shapes, width=255.0)
    assert abs(float(wide.value(255.0 * x) - prior.value(x))) < 1e-10


def test_grey_shapes_are_those_of_the_mean_of_the_channels() -> None:
    shapes = random_shapes(2)
    grey, pixels = shapes.grey(), shapes.side**2
    for k in range(3):
        whole = shapes.bases[k] @ shapes.variances[k].diag() @ shapes.bases[k].T
        expected = whole.view(3, pixels, 3, pixels).mean((0, 2))
        got = grey.bases[k] @ grey.variances[k].diag() @ grey.bases[k].T
        assert torch.allclose(got, expected, atol=1e-4)


def test_what_is_shipped_tells_photographs_from_noise() -> None:
    assert len((resources.files("rgap.data") / FILE).read_bytes()) < 2_000_000
    prior, draw = PatchPrior(shipped()), torch.Generator().manual_seed(0)
    grey = PatchPrior(shipped(1))
    for photo in load(32).split(1):
        order = torch.randperm(1024, generator=draw)
        shuffled = photo.flatten(2)[..., order].view_as(photo)
        assert float(prior.value(photo)) < float(prior.value(shuffled))
        mean = photo.mean(1, keepdim=True)
        assert float(grey.value(mean)) < float(grey.value(shuffled.mean(1, keepdim=True)))


def test_by_name_it_is_added_to_the_prior_of_differences() -> None:
    x = load(1)
    whole = prior_of("patches", (3, 32, 32), (0.0, 1.0))
    expected = 10.0 * natural(3).value(x) + 3.0 * PatchPrior(shipped()).value(x)
    assert abs(float(whole.value(x) - expected)) < 1e-9
    assert torch.isfinite(photographic(1, 2.0).gradient(load(1).mean(1, keepdim=True))).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"1 or 3 channels, got 2; write prior='natural'"):
        prior_of("patches", (2, 32, 32), None)
    with pytest.raises(ValueError, match=r"at least 6 pixels a side, got samples of \[3, 5, 32\]"):
        prior_of("patches", (3, 5, 32), None)
    with pytest.raises(TypeError, match=r"prior: expected one of 'natural'.*, got 3; write"):
        prior_of(3, (3, 8, 8), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least 6×6 pixels, got \[1, 3, 5, 32\]"):
        PatchPrior(shipped()).value(torch.zeros(1, 3, 5, 32))
    shapes = random_shapes(0)
    with pytest.raises(ValueError, match=r"weights: expected \[3, 2\]"):
        Shapes(shapes.bases, shapes.variances, shapes.contrasts, torch.ones(3, 4), 3, 0.01)
    with pytest.raises(ValueError, match="square patches"):
        Shapes(shapes.bases, shapes.variances, shapes.contrasts, shapes.weights, 2, 0.01)
