"""Formula, measured and modular ranks of small networks against matrices that autograd writes down.

The reference knows nothing of recorders: hooks on the modules add a zero to every output, whose
derivative is k; the gradient constraints are the derivative of each layer's parameter gradient by
its input at that k, the weight constraints its own derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import numpy as np
import pytest
import torch
from rank_networks import CASES, PICTURE, SPELLINGS
from reference import dense_blocks
from torch import Tensor, nn
from torch.nn import functional as F
from written import Written

from rgap.analysis import Audit, audit, generic_ranks

BATCHES = (1, 2, 3, 8)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Ranks = tuple[int, int, int]


def rank(matrix: Tensor) -> int:
    return int(np.linalg.matrix_rank(matrix.numpy())) if matrix.numel() else 0


def unit(rows: Tensor) -> Tensor:
    """Rows of one block of size one: small cotangents must not vanish beside the weights."""
    return rows / rows.norm().clamp_min(1e-300)


def reference(model: nn.Module, x: Tensor) -> list[tuple[str, int, Ranks]]:
    """Layer, unknowns, and ranks of K, W and all rows about its unknowns, in forward order."""
    met: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    names = {module: name for name, module in model.named_modules()}

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        met.append((names[module], module, args[0], torch.zeros_like(output, requires_grad=True)))
        return output + met[-1][3]

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, LAYERS)]
    outputs = model(x)
    for handle in handles:
        handle.remove()
    loss = nn.functional.cross_entropy(outputs, torch.arange(len(x)) % outputs.shape[1])
    cotangents = torch.autograd.grad(loss, [zero for *_, zero in met])
    blocks, own = [], []
    for (_, module, u, _), k in zip(met, cotangents, strict=True):
        if isinstance(module, nn.Linear):
            u, k = u.reshape(-1, u.shape[-1]), k.reshape(-1, k.shape[-1])
        rows_k, rows_w = dense_blocks(module, k, tuple(u.shape[1:]))
        if not module.weight.requires_grad:
            rows_k = torch.zeros_like(rows_k)
        blocks.append((unit(rows_k), unit(rows_w[k.flatten() != 0])))
        own.append((rank(blocks[-1][0]), rank(blocks[-1][1])))
    found = []
    for name, module, u, _ in met:
        calls = [i for i, other in enumerate(met) if other[1] is module]
        branches = [i for i, other in enumerate(met) if other[2] is u]
        if len(calls) > 1:  # one gradient for all calls: their inputs are one batch
            rows_k = torch.cat([blocks[i][0] for i in calls], 1)
            rows_w = torch.block_diag(*(blocks[i][1] for i in calls))
            ranks = (rank(rows_k), rank(rows_w), rank(torch.cat([rows_k, rows_w])))
            found.append((name, u.numel() * len(calls), ranks))
            continue
        rows = torch.cat([part for i in branches for part in blocks[i]])
        i = next(i for i in branches if met[i][0] == name)
        found.append((name, u.numel(), (*own[i], rank(rows))))
    return found


def batches(name: str) -> tuple[int, ...]:
    """All batch sizes for small networks; the spellings of a mean differ in one step only."""
    small = prod(CASES[name].shape) * max(BATCHES) < 100
    return BATCHES if small else (2,) if name in SPELLINGS else BATCHES[:2]


@cache
def tables(name: str) -> tuple[nn.Module, Tensor, Audit, Audit]:
    case = CASES[name]
    model = case.build()
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(max(BATCHES), *case.shape, generator=generator, dtype=torch.float64)
    measured = audit(model, case.shape, batches(name), inputs=x)
    return model, x, measured, audit(model, case.shape, batches(name), method="formula")


@pytest.mark.cases(45)
@pytest.mark.parametrize("name", CASES)
def test_formula_and_measurement_against_autograd(name: str) -> None:
    """Exact means equal; a bound is one from above."""
    model, x, measured, counted = tables(name)
    case = CASES[name]
    for batch in batches(name):
        truth = reference(model, x[:batch])
        head = truth[-1][0]
        rows = [row for row in measured.rows if row.batch_size == batch and row.kind != "step"]
        forms = [row for row in counted.rows if row.batch_size == batch and row.kind != "step"]
        assert [row.layer for row in rows] == [row.layer for row in forms] == [t[0] for t in truth]
        for row, form, (layer, unknowns, (of_k, of_w, joint)) in zip(
            rows, forms, truth, strict=True
        ):
            unknowns = max(unknowns, batch * case.ahead.get(layer, 0))
            if form.weight_rank == 0 and layer == head:  # no one knows the logits of a softmax
                joint = of_k
            assert (row.unknowns, form.unknowns) == (unknowns, unknowns), layer
            assert (row.gradient_rank, row.weight_rank, row.joint_rank) == (of_k, of_w, joint)
            assert form.gradient_rank >= of_k and form.joint_rank >= joint, layer
            assert form.joint_rank == joint or not form.exact, (layer, form)
            assert form.nullity == unknowns - form.joint_rank


PADS = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d,
        "circular": nn.CircularPad2d, "zeros": nn.ZeroPad2d}  # fmt: skip


def padded(border: str, where: str) -> nn.Module:
    """Two convolutions behind borders: their own, modules of their own, or calls of ``F.pad``."""
    own = {"padding": 1, "padding_mode": border} if where == "conv" else {}
    parts: dict[str, object] = {
        "a": nn.Conv2d(2, 2, 3, 2, **own), "b": nn.Conv2d(2, 3, 3, **own), "fc": nn.Linear(12, 4),
    }  # fmt: skip
    mode = "constant" if border == "zeros" else border
    pad: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    if where == "module":
        parts["pad"] = pad = PADS[border](1)
    if where == "function":
        pad = lambda x: F.pad(x, (1, 1, 1, 1), mode)  # noqa: E731
    return Written(
        lambda m, x: m.fc(m.b(pad(m.a(pad(x)).tanh())).sigmoid().flatten(1)), **parts
    ).double()


@pytest.mark.parametrize("where", ["module", "function"])
@pytest.mark.parametrize("border", PADS)
def test_a_border_ahead_of_a_convolution_adds_no_unknowns(border: str, where: str) -> None:
    """The ranks that autograd has of the same network with ``padding_mode``."""
    own, split = padded(border, "conv"), padded(border, where)
    split.load_state_dict(own.state_dict())
    x = torch.randn(2, *PICTURE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    truth = reference(own, x)
    measured = audit(split, PICTURE, (2,), inputs=x)
    for row, (layer, unknowns, ranks) in zip(measured.rows, truth, strict=True):
        assert (row.layer, row.unknowns) == (layer, unknowns)
        assert (row.gradient_rank, row.weight_rank, row.joint_rank) == ranks
    counted = audit(split, PICTURE, (2,), method="formula")
    assert [row.unknowns for row in counted.rows] == [unknowns for _, unknowns, _ in truth]


def test_a_border_that_was_written_to_is_no_border() -> None:
    """What stands between the border and the convolution is what it reads."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        wide = F.pad(x, (1, 1, 1, 1), "reflect")
        return m.fc(m.a(wide.sigmoid_()).flatten(1))

    model = Written(forward, a=nn.Conv2d(2, 2, 3, 2), fc=nn.Linear(8, 4)).double()
    assert audit(model, PICTURE, (1,)).rows[0].unknowns == 72


