"""How far a long call is: layer or iteration, count, rate, time left; silence in pipes."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rgap
from rgap import progress as module
from rgap.cli.app import app
from rgap.matching.search import match
from rgap.progress import Progress, Report

SHAPE = (2, 6, 6)


def conv() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Tanh(),
            nn.Flatten(), nn.Linear(64, 5),
        ).eval()  # fmt: skip


def sent(model: nn.Module) -> rgap.Update:
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    return rgap.capture(model, x, torch.tensor([1]), dtype=torch.float64)


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left_follow_the_counts() -> None:
    clock, told = Clock(), list[Report]()
    show = Progress(told.append, clock=clock)
    for number in range(1, 5):
        show.stage(f"layer{number}", number, 10)
        clock.now += 2.0
    assert told[0].rate is None and told[0].left is None
    last = told[-1]
    assert (last.what, last.number, last.total) == ("layer4", 4, 10)
    assert last.rate == pytest.approx(0.5) and last.left == pytest.approx(14.0)
    assert last.seconds == pytest.approx(6.0)
    show.stage("another", 1, 3, series="another")
    assert told[-1].rate is None


def test_how_it_goes_stands_behind_the_count() -> None:
    told = list[Report]()
    match(conv(), sent(conv()), method="ig", iterations=3, progress=told.append)
    assert re.fullmatch(r"iteration: 1 of 3, best \d.*", told[0].words), told[0].words
    told.clear()
    rgap.invert(conv(), sent(conv()), progress=told.append)
    layers = [report for report in told if report.number is not None]
    assert [report.words[:9] for report in layers] == ["2: 2 of 3", "0: 3 of 3"]


def test_a_time_limit_bounds_what_is_left() -> None:
    clock, told = Clock(), list[Report]()
    show = Progress(told.append, deadline=110.0, clock=clock)
    show.stage("step", 1)
    clock.now += 4.0
    show.stage("step", 2)
    assert told[-1].left == pytest.approx(6.0)
    show.stage("step", 3, 100)
    assert told[-1].left == pytest.approx(6.0)


CALLS = {
    "invert": lambda told: rgap.invert(conv(), sent(conv()), progress=told),
    "match": lambda told: match(conv(), sent(conv()), iterations=3, progress=told),
    "ig": lambda told: match(conv(), sent(conv()), method="ig", iterations=3, progress=told),
    "audit": lambda told: rgap.analysis.audit(conv(), SHAPE, (1, 2), progress=told),
    "identifiability": lambda told: rgap.analysis.identifiability(conv(), SHAPE, progress=told),
    "structured": lambda told: rgap.analysis.identifiability(
        conv(), SHAPE, method="structured", sequential=False, progress=told
    ),
    "noise": lambda told: rgap.analysis.noise(conv(), SHAPE, sigma=1e-3, progress=told),
    "trials": lambda told: rgap.analysis.noise_trials(
        conv(), SHAPE, sigma=1e-6, trials=4, progress=told
    ),
    "harden": lambda told: rgap.analysis.harden(conv(), SHAPE, changes=("noise",), progress=told),
    "largest batch": lambda told: rgap.analysis.largest_identifiable_batch(
        conv(), SHAPE, largest=2, progress=told
    ),
    "training": lambda told: rgap.analysis.audit_training(
        conv(), SHAPE, [conv().state_dict()] * 2, (1,), progress=told
    ),
    "indices": lambda told: rgap.analysis.leakage_indices(conv(), SHAPE, progress=told),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_long_function_counts(name: str) -> None:
    told = list[Report]()
    CALLS[name](told.append)
    reports = [*told, *(report.inner for report in told if report.inner is not None)]
    counted = [report for report in reports if report.number is not None]
    assert counted, [report.words for report in told]
    assert all(report.what and report.seconds >= 0 for report in reports)
    for report in counted:
        assert report.number >= 1 and (report.total is None or report.number <= report.total)


@pytest.mark.parametrize("name", ["invert", "audit", "noise"])
def test_nothing_is_shown_in_a_pipe(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    CALLS[name](True)
    captured = capfd.readouterr()
    assert captured.err == "" and captured.out == ""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(seconds: float, monkeypatch: pytest.MonkeyPatch, patience: float) -> str:
    stream = Terminal()
    monkeypatch.setattr(module, "PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(True) as show:
        show.stage("conv7", 3, 9)
        time.sleep(seconds)
    return stream.getvalue()


def test_a_terminal_shows_what_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.PATIENCE == 2.0
    assert "conv7: 3 of 9" in shown(0.4, monkeypatch, patience=0.05)


def test_nothing_is_shown_under_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "conv7" not in shown(0.05, monkeypatch, patience=2.0)


def test_an_exception_takes_the_line_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    show = Progress(True)
    with pytest.raises(KeyError), show:
        raise KeyError
    assert show._line is not None and not show._line._timer.is_alive()


@pytest.mark.parametrize("command", ["invert", "match", "labels", "audit", "harden"])
def test_every_command_that_computes_has_a_device_and_can_be_quiet(command: str) -> None:
    told = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert "--device" in told and "--quiet" in told and "--no-progress" in told


def test_a_capture_has_a_device() -> None:
    told = CliRunner().invoke(app, ["capture", "--help"], env={"COLUMNS": "200"}).output
    assert "--device" in told


@pytest.mark.parametrize("flag", ["--quiet", "-q", "--no-progress"])
def test_a_quiet_command_answers_all_the_same(flag: str) -> None:
    args = ["audit", "mlp", "--method", "formula", "--batch-sizes", "1", flag, "--json"]
    done = CliRunner().invoke(app, [*args, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    wrong = CliRunner().invoke(app, [*args, "--device", "nowhere"])
    assert wrong.exit_code == 2 and "--device" in wrong.output
