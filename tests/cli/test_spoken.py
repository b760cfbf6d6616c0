"""A command's errors name the options that were typed, not the library's arguments."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from cases import dense
from torch import nn
from typer.testing import CliRunner

import rgap
from rgap.cli.app import app
from rgap.cli.spoken import options_of, spoken

PYTHON = re.compile(
    r"rgap\.\w+\(|Update\(|Loss\(|LocalTraining|dataclasses|update\.\w+\(|model\.\w|\b[a-z_]+=[\w(\[]"
)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {
    name: options_of(typer.Context(command, info_name=name)) for name, command in COMMANDS.items()
}


@pytest.mark.parametrize("command", ["check", "invert", "match", "labels"])
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("batch_size: unknown; pass batch_size=.", "--batch-size: unknown; pass --batch-size."),
        ("pass batch_size=4, or wait", "pass --batch-size 4, or wait"),
        ("state it (input_shape=(3, 8, 8))", "state it (--input-shape 3,8,8)"),
        ("write dataclasses.replace(update, batch_size=4)", "write --batch-size 4"),
        ("batch_size=torch.tensor([3, 5]) says it", "--batch-size 3,5 says it"),
        ("give a smaller input_shape.", "give a smaller --input-shape."),
        ("update.batch_size is of 'batch_size'", "update.batch_size is of 'batch_size'"),
        ("update: expected a file", "UPDATE: expected a file"),
        ("write torch.zeros(2, device='cpu')", "write torch.zeros(2, device='cpu')"),
        ("the model: it has batch_sizes=3", "the model: it has batch_sizes=3"),
    ],
)
def test_arguments_become_options(command: str, said: str, wanted: str) -> None:
    assert spoken(said, OPTIONS[command]) == wanted


def test_the_errors_of_the_commands_speak_of_options(tmp_path: Path) -> None:
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sent = rgap.capture(rgap.models.mlp(seed=0), x, torch.tensor([3]))
    paths = {"unknown": replace(sent, batch_size=None), "whole": sent}
    for name, update in paths.items():
        update.save(tmp_path / f"{name}.safetensors")
    whole, unknown = (str(tmp_path / f"{n}.safetensors") for n in ("whole", "unknown"))
    runs = [
        ["labels", "mlp", unknown],
        ["match", "mlp", unknown],
        ["invert", "mlp", whole, "--batch-size", "0"],
        ["check", "mlp", whole, "--batch-size", "0"],
        ["invert", "mlp", whole, "--noise", "-1"],
        ["check", "mlp", whole, "--noise", "-1"],
        ["invert", "mlp", whole, "--input-shape", "3,8,8"],
    ]
    for arguments in runs:
        result = CliRunner().invoke(app, [*arguments, "--quiet"])
        assert result.exit_code == 2, (arguments, result.output)
        names = [n for n in OPTIONS[arguments[0]] if "_" in n]
        python = [n for n in names if re.search(rf"\b{n}\b[=:]", result.output)]
        assert not python, (arguments, result.output)
        assert "--" in result.output, (arguments, result.output)


@pytest.mark.parametrize("command", ["check", "invert", "match", "labels"])
def test_no_advice_of_a_command_is_a_line_of_python(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    y, own = torch.tensor([3]), torch.nn.functional.cross_entropy
    model, path = dense(18, 12, 5), str(tmp_path / "update.safetensors")
    module = ModuleType("given_network")
    monkeypatch.setitem(sys.modules, "given_network", module)
    module.build = lambda: model
    sent = rgap.capture(model, x, y)
    soft = torch.full((1, 5), 0.2)
    updates = {
        "another network": rgap.capture(nn.Sequential(nn.Flatten(), nn.Linear(18, 5)), x, y),
        "more layers": rgap.capture(dense(18, 12, 9, 5), x, y),
        "other widths": rgap.capture(dense(18, 11, 5), x, y),
        "wrapped": replace(sent, gradients={f"a.{n}.b": g for n, g in sent.gradients.items()}),
        "missing": replace(sent, gradients=dict(list(sent.gradients.items())[2:])),
        "steps": replace(sent, local_steps=3),
        "soft": rgap.capture(model, x, soft, rgap.Loss(targets="probability")),
        "weighted": rgap.capture(model, x, y, rgap.Loss(weight=(1.0,) * 4 + (2.0,))),
        "own": rgap.capture(model, x, y, lambda outputs, targets: 2 * own(outputs, targets)),
    }
    for name, update in updates.items():
        update.save(path)
        limits = ("--iterations", "1", "--labels", "3") if command == "match" else ()
        if command == "match" and name == "soft":
            continue  # whose labels are ten numbers
        result = CliRunner().invoke(app, [command, "given_network:build", path, "--quiet", *limits])
        assert result.exception is None or isinstance(result.exception, SystemExit), name
        assert not PYTHON.search(result.output), (name, result.output)