@pytest.mark.parametrize("name", CASES)
def test_steps_that_discard_are_never_passed_over(name: str) -> None:
    """As a row of their own, or in the row of the layer that they lead into; and in words."""
    case = CASES[name]
    _, _, measured, counted = tables(name)
    for table in (measured, counted):
        for row in table.rows:
            entries = case.ahead.get(row.layer)
            assert (row.step != "") == (entries is not None), (row.layer, row.step)
            if entries is not None:
                assert row.unknowns == entries * row.batch_size
                assert row.nullity > 0
        steps = {row.layer: row for row in table.rows if row.kind == "step"}
        assert set(steps) == set(case.steps)
        for step, (before, after) in case.steps.items():
            row = table.row(step, 2)
            assert (row.unknowns, row.joint_rank) == (2 * before, 2 * after)
        if case.ahead or case.steps:
            assert "every layer determines its input" not in table.explain()
            assert table.largest_exact_batch == 0
            named = {row.step for row in table.rows if row.step} | set(steps)
            assert all(f"'{step}'" in table.explain() for step in named)


@pytest.mark.cases(40)
@pytest.mark.parametrize("name", CASES)
def test_modular_ranks_are_those_of_the_formula_where_it_is_exact(name: str) -> None:
    model, x, measured, counted = tables(name)
    modular = generic_ranks(model, CASES[name].shape, 2, inputs=x[:2], points=1)
    rows = [row for row in measured.rows if row.batch_size == 2 and row.kind != "step"]
    forms = [row for row in counted.rows if row.batch_size == 2 and row.kind != "step"]
    for found, row, form in zip(modular, rows, forms, strict=True):
        assert found.layer == row.layer
        if row.beside or row.layer == rows[-1].layer:
            continue
        trained = not name.startswith("frozen") or row.gradient_rank
        assert found.modular.joint >= row.joint_rank
        if form.exact and trained:
            assert found.modular.joint == form.joint_rank


