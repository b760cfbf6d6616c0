"""The defender's answer: every change reaches the fraction, and the next smaller one does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import small_conv, small_mlp
from graphs import residual, seeded
from torch import nn
from typer.testing import CliRunner

from rgap.analysis import DEFENCES, harden, identifiability, noise
from rgap.analysis.hardening.resize import UnfitError, called_layers, with_channels, with_stride
from rgap.analysis.hardening.table import Hardening
from rgap.cli.app import app

SHAPE = (2, 5, 5)


def network() -> nn.Module:
    return small_conv("tanh", channels=3, size=5, depth=2, norm=True).double()


@pytest.fixture(scope="module")
def answer() -> Hardening:
    return harden(network(), SHAPE, 0.1, largest_batch=16)


def missing(model: nn.Module, batch: int) -> int:
    found = identifiability(model, SHAPE, batch, method="dense", sequential=False)
    return found.joint_nullity


def test_every_kind_of_change_is_answered(answer: Hardening) -> None:
    assert answer.missing == 0 and answer.unknowns == 50
    assert {change.kind for change in answer.changes} == {
        "batch size",
        "channels",
        "stride",
        "noise",
    }
    assert all(change.fraction >= 0.1 for change in answer.changes)


def test_no_smaller_change_is_enough(answer: Hardening) -> None:
    for change in answer.changes:
        after, size = int(change.after), change.unknowns
        if change.kind == "batch size":
            assert missing(network(), after) == change.missing
            assert missing(network(), after - 1) < 0.1 * (after - 1) * 50
        elif change.kind == "channels":
            narrow = with_channels(network(), change.layer, after, SHAPE)
            wider = with_channels(network(), change.layer, after + 1, SHAPE)
            assert missing(narrow, 1) == change.missing
            assert missing(wider, 1) < 0.1 * size
        elif change.kind == "stride":
            coarse = with_stride(network(), change.layer, after, SHAPE)
            finer = with_stride(network(), change.layer, after - 1, SHAPE)
            assert missing(coarse, 1) == change.missing
            assert missing(finer, 1) < 0.1 * size
        else:
            below, above = (
                noise(network(), SHAPE, sigma=change.after * factor) for factor in (1 - 1e-6, 1)
            )
            assert above.lost == change.missing >= 5
            assert below.lost < 5


def test_the_answer_in_words_frames_and_tables(answer: Hardening) -> None:
    words = answer.explain()
    best = answer.of("batch size")
    assert best is not None and f"batch size: 1 -> {best.after:.4g}" in words
    assert "may still be guessed" in words
    assert len(answer.to_frame()) == len(answer.changes) == answer._repr_html_().count("<tr>") - 1
    document = json.loads(json.dumps(answer.summary(), allow_nan=False))
    assert document["changes"][0]["kind"] == "batch size"


def test_what_is_already_gone_needs_no_change() -> None:
    done = harden(small_mlp("tanh", widths=(3, 6)).double(), (2, 4, 4), 0.1, 4)
    assert not done.changes and "Nothing has to be changed" in done.explain()


def test_what_cannot_be_reached_is_said() -> None:
    answer = harden(
        small_mlp("tanh").double(), (2, 4, 4), 0.99, largest_batch=2, changes=("batch size",)
    )
    assert not answer.changes and answer.failed == ("batch size: none up to 2 is enough.",)


def test_changed_networks_leave_the_original_and_run() -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    names = [name for name, _ in called_layers(model, SHAPE)]
    assert names == ["conv0", "conv1", "fc"]
    narrow = with_channels(model, "conv0", 2, SHAPE)
    assert narrow.norm0.num_features == 2 and narrow.conv1.weight.shape[1] == 2
    assert torch.equal(narrow.fc.weight, model.fc.weight), "what still fits keeps its weights"
    coarse = with_stride(model, "conv1", 3, SHAPE)
    assert coarse.fc.in_features == 12 and torch.equal(coarse.conv1.weight, model.conv1.weight)
    for changed in (narrow, coarse):
        assert changed(torch.zeros(2, *SHAPE).double()).shape == (2, 5)
        assert not any(m._forward_pre_hooks for m in changed.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_change_that_a_branch_does_not_allow_is_refused() -> None:
    model = seeded(residual)
    with pytest.raises(UnfitError, match="size"):
        with_channels(model, "b", 2, (2, 5, 5))
    answer = harden(model, (2, 5, 5), 0.9, changes=("channels", "stride"), largest_stride=2)
    assert any("'b'" in line and "does not run" in line for line in answer.failed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fraction": 0.0}, r"fraction in \(0, 1\], got 0.0; write fraction=0.1"),
        ({"fraction": 1.5}, "got 1.5"),
        ({"changes": ("width",)}, r"got \('width',\); write changes="),
        ({"changes": "noise"}, "got 'noise'; write changes="),
        ({"largest_batch": 0}, "got 0 and 4; write largest_batch=32"),
        ({"batch_size": 0}, "batch_size >= 1, got 0"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        harden(small_mlp("tanh"), (2, 4, 4), **arguments)


def test_the_command_line_prints_a_table_or_one_document() -> None:
    spec = (
        "harden",
        "mlp:widths=3,input_shape=1x4x4",
        "--input-shape",
        "1,4,4",
        "--fraction",
        "0.5",
    )
    arguments = [*spec, "--changes", "batch size"]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert [change["kind"] for change in document["changes"]] == ["batch size"]
    shown = CliRunner().invoke(app, arguments).stdout
    assert "batch size" in shown and f"-> {document['changes'][0]['after']}" in shown
    refused = CliRunner().invoke(app, [*spec, "--changes", "width"])
    assert refused.exit_code == 2


def test_a_joint_audit_on_the_command_line(tmp_path: Path) -> None:
    plot = tmp_path / "nullity.png"
    arguments = ["audit", "lenet:channels=2,input_shape=1x8x8", "--joint", "--batch-sizes", "1,2"]
    found = CliRunner().invoke(app, [*arguments, "--input-shape", "1,8,8", "--json"])
    assert found.exit_code == 0, found.output
    joint = json.loads(found.stdout)["joint"]
    assert [one["unknowns"] for one in joint] == [64, 128]
    shown = CliRunner().invoke(app, [*arguments, "--input-shape", "1,8,8", "--plot", str(plot)])
    assert plot.is_file() and f"determines {joint[1]['joint_rank']} of" in shown.stdout


@pytest.mark.parametrize(("name", "share"), [("prune", 0.3), ("quantise", 0.1), ("sign", 0.3)])
def test_the_weakest_level_of_a_defence_is_found(name: str, share: float) -> None:
    """The level is enough by the bound itself, and the next weaker one is not."""
    change = harden(network(), SHAPE, share, changes=(), defence=name).of(name)
    assert change is not None and change.before == DEFENCES[name].idle
    levels = list(DEFENCES[name].levels())
    at = [level.strength for level in levels].index(change.after)
    found = noise(network(), SHAPE, defence=levels[at])
    assert found.nullity + found.lost == change.missing >= share * 50
    weaker = noise(network(), SHAPE, defence=levels[at - 1])
    assert at == 0 or weaker.nullity + weaker.lost < share * 50


def test_a_defence_that_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(ValueError, match="'clip', which has none; write defence='prune'"):
        harden(network(), SHAPE, defence=("prune", "clip"))
    with pytest.raises(
        ValueError, match=r"expected one of 'prune', .*got 'wrong'; write defence='prune'"
    ):
        harden(network(), SHAPE, defence="wrong")
    answer = harden(network(), SHAPE, 1.0, changes=(), defence="prune")
    assert answer.failed == ("prune: even Prune(keep=0.001) is not enough.",)
