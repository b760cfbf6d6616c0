"""What `noise` predicts: error by picture and pixel, in words, numbers and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite, log10, nan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rgap.analysis.finding import Finding
from rgap.analysis.noise_bound.defences import Defence
from rgap.recovery import plain
from rgap.solvers.rank import Rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseReport(Finding):
    """Predicted error of the least-squares reconstruction from a noisy update, at one batch.

    ``method`` is "dense", "normal" or "sampled"; ``equations`` counts those that carry information.

    Attributes:
        sigma: Gaussian noise that was stated.
        defences: in the order in which they act.
        width: of the value range, the peak of the PSNR.
        variance: predicted variance of every entry, ``[B, *input_shape]``, over the identifiable
            directions.
        share: share of every entry's unit vector that is identifiable, same shape.
        unit_variance: the same at noise of variance 1, where the error is proportional to the
            noise; None otherwise (signs, quantised tensors of unequal steps).
        level: standard deviation of an entry of the update with all its noise; with
            ``unit_variance`` None, that of the noisiest entry.
        decision: rank of the weighed Jacobian and its gap; None where it was not seen.
        spectrum: singular values of the Jacobian, its rows weighed by their noise relative to
            ``level``; empty for ``"sampled"``.
        sampling: relative standard error of the predicted total; 0 where it was computed.
    """

    sigma: float
    defences: tuple[Defence, ...]
    width: float
    variance: Tensor = field(repr=False)
    share: Tensor = field(repr=False)
    unit_variance: Tensor | None = field(repr=False)
    level: float
    decision: Rank | None
    spectrum: Tensor = field(repr=False)
    sampling: float = 0.0

    @property
    def rank(self) -> int | None:
        """Identifiable directions; None where the method does not see them."""
        return None if self.decision is None else self.decision.rank

    @property
    def nullity(self) -> int | None:
        """Directions that are not in the update at any noise; None where not seen."""
        return None if self.decision is None else self.decision.nullity

    @property
    def mse(self) -> Tensor:
        """Predicted mean squared error of every picture [B], over the identifiable directions.

        NaN where nothing at all is identifiable.
        """
        error = self.variance.flatten(1).mean(1)
        return torch.full_like(error, nan) if self.rank == 0 else error

    @property
    def psnr(self) -> Tensor:
        """Predicted PSNR of every picture in dB [B]; infinite without noise, NaN at rank 0."""
        return 20 * log10(self.width) - 10 * self.mse.log10()

    @property
    def std(self) -> Tensor:
        """Predicted standard deviation of every entry, ``[B, *input_shape]``: the error map."""
        return self.variance.sqrt()

    @property
    def lost(self) -> int | None:
        """Identifiable directions whose error exceeds the value range; None where not seen.

        In these a guess from the range alone is as good as the update.
        """
        if self.decision is None:
            return None
        kept = self.spectrum[: self.decision.rank]
        return int((self.level > self.width * kept).sum())

    def critical_sigma(self, psnr: float) -> float:
        """The largest noise at which every picture is still predicted at ``psnr`` dB or better.

        ``σ* = width · 10^(−psnr/20) / √(max_b mean_b diag (JᵀJ)⁻¹)``, because the squared error is
        proportional to σ².  It counts the identifiable directions only; 0 where there are none.

        Args:
            psnr: in dB.

        Raises:
            ValueError: a PSNR that is not finite, or an error that is not proportional to the
                noise (signs, quantising).
        """
        if not isfinite(psnr):
            raise ValueError(f"psnr: expected a finite number of dB, got {psnr}; write 30.0")
        if self.unit_variance is None:
            raise ValueError(
                "expected an error proportional to the noise, got one from "
                f"{[type(d).__name__ for d in self.defences]}, which add their own; write "
                "noise(model, inputs, sigma=...) at several sigma and read psnr"
            )
        if self.rank == 0:
            return 0.0
        worst = float(self.unit_variance.flatten(1).mean(1).amax())
        return self.width * 10 ** (-psnr / 20) / worst**0.5 if worst > 0 else inf

    def explain(self) -> str:
        """The prediction in plain words."""
        told = ", ".join(str(one) for one in self.defences)
        lines = [
            f"{self.model} at B = {self.batch_size}, noise σ = {self.level:.3g} on an entry of the "
            f"update{' after ' + told if told else ''}: {self.equations:,} equations for "
            f"{self.unknowns:,} unknowns ({self.method})."
        ]
        if self.rank == 0:
            return "\n".join([*lines, "Nothing is identifiable to first order.", *self.notes])
        if self.level == 0:
            lines.append("Without noise the identifiable directions are exact.")
        else:
            low, high = float(self.psnr.min()), float(self.psnr.max())
            both = f"{low:.1f}" if high - low < 0.05 else f"{low:.1f} to {high:.1f}"
            lines.append(
                f"Predicted PSNR {both} dB; standard error of a pixel {float(self.std.min()):.2g} "
                f"to {float(self.std.max()):.2g}."
                + (" Twice the noise costs 6 dB." if self.unit_variance is not None else "")
            )
        if self.nullity:
            lines.append(
                f"That is the error in the {self.rank:,} directions that are identifiable; "
                f"{self.nullity:,} others ({self.nullity / self.unknowns:.1%}) are not in the "
                "update at any noise."
            )
        if self.lost:
            lines.append(
                f"In {self.lost:,} directions the error exceeds the range of the data: there the "
                "update says less than the range, and the first-order prediction is too large."
            )
        if self.decision is not None and self.rank:
            lines.append(
                f"Condition {self.decision.condition:.1e}; the error is shared by about "
                f"{self.effective:.0f} directions."
            )
        return "\n".join([*lines, *self.notes])

    @property
    def effective(self) -> float:
        """Directions that share the error: ``(Σ λ)²/Σ λ²``, λ the eigenvalues of the covariance.

        1 where a single direction carries all of it; the squared error of one trial scatters by
        ``√(2/effective)`` around its mean.  NaN where the spectrum was not seen.
        """
        if not self.rank:
            return nan
        shares = self.spectrum[: self.rank].double()
        shares = (shares[-1] / shares).square()
        return float(shares.sum().square() / shares.square().sum())

    def _numbers(self) -> dict[str, Any]:
        return {
            "sigma": self.sigma,
            "defences": [str(one) for one in self.defences],
            "rank": self.rank,
            "nullity": self.nullity,
            "lost": self.lost,
            "level": self.level,
            "mse": [plain(v) for v in self.mse.tolist()],
            "psnr": [plain(v) for v in self.psnr.tolist()],
            "sampling": plain(self.sampling),
        }

    def plot(self) -> Figure:
        """The predicted error map of every picture."""
        from rgap.analysis.plots.noise import error_map

        return error_map(self)
