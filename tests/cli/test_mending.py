"""What a command says of a mistake is an option of its own, and the option mends it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import mistakes_table
import pytest
import torch
from cases import dense
from mistakes_table import MISTAKES
from typer.testing import CliRunner

from rgap import capture
from rgap.cli.app import app
from rgap.update.losses import Loss

PYTHON = re.compile(r"rgap\.|Update\(|=\[|dataclasses|update\.|replace\(")
ONE_OF_A_KIND = {one.kinds: name for name, one in MISTAKES.items()}.values()
MENDED = {
    "sign": "--factor",
    "smoothing": "--label-smoothing",
    "squared error": "--loss",
    "decay": "--weight-decay",
    "silent": "--frozen",
}


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module whose network a command finds."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("given_network")
    monkeypatch.setitem(sys.modules, "given_network", module)
    return module


def ran(module: ModuleType, name: str, command: str, *options: str) -> tuple[int, str]:
    """The exit code and the output of a command on an update with this mistake."""
    one = MISTAKES[name]
    network = "normed" if name == "mode" else "mlp"
    model, update = mistakes_table.Trial(name, network, one.batches[0], 10, False, 3).made()
    module.build = lambda: model
    update.save("update")
    words = [command, "given_network:build", "update", "-q", *options]
    result = CliRunner().invoke(app, words)
    return result.exit_code, result.output


def test_no_remedy_on_the_command_line_is_python(given: ModuleType) -> None:
    kinds = set()
    for name in ONE_OF_A_KIND:
        code, said = ran(given, name, "check", "--json")
        assert code in (0, 1), said
        kinds |= {one["kind"] for one in json.loads(said)["findings"]}
        assert not PYTHON.search(said.replace('\\"', '"')), (name, said)
    assert len(kinds) > 12, kinds


@pytest.mark.parametrize("name", MENDED)
def test_what_is_written_mends_it(name: str, given: ModuleType) -> None:
    _, said = ran(given, name, "check")
    (line,) = re.findall(r"^   write (--.*)$", said, re.MULTILINE)[:1]
    options = line.split(" if the ")[0].split(" with the ")[0].split()
    assert MENDED[name] in options, line
    code, said = ran(given, name, "invert", *options, "--json")
    told = json.loads(said)
    assert not PYTHON.search(said), said
    if name == "silent":
        assert "missing" not in told["reason"], told["reason"]
    else:
        assert (code, told["status"]) == (0, "EXACT"), told["reason"]


@pytest.mark.parametrize(
    ("loss", "right", "wrong", "said"),
    [(Loss(targets="probability"), "0,1,0", "1,0,0", "leave --labels out"),
     (Loss("mse_loss"), "0,1,0", "1,0,0", "write --labels 0,1,0"),
     (Loss("binary_cross_entropy_with_logits"), "0,1,1", "1,0,0", "write --labels 0,1,1"),
     (Loss(targets="probability"), "0.5,0.5,0,0,0.25,0.75", "1,0,0", "for each of 2 pictures"),
     (Loss("mse_loss"), "0.5,1,0,0,2,0.25", "1,0,0,1", "(2, 3)")],
)  # fmt: skip
def test_targets_of_several_numbers_are_read(
    loss: Loss, right: str, wrong: str, said: str, given: ModuleType
) -> None:
    model = dense(12, 8, 3, flat=True).double()
    given.build = lambda: model
    numbers = [float(part) for part in right.split(",")]
    targets = torch.tensor(numbers, dtype=torch.float64).reshape(-1, 3)
    targets = targets.long() if loss.targets == "index" else targets
    capture(model, torch.rand(len(targets), 12).double(), targets, loss).save("update")

    def told(command: str, labels: str) -> tuple[int, str]:
        words = [command, "given_network:build", "update", "-q", "--labels", labels]
        result = CliRunner().invoke(app, words)
        return result.exit_code, result.output

    assert told("check", right)[0] == told("invert", right)[0] == 0
    code, output = told("check", wrong)
    assert code in (1, 2) and said in output, output


def test_weights_after_a_step_are_read(given: ModuleType) -> None:
    trial = mistakes_table.Trial("none", "mlp", 1, 10, False, 3)
    model, update = trial.made()
    after = {n: p.detach() - 0.1 * update.gradients[n] for n, p in model.named_parameters()}
    given.build = lambda: model
    replace(update, gradients=after).save("update")
    words = ["invert", "given_network:build", "update", "-q"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "Write --after-step 0.01 with" in refused.output
    result = CliRunner().invoke(app, [*words, "--after-step", "0.1"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [("--factor 0", "--factor: expected"), ("--class-weights a", "--class-weights: expected"),
     ("--loss mse", "mse_loss"), ("--label-smoothing 2", "--label-smoothing"),
     ("--after-step -1", "expected a positive learning rate")],
)  # fmt: skip
def test_a_wrong_correction_is_one_line(options: str, said: str, given: ModuleType) -> None:
    code, output = ran(given, "none", "check", *options.split())
    assert code == 2 and said in output and len(output.splitlines()) == 1, output
