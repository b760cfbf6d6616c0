"""The measured error of the maximum-likelihood estimate beside the Cramér–Rao bound.

For Gaussian noise the most likely batch is the least-squares one, ``min_x ‖g(x) − y‖²``.  It is
found here from the true batch, for many noisy updates y at once: the bound speaks of estimates
that are near the truth, and how an attacker gets there is another question.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.analysis.noise_bound.channel import channel
from rgap.analysis.noise_bound.cramer_rao import noise
from rgap.analysis.noise_bound.fisher import WeighedJacobian
from rgap.analysis.noise_bound.report import NoiseReport
from rgap.analysis.probe import ProbePoint, probe_batch
from rgap.jacobian.update_map import UpdateMap
from rgap.progress import Progress, Shown
from rgap.update.losses import Loss

SETTLED = 1e-6  # of the error: a last step below it changes no digit that is reported
STEPS = 60  # at most; each gains a digit or more where the bound is attained
TOGETHER = 64  # trials at once

__all__ = ["NoiseTrials", "noise_trials"]


@dataclass(frozen=True, eq=False)
class NoiseTrials:
    """Measured against predicted error at one batch.

    Attributes:
        report: the prediction.
        totals: squared error ``‖x̂ − x‖²`` of every trial [T].
        variance: mean squared error of every entry, ``[B, *input_shape]``.
        bias: mean error of every entry, same shape.
        steps: Gauss–Newton steps of the slowest trial.
        settled: False if a trial was still moving when the steps ran out.
        seconds: wall time.
    """

    report: NoiseReport
    totals: Tensor = field(repr=False)
    variance: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    steps: int
    settled: bool
    seconds: float

    @property
    def ratio(self) -> float:
        """Measured mean squared error over the bound; 1 for an estimate that attains it."""
        return float(self.totals.mean() / self.report.variance.sum())

    @property
    def standard_error(self) -> float:
        """Standard error of ``ratio`` over the trials."""
        spread = self.totals.std() / len(self.totals) ** 0.5
        return float(spread / self.report.variance.sum())

    def explain(self) -> str:
        """The comparison in one sentence."""
        words = (
            f"{len(self.totals)} noisy updates at σ = {self.report.level:.2g}: measured over "
            f"predicted squared error {self.ratio:.3f} ± {self.standard_error:.3f}"
        )
        return words + ("." if self.settled else "; some estimates had not settled.")


def noise_trials(
    model: nn.Module,
    inputs: Tensor | Sequence[int],
    batch_size: int | None = None,
    *,
    sigma: float,
    trials: int = 200,
    loss: str | Loss | nn.Module = "cross_entropy",
    labels: Tensor | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Shown = False,
) -> NoiseTrials:
    """Measure the error of the maximum-likelihood estimate from updates with Gaussian noise.

    Every trial minimises ``½‖g(x) − y‖²`` with ``y = g(x₀) + σ e`` by Gauss–Newton from the truth
    x₀: the exact gradient ``J(x)ᵀ(g(x) − y)`` at every step, the matrix ``(JᵀJ)⁻¹`` of x₀ kept.
    Where it stops the gradient vanishes, so the matrix has no part in the answer.

    Args:
        model: in eval mode, with a Jacobian of full column rank; any module.
        inputs: the batch, or the shape of one sample for a random batch.
        batch_size: B, with a shape.
        sigma: standard deviation of the noise, > 0, small enough for the bound to be attained.
        trials: number T of noisy updates.
        loss: of the client.
        labels: targets; drawn if None.
        value_range: of the data.
        seed: of the noise, and of what is drawn.
        device: where to compute; default the CPU.
        progress: True for a line on a terminal, or a function that is told; see
            :mod:`rgap.progress`.

    Raises:
        ValueError: no noise, fewer than 2 trials, a batch that is not identifiable.

    >>> import rgap
    >>> net = rgap.models.mlp((16,), 4, "tanh", input_shape=(1, 4, 4), seed=0)
    >>> found = noise_trials(net, (1, 4, 4), sigma=1e-6, trials=400)
    >>> abs(found.ratio - 1) < 4 * found.standard_error, found.settled
    (True, True)
    """
    start = time.perf_counter()
    if not (isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma: expected a finite number > 0, got {sigma}; write sigma=1e-6")
    if validation.count("trials", trials) < 2:
        raise ValueError("trials: expected at least 2, got 1; write trials=200")
    report = noise(
        model, inputs, batch_size, sigma=sigma, loss=loss, labels=labels,
        value_range=value_range, method="dense", seed=seed,
    )  # fmt: skip
    if report.nullity:
        raise ValueError(
            f"expected a batch that the update determines, got {report.nullity} of "
            f"{report.unknowns} directions that it does not; write a smaller batch, or noise(...) "
            "for the error in the others"
        )
    truth = probe_batch(inputs, batch_size, seed, device)
    point = ProbePoint.of(model, truth, loss, seed if labels is None else labels)
    error, slowest, settled = _errors(point, sigma, trials, seed, progress)
    return NoiseTrials(
        report,
        error.square().flatten(1).sum(1),
        error.square().mean(0),
        error.mean(0),
        slowest,
        settled,
        time.perf_counter() - start,
    )


def _errors(
    point: ProbePoint, sigma: float, trials: int, seed: int, progress: Shown
) -> tuple[Tensor, int, bool]:
    """Errors of the most likely batch at so many drawn noises of standard deviation σ.

    Returns:
        ``x̂ − x₀`` [T, B, *input_shape], the Gauss–Newton steps of the slowest, whether all settled.
    """
    update = point.update
    sent = WeighedJacobian(update, channel(point, sigma, ()))
    upper = torch.linalg.qr(sent.matrix(), mode="r").R
    clean = update.value(point.inputs)
    generator = torch.Generator().manual_seed(seed)
    errors, slowest, settled = [], 0, True
    with Progress(progress) as show:
        for begin in range(0, trials, TOGETHER):
            count = min(TOGETHER, trials - begin)
            show.stage("trial", begin + 1, trials)
            drawn = torch.randn(count, len(clean), generator=generator, dtype=torch.float64)
            estimate, steps, done = _most_likely(update, upper, clean + sigma * drawn.to(clean))
            errors.append(estimate - point.inputs)
            slowest, settled = max(slowest, steps), settled and done
    return torch.cat(errors), slowest, settled


def _most_likely(update: UpdateMap, upper: Tensor, noisy: Tensor) -> tuple[Tensor, int, bool]:
    """``argmin_x ‖g(x) − y‖`` for updates [T, equations]: [T, B, *input_shape], steps, settled."""

    def slope(x: Tensor, y: Tensor) -> Tensor:
        forward = torch.func.vjp(update.value, x)
        value, pull = forward[0], forward[1]
        out: Tensor = pull(value - y)[0]
        return out

    truth = update.inputs
    x = truth.expand(len(noisy), *truth.shape).clone()
    for step in range(STEPS):
        slopes = torch.vmap(slope)(x, noisy).detach().flatten(1)
        half = torch.linalg.solve_triangular(upper.T, slopes.T, upper=False)
        move = torch.linalg.solve_triangular(upper, half, upper=True).T
        x = x - move.reshape(x.shape)
        moved, away = move.norm(dim=1), (x - truth).flatten(1).norm(dim=1)
        if bool((moved <= SETTLED * away).all()):
            return x, step + 1, True
    return x, STEPS, False
