"""No command replaces what is there already, unless --force says so; what it replaces is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

import rgap
from rgap.cli.app import app
from rgap.report import demo as report

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
UPDATE = "sent.safetensors"
WORDS = {
    "capture": ("lenet", "--images", "photos:0", "--labels", "3", "--output", "out.safetensors"),
    "invert": ("lenet", UPDATE, "--output", "out.safetensors"),
    "match": (
        "lenet",
        UPDATE,
        "--output",
        "out.safetensors",
        "--iterations",
        "1",
        "--restarts",
        "1",
    ),
    "audit": ("lenet", "--batch-sizes", "1", "--plot", "out.svg"),
    "import": (
        "--model",
        "lenet",
        "--gradients",
        UPDATE,
        "--prefix",
        "gradients/",
        "--output",
        "out.safetensors",
    ),
    "report": ("lenet", UPDATE, "--batch-sizes", "1", "--output", "out.html"),
}
WRITES = {name for name, command in COMMANDS.items()
          for option in command.params if option.name in ("output", "plot")}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    picture = rgap.photos.load(1, dtype=torch.float32)
    rgap.capture(rgap.models.lenet(seed=0), picture, torch.tensor([3])).save(tmp_path / UPDATE)
    return tmp_path


def called(command: str, *words: str) -> Result:
    return CliRunner().invoke(app, [command, *words])


def test_every_command_that_writes_is_tried() -> None:
    assert {*WORDS, "demo"} == WRITES
    for name in WRITES:
        assert any(option.name == "force" for option in COMMANDS[name].params)


@pytest.mark.parametrize("command", WORDS)
def test_a_file_is_replaced_with_force_alone(command: str, here: Path) -> None:
    flag, name = next(
        (flag, word)
        for flag, word in zip(WORDS[command], WORDS[command][1:], strict=False)
        if word.startswith("out.")
    )
    (here / name).write_bytes(b"mine")
    told = called(command, *WORDS[command])
    free = name.replace("out", "out-2")
    assert told.exit_code == 2 and (here / name).read_bytes() == b"mine"
    assert told.output == (
        f"rgap: error: {flag}: expected a place that is free, got {name}, which exists; write "
        f"{flag} {free} or, to replace it, --force\n"
    )
    told = called(command, *WORDS[command], "--force")
    assert told.exit_code in (0, 1), told.output
    assert (here / name).read_bytes() != b"mine"
    assert {path.name for path in here.iterdir()} == {UPDATE, name}


def test_the_mask_beside_a_picture_is_not_replaced_either(here: Path) -> None:
    (here / "out-determined.png").write_bytes(b"mine")
    told = called("invert", "lenet", UPDATE, "--output", "out.png")
    assert told.exit_code == 2 and "got out-determined.png, which exists" in told.output
    assert not (here / "out.png").exists()


def test_a_folder_is_replaced_where_it_holds_a_recovery_and_nothing_else(here: Path) -> None:
    words = ("invert", "lenet", UPDATE, "--output", "found")
    assert called(*words).exit_code == 0
    held = {path.name for path in (here / "found").iterdir()}
    (here / "found" / "picture-7.png").write_bytes(b"of an older batch")
    told = called(*words)
    assert (
        told.exit_code == 2 and "write --output found-2 or, to replace it, --force" in told.output
    )
    assert called(*words, "--force").exit_code == 0
    assert {path.name for path in (here / "found").iterdir()} == held
    (here / "found" / "notes.txt").write_bytes(b"mine")
    told = called(*words, "--force")
    assert told.exit_code == 2 and "holds more than a recovery, notes.txt" in told.output
    assert (here / "found" / "notes.txt").read_bytes() == b"mine"
    assert {path.name for path in here.iterdir()} == {UPDATE, "found"}


def test_what_fails_while_it_is_written_leaves_what_was_there(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("invert", "lenet", UPDATE, "--output", "found")
    assert called(*words).exit_code == 0
    before = {path.name: path.read_bytes() for path in (here / "found").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rgap.report.results.save_picture", full)
    assert called(*words, "--force").exit_code == 2
    assert {path.name: path.read_bytes() for path in (here / "found").iterdir()} == before
    assert {path.name for path in here.iterdir()} == {UPDATE, "found"}


@pytest.mark.parametrize("name", report.FILES)
def test_a_demonstration_replaces_nothing(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        raise ValueError("it ran")

    monkeypatch.setattr(report, "run", run)
    (here / "demo").mkdir()
    (here / "demo" / name).write_bytes(b"mine")
    told = called("demo")
    assert told.exit_code == 2 and f"got demo/{name}, which exists; write --output demo-2" in (
        told.output
    )
    assert "it ran" in called("demo", "--force").output


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_file_is_never_replaced(kind: str, here: Path) -> None:
    path = here / "out.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(here / "nowhere")
    for words in ((), ("--force",)):
        told = called("capture", *WORDS["capture"], *words)
        assert told.exit_code == 2 and "expected the name of a file" in told.output
        assert path.is_fifo() if kind == "pipe" else path.is_symlink()


def test_an_output_without_a_name_is_refused(here: Path) -> None:
    told = called("invert", "lenet", UPDATE, "--output", "")
    assert told.exit_code == 2
    assert told.output == "rgap: error: --output: expected a name, got '.'; write --output found\n"


def test_a_written_file_has_the_mode_of_every_new_one(here: Path) -> None:
    (here / "plain").touch()
    assert called("capture", *WORDS["capture"]).exit_code == 0
    assert (here / "out.safetensors").stat().st_mode == (here / "plain").stat().st_mode
