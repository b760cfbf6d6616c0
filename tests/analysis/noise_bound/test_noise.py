"""Predicted error under noise: against dense algebra, sampled estimates, and each defence."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from math import log10

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.analysis.noise_bound.cramer_rao import noise
from rgap.analysis.noise_bound.defences import (
    Clip,
    Defence,
    DifferentialPrivacy,
    Prune,
    Quantise,
    Sign,
)
from rgap.analysis.noise_bound.trials import noise_trials
from rgap.machine import memory

SHAPE = (1, 4, 4)


def mlp(seed: int = 0) -> nn.Module:
    return rgap.models.mlp((16,), 4, "tanh", input_shape=SHAPE, seed=seed)


class Skip(nn.Module):
    """A residual block with SiLU: nothing that a recursion could pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(96, 4)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.first(x))
        return self.head(self.act(z + self.second(z)).flatten(1))


def skip() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Skip().eval()


def batch(count: int = 1) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1)).double()


def gradient(model: nn.Module, labels: Tensor, x: Tensor) -> Tensor:
    """The reference: the update by autograd, one flat vector."""
    twin = model.double()
    loss = nn.functional.cross_entropy(twin(x), labels)
    found = torch.autograd.grad(loss, list(twin.parameters()), create_graph=True)
    return torch.cat([g.flatten() for g in found])


def differentiated(model: nn.Module, labels: Tensor, x: Tensor, send) -> Tensor:
    """Jacobian of any function of the update, by autograd."""

    def sent(at: Tensor) -> Tensor:
        return send(gradient(model, labels, at))

    found = torch.autograd.functional.jacobian(sent, x, vectorize=True)
    return found.flatten(1)


def jacobian(model: nn.Module, labels: Tensor, x: Tensor) -> Tensor:
    found = torch.autograd.functional.jacobian(
        lambda at: gradient(model, labels, at), x, vectorize=True
    )
    return found.flatten(1)


@pytest.mark.parametrize("build", [mlp, skip])
def test_the_bound_is_that_of_the_dense_jacobian(build) -> None:
    x, labels = batch(2), torch.tensor([1, 3])
    model = build()
    found = noise(model, x, sigma=2e-3, labels=labels)
    j = jacobian(model, labels, x)
    exact = 4e-6 * torch.linalg.inv(j.T @ j).diagonal().reshape(x.shape)
    assert found.rank == found.unknowns == 32
    torch.testing.assert_close(found.variance, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mse, exact.flatten(1).mean(1), rtol=1e-6, atol=0)
    assert found.psnr.tolist() == pytest.approx((-10 * found.mse.log10()).tolist())


def test_the_three_methods_agree() -> None:
    x, model = batch(2), skip()
    dense = noise(model, x, sigma=1e-3, method="dense")
    normal = noise(model, x, sigma=1e-3, method="normal")
    torch.testing.assert_close(normal.variance, dense.variance, rtol=1e-6, atol=0)
    sampled = noise(model, x, sigma=1e-3, method="sampled", samples=200, iterations=2000)
    assert 0 < sampled.sampling < 0.2
    off = float(sampled.variance.sum() / dense.variance.sum()) - 1
    assert abs(off) < 4 * sampled.sampling
    assert sampled.rank is None


def test_sampling_that_was_cut_short_says_that_it_predicts_too_little() -> None:
    found = noise(skip(), batch(2), sigma=1e-3, method="sampled", iterations=3)
    exact = noise(skip(), batch(2), sigma=1e-3)
    assert float(found.variance.sum()) < float(exact.variance.sum())
    assert "too small" in found.explain()


def test_error_is_proportional_to_noise_and_the_critical_level_is_its_inverse() -> None:
    x, model = batch(3), skip()
    one, ten = noise(model, x, sigma=1e-4), noise(model, x, sigma=1e-3)
    torch.testing.assert_close(ten.variance, 100 * one.variance, rtol=1e-12, atol=0)
    level = one.critical_sigma(40.0)
    assert float(noise(model, x, sigma=level).psnr.min()) == pytest.approx(40.0, abs=1e-9)
    assert level == pytest.approx(ten.critical_sigma(40.0))
    wide = noise(model, x, sigma=1e-4, value_range=(-1, 1))
    torch.testing.assert_close(wide.psnr, one.psnr + 20 * log10(2), rtol=1e-12, atol=0)