def test_the_table_covers_what_it_should() -> None:
    assert len(CASES) >= 40
    counted = {name: tables(name)[3] for name in CASES}
    exact = sum(row.exact for table in counted.values() for row in table.rows)
    assert exact >= 0.75 * sum(len(table.rows) for table in counted.values())


def test_branches_show_one_joint_rank() -> None:
    """A 1×1 convolution of stride 2 reads a quarter of the pixels; its twin reads all of them."""
    _, _, measured, _ = tables("projection skip")
    skip, twin = measured.row("skip", 1), measured.row("a", 1)
    assert (skip.beside, twin.beside) == ("a", "skip")
    assert skip.gradient_rank + skip.weight_rank < skip.joint_rank == twin.joint_rank
    assert skip.discard == twin.discard == 0


def test_class_token() -> None:
    """17 tokens of width 64, two samples: the head reads one of them."""
    model = Written(
        lambda m, x: m.fc(m.b(m.a(x).tanh())[:, 0]),
        a=nn.Linear(64, 64), b=nn.Linear(64, 64), fc=nn.Linear(64, 10),
    ).eval()  # fmt: skip
    for method in ("exact", "formula"):
        table = audit(model, (17, 64), (2,), method=method)
        assert (table.row("b", 2).unknowns, table.row("b", 2).nullity) == (2176, 2048)
        assert (table.row("fc", 2).unknowns, table.row("fc", 2).nullity) == (2176, 2048)


@pytest.mark.parametrize("method", ["exact", "sketch", "formula"])
def test_functions_and_modules_have_the_same_ranks(method: str) -> None:
    modules = CASES["last outputs unread"].build()
    a, b, fc = modules.a, modules.b, modules.fc
    functions = Written(
        lambda m, x: F.linear(
            F.conv2d(F.conv2d(x, m.a, m.c, 2).tanh(), m.b, stride=2).tanh().flatten(1), m.fc
        ),
        a=a.weight, c=a.bias, b=b.weight, fc=fc.weight,
    ).eval()  # fmt: skip
    one, two = (
        audit(model, (2, 7, 7), (1, 3), method=method).rows for model in (modules, functions)
    )
    for left, right in zip(one, two, strict=True):
        assert left.layer == right.layer
        assert (left.joint_rank, left.exact) == (right.joint_rank, right.exact)
        assert (left.gradient_rank, left.weight_rank) == (right.gradient_rank, right.weight_rank)


def test_a_shared_weight_beside_another_layer_is_a_bound() -> None:
    """Two calls of one weight, one of them on an input that another layer reads."""
    model = Written(
        lambda m, x: m.fc(m.same(m.a(x).tanh()) + m.same(x) + m.b(x)),
        a=nn.Linear(4, 4), same=nn.Linear(4, 2), b=nn.Linear(4, 1), fc=nn.Linear(2, 3),
    ).double().eval()  # fmt: skip
    for method in ("exact", "formula"):
        table = audit(model, (4,), (3,), method=method)
        assert [row.exact for row in table.rows] == [False, False, False, False, True]
        assert table.largest_exact_batch == 0


def test_what_is_not_counted_is_named() -> None:
    made = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))
    model = nn.Sequential(made, nn.Tanh(), nn.Linear(5, 3)).eval()
    up = Written(
        lambda m, x: m.fc(m.up(x).tanh().flatten(1) @ m.mix),
        up=nn.ConvTranspose1d(1, 1, 2, 2), mix=nn.Parameter(torch.ones(8, 4)), fc=nn.Linear(4, 2),
    ).eval()  # fmt: skip
    for method in ("exact", "formula"):
        words = audit(model, (6,), (1,), method=method).explain()
        assert "Not counted: '0.parametrizations.weight' (ParametrizationList)" in words
        words = audit(up, (1, 4), (1,), method=method).explain()
        assert "Not counted: Written, 'up' (ConvTranspose1d)" in words


