"""What ended an inversion is a kind with numbers; words are made from it and never read back."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import rgap
from rgap import Halt, HaltKind, Route, Status
from rgap.analysis.causes.cause import CauseKind
from rgap.analysis.causes.explain import explain

SHAPE = (2, 8, 8)


def conv(*top: nn.Module, outputs: int = 4) -> nn.Module:
    """Convolution, ``top``, head; drawn from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), *top, nn.Flatten())
        size = body(torch.zeros(1, *SHAPE)).shape[1]
        return nn.Sequential(body, nn.Linear(size, outputs)).double().eval()


class Branches(nn.Module):
    """Two branches that join below the head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Without a bias no layer below gives its input by itself.
            self.left, self.right = (nn.Linear(128, 8, bias=False) for _ in range(2))
            self.head = nn.Linear(8, 3, bias=False)
        self.double().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        return self.head(torch.tanh(self.left(flat)) * torch.tanh(self.right(flat)))


def recovered(
    model: nn.Module, count: int = 1, label: int = 1
) -> tuple[rgap.Recovery, rgap.Update]:
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.ones(count, dtype=torch.long)
    update = rgap.capture(model, x, labels, dtype=torch.float64)
    return rgap.invert(model, update), update


@pytest.mark.parametrize(
    ("model", "kind", "stage"),
    [
        (conv(nn.Tanh(), nn.MaxPool2d(2)), HaltKind.POOL, "0.2"),
        (conv(nn.Tanh(), nn.LPPool2d(2, 2)), HaltKind.POOL, "0.2"),
        (conv(nn.GELU()), HaltKind.ACTIVATION, "0.1"),
        (conv(nn.LocalResponseNorm(2)), HaltKind.STEP, "0.1"),
        (conv(nn.AvgPool2d(3, 1, 1)), HaltKind.AVERAGE, "0.1"),
        (Branches(), HaltKind.BARRIER, "mul"),
    ],
    ids=lambda value: value.name if isinstance(value, HaltKind) else None,
)
def test_a_step_without_inverse_is_named_by_its_kind(model, kind, stage) -> None:
    recovery, update = recovered(model)
    assert recovery.status is Status.UNSUPPORTED, recovery.reason
    assert recovery.halt is not None and not recovery.halt.supported
    assert (recovery.halt.kind, recovery.halt.stage) == (kind, stage), recovery.reason
    first = explain(recovery, model, update).causes[0]
    assert (first.kind, first.place) == (CauseKind.NO_INVERSE, stage)


def test_the_advice_follows_the_kind_and_not_the_name_of_the_layer() -> None:
    """A GELU called "pool" is an activation, whatever its name says."""
    model = conv(nn.Identity())
    model[0][1] = nn.Sequential()
    model[0][1].add_module("pool", nn.GELU())
    recovery, update = recovered(model)
    assert recovery.halt is not None and recovery.halt.kind is HaltKind.ACTIVATION
    changes = explain(recovery, model, update).causes[0].changes
    assert any(change.startswith("an activation with an inverse") for change in changes)
    assert not any("max-pool" in change for change in changes)


def test_missing_equations_carry_their_number() -> None:
    model = conv(nn.Tanh(), nn.AvgPool2d(2))
    recovery, update = recovered(model)
    halt = recovery.halt
    assert halt is not None and halt.kind is HaltKind.DEFICIENT
    assert (halt.stage, halt.unknowns, halt.rank, halt.missing) == ("0.2", 384, 96, 288)
    cause = explain(recovery, model, update).causes[0]
    assert (cause.kind, cause.place, cause.number) == (CauseKind.MISSING, "0.2", 288.0)
    assert str(halt.missing) in recovery.reason


def test_a_layer_with_too_low_a_rank_agrees_with_its_report() -> None:
    model = rgap.models.lenet(channels=4, input_shape=(3, 16, 16), seed=0)
    update = rgap.capture(model, rgap.photos.load(1, 16), torch.tensor([3]), dtype=torch.float64)
    recovery = rgap.invert(model, update)
    report, halt = recovery.layer("conv1"), recovery.halt
    assert halt is not None and halt.kind is HaltKind.DEFICIENT and halt.stage == "conv1"
    assert (halt.unknowns, halt.rank, halt.missing) == (
        report.unknowns, report.joint_rank, report.nullity,
    )  # fmt: skip
    assert recovery.reason == halt.reason


def test_samples_that_are_not_told_apart_and_contradictions() -> None:
    model = conv(nn.Tanh())
    alike, _ = recovered(model, count=6)
    assert alike.halt is not None and alike.halt.kind is HaltKind.UNSEPARATED
    _, update = recovered(model)
    wrong = dict(update.gradients)
    wrong["0.0.weight"] = 1.5 * wrong["0.0.weight"]
    other = dataclasses.replace(update, gradients=wrong)
    recovery = rgap.invert(model, other)
    assert recovery.status is Status.INCONSISTENT
    assert recovery.halt is not None and recovery.halt.kind is HaltKind.CONTRADICTION


def test_an_exact_recovery_has_no_halt() -> None:
    recovery, _ = recovered(conv(nn.Tanh()))
    assert recovery.exact and recovery.halt is None
    assert recovery.summary()["halt"] is None


def test_a_route_is_its_text() -> None:
    recovery, _ = recovered(conv(nn.Tanh()))
    assert recovery.layers[-1].route is Route.BIAS_ATTACK == "bias attack"
    assert json.loads(json.dumps([report.route for report in recovery.layers]))[-1] == "bias attack"
    assert {Route(str(route)) for route in Route} == set(Route)
    with pytest.raises(ValueError, match="a way unknown"):
        rgap.LayerReport("fc", "linear", 9, 1, 8, 1, 1.0, 1.0, 0.0, 0.0, "a way unknown")


def test_a_halt_travels_with_its_recovery() -> None:
    recovery, _ = recovered(conv(nn.GELU()))
    for twin in (copy.deepcopy(recovery), pickle.loads(pickle.dumps(recovery))):
        assert twin.halt == recovery.halt
    told = recovery.summary()["halt"]
    assert told == {
        "kind": "ACTIVATION", "stage": "0.1", "unknowns": None, "rank": None, "missing": None,
    }  # fmt: skip
    assert Halt.deficient("fc", 3, 8).missing == 5


READERS = {"startswith", "endswith", "split", "partition", "find", "index", "count", "removesuffix"}


def _named(node: ast.AST) -> bool:
    """A field or a variable that holds a sentence."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("lower", "upper", "strip") and _named(node.func.value)
    return (isinstance(node, ast.Attribute) and node.attr in ("reason", "note", "words")) or (
        isinstance(node, ast.Name) and node.id in ("reason", "note")
    )


