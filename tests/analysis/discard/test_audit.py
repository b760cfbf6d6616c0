"""The audit's ranks against dense matrices that autograd writes down; its words and manners."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from cases import picture, small_conv, small_mlp
from graphs import concatenated, odd_geometry, pooled, residual, seeded
from reference import dense_blocks
from torch import Tensor, nn
from written import Written

import rgap
from rgap.analysis import Audit, AuditRow, audit
from rgap.network.chain import parse

BATCHES = (1, 2, 3)
Ranks = tuple[int, int, int]


def dense_ranks(model: nn.Module, x: Tensor) -> dict[str, Ranks]:
    """Ranks of K, W and [K; W] of every layer; k is the derivative by a zero added to z."""
    met: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    names = {module: name for name, module in model.named_modules()}

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        met[names[module]] = (module, args[0], torch.zeros_like(output, requires_grad=True))
        return output + met[names[module]][2]

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    outputs = model(x)
    for handle in handles:
        handle.remove()
    loss = nn.functional.cross_entropy(outputs, torch.arange(len(x)) % outputs.shape[1])
    cotangents = torch.autograd.grad(loss, [zero for *_, zero in met.values()])
    found, sharing = {}, {}
    for (name, (module, u, _)), k in zip(met.items(), cotangents, strict=True):
        rows_k, rows_w = dense_blocks(module, k, tuple(u.shape[1:]))
        rows_w = rows_w[k.flatten() != 0]  # the z of a unit without a cotangent is unknown
        # rows of unit size: tiny cotangents must not vanish beside the weights
        parts = [rows / rows.norm().clamp_min(1e-300) for rows in (rows_k, rows_w)]
        parts.append(torch.cat(parts))
        ranks = [int(np.linalg.matrix_rank(part.numpy())) for part in parts]
        found[name] = (ranks[0], ranks[1], ranks[2])
        sharing.setdefault(id(u), []).append((name, parts[2]))
    for branches in sharing.values():  # layers that read one tensor are counted together
        joint = int(np.linalg.matrix_rank(torch.cat([rows for _, rows in branches]).numpy()))
        for name, _ in branches:
            found[name] = (*found[name][:2], joint)
    return found


def ranks(table: Audit, batch: int) -> dict[str, Ranks]:
    return {
        row.layer: (row.gradient_rank, row.weight_rank, row.joint_rank)
        for row in table.rows
        if row.batch_size == batch
    }


NETWORKS = {
    "sigmoid": lambda: small_conv("sigmoid", channels=2, size=5, seed=1).double(),
    "relu": lambda: small_conv("relu", channels=3, size=5, seed=2).double(),
    "deep relu": lambda: small_conv("relu", channels=2, size=5, seed=0, depth=3).double(),
    "leaky relu, stride": lambda: small_conv("leaky_relu", channels=3, size=5, stride=2).double(),
    "softplus, batch norm": lambda: small_conv("softplus", channels=2, size=5, norm=True).double(),
    "tanh mlp": lambda: small_mlp("tanh", widths=(9, 7)).double(),
    "relu mlp": lambda: small_mlp("relu", widths=(12, 8), seed=3).double(),
    "residual": lambda: seeded(residual),
    "concatenated": lambda: seeded(concatenated),
    "max-pool, gelu": lambda: seeded(pooled),
    "odd geometry": lambda: seeded(odd_geometry),
}
# Equality is the rule, not a law: here one ReLU pattern shares an equation more than was counted.
LOOSE = {("deep relu", "conv0")}
MASKED = {"relu", "deep relu", "relu mlp", "residual", "concatenated", "max-pool, gelu"}
SHAPES = {"tanh mlp": (2, 4, 4), "relu mlp": (2, 4, 4), "max-pool, gelu": (2, 4, 4)}


@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_of_every_layer_equal_numpys(name: str) -> None:
    model, shape = NETWORKS[name](), SHAPES.get(name, (2, 5, 5))
    x = picture(shape, 4, max(BATCHES)).double()
    table = audit(model, shape, BATCHES, inputs=x)
    bound = audit(model, shape, BATCHES, inputs=x, method="sketch")
    counts = audit(model, shape, BATCHES, method="formula")
    for batch in BATCHES:
        dense = dense_ranks(model, x[:batch])
        assert ranks(table, batch) == dense, "layer: gradient, weight, joint"
        for layer, (of_k, of_w, joint) in dense.items():
            closed = bound.row(layer, batch)
            assert (closed.gradient_rank, closed.weight_rank) == (of_k, of_w)
            assert closed.joint_rank >= joint, "an upper bound never falls below the rank"
            assert closed.joint_rank == joint or (not closed.exact and (name, layer) in LOOSE)
            counted = counts.row(layer, batch)
            assert (counted.unknowns, counted.condition) == (closed.unknowns, None)
            assert counted.gradient_rank >= of_k
            if layer != table.layers[-1]:  # no one knows the logits, so the head counts no W
                assert counted.weight_rank >= of_w
            assert counted.joint_rank >= joint, "units that are off only take equations away"
            assert counted.joint_rank == joint or not counted.exact or name in MASKED


def test_the_networks_above_cover_the_cases() -> None:
    """Determined and deficient layers, dead units, gradients of no use, networks of no chain."""
    rows = []
    for name, make in NETWORKS.items():
        shape = SHAPES.get(name, (2, 5, 5))
        x = picture(shape, 4, 3).double()
        rows += [(name, row) for row in audit(make(), shape, (3,), inputs=x).rows]
    short = {name for name, row in rows if row.nullity}
    assert {"relu", "residual", "concatenated", "odd geometry"} <= short
    assert {"sigmoid", "tanh mlp"}.isdisjoint(short)
    assert any(row.gradient_rank + row.weight_rank > row.joint_rank for _, row in rows)
    assert any(0 < row.weight_rank < row.joint_rank < row.unknowns for _, row in rows)
    for name in ("residual", "concatenated"):
        assert not parse(NETWORKS[name](), (2, 5, 5)).complete


def test_lenets_second_convolution_falls_short_at_two_samples() -> None:
    lenet = rgap.models.lenet(seed=0).double()
    features = lenet[:2](rgap.photos.load(2)).detach()
    table = audit(lenet[2:], (12, 16, 16), (2,), inputs=features)
    row = table.row("conv2", 2)
    # 144 = 12² equations are in both blocks: 3600 + 1536 − 144 = 4992
    assert (row.gradient_rank, row.weight_rank, row.joint_rank) == (3600, 1536, 4992)
    assert (row.unknowns, row.nullity, row.discard) == (6144, 1152, 0.1875)
    assert [row.nullity for row in table.rows] == [1152, 0, 0]
    assert "'conv2' (conv2d) is the first layer that falls short: 1152 of 6144" in table.explain()


def test_a_pool_above_a_layer_counts_what_it_averages_away() -> None:
    conv = small_conv("sigmoid", channels=3, size=4, depth=1)
    model = nn.Sequential(*conv[:2], nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 5))
    row = audit(model, (2, 4, 4), (2,)).row("4", 2)
    assert (row.joint_rank, row.unknowns, row.nullity) == (24, 2 * 3 * 4 * 4, 72)


@pytest.mark.parametrize("method", ["exact", "sketch", "formula"])
def test_an_in_place_activation_does_not_hide_its_dead_units(method: str) -> None:
    plain, in_place = (small_conv("relu", channels=3, size=4, seed=1) for _ in range(2))
    for module in in_place.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    assert audit(in_place, (2, 4, 4), method=method) == audit(plain, (2, 4, 4), method=method)
    in_place.requires_grad_(False)
    assert audit(in_place, (2, 4, 4), method=method) == audit(plain, (2, 4, 4), method=method)


def test_a_layer_that_no_gradient_reaches_is_noted() -> None:
    model = small_conv("relu", channels=2, size=4, seed=1)
    with torch.no_grad():
        model.conv1.bias.fill_(-100.0)
    table = audit(model, (2, 4, 4), (1,))
    assert [row.gradient_rank for row in table.rows[:2]] == [0, 0]
    assert "No gradient at all reaches 'conv0', 'conv1'" in table.explain()


def test_a_layer_that_is_called_twice_has_a_row_per_call() -> None:
    twice = Written(
        lambda m, x: m.fc(m.same(m.same(x).tanh())), same=nn.Linear(6, 6), fc=nn.Linear(6, 4)
    )
    assert [row.layer for row in audit(twice, (6,), (1,)).rows] == ["same", "same", "fc"]


# --- the table ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Audit:
    return audit(NETWORKS["odd geometry"](), (2, 5, 5), (1, 2))


def made(*nullities: int) -> Audit:
    cells = zip((1, 2, 4), nullities, strict=True)
    rows = [AuditRow("fc", "linear", b, 9, 0, 0, 9 - n, n, n / 9, inf) for b, n in cells]
    return Audit("Made", "exact", tuple(rows))


def test_largest_exact_batch_and_words() -> None:
    assert [made(*n).largest_exact_batch for n in ((0, 0, 0), (0, 0, 3), (1, 1, 1))] == [4, 2, 0]
    words = made(0, 0, 3).explain().splitlines()
    assert words[0] == "B = 1: every layer determines its input."
    assert "B = 4: from the output down, 'fc' (linear)" in words[2]
    assert "3 of 9 equations are missing (33.3%)" in words[2]
    with pytest.raises(KeyError, match=r"\['fc'\] and a batch size of \[1, 2, 4\], got 'fd' and 1"):
        made(0, 0, 3).row("fd", 1)


def test_plot_frame_html_and_json_say_what_the_rows_say(table: Audit) -> None:
    drawn = table.plot().axes[0].images[0].get_array()
    assert drawn.shape == (3, 2)
    frame = table.to_frame()
    assert frame.to_dict("records") == [asdict(row) for row in table.rows]
    for row in table.rows:
        place = table.layers.index(row.layer), table.batch_sizes.index(row.batch_size)
        assert float(drawn[place]) == row.discard == row.nullity / row.unknowns
        assert f"<td>{row.joint_rank}</td>" in table._repr_html_()
    text = json.dumps(table.summary(), allow_nan=False)
    assert json.loads(text)["rows"] == [asdict(row) for row in table.rows]
    assert made(0, 0, 0).summary()["rows"][0]["condition"] is None, "JSON has no infinity"


def test_without_pandas_the_message_says_what_to_install(
    table: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'rgap\[frames\]'.*from summary\(\)"):
        table.to_frame()


# --- manners and refusals -------------------------------------------------------------------


def test_model_and_random_state_are_left_as_they_were() -> None:
    model = small_conv("relu", channels=2, size=4, norm=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = picture((2, 4, 4), 0, 2)
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), x]
    before = [t.clone() for t in tensors]  # type: ignore[union-attr]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = audit(model, (2, 4, 4), (1, 2), inputs=x)
    assert audit(model, (2, 4, 4), (1, 2), inputs=x) == first
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    assert not any(m.training or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_sizes": (1, 0)}, r">= 1, got \(1, 0\); write batch_sizes="),
        ({"batch_sizes": 4}, "whole numbers >= 1, got 4; write batch_sizes="),
        ({"batch_sizes": (1.5,)}, r"whole numbers >= 1, got \(1.5,\)"),
        ({"weights": "trained"}, "got 'trained'; write weights='random'"),
        ({"method": "guess"}, "got 'guess'; write method='exact'"),
        ({"loss": "mse"}, "write loss='mse_loss'"),
        ({"input_shape": (13,)}, r"'fc0' \(linear\) expects \[B, 32\].*\(32,\) would fit"),
        ({"inputs": torch.rand(1, 2, 4, 4)}, r"\[2 or more, 2, 4, 4\], got \[1, 2, 4, 4\]"),
        ({"inputs": torch.full((2, 2, 4, 4), inf)}, "inputs has NaN or infinity in 64 of 64"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        audit(small_mlp("relu"), **{"input_shape": (2, 4, 4), "batch_sizes": (1, 2), **arguments})


@pytest.mark.parametrize(
    ("parts", "forward", "words"),
    [
        ([nn.Linear(4, 4), nn.Dropout()], None, r"'1' \(Dropout\) is in train.*model.eval\(\)"),
        ([nn.Linear(20_001, 2)], None, "at most 20000 inputs.*got '0' with 20001"),
        (
            [nn.Linear(4, 4)],
            lambda m, x: (m.part(x), x),
            "returned a tuple, expected one tensor; wrap it in a module",
        ),
        ([nn.LayerNorm(4)], lambda m, x: m.part(x), "got Written with none"),
    ],
)
def test_models_that_are_refused(parts: list[nn.Module], forward: Any, words: str) -> None:
    model = Written(forward, part=parts[0]) if forward else nn.Sequential(*parts)
    width = getattr(parts[0], "in_features", 4)
    with pytest.raises((ValueError, TypeError), match=words):
        audit(model, (width,), (1, 2))


class Forked(nn.Module):
    """Two convolutions read one input, and a mean leads into the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 1)
        self.last = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x).tanh() + self.right(x)
        return self.last(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def test_an_audit_prints_as_a_table_and_says_a_pair_once() -> None:
    table = audit(Forked().eval(), (1, 4, 4), (1, 2), method="formula")
    said = [note for note in table.notes if "they read one input" in note]
    assert said == ["'left' is counted together with 'right': they read one input."]
    assert repr(table) == "Audit('Forked', 'formula', 3 layers at B = 1, 2, largest_exact_batch=0)"
    lines = str(table).splitlines()
    assert lines[0].split()[:2] == ["layer", "kind"] and len(lines[1].split()) == 9
    assert [line.split()[0] for line in lines[2:8]] == ["left", "right", "last"] * 2
    assert table.explain() in str(table)
    [ranks, *_] = rgap.analysis.generic_ranks(Forked().eval(), (1, 4, 4), 1)
    assert "left (conv2d, B = 1)" in repr(ranks) and len(repr(ranks)) < 200
    assert str(ranks) == ranks.explain()
