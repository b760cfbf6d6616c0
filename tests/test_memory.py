"""One budget for every large allocation: a result or a refusal, and what is read block by block."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from allocations import Allocations
from torch import nn
from typer.testing import CliRunner

import rgap
from rgap.analysis import audit, harden, identifiability, noise
from rgap.arithmetic.doubles import Doubles, blocks, row_blocks
from rgap.cli.app import app
from rgap.head.bias_attack import bias_attack, rank_one_residual
from rgap.head.features import features_from_bias
from rgap.inversion.batch_rows import batch_of
from rgap.inversion.problem import prepare
from rgap.machine import memory
from rgap.network import affine as maps
from rgap.precision import Precision
from rgap.recovery import Status
from rgap.separation.batch import HELD, Separated
from rgap.separation.route import separate
from rgap.update.preflight import ClientView


def test_sizes_are_read_as_people_write_them() -> None:
    read = {
        "4GB": 4e9,
        "500 mb": 5e8,
        "2GiB": 2 * 2**30,
        "1e9": 1e9,
        "1.5g": 1.5e9,
        "1.1e+09": 1.1e9,
    }
    assert {text: memory.bytes_of(text) for text in read} == read
    for wrong in ("", "much", "4XB", "-1GB", "-1", "0", "abc", "nan"):
        with pytest.raises(ValueError, match="--memory-limit: expected a size such as 4GB"):
            memory.bytes_of(wrong)


TAKING = {
    "invert": lambda net, sent, budget: rgap.invert(net, sent, memory_budget=budget),
    "match": lambda net, sent, budget: rgap.match(net, sent, memory_budget=budget, iterations=1),
    "estimate": lambda net, sent, budget: rgap.labels.estimate(net, sent, memory_budget=budget),
    "audit": lambda net, _, budget: audit(net, (1, 4, 4), (1,), memory_budget=budget),
    "identifiability": lambda net, _, budget: identifiability(net, (1, 4, 4), memory_budget=budget),
    "noise": lambda net, _, budget: noise(net, (1, 4, 4), sigma=0.1, memory_budget=budget),
    "harden": lambda net, _, budget: harden(
        net, (1, 4, 4), 0.5, changes=("batch size",), memory_budget=budget
    ),
}


def test_numbers_of_any_kind_are_a_budget() -> None:
    assert memory.budget_of(np.float32(4e9)) == memory.budget_of(4 * 10**9) == 4e9
    assert memory.budget_of(memory.LEAST) == memory.LEAST


@pytest.mark.parametrize("name", TAKING)
def test_a_budget_that_is_none_is_refused(name: str) -> None:
    net = rgap.models.mlp((8,), 3, input_shape=(1, 4, 4), seed=0)
    sent = rgap.capture(net, torch.rand(1, 1, 4, 4), torch.tensor([1]))
    for wrong in ("4GB", True, [4e9], -1.0, 0, 10, float("nan"), float("inf")):
        with pytest.raises((TypeError, ValueError), match="memory_budget: expected") as refusal:
            TAKING[name](net, sent, wrong)
        assert "write memory_budget=4e9" in str(refusal.value)
        assert "got inf" not in str(refusal.value) or "a finite number" in str(refusal.value)


@pytest.mark.parametrize(
    ("typed", "said"),
    [("1KB", "1000 bytes; write --memory-limit 4GB, or leave --memory-limit out"), ("63MB", "e+07"),
     ("0", "'0'"), ("-1", "'-1'"), ("abc", "'abc'"), ("1e400GB", "1e400GB")],
)  # fmt: skip
def test_a_limit_that_is_none_is_one_line(
    typed: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = rgap.models.mlp((8,), seed=0)
    rgap.capture(net, torch.rand(1, 3, 32, 32), torch.tensor([1])).save("update")
    for line in ("invert NET update", "match NET update", "labels NET update", "audit NET"):
        words = line.replace("NET", "mlp:widths=8").split()
        ran = CliRunner().invoke(app, [*words, "--memory-limit", typed, "-q"])
        assert ran.exit_code == 2 and len(ran.output.splitlines()) == 1, ran.output
        assert "--memory-limit: expected" in ran.output and said in ran.output, ran.output


def test_the_tightest_control_group_decides(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/jobs/one"
    group.mkdir(parents=True)
    for folder, most, used in ((group.parent, "8000000000", "1000"), (group, "max", "900")):
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text(used)
    (group.parent / "memory.stat").write_text("anon 5\ninactive_file 600\n")
    old = tmp_path / "sys/fs/cgroup/memory/old"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("3000000000\n")
    (old / "memory.usage_in_bytes").write_text("1000000000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu,memory:/old\n0::/jobs/one\n")
    left = memory._control_groups(str(membership), str(tmp_path))
    assert sorted(left) == [2e9, 8e9 - 400]


def test_what_the_machine_does_not_say_is_no_error(tmp_path: Path) -> None:
    assert memory._control_groups(str(tmp_path / "none"), str(tmp_path)) == []
    available = memory._available(str(tmp_path / "none"))
    assert available is None or available > 0
    assert memory.free() > 0


def _fully_connected(width: int = 2500, units: int = 300, channels: int = 25) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(width, units), nn.ReLU(), nn.Linear(units, 50), nn.ReLU(), nn.Linear(50, 10),
    ).eval()  # fmt: skip


def test_the_fully_connected_part_comes_back_certified_above_a_max_pool() -> None:
    model = _fully_connected(400, channels=4)
    x = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    update = rgap.capture(model, x, torch.tensor([3]))
    found = rgap.invert(model, update)
    assert found.status is Status.UNSUPPORTED and "max_pool2d" in found.reason
    with torch.no_grad():
        true = model[:4](x).double()
    told = {"4": [1, 400], "6": [1, 300], "8": [1, 50]}
    assert list(found.features) == list(told) and found.summary()["features"] == told
    assert float((found.features["8"] - model[:8](x).detach()).abs().max()) < 1e-4
    gap = (found.features["4"] - true).abs()
    error = found.layer("4").predicted_error
    assert error is not None and float(gap.square().mean().sqrt()) < 5 * error < 1e-4
    assert "Certified: the input of '4', 400 values" in found.explain()


def test_features_that_the_layer_above_contradicts_are_not_certified() -> None:
    model = _fully_connected()
    x = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    one, other = (rgap.capture(model, x[i : i + 1], torch.tensor([3])) for i in (0, 1))
    mixed = dict(one.gradients) | {n: other.gradients[n] for n in ("4.weight", "4.bias")}
    update = rgap.Update(mixed, batch_size=1, input_shape=(1, 20, 20))
    found = rgap.invert(model, update)
    assert not found.features
    assert any("no features are certified: the input of '6'" in text for text in found.warnings)


def test_errors_drawn_for_the_features_are_those_of_noise_on_every_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(40, generator=generator).double()
    x = torch.rand(30, generator=generator).double()
    weight = torch.outer(k, x)
    precision = Precision(torch.float32, 1e-3, samples=4000)
    layer = maps.linear("0", weight, k, ("0.weight", "0.bias"), (30,))
    known, _ = features_from_bias(layer, weight, k, precision)
    noise = 1e-3 * torch.randn(4000, 40, 30, generator=generator).double()
    noise_k = 1e-3 * torch.randn(4000, 40, generator=generator).double()
    drawn = torch.stack(
        [bias_attack(weight + g, k + e) - x for g, e in zip(noise, noise_k, strict=True)]
    )
    mine = known.error[:, 0]
    assert torch.allclose(mine.std(0), drawn.std(0), rtol=0.1)
    assert torch.allclose(mine.T.cov(), drawn.T.cov(), atol=0.15 * float(drawn.T.cov().max()))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 7, generator=generator)
    k, x = torch.randn(50, generator=generator).double(), torch.rand(7).double()
    whole = bias_attack(weight, k), rank_one_residual(weight, x, k)
    monkeypatch.setattr(row_blocks, "__defaults__", (21,))
    assert len(list(row_blocks(weight, k))) == 17
    assert torch.allclose(bias_attack(weight, k), whole[0], rtol=1e-12)
    assert rank_one_residual(weight, x, k) == pytest.approx(whole[1])
    layer = maps.linear("fc", weight, None, ("w", None), (7,))
    assert torch.allclose(layer.adjoint_of_squares(k[None]), layer.squared().adjoint(k[None]))
    assert torch.allclose(layer.linear_of_squares(x[None]), layer.squared().linear(x[None]))


def test_conversions_are_kept_only_where_there_is_room() -> None:
    sent = {"w": torch.ones(1000)}
    roomy, tight = Doubles(sent, "cpu", 1e6), Doubles(sent, "cpu", 100.0)
    assert roomy["w"] is roomy["w"] and tight["w"] is not tight["w"]
    assert "w" in tight and list(tight) == ["w"] and tight.original["w"].dtype == torch.float32


def test_a_refusal_names_the_layer_the_need_and_what_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(800, 200), nn.Tanh(),
        nn.Linear(200, 10),
    ).eval()  # 162,434 parameters: 1.3 MB in float64  # fmt: skip
    x = torch.rand(1, 3, 12, 12)
    update = rgap.capture(model, x, torch.tensor([3]))
    monkeypatch.setattr(memory, "LEAST", 1.0)
    wide = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(30), nn.Flatten(),
                         nn.Linear(32, 2)).eval()  # fmt: skip
    seen = rgap.capture(wide, torch.rand(1, 3, 32, 32), torch.tensor([1]))
    calls = {
        "a float64 copy of the": lambda: rgap.invert(model, update, memory_budget=1e5),
        "carrying errors through": lambda: rgap.invert(wide, seen, memory_budget=1e6),
        "the measured ranks of '0' at B = 2": lambda: audit(
            model, (3, 12, 12), (2,), memory_budget=3e6
        ),
        "the sketch of '0'": lambda: audit(
            model, (3, 12, 12), (2,), method="sketch", memory_budget=3e6
        ),
        "matching the": lambda: rgap.match(model, update, memory_budget=1e5),
    }
    for what, call in calls.items():
        with pytest.raises(memory.OutOfMemory, match="write memory_budget=") as refusal:
            call()
        assert what in str(refusal.value), str(refusal.value)


@pytest.mark.parametrize("budget", [memory.LEAST, 1e8])
def test_peak_memory_follows_the_budget(budget: float) -> None:
    """In a process of its own: what invert takes on top is below four times the budget."""
    code = f"""
        import resource, torch, rgap
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 5, padding=2), torch.nn.Tanh(), torch.nn.Flatten(),
            torch.nn.Linear(4096, 10),
        ).eval()
        update = rgap.capture(model, torch.rand(1, 3, 16, 16), torch.tensor([3]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = rgap.invert(model, update, memory_budget={budget})
            print(found.status.name)
        except ValueError as refusal:
            print("refused", refusal)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    *_, taken = ran.stdout.split()
    assert float(taken) * 1024 < 4 * budget, ran.stdout


def test_a_large_layer_is_copied_once_and_the_update_read_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """VGG-16 in small: one float64 copy of the model, twice the update, and little beside it."""
    for read in (blocks, row_blocks):
        monkeypatch.setattr(read, "__defaults__", (2**13,))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 1500), nn.ReLU(), nn.Linear(1500, 150), nn.ReLU(), nn.Linear(150, 10),
    ).eval()  # fmt: skip
    x = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    update = rgap.capture(model, x, torch.tensor([3]))
    size = sum(4 * g.numel() for g in update.gradients.values())
    with Allocations() as made:
        found = rgap.invert(model, update)
    assert list(found.features) == ["4", "6", "8"]
    assert made.peak < 3.0 * size, f"{made.peak / size:.1f} times the update"
    assert made.total < 120 * size, f"{made.total / size:.0f} times the update"


