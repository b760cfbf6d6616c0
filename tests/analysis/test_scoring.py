"""Scores: rows and samples paired whatever their order, and every number against a reference."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from math import inf

import pytest
import torch
from torch import Tensor

import rgap
from rgap.analysis import Score, score
from rgap.analysis.scoring import ssim
from rgap.recovery import Recovery, Status

B, SHAPE = 5, (3, 16, 16)


def answer(inputs: Tensor | None, labels: Tensor | None = None, **more: object) -> Recovery:
    """A recovery with these rows."""
    fields = {"residual": 0.0, "predicted_error": None, "error_bound": None, "reason": ""} | more
    return Recovery(inputs, labels, Status.EXACT, (), **fields)  # type: ignore[arg-type]


def batch(seed: int = 0, count: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)
    return x, torch.randperm(count, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_is_scored_beside_its_own_row(seed: int) -> None:
    x, y = batch(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(B, generator=generator)
    sizes = 10.0 ** -torch.arange(1, B + 1).double()
    rows = x + sizes[:, None, None, None]
    named = y.clone()
    named[2] = B
    scored = score(answer(rows[order], named[order]), x, y, (-1.0, 1.0))
    assert torch.equal(order[scored.order], torch.arange(B))
    torch.testing.assert_close(scored.error, sizes, rtol=1e-9, atol=0)
    torch.testing.assert_close(scored.psnr, 20 * (2 / sizes).log10(), rtol=1e-9, atol=0)
    assert scored.labels_right is not None and scored.labels_right.tolist() == [
        b != 2 for b in range(B)
    ]
    assert scored.label_accuracy == pytest.approx(0.8) and scored.surplus == 0


def test_structural_similarity_is_the_published_formula() -> None:
    """One window: means, variances and covariance under a Gaussian of σ = 1.5."""
    x, _ = batch(count=2)
    one, two = x[:, :1]
    line = torch.exp(-(torch.arange(-5, 6).double() ** 2) / (2 * 1.5**2))
    weight = torch.outer(line, line) / line.sum() ** 2
    first_window, second_window = one[0, :11, :11], two[0, :11, :11]
    a, b = (weight * first_window).sum(), (weight * second_window).sum()
    aa = (weight * (first_window - a) ** 2).sum()
    bb = (weight * (second_window - b) ** 2).sum()
    ab = (weight * (first_window - a) * (second_window - b)).sum()
    first, second = 0.01**2, 0.03**2
    value = (2 * a * b + first) * (2 * ab + second)
    value = value / ((a**2 + b**2 + first) * (aa + bb + second))
    torch.testing.assert_close(
        ssim(one[None, :, :11, :11], two[None, :, :11, :11])[0], value, rtol=1e-9, atol=0
    )
    windows = [
        float(ssim(one[None, :, i : i + 11, j : j + 11], two[None, :, i : i + 11, j : j + 11]))
        for i in range(6)
        for j in range(6)
    ]
    assert float(ssim(one[None], two[None])) == pytest.approx(sum(windows) / 36)
    assert score(answer(x[:, :, :10]), x[:, :, :10]).ssim is None
    assert score(answer(x), x).ssim.tolist() == pytest.approx([1.0, 1.0])  # type: ignore[union-attr]


def test_equal_pictures_are_told_apart_by_their_labels() -> None:
    x = batch(count=1)[0].expand(2, *SHAPE)
    rows = x + torch.tensor([1e-7, -1e-7]).double()[:, None, None, None]
    scored = score(answer(rows, torch.tensor([1, 0])), x, torch.tensor([0, 1]))
    assert scored.order.tolist() == [1, 0] and scored.label_accuracy == 1.0
    soft = torch.eye(2).double()
    assert score(answer(rows, soft[[1, 0]]), x, soft).label_accuracy == 1.0
    assert score(answer(rows, soft[[1, 0]]), x, torch.tensor([0, 1])).label_accuracy == 1.0


@pytest.mark.parametrize("count", [0, 2, 4, 7])
def test_rows_too_few_and_too_many_are_said(count: int) -> None:
    x, y = batch()
    more, _ = batch(1, 2)
    rows, named = torch.cat([x, more])[:count], torch.cat([y, y[:2]])[:count]
    scored = score(answer(rows, named, error_bound=1e-6) if count else answer(None), x, y)
    met = min(count, B)
    assert scored.order.tolist() == [*range(met), *[-1] * (B - met)]
    assert scored.surplus == max(0, count - B)
    assert scored.psnr.tolist() == [inf] * met + [-inf] * (B - met)
    assert scored.worst == (0.0 if count >= B else inf)
    assert scored.within is (None if count == 0 else count >= B)
    assert scored.label_accuracy == (None if count == 0 else met / B)
    assert ("rows too many" in scored.explain()) is (count > B)


def test_copies_are_rows_and_what_is_open_is_left_out() -> None:
    x, y = batch(count=2)
    three = x[[0, 0, 1]]
    scored = score(answer(x, y, multiplicities=torch.tensor([2, 1])), three, y[[0, 0, 1]])
    assert scored.worst == 0.0 and scored.label_accuracy == 1.0
    partial = x[:1] + 1e-4
    partial[..., 3:] = torch.nan
    scored = score(answer(None, partial=partial, error_bound=2e-4), x[:1])
    assert scored.worst == pytest.approx(1e-4) and scored.within is True
    assert float(scored.psnr) == pytest.approx(80.0)


def test_a_real_recovery_keeps_its_bound_and_a_wrong_batch_breaks_it() -> None:
    model = rgap.models.mlp((40,), 4, "tanh", input_shape=(1, 4, 4), seed=0)
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor([1])))
    right = score(recovery, x, torch.tensor([1]))
    assert right.within is True and right.label_accuracy == 1.0 and float(right.psnr) > 80
    wrong = score(recovery, 1 - x, torch.tensor([0]))
    assert wrong.within is False and wrong.label_accuracy == 0.0
    assert "BEYOND" in wrong.explain()


def test_a_score_is_frozen_and_becomes_plain_numbers() -> None:
    x, y = batch()
    scored = score(answer(x, y), x, y)
    with pytest.raises(FrozenInstanceError):
        scored.surplus = 1  # type: ignore[misc]
    told = scored.summary()
    assert told["psnr"] == [None] * B and told["label_accuracy"] == 1.0
    assert repr(scored).startswith("Score(status=") and isinstance(scored, Score)


@pytest.mark.parametrize(
    ("inputs", "labels", "span", "words"),
    [
        (torch.rand(B, 3, 8, 8), None, (0, 1), r"expected samples of shape \[3, 16, 16\]"),
        (torch.rand(B, *SHAPE), torch.arange(3), (0, 1), "expected 5, one for each"),
        (torch.rand(B, *SHAPE), None, None, "expected .low, high."),
        (torch.rand(B, *SHAPE), None, (1, 1), "low < high"),
    ],
)
def test_what_does_not_fit_is_refused(
    inputs: Tensor, labels: Tensor | None, span: tuple[float, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        score(answer(batch()[0], torch.arange(B)), inputs, labels, span)
