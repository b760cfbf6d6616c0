"""A recovery beside the truth: which sample is which, and how near each one came.

The order of a batch is not in its gradient, so rows and samples are paired one to one first, at

    min over pairings π of  Σ_b ‖x̂_π(b) − x_b‖ / √n,

with labels where pictures are alike.  A score judges an answer and takes no part in finding it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap import validation
from rgap.recovery import Recovery, Status, plain

__all__ = ["Score", "psnr", "score", "ssim"]

WINDOW, SPREAD = 11, 1.5  # of SSIM, as published: pixels a side of its window, and its σ
FLAT = (0.01, 0.03)  # K_1, K_2 there: of the range, below which means and deviations are alike
# Of the value range.  Pictures that differ by less are told apart by their labels, and a dense
# target is right within it: 48 dB and more below the difference of two photographs, and far above
# the rounding of a float32 update in a recovered entry.
ALIKE = 1e-3


@dataclass(frozen=True, eq=False)
class Score:
    """How near a recovery came to the batch, sample by sample in the order of the batch.

    A sample that no row is paired with has ``order`` −1, an infinite error, a PSNR of −∞ and an
    SSIM of NaN.

    Attributes:
        status: of the recovery.
        order: row of the recovery that belongs to each sample [B], copies counted as rows.
        error: largest error of any entry of each sample [B], in units of the data; of the entries
            that are determined, where only some are.
        psnr: of each sample [B] in dB, ∞ where there is no error at all.
        ssim: structural similarity of each picture [B]; None where the data are no pictures
            ``[C, H, W]`` of at least 11 × 11.
        labels_right: whether each sample has its label [B]; None where labels were not recovered,
            or not given.
        surplus: rows that no sample is paired with.
        bound: ``error_bound`` of the recovery.
    """

    status: Status
    order: Tensor = field(repr=False)
    error: Tensor
    psnr: Tensor
    ssim: Tensor | None
    labels_right: Tensor | None
    surplus: int
    bound: float | None

    @property
    def worst(self) -> float:
        """Largest error of any entry of any sample; infinite where a sample is missing."""
        return float(self.error.max())

    @property
    def within(self) -> bool | None:
        """True if the error bound of the certificate holds; None without one."""
        return None if self.bound is None else self.worst <= self.bound

    @property
    def label_accuracy(self) -> float | None:
        """Share of the samples that have their label; None where there is nothing to compare."""
        return None if self.labels_right is None else float(self.labels_right.double().mean())

    def explain(self) -> str:
        """The score in one sentence."""
        met = int((self.order >= 0).sum())
        words = f"{self.status.name}: {met} of {len(self.order)} samples"
        if met:
            paired = self.order >= 0
            words += f", PSNR {float(self.psnr[paired].min()):.1f} dB or more"
            if self.ssim is not None:
                words += f", SSIM {float(self.ssim[paired].min()):.3f} or more"
            words += f", largest error {float(self.error[paired].max()):.2g}"
        if self.bound is not None:
            words += f" ({'within' if self.within else 'BEYOND'} the bound {self.bound:.2g})"
        if self.label_accuracy is not None:
            words += f", labels {self.label_accuracy:.0%} right"
        return words + (f"; {self.surplus} rows too many." if self.surplus else ".")

    def summary(self) -> dict[str, Any]:
        """Plain numbers, for JSON; None where a number is not finite."""
        return {
            "status": self.status.name,
            "order": self.order.tolist(),
            "error": plain(self.error),
            "psnr": plain(self.psnr),
            "ssim": None if self.ssim is None else plain(self.ssim),
            "labels_right": None if self.labels_right is None else self.labels_right.tolist(),
            "label_accuracy": self.label_accuracy,
            "surplus": self.surplus,
            "bound": self.bound,
            "within": self.within,
        }


def score(
    recovery: Recovery,
    inputs: Tensor,
    labels: Tensor | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Score:
    """Compare a recovery with the batch that it was made from.

    Copies of a row (``multiplicities``) count as rows; where only some entries are determined
    (``partial``), these are compared.  Without an answer the nearest candidate is scored, which
    ``status`` then says.

    Args:
        recovery: of `rgap.invert` or `rgap.match`.
        inputs: the true batch x, ``[B, *input_shape]``.
        labels: the true targets y, [B] or [B, C]; None where only inputs are to be compared.
        value_range: of the data; its width is the peak of PSNR and SSIM.

    Returns:
        The :class:`Score`.

    Raises:
        ValueError: inputs of another shape than those recovered, as many labels as no batch has,
            an empty range.

    Source: Wang, Bovik, Sheikh and Simoncelli (2004) for SSIM.

    >>> import rgap
    >>> model = rgap.models.mlp((32,), 4, "tanh", input_shape=(1, 4, 4), seed=0)
    >>> x, y = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([2])
    >>> found = rgap.analysis.score(rgap.invert(model, rgap.capture(model, x, y)), x, y)
    >>> float(found.psnr) > 80, found.label_accuracy, found.within
    (True, 1.0, True)
    """
    limits = validation.bounds(value_range)
    if limits is None:
        raise ValueError("value_range: expected (low, high), got None; write value_range=(0, 1)")
    peak, truth = limits[1] - limits[0], inputs.detach().cpu().double()
    if labels is not None and len(labels) != len(truth):
        raise ValueError(
            f"labels: expected {len(truth)}, one for each of inputs, got {len(labels)}; write "
            "labels=None to compare inputs alone"
        )
    rows, named = _rows(recovery, truth[:0])
    if rows.shape[1:] != truth.shape[1:]:
        raise ValueError(
            f"inputs: expected samples of shape {list(rows.shape[1:])}, as recovered, got "
            f"{list(truth.shape[1:])}; give the batch as the model read it"
        )
    gap = (rows[:, None] - truth[None]).flatten(2)  # NaN where an entry is not determined
    agree = _agree(named, labels, len(rows), len(truth))
    order = _paired(gap.square().nanmean(2).sqrt(), agree, peak * ALIKE)
    met = order >= 0
    mates, samples = order[met], torch.arange(len(truth))[met]
    own = gap[mates, samples]
    error, quality, likeness = (
        torch.full((len(truth),), nothing, dtype=torch.float64)
        for nothing in (torch.inf, -torch.inf, torch.nan)
    )
    error[met] = own.abs().nan_to_num(0.0).amax(1)
    quality[met] = _decibel(own.square().nanmean(1), peak)
    pictures = truth.ndim == 4 and min(truth.shape[2:]) >= WINDOW
    if pictures and len(mates):
        likeness[met] = ssim(truth[samples], rows[mates], peak)
    right = None
    if agree is not None:
        right = torch.zeros(len(truth), dtype=torch.bool)
        right[met] = agree[mates, samples]
    return Score(
        recovery.status, order, error, quality, likeness if pictures else None, right,
        len(rows) - len(mates), recovery.error_bound,
    )  # fmt: skip


def _rows(recovery: Recovery, nothing: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows that are compared and their targets: of the answer, of a part, of a candidate."""
    rows, named = recovery.nearest, recovery.nearest_labels
    if recovery.inputs is None and recovery.partial is not None:
        rows, named = recovery.partial, recovery.labels
    if rows is None:
        return nothing, None
    rows = rows.detach().cpu().double()
    named = None if named is None else named.detach().cpu().double()
    copies = recovery.multiplicities
    if copies is not None and len(copies) == len(rows):
        times = copies.cpu()
        rows = rows.repeat_interleave(times, 0)
        named = None if named is None else named.repeat_interleave(times, 0)
    return rows, named