def _tanh_conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, 2, 2), nn.Tanh(), nn.Conv2d(12, 12, 5, 2, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(192, 10),
    ).eval()  # fmt: skip


def _tanh_mlp(units: int = 80) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, units), nn.Tanh(), nn.Linear(units, 10)).eval()


MEASURED = {
    "auto": lambda **o: identifiability(_tanh_mlp(), (1, 8, 8), 4, sequential=False, **o),
    "dense": lambda **o: identifiability(
        _tanh_mlp(40), (1, 8, 8), 4, method="dense", sequential=False, **o
    ),
    "structured": lambda **o: identifiability(_tanh_conv(), (3, 16, 16), 2, sequential=False, **o),
    "noise": lambda **o: noise(_tanh_mlp(), (1, 8, 8), 4, sigma=0.1, iterations=5, **o),
    "harden": lambda **o: harden(
        _tanh_mlp(40), (1, 8, 8), 0.9, 4, largest_batch=8, changes=("batch size",), **o
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_an_analysis_keeps_its_budget_or_refuses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result or a refusal that says what to write: never more than was allowed."""
    monkeypatch.setattr(memory, "LEAST", 1.0)
    ended = []
    for budget in (5e4, 6e6, 2e7, 6e7):
        with Allocations() as made:
            try:
                MEASURED[name](memory_budget=budget)
                ended.append("answered")
            except memory.OutOfMemory as refusal:
                ended.append(str(refusal))
        few = 2.5e6  # the batch, its outputs, trials of the network: below any real budget
        assert made.peak <= max(budget, few), f"{made.peak / 1e6:.1f} MB of {budget / 1e6:.1f}"
    assert ended[-1] == "answered" and "write memory_budget=" in ended[0], ended


@pytest.mark.parametrize(
    "command",
    [
        ["audit", "--joint", "--batch-sizes", "1"],
        ["harden", "--changes", "noise"],
        ["labels", "update.safetensors"],
        ["labels", "update.safetensors", "--method", "exact"],
    ],
    ids=" ".join,
)
def test_the_commands_keep_a_budget(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "LEAST", 1.0)
    name, *rest = command
    if name == "labels":
        network = rgap.models.mlp((8,), 3, input_shape=(1, 4, 4), seed=0)
        rgap.capture(network, torch.rand(1, 1, 4, 4), torch.tensor([1])).save(rest[0])
    (tmp_path / "written_small.py").write_text(
        "import rgap\n\ndef small():\n"
        "    return rgap.models.mlp((8,), 3, input_shape=(1, 4, 4), seed=0)\n"
    )
    monkeypatch.delitem(sys.modules, "written_small", raising=False)
    model = "written_small:small"
    shape = [] if name == "labels" else ["--input-shape", "1,4,4"]
    whole = CliRunner().invoke(app, [name, model, *rest, *shape, "--memory-limit", "1GB", "-q"])
    assert whole.exit_code == 0, whole.output
    refused = CliRunner().invoke(app, [name, model, *rest, *shape, "--memory-limit", "1kB", "-q"])
    assert refused.exit_code == 2 and "--memory-limit" in refused.output, refused.output


def test_a_replay_and_a_polish_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both hold several tensors of the update's size: they ask before, and are never killed."""
    monkeypatch.setattr(memory, "LEAST", 1e3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 5)).eval()
    update = rgap.capture(network, torch.rand(1, 64), torch.tensor([3]))
    numbers = sum(p.numel() for p in network.parameters())
    assert rgap.invert(network, update, memory_budget=8.0 * numbers * 40).status is Status.EXACT
    with pytest.raises(ValueError, match="the update of an answer"):
        rgap.invert(network, update, memory_budget=8.0 * numbers * 2)


def test_separating_keeps_its_budget_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts go through in fewer at a time, and where not one fits that is said."""
    monkeypatch.setattr(memory, "LEAST", 1.0)
    torch.manual_seed(0)
    size = 24
    network = nn.Sequential(
        nn.Linear(64, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 10)
    )
    update = rgap.capture(network.eval(), torch.rand(size, 64), torch.arange(size) % 10)
    batch = batch_of(prepare(ClientView.of(network, update)))
    free = batch.starts(size, 16, 8)
    tight = replace(batch, room=8.0 * HELD * 8 * size**2 * 3)
    assert (free, tight.starts(size, 16, 8)) == (16, 3)
    assert isinstance(separate(tight), Separated)
    with pytest.raises(memory.OutOfMemory, match=r"telling 24 samples apart.*write memory_budget="):
        separate(replace(batch, room=1e3))
