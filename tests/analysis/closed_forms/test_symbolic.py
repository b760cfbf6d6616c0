"""Expressions in B and in the sizes: against exact ranks, against themselves, and as they read."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import prod

import matplotlib.mathtext
import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import RandomLayer, layers, true_joint_rank
from torch import nn

import rgap
from rgap.analysis import SymbolicLayer, closed_form, layer_form, symbolic
from rgap.analysis.closed_forms.batches import (
    EveryBatch,
    every_batch,
    lines_of,
    lowest,
    open_part,
    stepwise,
    tidy,
    turns,
)
from rgap.analysis.closed_forms.witness import Witness
from rgap.analysis.generic_rank.modular import modular_ranks
from rgap.network.chain import parse

B = sympy.Symbol("B", positive=True, integer=True)
ALL_ON = [layer for layer in layers(60) if bool(layer.active.all())]
LENET = {
    "in_channels": 12, "out_channels": 12, "kernel_size": 5, "input_size": (16, 16), "stride": 2,
    "padding": 2,
}  # fmt: skip
CNN6D = LENET | {"out_channels": 20, "kernel_size": 3, "input_size": (17, 17), "padding": 1}


@cache
def form_of(index: int) -> EveryBatch:
    return every_batch(next(layer for layer in ALL_ON if layer.index == index).affine, B)


def ids(layer: RandomLayer) -> str:
    return f"{layer.index}: {layer.title}"


# ---------------------------------------------------------------- every batch size


@pytest.mark.cases(18)
@pytest.mark.parametrize("layer", ALL_ON, ids=ids)
def test_for_every_batch_never_below_and_equal_where_exact(layer: RandomLayer) -> None:
    """At the layer's own B, and at the next one."""
    form = form_of(layer.index)
    for batch in (layer.batch, layer.batch + 1):
        found = modular_ranks(layer.affine, batch, seed=batch)
        pairs = (
            (form.gradient, form.gradient_exact, found.gradient),
            (form.weight, form.weight_exact, found.weight),
            (form.joint, form.exact, found.joint),
        )
        for expression, exact, truth in pairs:
            value = int(expression.subs(B, batch))
            assert value >= truth
            assert not exact or value == truth


def test_for_every_batch_exact_nine_times_in_ten() -> None:
    assert sum(form_of(layer.index).exact for layer in ALL_ON) >= 0.9 * len(ALL_ON)


@pytest.mark.parametrize("layer", ALL_ON[::2], ids=ids)
def test_the_critical_batch_is_the_first_with_something_open(layer: RandomLayer) -> None:
    """By exact ranks at B* − 1 and B*; an expression that says never leaves nothing at B = 5."""
    form = form_of(layer.index)
    if not form.exact:
        return
    single = prod(layer.affine.in_shape)
    if form.critical == sympy.oo:
        assert modular_ranks(layer.affine, 5, points=1).joint == 5 * single
        return
    star = int(form.critical)
    if star * single > 4000:
        star = 4000 // single  # not there yet: everything below must be determined
        assert star == 0 or modular_ranks(layer.affine, star, points=1).joint == star * single
        return
    assert modular_ranks(layer.affine, star, points=1).joint < star * single
    if star > 1:
        assert modular_ranks(layer.affine, star - 1, points=1).joint == (star - 1) * single


@pytest.mark.cases(18)
@pytest.mark.parametrize("layer", ALL_ON, ids=ids)
def test_a_witness_is_a_lower_bound(layer: RandomLayer) -> None:
    seen = Witness(layer.affine)
    gradient, weight, joint = true_joint_rank(layer)
    assert seen.gradient(layer.batch) <= gradient
    assert layer.batch * seen.weight(weight) <= weight
    assert seen.joint(layer.batch, joint) <= joint


def test_a_witness_that_may_not_work_claims_little() -> None:
    conv = parse(rgap.models.lenet(seed=0), (3, 32, 32)).stages[1].affine
    idle, busy = Witness(conv, most=1.0), Witness(conv)
    assert idle.gradient(2) == 0
    assert idle.weight(768) == 768  # one tap a filter, nothing eliminated
    assert idle.joint(2, 4992) == 1536
    assert (busy.gradient(2), busy.joint(2, 4992)) == (3600, 4992)


def test_a_bound_that_is_not_reached_stays_a_bound() -> None:
    form = layer_form("conv2d", LENET, effort=1.0)
    assert not form.exact
    assert not form.gradient_exact
    assert form.text().splitlines()[0].startswith("conv2d: a bound;")
    assert "  joint rank     ≤ min(3072·B, 768·B + 3456)" in form.text().splitlines()
    assert "  nullity        ≥ 1152·max(0, 2·B − 3)" in form.text().splitlines()
    assert "shared" not in form.text()