def _reads_english(tree: ast.AST) -> list[int]:
    """Lines at which a decision is taken from a sentence or from the text of a route."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = any(isinstance(s, ast.Constant) and isinstance(s.value, str) and s.value
                        for s in sides)  # fmt: skip
            contained = any(isinstance(op, (ast.In, ast.NotIn)) for op in node.ops)
            if any(map(_named, sides)) and (texts or contained):
                found.append(node.lineno)
            if texts and any(isinstance(s, ast.Attribute) and s.attr == "route" for s in sides):
                found.append(node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in READERS and _named(node.func.value):
                found.append(node.lineno)
            pattern = isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
            if pattern and any(map(_named, node.args)):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "if 'pool' in recovery.reason.lower(): pass",
        "told = re.search('x', recovery.reason)",
        "place = recovery.reason.split('a')[1]",
        "if report.route == 'not reached': pass",
        "if halt.reason.startswith('the'): pass",
        "if report.note not in reason: pass",
    ],
)
def test_the_reader_of_english_is_found_where_there_is_one(line: str) -> None:
    assert _reads_english(ast.parse(line)) == [1]


def test_nothing_is_read_out_of_english() -> None:
    root = Path(__file__).resolve().parents[2]
    files = [*(root / "rgap").rglob("*.py"), *(root / "analysis").rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{path.relative_to(root)}:{line}"
        for path in files
        for line in _reads_english(ast.parse(path.read_text()))
    ]
    assert found == []