def test_a_deficient_batch_counts_only_what_is_identifiable() -> None:
    x = batch(1).expand(2, *SHAPE).clone()  # one picture twice: only the sum of moves shows
    labels = torch.tensor([2, 2])
    model = skip()
    found = noise(model, x, sigma=1e-3, labels=labels)
    assert found.nullity == 16
    j = jacobian(model, labels, x)
    exact = 1e-6 * torch.linalg.pinv(j.T @ j, rtol=1e-8, hermitian=True).diagonal()
    torch.testing.assert_close(found.variance.flatten(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.share, torch.full_like(x, 0.5), rtol=1e-6, atol=0)
    assert "16 others (50.0%)" in found.explain()


def test_the_most_likely_batch_attains_the_bound() -> None:
    for model in (mlp(), skip()):
        level = noise(model, batch()).critical_sigma(80.0)
        found = noise_trials(model, batch(), sigma=level, trials=2000)
        assert found.settled
        assert found.standard_error < 0.02
        assert abs(found.ratio - 1) < 0.05
        loose = noise_trials(model, batch(), sigma=1e3 * level, trials=100)
        assert abs(loose.ratio - 1) > abs(found.ratio - 1)  # far from linear it is no bound


def test_trials_refuse_what_is_not_determined() -> None:
    x = batch(1).expand(2, *SHAPE).clone()
    with pytest.raises(ValueError, match="16 of 32 directions"):
        noise_trials(skip(), x, sigma=1e-3, labels=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="sigma: expected a finite number > 0"):
        noise_trials(mlp(), x, sigma=0.0)
    with pytest.raises(ValueError, match="at least 2"):
        noise_trials(mlp(), x, sigma=1.0, trials=1)


def test_clipping_takes_the_length_away() -> None:
    x, labels, model = batch(), torch.tensor([1]), skip()
    norm = 0.1
    found = noise(model, x, sigma=1e-3, labels=labels, defence=Clip(norm))
    j = differentiated(model, labels, x, lambda g: norm * g / g.norm())
    exact = 1e-6 * torch.linalg.inv(j.T @ j).diagonal()
    torch.testing.assert_close(found.variance.flatten(), exact, rtol=1e-6, atol=0)
    idle = noise(model, x, sigma=1e-3, labels=labels, defence=Clip(1e6))
    assert "does not act" in idle.explain()
    plain = noise(model, x, sigma=1e-3, labels=labels)
    torch.testing.assert_close(idle.variance, plain.variance, rtol=1e-12, atol=0)


def test_clipping_can_cost_the_one_equation_that_was_there() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))  # one pixel, rank one
    x = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    assert noise(model, x, sigma=1e-3).rank == 1
    linear = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        linear[1].weight.zero_()  # then dL/dW = −2 t x for a target t: only a length
    target = torch.ones(1, 1, dtype=torch.float64)
    assert noise(linear, x, sigma=1e-3, loss="mse_loss", labels=target).rank == 1
    lost = noise(linear, x, sigma=1e-3, loss="mse_loss", labels=target, defence=Clip(0.1))
    assert lost.rank == 0
    assert lost.psnr.isnan().all()
    assert lost.critical_sigma(30.0) == 0.0
    assert "Nothing is identifiable" in lost.explain()