# ---------------------------------------------------------------- single layers


def test_published_layers() -> None:
    conv2 = layer_form("conv2d", LENET)
    assert conv2.joint_rank == sympy.Min(3072 * B, 768 * B + 3456)
    assert conv2.exact
    assert conv2.at({"B": 2}) == {
        "unknowns": 6144,
        "gradient_rank": 3600,
        "weight_rank": 1536,
        "joint_rank": 4992,
        "overlap": 144,
        "nullity": 1152,
    }
    assert conv2.at({"B": 1})["nullity"] == 0
    assert conv2.critical_batch == 2

    small = layer_form("conv2d", CNN6D)
    assert small.exact
    assert small.at({B: 1}) == {
        "unknowns": 3468,
        "gradient_rank": 1968,  # the naive count says 2160
        "weight_rank": 1620,
        "joint_rank": 3188,
        "overlap": 400,
        "nullity": 280,
    }
    assert small.critical_batch == 1


@pytest.mark.cases(3)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("sizes", [LENET, CNN6D], ids=["lenet", "cnn6d"])
def test_numbers_and_symbols_agree(sizes: dict[str, object], batch: int) -> None:
    assert layer_form("conv2d", {**sizes, "batch": batch}).at({}) == layer_form("conv2d", sizes).at(
        {"B": batch}
    )


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_linear_is_its_theorem_and_its_matrices(width: int, out: int, batch: int) -> None:
    rng = np.random.default_rng(width + 10 * out + 100 * batch)
    w, k = rng.normal(size=(out, width)), rng.normal(size=(batch, out))
    rows = np.concatenate([np.kron(k.T, np.eye(width)), np.kron(np.eye(batch), w)])
    rank = int(np.linalg.matrix_rank(rows))
    symbols = layer_form("linear", {"in_features": "n", "out_features": "m"})
    numbers = layer_form("linear", {"in_features": width, "out_features": out})
    for counts in (symbols.at({"n": width, "m": out, "B": batch}), numbers.at({"B": batch})):
        assert counts["joint_rank"] == rank
        assert counts["nullity"] == batch * width - rank
    assert numbers.critical_batch == (out + 1 if out < width else sympy.oo)


@settings(max_examples=3)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(3, 7), st.integers(0, 2)
)
def test_symbols_for_sizes_are_upper_bounds(c: int, f: int, k: int, n: int, p: int) -> None:
    """One expression for every size, held against the counts of numbers with a proof."""
    if n + 2 * p < k:
        return
    form = _general()
    numbers = {"C": c, "F": f, "k": k, "H": n, "W": n, "p": p}
    conv = nn.Conv2d(c, f, k, 2, p)
    affine = parse(nn.Sequential(conv, nn.Flatten()), (c, n, n)).stages[0].affine
    for batch in (1, 2):
        counts, truth = form.at(numbers | {"B": batch}), closed_form(affine, batch)
        assert counts["unknowns"] == truth.unknowns
        assert counts["gradient_rank"] >= truth.gradient_rank or not truth.gradient_exact
        assert counts["weight_rank"] >= truth.weight_rank or not truth.weight_exact
        assert counts["joint_rank"] >= truth.joint_rank or not truth.exact
        assert counts["nullity"] <= truth.nullity or not truth.exact
        assert counts["nullity"] == counts["unknowns"] - counts["joint_rank"]
    star = form.critical_batch.subs({form_symbol(s): v for s, v in numbers.items()})
    if star != sympy.oo and star <= 4:
        truth = closed_form(affine, int(star))
        assert truth.nullity > 0


@cache
def _general() -> SymbolicLayer:
    sizes = {
        "in_channels": "C",
        "out_channels": "F",
        "kernel_size": "k",
        "input_size": ("H", "W"),
        "padding": "p",
        "stride": 2,
    }
    return layer_form("conv2d", sizes)


def form_symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, positive=True, integer=True)


@settings(max_examples=40)
@given(st.integers(1, 10), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))
def test_average_pools_have_the_rank_of_their_matrix(n: int, k: int, s: int, p: int) -> None:
    if p > k // 2 or n + 2 * p < k:
        return
    pool = nn.AvgPool2d(k, s, p)
    unit = torch.eye(n * n, dtype=torch.float64).reshape(-1, 1, n, n)
    rank = int(torch.linalg.matrix_rank(pool(unit).flatten(1)))
    sizes = {"channels": 3, "input_size": (n, n), "kernel_size": k, "stride": s, "padding": p}
    form = layer_form("average_pool", sizes)
    assert form.exact
    assert form.at({"B": 2})["joint_rank"] == 2 * 3 * rank
    assert form.critical_batch == (1 if rank < n * n else sympy.oo)