def test_a_frozen_weight_sends_no_gradient() -> None:
    model = CASES["frozen first layer"].build()
    found = generic_ranks(model, (6,), 2)
    assert (found[0].modular.gradient, found[0].modular.joint) == (0, 8)
    assert audit(model, (6,), (2,)).row("a", 2).joint_rank == 8


def test_a_relu_makes_a_formula_a_bound() -> None:
    """Units are counted as on; where one is off the rank is lower."""
    table = tables("ReLU")[3]
    assert not any(row.exact for row in table.rows if row.layer in "ab")
    assert "every ReLU that is off takes a weight row away" in table.explain()


def test_strided_convolution_whose_last_outputs_are_unread() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2), nn.Tanh(), nn.Conv2d(12, 12, 2, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(12 * 49, 5),
    ).eval()  # fmt: skip
    row = audit(model, (3, 32, 32), (1, 2), method="formula").row("0", 1)
    assert (row.joint_rank, row.unknowns) == (3 * 29 * 29, 3 * 32 * 32)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(2, 4), "groups of one": lambda: nn.GroupNorm(4, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True), "rows": lambda: nn.LayerNorm(4),
    "layer": lambda: nn.LayerNorm([4, 4, 4]), "batch": lambda: nn.BatchNorm2d(4).eval(),
}  # fmt: skip
CONSTANT = ("groups of one", "instance", "rows")  # after a mean of each channel


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pool", ["mean", "adaptive 2", "sum"])
def test_what_is_left_of_a_sum_that_cancels_is_no_cotangent(norm: str, pool: str) -> None:
    """The mean of a normalised channel is a constant: nothing of the layer below is heard."""
    torch.manual_seed(0)
    pools = {"mean": lambda x: x.mean((2, 3)), "sum": lambda x: x.sum((2, 3))}
    after = pools.get(pool, lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1))
    head = nn.Linear(16 if pool == "adaptive 2" else 4, 3)
    parts = {"a": nn.Conv2d(2, 4, 3, padding=1), "norm": NORMS[norm](), "fc": head}
    model = Written(lambda m, x: m.fc(after(m.norm(m.a(x)))), **parts).double().eval()
    x = torch.rand(2, 2, 4, 4, dtype=torch.float64)
    measured = {row.layer: row for row in audit(model, PICTURE, (2,), inputs=x).rows}["a"]
    z = model.a(x).detach().requires_grad_()
    value = F.cross_entropy(model.fc(after(model.norm(z))), torch.arange(2))
    (k,) = torch.autograd.grad(value, z)
    k = k * (k.abs() > 1e-12)
    rows_k, rows_w = dense_blocks(model.a, k, PICTURE)
    rows_w = rows_w[k.flatten() != 0]
    both = torch.cat([unit(rows_k), unit(rows_w)])
    expected = (rank(rows_k), rank(rows_w), rank(both))
    assert (measured.gradient_rank, measured.weight_rank, measured.joint_rank) == expected
    assert (measured.joint_rank == 0) == (norm in CONSTANT and pool != "adaptive 2")
    counted = {r.layer: r for r in audit(model, PICTURE, (2,), method="formula").rows}["a"]
    assert counted.joint_rank >= measured.joint_rank
    assert counted.joint_rank == measured.joint_rank or not counted.exact


@pytest.mark.parametrize("trained", [False, True])
def test_a_mean_over_normalised_features_is_heard_only_with_factors_that_differ(
    trained: bool,
) -> None:
    torch.manual_seed(0)
    parts = {"a": nn.Linear(6, 8), "norm": nn.LayerNorm(8), "fc": nn.Linear(5, 4)}
    model = Written(lambda m, x: m.fc(m.norm(m.a(x)).mean(-1)), **parts).double().eval()
    if trained:
        nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    shown = [audit(model, (5, 6), (1, 2), method=how).rows for how in ("formula", "exact")]
    for counted, measured in zip(*shown, strict=True):
        assert counted.joint_rank >= measured.joint_rank
        assert counted.joint_rank == measured.joint_rank or not counted.exact
    assert {row.joint_rank > 0 for row in shown[1] if row.layer == "a"} == {trained}
