"""What a Recovery says of itself: words for every status, plain numbers, null space, pickles."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from allocations import smallest_routes
from cases import picture, small_conv, small_mlp
from reference import dense_blocks, dense_rank
from torch import Tensor, nn

from rgap import Recovery, Status, capture, invert
from rgap.recovery import LayerReport

BINARY = "binary_cross_entropy_with_logits"
X = picture((2, 8, 8), 1)
LABEL = torch.tensor([3])


def exact() -> Recovery:
    model = small_conv("sigmoid", seed=0)
    return invert(model, capture(model, X, LABEL))


def deficient() -> Recovery:
    model = small_conv("sigmoid", channels=3, stride=2, seed=0)
    return invert(model, capture(model, X, LABEL, dtype=torch.float64))


def ambiguous() -> Recovery:
    model = small_mlp("tanh", classes=1, bias=False, seed=3)
    x = picture((2, 4, 4), 4)
    return invert(model, capture(model, x, torch.tensor([1.0]), BINARY, dtype=torch.float64))


def inconsistent() -> Recovery:
    model = small_conv("sigmoid", seed=0)
    return invert(model, capture(small_conv("sigmoid", seed=1), X, LABEL))


def unsupported() -> Recovery:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()
    return invert(model, capture(model, X, LABEL))


def noisy() -> Recovery:
    """Full rank, but the stated noise is larger than the gradient."""
    model = small_conv("sigmoid", seed=0)
    return invert(model, capture(model, X, LABEL), noise=1e-2)


def batch() -> Recovery:
    model = small_conv("sigmoid", seed=0)
    return invert(model, capture(model, picture((2, 8, 8), 1, batch=2), torch.tensor([0, 1])))


def matrix_free() -> Recovery:
    model = small_conv("sigmoid", channels=3, stride=2, seed=0)
    with smallest_routes():
        return invert(model, capture(model, X, LABEL))


MAKERS = [exact, deficient, ambiguous, inconsistent, unsupported, noisy, batch, matrix_free]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def recovery(request: pytest.FixtureRequest) -> Recovery:
    found: Recovery = request.param()
    return found


def test_the_makers_cover_every_status_of_this_version() -> None:
    found = {make().status for make in MAKERS}
    assert found == set(Status) - {Status.COMPLETED}
    assert all(status.explanation for status in Status)


# --- every status ---------------------------------------------------------------------------


def test_explain_begins_with_the_status_and_says_everything_once(recovery: Recovery) -> None:
    text = recovery.explain()
    assert text.startswith(f"{recovery.status.name}: {recovery.reason}")
    assert text.count(recovery.reason) == 1
    for layer in recovery.layers:
        lines = [line for line in text.splitlines() if line.strip().startswith(f"{layer.layer} (")]
        assert len(lines) == 1, text
        if layer.note:
            assert text.count(layer.note) == 1, text
        assert f"{layer.unknowns} unknowns" in lines[0]
        if layer.nullity:
            assert f"{layer.nullity} of them open; the recursion stops here" in lines[0]
        if layer.route == "not reached":
            assert lines[0].endswith("not reached.")
    for word in ("nan", "inf ", "inf,", "None", "1e+150"):
        assert word not in text, text


def test_only_a_determined_layer_is_called_determined(recovery: Recovery) -> None:
    halted = [layer for layer in recovery.layers if layer.note]
    for layer in halted:
        line = next(
            line for line in recovery.explain().splitlines() if line.strip().startswith(layer.layer)
        )
        assert "determined" not in line, line
        assert "the recursion stops here" in line, line
    for layer in recovery.layers:
        assert layer.determined == (layer.nullity == 0)


def test_a_number_about_the_picture_comes_with_the_picture(recovery: Recovery) -> None:
    text = recovery.explain()
    assert ("bound for every entry" in text) == (recovery.inputs is not None)
    assert ("certified bound for every entry" in text) == ("inputs" in recovery.certified)
    assert recovery.exact == (recovery.status is Status.EXACT)
    if recovery.status is Status.AMBIGUOUS:
        assert len(recovery.candidates) > 1
        assert all(f"Candidate {n}:" in text for n in range(len(recovery.candidates)))
    else:
        assert not recovery.candidates


def test_summary_is_strict_json(recovery: Recovery) -> None:
    text = json.dumps(recovery.summary(), allow_nan=False)
    again = json.loads(text)
    assert again["status"] == recovery.status.name
    assert again["reason"] == recovery.reason
    assert [layer["layer"] for layer in again["layers"]] == [r.layer for r in recovery.layers]
    assert [layer["nullity"] for layer in again["layers"]] == [r.nullity for r in recovery.layers]
    assert [c["residual"] for c in again["candidates"]] == [c.residual for c in recovery.candidates]


def test_what_is_not_finite_becomes_null_in_the_summary() -> None:
    strange = replace(
        exact(),
        residual=math.nan,
        error_bound=math.inf,
        seconds=math.inf,
        predicted_error=torch.tensor([math.nan, 1.0, math.inf]),
        labels=torch.tensor([[math.nan, 0.5]]),
    )
    strange = replace(
        strange,
        layers=tuple(replace(r, gap=math.nan, condition=math.inf) for r in strange.layers),
    )
    again = json.loads(json.dumps(strange.summary(), allow_nan=False))
    assert again["residual"] is None
    assert again["error_bound"] is None
    assert again["predicted_error"] == [None, 1.0, None]
    assert again["labels"] == [[None, 0.5]]
    assert {layer["gap"] for layer in again["layers"]} == {None}
    assert strange.explain()


def test_html_escapes_and_names_every_layer(recovery: Recovery) -> None:
    html = recovery._repr_html_()
    assert html.count("<tr>") == 1 + len(recovery.layers)
    assert all(f"<td>{r.layer}</td>" in html for r in recovery.layers)
    sharp = replace(recovery, reason="a < b & c")
    assert "a &lt; b &amp; c" in sharp._repr_html_()


def test_repr_is_one_line_without_tensors(recovery: Recovery) -> None:
    text = repr(recovery)
    assert text.startswith(f"Recovery({recovery.status.name}, ")
    assert "\n" not in text
    assert "tensor(" not in text


@pytest.mark.parametrize(
    "copied", [lambda r: pickle.loads(pickle.dumps(r)), copy.deepcopy, copy.copy]
)
def test_copies_say_the_same(recovery: Recovery, copied: Any) -> None:
    again = copied(recovery)
    assert again.explain() == recovery.explain()
    assert again.summary() == recovery.summary()
    for name in ("inputs", "labels", "predicted_error"):
        one, other = getattr(recovery, name), getattr(again, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_recoveries_compare_and_hash_by_identity(recovery: Recovery) -> None:
    twin = copy.deepcopy(recovery)
    assert recovery == recovery
    assert recovery != twin
    assert len({recovery, twin}) == 2
    for candidate, other in zip(recovery.candidates, twin.candidates, strict=True):
        assert candidate != other


# --- layers, ranks, null space --------------------------------------------------------------


def test_layers_come_in_forward_order_and_by_name(recovery: Recovery) -> None:
    names = [r.layer for r in recovery.layers]
    assert [recovery.layer(name) for name in names] == list(recovery.layers)
    with pytest.raises(KeyError) as raised:
        recovery.layer("conv")
    for name in (*names, "'conv'"):
        assert name in str(raised.value)


def dense_equations() -> tuple[Tensor, Tensor]:
    """Dense K and W rows of the layer 'conv0' of ``deficient``."""
    model = small_conv("sigmoid", channels=3, stride=2, seed=0).double()
    cotangents: list[Tensor] = []
    handle = model[0].register_full_backward_hook(lambda m, i, o: cotangents.append(o[0]))
    x = X.double().requires_grad_()
    nn.functional.cross_entropy(model(x), LABEL).backward()
    handle.remove()
    return dense_blocks(model[0], cotangents[0], (2, 8, 8))


def test_ranks_are_the_dense_ones_and_null_directions_are_null() -> None:
    recovery = deficient()
    report = recovery.layer("conv0")
    rows, weights = dense_equations()
    balanced = torch.cat([rows / rows.norm(), weights / weights.norm()])
    assert report.unknowns == 128
    assert report.gradient_rank == dense_rank(rows)
    assert report.weight_rank == dense_rank(weights)
    assert report.joint_rank == dense_rank(balanced)
    assert report.nullity == 128 - dense_rank(balanced)
    assert report.nullity > 3
    for count in (1, 3, 1000):
        directions = recovery.null_space("conv0", count)
        found = len(directions)
        assert found == min(count, report.nullity)
        assert directions.shape == (found, 1, 2, 8, 8)
        flat = directions.flatten(1)
        assert torch.allclose(flat @ flat.T, torch.eye(found, dtype=flat.dtype), atol=1e-8)
        assert float((balanced @ flat.T).abs().max()) < 1e-8
    assert len(recovery.null_space("conv0")) == 8


def test_a_determined_layer_has_an_empty_null_space() -> None:
    recovery = exact()
    assert recovery.null_space("conv0").shape == (0, 1, 2, 8, 8)
    assert recovery.null_space("fc").shape == (0, 1, 384), "where the recursion started"


def test_null_space_of_what_was_not_reached_or_not_counted_or_copied() -> None:
    stopped = inconsistent()
    unreached = [r.layer for r in stopped.layers if r.route == "not reached"]
    assert unreached
    with pytest.raises(ValueError, match=r"recursion reached.*not reached"):
        stopped.null_space(unreached[0])
    with pytest.raises(KeyError, match="expected one of"):
        stopped.null_space("nowhere")
    with pytest.raises(ValueError, match="count"):
        deficient().null_space("conv0", 0)
    restored = pickle.loads(pickle.dumps(deficient()))
    with pytest.raises(ValueError, match=r"copied or unpickled.*invert"):
        restored.null_space("conv0")


def test_without_a_counted_rank_the_null_directions_are_still_null() -> None:
    recovery = matrix_free()
    rows, weights = dense_equations()
    assert recovery.layer("conv0").nullity is None
    directions = recovery.null_space("conv0", 4)
    assert len(directions) == 4
    balanced = torch.cat([rows / rows.norm(), weights / weights.norm()])
    # the cotangent is the recovered one, from a float32 gradient
    assert float((balanced @ directions.flatten(1).T).abs().max()) < 1e-4


def test_weight_rank_is_computed_when_asked_for() -> None:
    calls = []

    def rank() -> int:
        calls.append(1)
        return 7

    report = LayerReport(
        "fc", "linear", 9, 1, 8, 1, 10.0, 1.0, 0.0, 0.0, "gradient", "", _weight_rank=rank
    )
    assert not calls
    restored = pickle.loads(pickle.dumps(report))
    assert (report.weight_rank, report.weight_rank) == (7, 7)
    assert len(calls) == 1
    assert pickle.loads(pickle.dumps(report)).weight_rank == 7, "what was computed is kept"
    assert copy.deepcopy(report) == report
    assert restored.weight_rank is None


def test_weight_rank_of_every_layer_is_the_dense_one() -> None:
    model = small_conv("sigmoid", channels=3, stride=2, seed=0).double()
    recovery = deficient()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            report = recovery.layer(name)
            shape = {"conv0": (2, 8, 8), "conv1": (3, 4, 4), "fc": (12,)}[name]
            out = module(torch.zeros(1, *shape, dtype=torch.float64))
            assert report.weight_rank == dense_rank(
                dense_blocks(module, torch.ones_like(out), shape)[1]
            )
            assert report.unknowns == math.prod(shape)


# --- warnings -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_underflow_of_the_head_is_a_warning(dtype: torch.dtype) -> None:
    """Logits so far apart that the softmax of the losing classes is 0 in this precision."""
    model = small_mlp("tanh", seed=0)
    x = picture((2, 4, 4), 0)
    with torch.no_grad():
        model[-1].weight.mul_(1e4 if dtype == torch.float64 else 1e3)
        winner = int(model(x).argmax())
    label = torch.tensor([(winner + 1) % 5])
    recovery = invert(model, capture(model, x, label, dtype=dtype))
    assert recovery.warnings
    assert "'head.bias' underflowed" in recovery.warnings[0]
    assert f"Note: {recovery.warnings[0]}" in recovery.explain()
    if recovery.inputs is not None:
        assert float((recovery.inputs - x).abs().max()) <= (recovery.error_bound or 0)
    assert not exact().warnings