def _agree(named: Tensor | None, labels: Tensor | None, rows: int, samples: int) -> Tensor | None:
    """Whether a row has the target of a sample, [rows, samples]; classes by the largest entry."""
    if named is None or labels is None:
        return None
    true = torch.as_tensor(labels).detach().cpu().double()
    if named.ndim == true.ndim + 1:
        named = named.argmax(1).double()
    if true.ndim == named.ndim + 1:
        true = true.argmax(1).double()
    apart = named.reshape(rows, 1, -1) - true.reshape(1, samples, -1)
    return apart.abs().amax(2) <= ALIKE


def _paired(cost: Tensor, agree: Tensor | None, alike: float) -> Tensor:
    """Row of every sample at the least total cost [rows, samples], −1 where rows are too few."""
    if agree is not None:
        cost = cost + alike * ~agree
    order = torch.full((cost.shape[1],), -1)
    if len(cost):
        row, sample = linear_sum_assignment(cost.nan_to_num(0.0).numpy())
        order[torch.from_numpy(sample)] = torch.from_numpy(row)
    return order


def _decibel(mse: Tensor, peak: float) -> Tensor:
    """``20 log10(peak / √mse)``; infinite without an error."""
    return 10.0 * torch.log10(peak**2 / mse)


def psnr(original: Tensor, recovered: Tensor, value_range: tuple[float, float] = (0, 1)) -> float:
    """Peak signal-to-noise ratio in dB, ``20 log10(range / rms error)``; infinite if identical.

    Computed in float64 with the range of the data given, not guessed from it; nothing is clipped
    and nothing is capped.

    Args:
        original: a picture, any shape.
        recovered: of the same shape.
        value_range: of the data.

    >>> import torch
    >>> round(psnr(torch.zeros(3, 2, 2), torch.full((3, 2, 2), 1e-5)), 4)
    100.0
    """
    gap = recovered.detach().cpu().double() - original.detach().cpu().double()
    return float(_decibel(gap.square().mean(), float(value_range[1] - value_range[0])))


def ssim(original: Tensor, recovered: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity of pictures [B], averaged over channels and places of the window.

    ::

        SSIM = (2 μ_a μ_b + c_1) (2 σ_ab + c_2) / ((μ_a² + μ_b² + c_1) (σ_a² + σ_b² + c_2))

    with means, variances and covariance under a Gaussian window that lies inside the picture, and
    ``c_1 = (0.01·peak)², c_2 = (0.03·peak)²``.

    Args:
        original: pictures ``[B, C, H, W]`` of at least 11 × 11.
        recovered: of the same shape.
        peak: width of the value range.

    >>> ssim(torch.ones(1, 1, 16, 16), torch.ones(1, 1, 16, 16))
    tensor([1.], dtype=torch.float64)
    """
    place = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-place.square() / (2 * SPREAD**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(picture: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(picture, window)

    a, b = (p.detach().cpu().double().flatten(0, 1)[:, None] for p in (original, recovered))
    first, second = (FLAT[0] * peak) ** 2, (FLAT[1] * peak) ** 2
    middle, spread = mean(a) * mean(b), mean(a * b) - mean(a) * mean(b)
    power = mean(a).square() + mean(b).square()
    variance = mean(a.square()) + mean(b.square()) - power
    likeness = (2 * middle + first) * (2 * spread + second)
    likeness = likeness / ((power + first) * (variance + second))
    return likeness.reshape(len(original), -1).mean(1)