def test_differential_privacy_of_whole_updates_is_clipping_and_noise() -> None:
    x, model = batch(2), skip()
    private = noise(model, x, defence=DifferentialPrivacy(0.1, 0.02))
    same = noise(model, x, sigma=0.002, defence=Clip(0.1))
    torch.testing.assert_close(private.variance, same.variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_differential_privacy_by_sample_clips_each(reduction: str) -> None:
    x, labels, model = batch(2), torch.tensor([1, 3]), skip()
    clip, z = 0.1, 0.01
    share = 0.5 if reduction == "mean" else 1.0

    def send(at: Tensor) -> Tensor:
        each = [gradient(model, labels[b : b + 1], at[b : b + 1]) for b in range(2)]
        return share * sum(clip * g / g.norm() for g in each)

    j = torch.autograd.functional.jacobian(send, x).flatten(1)
    exact = (z * clip * share) ** 2 * torch.linalg.inv(j.T @ j).diagonal()
    loss = rgap.Loss("cross_entropy", reduction=reduction)
    for method in ("dense", "normal"):
        found = noise(
            model, x, labels=labels, loss=loss, method=method,
            defence=DifferentialPrivacy(clip, z, per_sample=True),
        )  # fmt: skip
        torch.testing.assert_close(found.variance.flatten(), exact, rtol=1e-5, atol=0)


def test_pruning_drops_rows() -> None:
    x, labels, model = batch(), torch.tensor([1]), skip()
    g, j = gradient(model, labels, x).detach(), jacobian(model, labels, x)
    for keep in (0.5, 0.02):
        found = noise(model, x, sigma=1e-3, labels=labels, defence=Prune(keep))
        count = round(keep * len(g))
        rows = j[g.abs().topk(count).indices]
        assert found.equations == count
        assert found.rank == int(torch.linalg.matrix_rank(rows))
    assert found.nullity


def test_quantising_adds_the_noise_of_rounding() -> None:
    x, labels, model = batch(), torch.tensor([1]), skip()
    g, j = gradient(model, labels, x).detach(), jacobian(model, labels, x)
    sizes = [p.numel() for p in model.parameters()]
    steps = torch.cat([2 * p.abs().max().expand(len(p)) / 4095 for p in g.split(sizes)])
    variance = steps**2 / 12 + 1e-12
    exact = torch.linalg.inv(j.T @ (j / variance[:, None])).diagonal()
    found = noise(model, x, sigma=1e-6, labels=labels, defence=Quantise(12))
    torch.testing.assert_close(found.variance.flatten(), exact, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="add their own"):
        found.critical_sigma(30.0)


def test_the_assumption_about_rounding_holds_for_fine_steps() -> None:
    """Least squares from updates that were truly rounded, over pictures: the error predicted."""
    model, labels = skip(), torch.tensor([1])
    sizes = [p.numel() for p in model.parameters()]
    measured = predicted = 0.0
    for seed in range(40):
        x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed)).double()
        g, j = gradient(model, labels, x).detach(), jacobian(model, labels, x)
        steps = torch.cat([2 * p.abs().max().expand(len(p)) / 65535 for p in g.split(sizes)])
        # levels lie at odd multiples of half a step from zero
        error = (torch.floor(g / steps) + 0.5) * steps - g
        weighed = j / steps[:, None]
        answer = torch.linalg.lstsq(weighed, (error / steps)[:, None], driver="gelsd").solution
        measured += float(answer.square().sum())
        predicted += float(noise(model, x, labels=labels, defence=Quantise(16)).variance.sum())
    assert measured / predicted == pytest.approx(1, abs=0.35)  # 40 pictures, a few directions each


def test_signs_fix_nothing_without_noise_and_little_with_it() -> None:
    x, labels, model = batch(), torch.tensor([1]), skip()
    bare = noise(model, x, labels=labels, defence=Sign())
    assert bare.rank == 0
    assert "inequalities" in bare.explain()
    with pytest.raises(ValueError, match="add their own"):
        bare.critical_sigma(30.0)
    g, j = gradient(model, labels, x).detach(), jacobian(model, labels, x)
    sigma = 0.5
    normal = torch.distributions.Normal(0.0, 1.0)
    a = g / sigma
    odds = normal.log_prob(a).exp() ** 2 / (normal.cdf(a) * normal.cdf(-a)) / sigma**2
    exact = torch.linalg.inv(j.T @ (j * odds[:, None])).diagonal()
    found = noise(model, x, sigma=sigma, labels=labels, defence=Sign())
    torch.testing.assert_close(found.variance.flatten(), exact, rtol=1e-5, atol=0)
    plain = noise(model, x, sigma=sigma, labels=labels)
    assert bool((found.variance >= plain.variance * torch.pi / 2 * (1 - 1e-9)).all())


def test_without_noise_what_is_identifiable_is_exact() -> None:
    found = noise(mlp(), batch())
    assert found.variance.count_nonzero() == 0
    assert "exact" in found.explain()
    assert bool(found.psnr.isinf().all())


