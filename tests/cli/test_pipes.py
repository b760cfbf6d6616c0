"""A pipe that nobody reads any more changes nothing of how a command ends."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rgap
from rgap.cli.app import main
from rgap.cli.console import unbroken
from rgap.models.spec import resolve

RUNS = {
    "--help": 0,
    "--version": 0,
    "invert --help": 0,
    "invert mlp:widths=32 right": 0,
    "invert mlp:widths=32 right --json": 0,
    "invert mlp:widths=32 right --explain --output found.safetensors": 0,
    "invert mlp:widths=32 wrong": 3,
    "invert mlp:widths=32 absent": 2,
    "check mlp:widths=32 right": 0,
    "check mlp:widths=32 wrong": 1,
    "labels mlp:widths=32 right": 0,
    "audit mlp:widths=32 --batch-sizes 1": 0,
    "capture mlp:widths=32 --images photos:0 --labels 3": 0,
}


@pytest.fixture(autouse=True)
def _updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = resolve("mlp:widths=32")
    sent = rgap.capture(model, x, torch.tensor([3]))
    sent.save("right")
    turned = replace(sent, gradients={n: -g for n, g in sent.gradients.items()})
    turned.save("wrong")


def ended(line: str, out: int, err: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command whose output and errors go to two open files."""
    monkeypatch.setattr(sys, "argv", ["rgap", *line.split()])
    with os.fdopen(out, "w") as plain, os.fdopen(err, "w") as errors:
        monkeypatch.setattr(sys, "stdout", plain)
        monkeypatch.setattr(sys, "stderr", errors)
        with pytest.raises(SystemExit) as end:
            main()
        sys.stdout.close()  # flushes, as the interpreter does at its end
        sys.stderr.close()
    return int(end.value.code or 0)


@pytest.mark.parametrize("line", RUNS)
def test_a_closed_pipe_leaves_the_exit_code_of_the_answer(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for _ in range(2):
        read, write = os.pipe()
        os.close(read)
        ends.append(write)
    assert ended(line, *ends, monkeypatch) == RUNS[line]
    assert "found" not in line or Path("found.safetensors").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize(
    "line", ["--version", "invert --help", "invert mlp:widths=32 right --json"]
)
def test_a_full_disk_is_an_error(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    errors = os.open("errors", os.O_WRONLY | os.O_CREAT)
    assert ended(line, full, errors, monkeypatch) == 2
    said = Path("errors").read_text().splitlines()
    assert len(said) == 1 and "No space left" in said[0], said


def test_a_closed_output_takes_words() -> None:
    with unbroken(None) as stream:
        assert stream.write("x") == 1
