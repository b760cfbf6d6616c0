"""Figures: what they state, and that they leave pyplot alone."""

from __future__ import annotations

import sys
from math import inf, log10

import pytest
import torch

from rgap.analysis.discard.table import Audit, AuditRow
from rgap.analysis.plots.discard import discard_heatmap, percent, psnr, side_by_side


def row(layer: str, batch: int, unknowns: int, nullity: int) -> AuditRow:
    joint = unknowns - nullity
    return AuditRow(
        layer, "conv2d", batch, unknowns, joint, 0, joint, nullity, nullity / unknowns, 1.0
    )


TABLE = Audit(
    "LeNet",
    "exact",
    (row("conv1", 1, 3072, 0), row("conv2", 1, 3072, 0), row("conv1", 2, 6144, 1152)),
)


def texts(figure: object) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]  # type: ignore[attr-defined]


def test_heatmap_states_share_and_count_in_forward_order() -> None:
    figure = discard_heatmap(TABLE)
    axes, bar = figure.axes
    assert texts(figure) == ["0%", "0", "18.8%", "1,152", "0%", "0", "–"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "conv1  (conv2d)",
        "conv2  (conv2d)",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    image = axes.images[0]
    assert image.get_clim() == (0.0, 1.0)
    assert float(image.get_array()[0, 1]) == pytest.approx(1152 / 6144)
    assert bar.get_ylabel() and axes.get_title() and axes.get_xlabel() == "batch size"


def test_heatmap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an audit with rows"):
        discard_heatmap(Audit("LeNet", "exact", ()))


def test_a_share_never_rounds_to_a_count_it_is_not() -> None:
    assert [percent(s) for s in (0.0, 1e-9, 0.5, 1 - 1e-9, 1.0)] == [
        "0%",
        "<0.1%",
        "50.0%",
        ">99.9%",
        "100%",
    ]


@pytest.mark.parametrize(("error", "span"), [(1e-12, 1.0), (1e-3, 1.0), (0.25, 2.0)])
def test_psnr_is_the_formula_without_a_cap(error: float, span: float) -> None:
    original = torch.rand(3, 4, 4, dtype=torch.float64)
    found = psnr(original, original + error, (-span / 2, span / 2))
    assert found == pytest.approx(20 * log10(span / error), rel=1e-3)
    assert psnr(original, original) == inf


def test_side_by_side_amplifies_by_the_factor_in_the_title() -> None:
    original = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64)
    figure = side_by_side(original, original + 3e-6, titles=["a cat"])
    top, middle, bottom = figure.axes
    assert top.get_title() == "a cat"
    assert middle.get_xlabel() == "PSNR 110.5 dB"
    assert bottom.get_title() == r"error × $2 \cdot 10^{5}$"
    assert float(bottom.images[0].get_array().max()) == pytest.approx(0.6)
    assert [a.get_ylabel() for a in figure.axes] == ["original", "recovered", "error"]


def test_what_is_not_determined_is_said_and_not_drawn() -> None:
    pictures = [torch.rand(1, 5, 6), torch.rand(3, 4, 4)]
    figure = side_by_side(pictures, [None, pictures[1]])
    grid = {(i // 2, i % 2): axes for i, axes in enumerate(figure.axes)}
    assert [t.get_text() for t in grid[1, 0].texts] == ["not determined"]
    assert not grid[1, 0].images
    assert grid[1, 1].get_xlabel() == "identical"
    assert grid[2, 1].get_title() == "no error at all"
    nothing = side_by_side(pictures, None)
    assert sum(bool(axes.images) for axes in nothing.axes) == 2


@pytest.mark.parametrize(
    ("originals", "recovered", "words"),
    [
        (torch.rand(2, 16), None, r"expected pictures \[C, H, W\]"),
        (torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4), "as many recovered pictures"),
        (torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5), r"of shape \[3, 4, 4\]"),
    ],
)
def test_pictures_that_do_not_match_are_refused(
    originals: torch.Tensor, recovered: torch.Tensor | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        side_by_side(originals, recovered)


def test_no_global_state_of_pyplot() -> None:
    before = sys.modules.get("matplotlib.pyplot")
    side_by_side(torch.rand(1, 1, 4, 4), None)
    discard_heatmap(TABLE)
    if before is None:
        assert "matplotlib.pyplot" not in sys.modules
    else:
        assert before.get_fignums() == []
