"""Wrong usage of any command is one line: what was expected, what came, what to write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import rgap
from rgap.cli.app import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
BASE = {
    "demo": (),
    "capture": ("mlp", "--images", "photos:0", "--labels", "3"),
    "import": ("--model", "mlp", "--gradients", "sent.safetensors"),
    "check": ("mlp", "sent.safetensors"),
    "audit": ("mlp",),
    "invert": ("mlp", "sent.safetensors"),
    "report": ("mlp", "sent.safetensors"),
    "match": ("mlp", "sent.safetensors"),
    "labels": ("mlp", "sent.safetensors"),
    "harden": ("mlp",),
}
# What no number, choice, shape or name of a file is; of these any word is a name.
WRONG = {"output": "taken.txt/inside.png", "plot": "heat.doc", "checkpoint": "no/folder/here"}
ALSO = {  # without which the option says that it needs it
    ("invert", "prior"): ("--complete",),
    ("invert", "start"): ("--complete",),
    ("report", "prior"): ("--complete",),
    ("report", "start"): ("--complete",),
    ("match", "generator"): ("--method", "gifd"),
    ("match", "generator_weights"): ("--method", "gifd", "--generator", "mlp"),
    ("match", "generator_codes"): ("--method", "gifd", "--generator", "mlp"),
    ("match", "generator_range"): ("--method", "gifd", "--generator", "mlp"),
}
DECLARED = {  # an option that several commands share is declared once, and tried in the last
    (option.name, option.help, str(option.default)): (name, option.name)
    for name, command in COMMANDS.items()
    for option in command.params
    if option.opts[0].startswith("-") and not option.is_flag and option.name != "help"
}
VALUED = list(DECLARED.values())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usage")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    update = rgap.capture(rgap.models.mlp(seed=0), x, torch.tensor([3]))
    update.save(folder / "sent.safetensors")
    (folder / "taken.txt").write_text("")
    return folder


def refused(here: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.chdir(here)
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2, (words, result.output, result.exception)
    lines = result.output.splitlines()
    assert len(lines) == 1 and lines[0].startswith("rgap: error: "), (words, result.output)
    return lines[0].removeprefix("rgap: error: ")


@pytest.mark.parametrize(("command", "option"), VALUED)
def test_a_wrong_value_of_any_option_is_one_line(
    command: str, option: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (param,) = (p for p in COMMANDS[command].params if p.name == option)
    flag, wrong = max(param.opts, key=len), WRONG.get(option, "n0nsense")
    told = refused(
        here, monkeypatch, command, *BASE[command], *ALSO.get((command, option), ()), flag, wrong
    )
    assert told.startswith(f"{flag}: ") or flag in told, told
    assert wrong.split("/")[0] in told, told
    assert "Input should" not in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("labels mlp sent.safetensors --method foo", r"idlg or all, got 'foo'; write .* best"),
        ("audit mlp --batch-sizes 0,x", "got '0' and 'x' in '0,x'; write --batch-sizes 1,2,4,8"),
        ("audit mlp --method foo", "expected exact, sketch or formula, got 'foo'"),
        ("invert mlp sent.safetensors --labels 99", "from 0 to 9, got 99; leave"),
        ("check mlp sent.safetensors --noise=-1", "a number of at least 0, got '-1'; write"),
        ("match mlp sent.safetensors --method dlg --generations 3", "got --method dlg; write"),
        ("match mlp sent.safetensors --restarts 0", "a whole number of at least 1, got '0'"),
        ("audit mlp --plot", "--plot: expected FILE, got nothing; write --plot FILE"),
        ("audit mlp --json=3", "--json: expected no value, got '3'; write --json alone"),
        ("audit mlp b", "unexpected extra argument"),
        ("audit mlp --batch-sizes 1 2", r"a list is one word, as in 1,2"),
        ("audit mlp --batch-sizes 8-1", "smallest first, got '8-1'; write --batch-sizes 1-8"),
        ("audit mlp --batch-sizes 1-2000", "at most 1024 sizes, .* got '1-2000'"),
        (f"audit mlp --batch-sizes {10**20}", "at most 1000000 samples, got 1000"),
        ("check mlp sent.safetensors --frob", "--frob: expected an option of .*; write --frozen"),
        ("capture mlp --images photos:0", "--labels: expected LABELS, got nothing; write"),
        ("invert", "MODEL: expected one, got none; see rgap invert -h"),
        ("adit mlp", "expected demo, .* got 'adit'; write rgap audit"),
        ("--frob", "--frob: expected an option of rgap"),
        ("check mlp sent.safetensors --input-shape 3,32", r"--input-shape .* would fit"),
        ("invert mlp sent.safetensors --weight-decay nan", "^--weight-decay: expected a finite n"),
        ("invert mlp sent.safetensors --factor=-inf", "^--factor: expected a finite number, got -"),
        ("match mlp sent.safetensors --local-rate inf", "^--local-rate: expected a finite number"),
        ("invert mlp sent.safetensors --time-limit nan", "^--time-limit: expected a finite numb"),
        ("check mlp sent.safetensors --noise inf", "^--noise: expected a finite number, got inf"),
        ("harden mlp --fraction nan", "^--fraction: expected a finite number, .* --fraction 0.1"),
        ("harden mlp --defence foo", "expected one of 'prune', .*got 'foo'; write --defence prune"),
        ("capture mlp --images photos:0 --labels 3 --output /proc/x.safetensors",
         "/proc/x.safetensors: expected a place that can be written to, got '"),
        ("audit mlp --batch-sizes 1 --method formula --plot /proc/x.png",
         "/proc/x.png: expected a place that can be written to, got '[A-Za-z ]*'; write"),
        ("invert mlp .", "^UPDATE: expected a file, got the folder .; write the name"),
        ("invert mlp sent.safetensors --weights .", "weights: expected a file, got the folder ."),
    ],
)  # fmt: skip
def test_what_was_expected_got_and_to_write(
    words: str, told: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.search(told, refused(here, monkeypatch, *words.split()))


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("invert mlp sent.safetensors --output sent.safetensors", "UPDATE"),
        ("match mlp sent.safetensors --output ./sent.safetensors", "UPDATE"),
        ("invert mlp sent.safetensors --output link.safetensors", "UPDATE"),
        ("invert mlp sent.safetensors --weights w.safetensors --output w.safetensors", "--weights"),
        ("match mlp sent.safetensors --start w.safetensors --resume w.safetensors", "--start"),
        ("match mlp sent.safetensors --start w.safetensors --output w.safetensors", "--start"),
        ("audit mlp --weights w.png --plot w.png", "--weights"),
        ("invert mlp sent.safetensors --weights w-determined.png --output w.png", "--weights"),
        ("capture mlp --weights w.safetensors --images photos:0 --labels 3 "
         "--output w.safetensors", "--weights"),
        ("capture mlp --images photos:0 --images w.safetensors --labels 3 "
         "--output w.safetensors", "--images"),
    ],
)  # fmt: skip
def test_an_output_that_a_command_reads_is_refused(
    words: str, read: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("w.safetensors", "w.png", "w-determined.png"):
        (here / name).write_bytes(b"held")
    if not (here / "link.safetensors").exists():
        (here / "link.safetensors").symlink_to(here / "sent.safetensors")
    before = {path: path.read_bytes() for path in here.iterdir() if path.is_file()}
    told = refused(here, monkeypatch, *words.split())
    assert re.search(rf"expected a file of its own, got .*{read} reads .*; write --\w+ ", told), (
        told
    )
    assert before == {path: path.read_bytes() for path in here.iterdir() if path.is_file()}
