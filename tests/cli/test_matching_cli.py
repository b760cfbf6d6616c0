"""``rgap match``: what it prints and writes, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import rgap
from rgap.cli.app import app
from rgap.cli.options import MatchMethod
from rgap.matching.search import METHODS

NETS = """
from torch import nn

def strided():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 5)
    )
"""
DRAWING = """
from torch import nn

def signed():
    return nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Flatten(), nn.Linear(4, 192), nn.Tanh(),
                         nn.Unflatten(1, (3, 8, 8)))

def ready():
    from rgap.priors import Generator
    return Generator(convolved(), (2, 4, 4))

def convolved():
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Upsample(8), nn.Sigmoid())

def drawing():
    return nn.Sequential(nn.Linear(4, 192), nn.Sequential(nn.Sigmoid(), nn.Unflatten(1, (3, 8, 8))))
"""
MODEL = "clinets:strided"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "clinets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    run(f"capture {MODEL} --images photos:0 --labels 2 --input-shape 3,8,8")
    return tmp_path


def run(line: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, line.split())
    return result.exit_code, result.output


def test_the_names_are_those_of_the_library() -> None:
    assert {m.value for m in MatchMethod} == set(METHODS)


def test_gauss_newton_meets_the_update_and_writes_its_picture(here: Path) -> None:
    code, text = run(f"match {MODEL} update.safetensors --iterations 12 --output found --json")
    found = json.loads(text)
    assert code == 0 and found["status"] == "COMPLETED" and found["labels"] == [2]
    assert found["misfit"] < 1e-6 and found["iterations"] <= 12 and found["output"] == "found"
    held = load_file(here / "found" / "recovery.safetensors")
    assert held["inputs"].shape == (1, 3, 8, 8) and (here / "found" / "picture-0.png").is_file()


def test_a_near_miss_is_never_written_as_an_answer(here: Path) -> None:
    line = f"match {MODEL} update.safetensors --method ig --iterations 2"
    code, _ = run(f"{line} --output near")
    assert code == 1 and not (here / "near" / "picture-0.png").exists()
    assert (here / "near" / "candidate-0-picture-0.png").is_file()
    assert "inputs" not in load_file(here / "near" / "recovery.safetensors")
    assert run(f"{line} --start near")[0] == 1, "but a start it is"
    line = f"invert {MODEL} update.safetensors --start near"
    code, text = run(line)
    assert code == 2 and "write --complete as well" in " ".join(text.split())
    assert run(f"{line} --complete --time-limit 5")[0] in (0, 1)


def test_a_generator_is_named_like_a_network(here: Path) -> None:
    (here / "clidraws.py").write_text(DRAWING)
    line = f"match {MODEL} update.safetensors --method gifd --iterations 3 --json"
    code, text = run(f"{line} --generator clidraws:drawing")
    found = json.loads(text)
    assert code == 1 and found["method"] == "gifd" and found["iterations"] == 6
    drawn = nn.Sequential(nn.Linear(4, 192)).state_dict()
    save_file({n: 0.5 * t for n, t in drawn.items()}, here / "weights.safetensors")
    options = "--generator clidraws:drawing --generator-weights weights.safetensors"
    assert json.loads(run(f"{line} {options}")[1])["objective"] != found["objective"]
    code, text = run(line)
    assert code == 2 and "--generator" in text and "generator=" not in text
    code, text = run(f"{line} --generator clidraws:drawing --generations 2")
    evolved = json.loads(text)
    assert code == 1 and evolved["objective"] != found["objective"], "from other codes"
    code, text = run(f"{line} --generator-weights weights.safetensors")
    assert code == 2 and "write --generator PACKAGE.MODULE:FUNCTION too" in " ".join(text.split())


@pytest.mark.parametrize("command", ["match --method latent --iterations 2", "invert --complete"])
def test_what_the_layers_of_a_generator_do_not_say(command: str, here: Path) -> None:
    (here / "clidraws.py").write_text(DRAWING)
    verb, _, rest = command.partition(" ")
    line = f"{verb} {MODEL} update.safetensors {rest} --json"
    code, text = run(f"{line} --generator clidraws:signed")
    assert code == 2 and "write --generator-range -1,1" in " ".join(text.split()), text
    code, text = run(f"{line} --generator clidraws:signed --generator-range -1,1")
    assert code in (0, 1) and json.loads(text)["status"] != "EXACT"
    code, text = run(f"{line} --generator clidraws:convolved")
    assert code == 2 and "--generator-codes 128" in " ".join(text.split()), text
    code, text = run(f"{line} --generator clidraws:convolved --generator-codes 2,4,4")
    assert code in (0, 1) and json.loads(text)["status"] != "EXACT"
    assert json.loads(run(f"{line} --generator clidraws:ready")[1])["status"] != "EXACT"
    code, text = run(f"{line} --generator-range -1,1")
    assert code == 2 and "--generator-range: expected the network" in " ".join(text.split())
    code, text = run(f"{line} --generator clidraws:signed --generator-range 1")
    assert code == 2 and "expected two numbers" in " ".join(text.split())


def test_a_generator_is_the_prior_of_a_completion(here: Path) -> None:
    (here / "clidraws.py").write_text(DRAWING)
    line = f"invert {MODEL} update.safetensors --generator clidraws:drawing"
    code, text = run(line)
    assert code == 2 and "write --complete as well" in " ".join(text.split())
    code, text = run(f"{line} --complete --prior tv")
    assert code == 2 and "leave one of them out" in " ".join(text.split())


def test_stated_noise_is_what_an_answer_may_miss(here: Path) -> None:
    line = f"match {MODEL} update.safetensors --iterations 3 --json"
    told, untold = (json.loads(run(line + more)[1]) for more in (" --noise 0.01", ""))
    assert told["status"] == "COMPLETED" and told["iterations"] < untold["iterations"]


def test_it_goes_on_from_its_file_to_the_same_end(here: Path) -> None:
    line = f"match {MODEL} update.safetensors --method ig --iterations 30 --json"
    whole = json.loads(run(line)[1])
    code, text = run(f"{line} --resume run.safetensors --time-limit 0")
    assert code == 1 and json.loads(text)["ended"] == "TIME"
    assert rgap.Checkpoint.load(here / "run.safetensors").settings["method"] == "ig"
    again = json.loads(run(f"{line} --resume run.safetensors")[1])
    assert again["ended"] == "DONE" and again["objective"] == whole["objective"]
    code, text = run(f"{line} --resume run.safetensors --seed 3")
    assert code == 2 and "--seed 0, expected --seed 3" in text


def test_a_recovery_in_a_file_is_a_start(here: Path) -> None:
    run(f"match {MODEL} update.safetensors --iterations 8 --output near.safetensors")
    near = load_file(here / "near.safetensors")["inputs"]
    line = f"match {MODEL} update.safetensors --method ig --time-limit 0 --start"
    code, text = run(f"{line} near.safetensors --output kept.safetensors")
    assert code == 0 and "COMPLETED" in text, "a start that meets the update is an answer"
    assert torch.equal(load_file(here / "kept.safetensors")["inputs"], near)
    code, text = run(f"{line} update.safetensors")
    assert code == 2 and "expected a file with the tensor 'inputs'" in text
    assert run(f"{line} nowhere.safetensors")[0] == 2
    save_file({"inputs": torch.cat([near, near])}, here / "two.safetensors")
    code, text = run(f"{line} two.safetensors")
    assert code == 2 and "expected a batch of 1" in text and "of 2 in two.safetensors" in text
    save_file({"inputs": near, "multiplicities": torch.tensor([2])}, here / "copies.safetensors")
    code, text = run(f"{line} copies.safetensors")
    assert code == 2 and "of 2 in copies.safetensors" in text, "every row as often as it occurs"
    (here / "folder").mkdir()
    save_file({"inputs": near}, here / "folder" / "recovery.safetensors")
    assert run(f"{line} folder")[0] == 0


def test_local_steps_need_a_rate() -> None:
    code, text = run(f"match {MODEL} update.safetensors --local-size 1")
    assert code == 2 and "--local-rate" in text
    code, text = run(
        f"match {MODEL} update.safetensors --method ig --local-rate 0.1 --iterations 2"
    )
    assert code == 1 and "UNDERDETERMINED" in text