def test_the_model_is_left_as_it_was() -> None:
    model = skip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    noise(model, batch(), sigma=1e-3, method="sampled", iterations=5)
    noise_trials(model, batch(), sigma=1e-5, trials=3)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": -1.0}, "sigma: expected a finite standard deviation >= 0, got -1.0"),
        ({"sigma": float("nan")}, "sigma: expected a finite"),
        ({"method": "magic"}, "expected method in"),
        ({"value_range": (1, 0)}, "low < high"),
        ({"value_range": None}, "a PSNR needs a peak"),
        ({"samples": 0}, "samples: expected at least 1"),
        ({"batch_size": 3}, "expected batch_size=1"),
        ({"method": "dense", "memory_budget": 1e5}, "or method='sampled'"),
        ({"defence": (Quantise(8), Clip(1.0))}, "clipping first"),
        ({"defence": (Clip(1.0), Clip(2.0))}, "each once"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LEAST", 1.0)
    with pytest.raises(ValueError, match=message):
        noise(mlp(), batch(), **arguments)


def test_other_bad_input() -> None:
    with pytest.raises(TypeError, match="expected Clip"):
        noise(mlp(), batch(), defence="clip")
    with pytest.raises(TypeError, match="expected floating numbers"):
        noise(mlp(), torch.ones(1, *SHAPE, dtype=torch.long))
    with pytest.raises(ValueError, match="no parameters"):
        noise(nn.Flatten(), batch())
    with pytest.raises(ValueError, match="train mode"):
        noise(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 2)), batch())
    with pytest.raises(ValueError, match="finite number of dB"):
        noise(mlp(), batch(), sigma=1.0).critical_sigma(float("inf"))
    with pytest.raises(ValueError, match="forward pass"):
        noise(mlp(), (3, 9, 9))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Clip(0.0), "Clip.norm"),
        (lambda: Clip(float("inf")), "Clip.norm"),
        (lambda: DifferentialPrivacy(-1.0, 1.0), "DifferentialPrivacy.clip"),
        (lambda: DifferentialPrivacy(1.0, -1.0), "DifferentialPrivacy.multiplier"),
        (lambda: Prune(0.0), r"share in \(0, 1\]"),
        (lambda: Prune(1.5), r"share in \(0, 1\]"),
        (lambda: Quantise(0), "1 to 32"),
        (lambda: Quantise(2.5), "1 to 32"),
    ],
)
def test_bad_defences_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_defence_is_frozen_and_summaries_are_plain() -> None:
    import json

    one: Defence = Clip(1.0)
    with pytest.raises(FrozenInstanceError):
        one.norm = 2.0  # type: ignore[misc]
    found = noise(mlp(), batch(2), sigma=1e-3, defence=(one, Prune(0.5), Quantise(8)))
    told = json.loads(json.dumps(found.summary()))
    assert told["defences"] == ["Clip(norm=1.0)", "Prune(keep=0.5)", "Quantise(bits=8)"]
    assert len(told["psnr"]) == 2


def test_the_figures_show_what_was_found() -> None:
    from rgap.analysis.plots.noise import error_map, noise_levels, weighed_spectrum

    x = batch(1).expand(2, *SHAPE).clone()
    found = noise(skip(), x, sigma=1e-3, labels=torch.tensor([2, 2]))
    figure = error_map(found)
    drawn = figure.axes[0].images[0].get_array()
    assert torch.as_tensor(drawn.data).allclose(found.std[0, 0])
    assert "16 identifiable" in figure.get_suptitle()
    assert found.plot().axes
    spectrum = weighed_spectrum(found).axes[0]
    assert "16 of 32 identifiable" in spectrum.get_title()
    level = float(torch.as_tensor(noise_levels(found, 25.0).axes[0].lines[-1].get_xdata())[0])
    assert level == pytest.approx(found.critical_sigma(25.0))
    with pytest.raises(ValueError, match="sigma=1e-3"):
        error_map(noise(skip(), x))
    with pytest.raises(ValueError, match="expected noise and singular values"):
        weighed_spectrum(noise(skip(), x))
    with pytest.raises(ValueError, match="input_shape"):
        error_map(noise(nn.Sequential(nn.Linear(3, 4)), (3,), sigma=1.0))
