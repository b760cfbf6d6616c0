"""The command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_model
from typer.testing import CliRunner

from rgap.cli.app import app
from rgap.cli.options import (
    LabelMethod,
    MatchMethod,
    Precision,
    PriorName,
    RankMethod,
    Reduction,
)
from rgap.models.spec import resolve

NETS = """
from torch import nn

def build(classes=5, slope=0.2):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(slope), nn.Flatten(), nn.Linear(512, classes)
    )

def pooled():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    )

def strided():
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 5)
    )

def number():
    return 3

def broken():
    raise RuntimeError("no such width")

constant = 4
"""
CAPTURE = ["--images", "photos:0", "--labels", "2", "--input-shape", "3,8,8"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "clinets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _fresh_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "clinets", raising=False)


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return SimpleNamespace(out=result.stdout, err=result.stderr)


def refused(*arguments: str) -> str:
    """The one line on standard error of a call that ends with code 2."""
    before = sorted(path.name for path in Path().iterdir() if path.name != "__pycache__")
    shown = call(*arguments, code=2)
    assert shown.out == ""
    assert "Traceback" not in shown.err
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    assert sorted(p.name for p in Path().iterdir() if p.name != "__pycache__") == before
    return str(lines[0])


def test_capture_then_invert_recovers_the_photograph(here: Path) -> None:
    call("capture", "clinets:build", *CAPTURE, "--output", "u.safetensors", "--dtype", "float64")
    shown = call("invert", "clinets:build", "u.safetensors", "--output", "found", "--json")
    document = json.loads(shown.out)
    assert document["status"] == "EXACT"
    assert document["labels"] == [2]
    assert document["output"] == "found"
    assert sorted(p.name for p in (here / "found").iterdir()) == [
        "picture-0.png",
        "recovery.safetensors",
    ]
    from rgap.photos import packaged as photos

    truth = photos.load(1, size=8)
    found = load_file(here / "found" / "recovery.safetensors")["inputs"]
    assert float((found - truth).abs().max()) < 1e-6
    with safe_open(here / "found" / "recovery.safetensors", "pt") as file:
        told = file.metadata()
    assert told["certified"] == "inputs, targets"
    assert float((found - truth).abs().max()) <= float(told["error_bound"]) < 1e-6
    shown = call("invert", "clinets:build", "u.safetensors", "--output", "one.png", "--explain")
    assert "EXACT" in shown.out
    assert "unknowns, determined by its gradient" in " ".join(shown.out.split())
    from matplotlib.image import imread

    assert abs(imread("one.png") - truth[0].movedim(0, -1).numpy()).max() <= 0.5 / 255 + 1e-6
    message = refused("invert", "clinets:build", "u.safetensors", "--output", "found")
    assert "found exists already" in message


def test_why_ranks_the_causes() -> None:
    call("capture", "clinets:pooled", *CAPTURE, "--output", "u.safetensors")
    shown = call("invert", "clinets:pooled", "u.safetensors", "--why", code=4)
    assert "What would change it: complete=True, which needs no prior" in shown.out
    assert "; a convolution of stride 2" in shown.out
    told = json.loads(
        call("invert", "clinets:pooled", "u.safetensors", "--why", "--json", code=4).out
    )
    assert told["why"]["causes"][0]["kind"] == "no inverse"


def test_exit_codes_of_what_is_not_exact() -> None:
    six = ["--images", "photos:0-5", "--labels", "0,1,2,3,4,0", "--input-shape", "3,8,8"]
    call("capture", "clinets:build", *six, "--output", "six.safetensors")
    shown = call("invert", "clinets:build", "six.safetensors", "--output", "none", code=1)
    assert "UNDERDETERMINED" in shown.out and "5 classes" in " ".join(shown.out.split())
    assert "nothing written" in shown.err
    assert not Path("none").exists()
    call("capture", "clinets:build", *CAPTURE, "--output", "u.safetensors")
    shown = call("invert", "clinets:build:slope=0.5", "u.safetensors", code=3)
    assert "INCONSISTENT" in shown.out
    call("capture", "clinets:pooled", *CAPTURE, "--output", "p.safetensors")
    shown = call("invert", "clinets:pooled", "p.safetensors", "--json", code=4)
    assert json.loads(shown.out)["status"] == "UNSUPPORTED"


def test_audit_prints_a_table_or_one_document(here: Path) -> None:
    arguments = ("audit", "clinets:build", "--input-shape", "3,8,8", "--batch-sizes", "1,2")
    shown = call(*arguments, "--plot", "heat.png")
    assert "gradient rank" in shown.out
    assert "B = 1" in shown.out
    assert (here / "heat.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads(call(*arguments, "--json", "--method", "formula").out)
    assert document["method"] == "formula"
    assert [row["batch_size"] for row in document["rows"]] == [1, 1, 2, 2]


def test_capture_from_files_and_what_it_shares(here: Path) -> None:
    from PIL import Image

    folder = here / "pictures"
    folder.mkdir()
    for n in range(2):
        Image.new("RGB", (20, 12), (255 * n, 51, 0)).save(folder / f"{n}.png")
    shown = call(
        "capture", "clinets:build", "--images", "pictures", "--labels", "1,4", "--json",
        "--input-shape", "3,8,8", "--share-labels", "--reduction", "sum",
    )  # fmt: skip
    assert json.loads(shown.out)["labels_shared"] is True
    from rgap import Update, capture

    update = Update.load("update.safetensors")
    assert update.labels is not None
    assert update.labels.tolist() == [1, 4]
    pictures = torch.tensor([[0.0, 0.2, 0.0], [1.0, 0.2, 0.0]])[:, :, None, None].expand(2, 3, 8, 8)
    again = capture(
        resolve("clinets:build"), pictures, torch.tensor([1, 4]), torch.nn.CrossEntropyLoss(
            reduction="sum"
        )
    )  # fmt: skip
    for name, sent in update.gradients.items():
        torch.testing.assert_close(sent, again.gradients[name])


def test_the_shape_of_a_sample_is_an_option_of_every_command_that_reads_an_update() -> None:
    from dataclasses import replace

    from rgap import Update

    call("capture", "clinets:build", *CAPTURE)
    update = Update.load("update.safetensors")
    stated = ",".join(map(str, update.input_shape or ()))
    replace(update, input_shape=(7, 7, 7)).save("update.safetensors")
    match = ("match", "--method", "ig", "--iterations", "1", "--labels", "3")
    for command in (("invert",), ("labels",), match):
        asked = (command[0], "clinets:build", "update.safetensors", *command[1:])
        assert "Traceback" not in call(*asked, code=2).err
        found = CliRunner().invoke(app, [*asked, "--input-shape", stated])
        assert found.exit_code in (0, 1), found.output


@pytest.mark.parametrize("spec", ["lenet:classes=7", "clinets:build"])
def test_an_audit_calls_the_network_what_it_was_asked_for(spec: str) -> None:
    """The class of both is a plain Sequential."""
    quick = ("--batch-sizes", "1", "--method", "formula", "--input-shape", "3,8,8")
    if spec.startswith("lenet"):
        spec = f"{spec},input_shape=3x8x8"
    if spec.startswith("clinets"):
        assert json.loads(call("audit", spec, *quick, "--json").out)["model"] == spec
    shown = call("audit", spec, *quick).out
    assert f"Equations of every layer's gradient: {spec}" in shown
    assert "Sequential" not in shown


def test_sizes_of_a_list_are_joined_by_x() -> None:
    with pytest.raises(ValueError, match=r"write resnet:channels=64x128"):
        resolve("resnet:channels=64,128")
    assert resolve("resnet:channels=8x16,input_shape=3x8x8") is not None


def test_weights_come_from_a_file(here: Path) -> None:
    model = resolve("clinets:build").double()
    with torch.no_grad():
        model[0].weight.mul_(2)
    save_model(model, "right.safetensors")
    again = resolve("clinets:build", "right.safetensors")
    assert torch.equal(again[0].weight, model[0].weight)
    with pytest.raises(ValueError, match=r"'3.bias' has shape \(5,\)"):
        resolve("clinets:build:classes=6", "right.safetensors")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lenett", "did you mean 'lenet'"),
        ("lenet:clases=3", "did you mean 'classes'"),
        ("lenet:classes", "expected options key=value"),
        ("./clinets.py", "write clinets:factory in this directory"),
        ("nets/clinets.py:build", "write clinets:build in nets"),
        ("clinet:build", "no module 'clinet'.*did you mean 'clinets'"),
        ("clinets:biuld", "has no 'biuld'; did you mean 'build'"),
        ("clinets:number", "return a torch.nn.Module, got a int"),
        ("clinets:constant", "to be a factory"),
        ("clinets:broken", "RuntimeError: no such width"),
    ],
)
def test_models_that_cannot_be_built(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve(spec)


def test_a_factory_in_train_mode_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("clinorm.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3))\n"
        "def plain():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n"
    )
    with pytest.warns(UserWarning, match=r"'1' \(BatchNorm1d\) mixes the samples.*eval mode"):
        assert not resolve("clinorm:build").training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not resolve("clinorm:plain").training


def test_one_name_is_one_network_and_the_random_state_stays() -> None:
    state = torch.get_rng_state()
    first, second = resolve("clinets:build:classes=4"), resolve("clinets:build:classes=4")
    assert torch.equal(first[0].weight, second[0].weight)
    assert first[3].out_features == 4
    assert not first.training
    assert torch.equal(state, torch.get_rng_state())
    assert resolve("lenet:activation=tanh,classes=7").act1.__class__ is torch.nn.Tanh


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("capture", "clinets:build", *CAPTURE, "--output", "u.pt"), "u.safetensors"),
        (("capture", "clinets:build", *CAPTURE, "--output", "no/u.safetensors"), "no folder no"),
        (("capture", "clinets:build", *CAPTURE[:3], "x"), "expected numbers such as 3,5"),
        (("capture", "clinets:build", *CAPTURE[:3], "1,2"), "expected 1, one per picture, got 2"),
        (("capture", "clinets:build", "--images", "a.png", "--labels", "1"), "photos:0-3"),
        (("capture", "clinets:build", "--images", "photos:99", "--labels", "1"), "0 to 31"),
        (("capture", "clinets:build", "--images", "clinets.py", "--labels", "1"), "no picture"),
        (("capture", "clinets:build", *CAPTURE, "--loss", "mse"), "mse_loss"),
        (("audit", "clinets:build", "--input-shape", "3,8"), "shape"),
        (("audit", "clinets:build", "--batch-sizes", "0"), "--batch-sizes"),
        (("audit", "clinets:build", "--plot", "heat.doc"), "heat.png"),
        (("invert", "clinets:build", "absent.safetensors"), "no file absent.safetensors"),
        (("invert", "clinets:build", "clinets.py"), "not a safetensors file"),
        (("demo", "--output", "clinets.py"), "expected a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    arguments: tuple[str, ...], words: str
) -> None:
    assert words in refused(*arguments)


def test_usage_errors_and_exit_codes_are_documented() -> None:
    call("invert", code=2)
    call("audit", "lenet", "--method", "guess", code=2)
    shown = call("invert", "--help").out
    for word in ("EXACT", "UNDERDETERMINED", "INCONSISTENT", "UNSUPPORTED"):
        assert word in shown


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
CHOICES = {
    "capture": (Precision, Reduction),
    "invert": (PriorName,),
    "match": (MatchMethod, PriorName),
    "labels": (LabelMethod,),
    "audit": (RankMethod,),
}
OWN = {
    "model",
    "weight_decay",
    "local_steps",
    "batch_sizes",
    "labels",
    "loss",
    "reduction",
    "method",
    "input_shape",
    "batch_size",
    "output",
    "prior",
    "time_limit",
}


def test_an_option_of_several_commands_is_declared_once() -> None:
    """One name means one thing everywhere, but for the options that a command makes its own."""
    declared: dict[str, set[Any]] = {}
    for command in COMMANDS.values():
        for option in command.params:
            said = (tuple(option.opts), option.help, option.default)
            declared.setdefault(option.name, set()).add(said)
    assert {name for name, said in declared.items() if len(said) > 1} == OWN


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_fits_its_terminal_and_breaks_no_name(command: str, columns: int) -> None:
    told = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": str(columns)}).output
    assert max(map(len, told.splitlines())) <= columns
    shown = [p for p in COMMANDS[command].params[1:] if not getattr(p, "hidden", False)]
    names = [name for option in shown for name in option.opts]
    for name in (*names, *(value for choices in CHOICES.get(command, ()) for value in choices)):
        assert name.lower() in told.lower(), name


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys; from rgap.cli import app\n"
        "for argument in ('--help', '--version'):\n"
        "    app([argument], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Commands" in done.stdout


def test_a_real_process_ends_with_the_code_and_one_line() -> None:
    program = [sys.executable, "-c", "from rgap.cli import main; main()"]
    done = subprocess.run(
        [*program, "invert", "lenet", "absent.safetensors"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("rgap: error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_nearest_batch_of_a_missed_completion_is_written_as_a_candidate() -> None:
    six = ["--images", "photos:0-1", "--labels", "0,1", "--input-shape", "3,32,32"]
    call("capture", "lenet5", *six, "--output", "u.safetensors")
    asked = ("invert", "lenet5", "u.safetensors", "--complete", "--time-limit", "2")
    told = json.loads(call(*asked, "--json", "--output", "near", code=4).out)
    [candidate] = told["candidates"]
    assert told["status"] == "UNSUPPORTED" and candidate["labels"] == [0, 1]
    assert candidate["residual"] > 0.01
    names = sorted(path.name for path in Path("near").iterdir())
    assert names == [*(f"candidate-0-picture-{n}.png" for n in range(2)), "recovery.safetensors"]
    with safe_open("near/recovery.safetensors", "pt") as held:
        assert held.metadata()["status"] == "UNSUPPORTED"
        assert float(held.metadata()["candidate-0-residual"]) == candidate["residual"]
    six = ["--images", "photos:0", "--labels", "0", "--input-shape", "3,32,32"]
    call("capture", "lenet5", *six, "--output", "u.safetensors", "--force")
    shown = call(*asked, "--output", "near.png", code=4)
    assert "no recovery" in shown.err and not Path("near.png").exists()


def test_invert_completes_on_request(tmp_path: Path) -> None:
    call("capture", "clinets:strided", *CAPTURE)
    stopped = call("invert", "clinets:strided", "update.safetensors", code=1)
    assert stopped.out.startswith("UNDERDETERMINED")
    refused = call("invert", "clinets:strided", "update.safetensors", "--prior", "tv", code=2)
    assert "write --complete as well" in refused.err
    asked = ("invert", "clinets:strided", "update.safetensors", "--complete", "--prior", "tv")
    found = call(*asked, "--time-limit", "300", "--output", "found", code=1)
    assert found.out.startswith("COMPLETED") and "a prior chose" in " ".join(found.out.split())
    assert (tmp_path / "found" / "picture-0.png").is_file()
    late = call(*asked, "--time-limit", "1e-6", "--output", "late", code=1)
    assert late.out.startswith("UNDERDETERMINED") and "the time is up" in " ".join(late.out.split())
    pictures = {path.name for path in (tmp_path / "late").glob("*.png")}
    assert pictures == {"candidate-0-picture-0.png"}
