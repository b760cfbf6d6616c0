"""How well a batch can be recovered from a noisy update: the Cramér–Rao bound, with defences.

To first order least squares sends noise e on the update to ``J⁺ e`` on the batch, so that
``E‖x̂ − x‖² = σ² tr((JᵀJ)⁻¹)``.  No unbiased estimate does better, and least squares attains it for
small noise.  The diagonal says it pixel by pixel.  It holds while the noise moves the answer by
little: clamping to the range of pictures, or another prior, can do better once the noise is large.

Source: Cramér (1946), Rao (1945).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.analysis.noise_bound.channel import channel
from rgap.analysis.noise_bound.defences import Defence, check
from rgap.analysis.noise_bound.fisher import Information, WeighedJacobian, information
from rgap.analysis.noise_bound.report import NoiseReport
from rgap.analysis.probe import ProbePoint, probe_batch
from rgap.machine.allowance import Timed
from rgap.progress import Shown
from rgap.update.losses import Loss

METHODS = ("auto", "dense", "normal", "sampled")

__all__ = ["noise"]


def noise(
    model: nn.Module,
    inputs: Tensor | Sequence[int],
    batch_size: int | None = None,
    *,
    sigma: float = 0.0,
    defence: Defence | Sequence[Defence] | None = None,
    loss: str | Loss | nn.Module = "cross_entropy",
    labels: Tensor | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    method: str = "auto",
    memory_budget: float | None = None,
    time_limit: float | None = None,
    samples: int = 8,
    iterations: int = 2000,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Shown = False,
) -> NoiseReport:
    """Predict the error of the best reconstruction from a noisy update, pixel by pixel.

    ``cov(x̂) = (Jᵀ Σ⁻¹ J)⁺`` at a batch, with ``J = ∂(update)/∂(data)`` and Σ the noise of the
    update.  Where J has a null space, this is the error in the directions that are identifiable;
    the others are not in the update at any noise, and the report counts them.

    Args:
        model: in eval mode; any module.  Left as it was.
        inputs: the batch ``[B, *input_shape]``, or the shape of one sample for a random batch.
        batch_size: B, with a shape; 1 if left out.
        sigma: standard deviation of Gaussian noise in every entry of the update, after clipping.
        defence: one of Clip, DifferentialPrivacy, Prune, Quantise, Sign, or several in that order.
        loss: of the client.
        labels: targets as the loss wants them; drawn, and different as far as possible, if None.
        value_range: of the data; its width is the peak of the PSNR.
        method: "dense" takes the singular values of the weighed J, "normal" the eigenvalues of
            ``JᵀΣ⁻¹J``, "sampled" sends sampled noise through least squares by products alone and
            states the standard error; "auto" is the first that the budget allows, of the formed
            ones up to 4096 unknowns.
        memory_budget: bytes on top of the model, by default half of what is free; kept.
        time_limit: seconds, kept within a tenth; None for none.
        samples: of ``"sampled"``.
        iterations: of one solve of ``"sampled"``, at most.
        seed: of a random batch, labels and samples.
        device: where to compute; default the CPU.
        progress: True for a line on a terminal, or a function; see :mod:`rgap.progress`.

    Returns:
        The :class:`NoiseReport`.

    Raises:
        ValueError: negative noise, train mode, no trained parameters, shapes that do not fit, no
            answer within the budget (:class:`rgap.machine.memory.OutOfMemory`) or the time
            (:class:`rgap.machine.allowance.OutOfTime`).
        TypeError: inputs that are neither a floating tensor nor whole numbers, an unknown defence.

    >>> import rgap
    >>> net = rgap.models.mlp((16,), 4, "tanh", input_shape=(1, 4, 4), seed=0)
    >>> found = noise(net, (1, 4, 4), sigma=1e-4)
    >>> found.rank, found.unknowns, float(found.psnr) > 30
    (16, 16, True)
    >>> noise(net, (1, 4, 4), sigma=found.critical_sigma(30.0)).psnr.round().tolist()
    [30.0]
    """
    start = time.perf_counter()
    show = Timed(progress, time_limit, device or "cpu")
    chain, width = check(defence), _arguments(sigma, value_range, method, samples, iterations)
    pictures = probe_batch(inputs, batch_size, seed, device)
    given = seed if labels is None else labels
    point = ProbePoint.of(
        model, pictures, loss, given, memory_budget=memory_budget, time_limit=time_limit
    )
    sent = WeighedJacobian(point.update, channel(point, float(sigma), chain))
    with show, show.every_operation():
        show.stage("Fisher information")
        route, seen = information(
            sent, method, room=point.room, samples=samples, iterations=iterations, seed=seed,
            show=show,
        )  # fmt: skip
    return NoiseReport(
        **point.about, **_predicted(sent, seen), sigma=float(sigma), defences=chain, width=width,
        method=route, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _predicted(sent: WeighedJacobian, seen: Information) -> dict[str, Any]:
    """Error at the noise of the channel, from the information at unit noise."""
    noisy = sent.channel
    return {
        "equations": int((noisy.weights > 0).sum()),
        "variance": seen.variance * noisy.variance,
        "share": seen.share,
        "unit_variance": seen.variance if noisy.uniform else None,
        "level": noisy.variance**0.5,
        "decision": seen.rank,
        "spectrum": seen.values,
        "sampling": seen.sampling,
        "notes": (*noisy.notes, *seen.notes),
    }


def _arguments(sigma: Any, value_range: Any, method: str, samples: int, iterations: int) -> float:
    """The width of ``value_range``; arguments out of their ranges are refused."""
    if method not in METHODS:
        raise ValueError(f"expected method in {list(METHODS)}, got {method!r}; write method='auto'")
    if not (isfinite(sigma) and sigma >= 0):
        raise ValueError(
            f"sigma: expected a finite standard deviation >= 0, got {sigma}; write sigma=1e-3"
        )
    validation.count("samples", samples)
    validation.count("iterations", iterations)
    limits = validation.bounds(value_range)
    if limits is None:
        raise ValueError(
            "value_range: expected (low, high), got None, and a PSNR needs a peak; write "
            "value_range=(0, 1)"
        )
    return limits[1] - limits[0]