def test_pointwise_layers() -> None:
    assert layer_form("batch_norm", {"features": "n"}).nullity == 0
    assert layer_form("invertible", {"features": 7}).critical_batch == sympy.oo
    relu = layer_form("relu", {"features": 8, "active": sympy.Rational(1, 4)})
    assert relu.at({"B": 3})["nullity"] == 18
    assert layer_form("relu", {"features": "n"}).text().splitlines()[-2:] == [
        "  nullity        = B·n·(1 − ρ)",
        "  critical batch = 1",
    ]


def test_max_pools_are_bounds() -> None:
    form = layer_form("max_pool", {"channels": 2, "input_size": (6, 6), "kernel_size": 2})
    assert not form.exact
    assert form.at({"B": 1})["weight_rank"] == 18
    assert form.critical_batch == 1


# ---------------------------------------------------------------- networks


def test_lenet() -> None:
    net = symbolic(rgap.models.lenet(seed=0), (3, 32, 32))
    assert net.exact
    assert [layer.critical_batch for layer in net.layers] == [sympy.oo, 2, sympy.oo, 10]
    assert net.critical_batch == 2
    assert int(net.total_nullity.subs(B, 2)) == 1152
    assert int(net.total_nullity.subs(B, 1)) == 0
    assert int(net.total_unknowns.subs(B, 1)) == 2 * 3072 + 2 * 768
    assert net.text().splitlines()[3].split("  ")[0] == "conv2"
    assert "1152·max(0, 2·B − 3)" in net.text()
    for batch in (1, 2, 3, 9, 10, 30):
        total = sum(layer.at({"B": batch})["nullity"] for layer in net.layers)
        assert int(net.total_nullity.subs(B, batch)) == total


def test_mlp() -> None:
    net = symbolic(rgap.models.mlp((64, 32), 10, input_shape=(1, 8, 8), seed=0), (1, 8, 8))
    assert [layer.kind for layer in net.layers] == ["linear", "linear", "head"]
    assert [layer.critical_batch for layer in net.layers] == [sympy.oo, 33, 10]
    assert net.exact


def test_any_module_with_pools_norms_and_sequences() -> None:
    class Any(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding="same")
            self.norm = nn.BatchNorm2d(4)
            self.pool = nn.MaxPool2d(2)
            self.mean = nn.AdaptiveAvgPool2d(2)
            self.rows = nn.Linear(4, 3)
            self.out = nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.mean(input=self.pool(torch.relu(self.norm(self.conv(x)))))
            return self.out(self.rows(x.flatten(2).transpose(1, 2)).flatten(1))

    net = symbolic(Any().eval(), (1, 8, 8), "n")
    kinds = ["conv2d", "batch_norm", "max_pool", "average_pool", "linear", "head"]
    assert [layer.kind for layer in net.layers] == kinds
    assert net.layers[4].unknowns == 4 * 4 * sympy.Symbol("n", positive=True, integer=True)
    assert not net.exact
    assert "The places of the winners of max-pools are taken as known." in net.notes
    assert int(net.total_nullity.subs(dict.fromkeys(net.total_nullity.free_symbols, 3))) > 0


# ---------------------------------------------------------------- how it reads


def rendered(formula: str) -> None:
    matplotlib.mathtext.MathTextParser("path").parse(f"${formula}$")


def cells(table: str) -> list[str]:
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    return [cell.strip(" $\\") for row in rows for cell in row.split("&") if "$" in cell]


def test_latex_parses() -> None:
    net = symbolic(rgap.models.lenet(seed=0), (3, 32, 32))
    found = cells(net.latex())
    assert len(found) == 4 * 6 + 4
    for cell in found:
        rendered(cell)
    assert net.latex().count("{") == net.latex().count("}")
    for form in (_general(), layer_form("conv2d", LENET), layer_form("relu", {"features": "n"})):
        body = form.latex().removeprefix(r"\begin{aligned} ").removesuffix(r" \end{aligned}")
        for line in body.split(r" \\ "):
            rendered(line.replace("&", ""))


def test_long_expressions_get_names() -> None:
    lines = _general().text().splitlines()
    assert lines[0] == ("conv2d: a bound; rows and pixels counted by residue classes of the stride")
    assert lines[-1].startswith("  where α = min(F, C·k²), ")
    assert max(map(len, lines[:-1])) <= 120
    named = layer_form(
        "conv2d",
        {**dict.fromkeys(("in_channels", "out_channels"), 4), "kernel_size": 3, "stride": 2}
        | {"input_size": ("H", "W"), "output_size": ("P", "Q")},
    )
    assert "P·Q" in named.text()


def test_html_marks_bounds() -> None:
    pool = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 2))
    page = symbolic(pool.eval(), (1, 8, 8))._repr_html_()
    assert page.startswith("<table>")
    assert "<td>≤ 18·B</td>" in page


# ---------------------------------------------------------------- minima of lines


@st.composite
def concave(draw: st.DrawFn) -> sympy.Expr:
    """Sums of multiples of minima of lines, nested once."""
    line = st.builds(lambda a, s: a + s * B, st.integers(0, 40), st.integers(0, 12))
    least = st.lists(line, min_size=1, max_size=4).map(lambda parts: sympy.Min(*parts))
    inner = draw(st.lists(least, min_size=1, max_size=3))
    factors = draw(st.lists(st.integers(1, 5), min_size=len(inner), max_size=len(inner)))
    total = sympy.Add(*(f * part for f, part in zip(factors, inner, strict=True)))
    return sympy.Min(total, draw(line)) if draw(st.booleans()) else total


@settings(max_examples=30)
@given(concave())
def test_tidy_is_the_same_function(expression: sympy.Expr) -> None:
    neat, lines = tidy(expression, B), lines_of(expression, B)
    assert lines is not None
    values = [expression.subs(B, b) for b in range(1, 31)]
    assert [neat.subs(B, b) for b in range(1, 31)] == values
    assert all(s >= t for (_, s), (_, t) in pairwise(lines))
    bends = [b for b in range(2, 30) if 2 * values[b - 1] != values[b - 2] + values[b]]
    assert set(bends) <= set(turns(lines))


@settings(max_examples=30)
@given(concave(), concave())
def test_open_parts_and_differences(one: sympy.Expr, two: sympy.Expr) -> None:
    left = open_part(100 * B, one, B)
    apart = stepwise([one, 3 * B], [two], B)
    for b in (*range(1, 20), 41):
        assert left.subs(B, b) == 100 * b - one.subs(B, b)
        assert apart.subs(B, b) == one.subs(B, b) + 3 * b - two.subs(B, b)


def test_what_is_no_minimum_of_lines_stays() -> None:
    n = sympy.Symbol("n", positive=True)
    assert lines_of(B**2, B) is None
    assert lines_of(-sympy.Min(3, B), B) is None
    assert tidy(sympy.Min(n, B), B) == sympy.Min(n, B)
    assert lowest([(Fraction(1), Fraction(2))], B) == 2 * B + 1


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        ("conv4d", {}, r"expected kind in \['average_pool'.*write kind='conv2d'"),
        ("linear", {"in_features": 3}, r"linear: expected the size 'out_features', got \[\]"),
        ("linear", {"in_features": 0, "out_features": 1}, r"expected in_features to be a whole"),
        ("linear", {"in_features": 2.5, "out_features": 1}, r"got 2.5; write in_features=1"),
        ("linear", {"in_features": 3, "out_features": 1, "kernel": 2}, r"sizes \['kernel'\]"),
        ("conv2d", {**LENET, "groups": 5}, r"in_channels to be a multiple of groups=5"),
        ("conv2d", {**LENET, "input_size": 1, "padding": 0}, r"expected a kernel that fits"),
        ("conv2d", {**LENET, "stride": (1, 1, 1)}, r"expected 2 sizes in 'stride'"),
        ("conv2d", {**LENET, "padding": (1,)}, r"expected 2 paddings"),
        ("conv2d", {**LENET, "output_size": 9}, r"expected output_size 8 by the other sizes"),
        ("conv2d", {**LENET, "batch": 0}, r"expected batch to be a whole number >= 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind: str, sizes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer_form(kind, sizes)


def test_networks_that_cannot_be_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="with none: there is nothing to count"):
        symbolic(nn.Flatten(), (3, 4, 4))
    with pytest.raises(ValueError, match=r"expected a model that takes \[B, 1, 8, 8\]"):
        symbolic(rgap.models.lenet(seed=0), (1, 8, 8))
    with pytest.raises(ValueError, match="expected batch >= 1, got 0"):
        symbolic(rgap.models.lenet(seed=0), (3, 32, 32), 0)
    with pytest.raises(ValueError, match="expected numbers for every size of a layer with padding"):
        layer_form("conv2d", {**LENET, "padding_mode": "circular", "in_channels": "C"})
    with pytest.raises(ValueError, match=r"expected values for \['B'\]"):
        layer_form("conv2d", LENET).at({})
