"""Every tensor is made on the device of what it goes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from allocations import smallest_routes
from cases import redrawn
from device_mode import ALLOWED, ROOMS, ROOT, Devices
from torch import nn

import rgap
from rgap.matching.presets import PRESETS
from rgap.matching.search import match

DOUBLE = torch.float64
DIRECT = sorted(name for name, preset in PRESETS.items() if not preset.domains)


def conv(act: nn.Module, *, bias: bool = True, channels: int = 6) -> nn.Module:
    return redrawn(
        nn.Conv2d(2, channels, 3, padding=1), act, nn.Conv2d(channels, 4, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 5, bias=bias),
    )  # fmt: skip


def dense(act: nn.Module, *, bias: bool = True, outputs: int = 6) -> nn.Module:
    return redrawn(
        nn.Flatten(), nn.Linear(128, 24, bias=bias), act, nn.Linear(24, 20, bias=bias), act,
        nn.Linear(20, outputs, bias=bias),
    )  # fmt: skip


class Gated(nn.Module):
    """A fully connected layer under a gate: no chain from the output down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = (
            dense(nn.Tanh())[1], redrawn(nn.Linear(24, 24))[0], redrawn(nn.Linear(24, 5))[0],
        )  # fmt: skip
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of x [B, 2, 8, 8]."""
        h = self.first(x.flatten(1))
        return self.last(h * torch.sigmoid(self.gate(h)))


def sent(
    model: nn.Module, labels: list, loss: str = "cross_entropy", shape: tuple[int, ...] = (2, 8, 8)
) -> rgap.Update:
    x = torch.rand(len(labels), *shape, generator=torch.Generator().manual_seed(1)).double()
    return rgap.capture(model, x, torch.tensor(labels), loss, dtype=DOUBLE)


def inverted(model: nn.Module, labels: list, loss: str = "cross_entropy", **options) -> None:
    rgap.invert(model, sent(model, labels, loss), **options).explain()


def completed(*layers: nn.Module, seconds: float = 2.0) -> None:
    model = redrawn(*layers)
    rgap.invert(model, sent(model, [1]), complete=True, time_limit=seconds)


def searched(method: str, **options) -> None:
    model = conv(nn.Sigmoid())
    options.setdefault("labels", torch.tensor([1]))
    match(model, sent(model, [1]), method=method, time_limit=2.0, **options)


def known_head(model: nn.Module) -> None:
    update = sent(model, [0, 1])
    head = rgap.Head(torch.rand(2, 36), torch.rand(2, 5))
    rgap.invert(model, update, head=head)


def unsized(model: nn.Module) -> None:
    rgap.invert(model, replace(sent(model, [0, 1]), batch_size=None))


def defended() -> None:
    model = conv(nn.Tanh())
    for defence in (rgap.analysis.Prune(0.5), rgap.analysis.Clip(0.1), rgap.analysis.Sign()):
        rgap.analysis.noise(model, (2, 8, 8), sigma=1e-3, defence=defence)


def null_spaces() -> None:
    model = conv(nn.Tanh(), channels=2)
    recovery = rgap.invert(model, sent(model, [0]))
    for report in recovery.layers:
        assert report.weight_rank is None or report.weight_rank > 0
        if report.nullity:
            recovery.null_space(report.layer)


def wrong(model: nn.Module, labels: list, factor: float) -> rgap.Update:
    """An update that came with another factor than its loss says."""
    update = sent(model, labels)
    return replace(update, gradients={n: factor * g for n, g in update.gradients.items()})


CASES: dict[str, Callable[[], object]] = {
    "a batch beside a wrong loss": lambda: rgap.invert(
        dense(nn.Tanh()), wrong(dense(nn.Tanh()), [0, 1, 2], -1.0)
    ),
    "no chain above": lambda: inverted(Gated(), [1]),
    "check": lambda: [
        rgap.check(conv(nn.Tanh()), wrong(conv(nn.Tanh()), [1], factor)) for factor in (-1.0, 3.0)
    ],
    "check of a part": lambda: rgap.check(
        conv(nn.Tanh()),
        rgap.Update(dict(list(sent(conv(nn.Tanh()), [1]).gradients.items())[2:]), batch_size=1),
    ),
    "ranks alone": lambda: rgap.analysis.identifiability(
        conv(nn.Tanh()), (2, 8, 8), 2, method="structured", null_space=False, sequential=False
    ),
    "audit of a mean": lambda: rgap.analysis.audit(
        redrawn(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5)),
        (2, 8, 8), (1,),
    ),
    "hardening": lambda: rgap.analysis.harden(
        dense(nn.Tanh()), (2, 8, 8), 0.5, changes=("noise",), time_limit=60.0
    ),
    "bias attack": lambda: inverted(conv(nn.Tanh()), [1]),
    "relu": lambda: inverted(conv(nn.ReLU()), [1]),
    "leaky relu": lambda: inverted(conv(nn.LeakyReLU(0.2)), [1]),
    "elu": lambda: inverted(conv(nn.ELU()), [1]),
    "softplus": lambda: inverted(conv(nn.Softplus()), [1]),
    "head equations": lambda: inverted(conv(nn.Tanh(), bias=False), [1]),
    "mse": lambda: inverted(conv(nn.Tanh(), bias=False), [[0.1, 0.5, 0.2, 0.0, 0.3]], "mse_loss"),
    "binary": lambda: inverted(
        conv(nn.Tanh(), bias=False), [[0.0, 1.0, 1.0, 0.0, 1.0]],
        "binary_cross_entropy_with_logits",
    ),
    "homogeneous": lambda: inverted(dense(nn.LeakyReLU(0.3), bias=False), [1]),
    "given head": lambda: known_head(conv(nn.Tanh())),
    "missing equations": null_spaces,
    "matrix free": smallest_routes()(lambda: inverted(conv(nn.Tanh()), [1])),
    "pair": lambda: inverted(dense(nn.Tanh()), [0, 1, 2]),
    "pair of relu": lambda: inverted(dense(nn.ReLU()), [0, 1, 1]),
    "softmax head": lambda: inverted(conv(nn.Tanh()), [0, 1, 2]),
    "softmax head, one class": lambda: inverted(conv(nn.Tanh()), [2, 2]),
    "size not stated": lambda: unsized(dense(nn.Tanh())),
    "completion": lambda: completed(
        nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 5)
    ),
    "completion of kinks": lambda: completed(
        nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)
    ),
    "max-pools": lambda: completed(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    ),
    "matched instead": lambda: completed(nn.Conv2d(2, 5, 8), nn.Flatten()),
    "gauss newton": lambda: searched("gauss_newton"),
    "published": lambda: [searched(name, iterations=3) for name in DIRECT],
    "labels": lambda: [
        rgap.labels.estimate(m, sent(m, [0, 1, 1, 3]), method=name)
        for m in (conv(nn.ReLU()),) for name in rgap.labels.METHODS
    ],
    "audit": lambda: rgap.analysis.audit(conv(nn.Tanh()), (2, 8, 8), (1, 2)),
    "identifiability": lambda: rgap.analysis.identifiability(conv(nn.Tanh()), (2, 8, 8), 2),
    "noise": defended,
    "trials": lambda: rgap.analysis.noise_trials(conv(nn.Tanh()), (2, 8, 8), sigma=1e-6),
    "generic ranks": lambda: rgap.analysis.generic_ranks(conv(nn.Tanh()), (2, 8, 8), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_is_made_without_a_device(case: str) -> None:
    with Devices() as mode:
        CASES[case]()
    assert not mode.found, "\n".join(sorted(mode.found))
    assert mode.looked > 0


def test_the_mode_names_file_and_line() -> None:
    """A factory without a device, in a frame of the library, is found; the others are not."""
    code = "import torch\ndef made(): torch.zeros(2)\ndef stated(): torch.zeros(2, device='cpu')"
    room = next(room for room in ROOMS if room.endswith("solvers/"))
    held: dict = {}
    exec(compile(code, room + "made_up.py", "exec"), held)
    with Devices() as mode:
        held["stated"]()
        torch.zeros(3)  # of a test, not of the library
    assert mode.found == set() and mode.looked == 1
    with Devices() as mode:
        held["made"]()
    assert mode.found == {"solvers/made_up.py:2 (made): torch.zeros"}


def test_what_is_allowed_exists() -> None:
    """Every exception names a function that is there."""
    for place, name in ALLOWED:
        assert f"def {name.rpartition('.')[2]}(" in (ROOT / place).read_text()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("labels", [[1], [0, 1, 2]])
@pytest.mark.parametrize("made", [lambda: conv(nn.Tanh()), lambda: dense(nn.LeakyReLU(0.2))])
def test_cuda_recovers_what_the_cpu_does(made: Callable[[], nn.Module], labels: list) -> None:
    model = made()
    update = sent(model, labels)
    here, there = rgap.invert(model, update), rgap.invert(model, update, device="cuda")
    assert here.status is there.status, there.reason
    if here.inputs is not None:
        assert float((here.inputs - there.inputs.cpu()).abs().max()) < 1e-6
        assert here.labels.tolist() == there.labels.tolist()


@pytest.mark.cuda
@needs_cuda
def test_cuda_completes_and_matches_what_the_cpu_does() -> None:
    model = redrawn(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 5))
    update = sent(model, [1])
    for call in (
        lambda place: rgap.invert(model, update, complete=True, device=place),
        lambda place: match(model, update, iterations=8, device=place),
    ):
        here, there = call("cpu"), call("cuda")
        assert here.status is there.status, there.reason
        assert float((here.nearest.cpu() - there.nearest.cpu()).abs().max()) < 1e-3


@pytest.mark.cuda
@needs_cuda
def test_cuda_counts_what_the_cpu_does() -> None:
    model = conv(nn.Tanh(), channels=3)
    audits = [rgap.analysis.audit(model, (2, 8, 8), (1, 2), device=p) for p in ("cpu", "cuda")]
    assert [row.joint_rank for row in audits[0].rows] == [row.joint_rank for row in audits[1].rows]
    ranks = [rgap.analysis.identifiability(model, (2, 8, 8), 2, device=p) for p in ("cpu", "cuda")]
    assert ranks[0].joint_rank == ranks[1].joint_rank
    levels = [
        float(rgap.analysis.noise(model, (2, 8, 8), sigma=1e-4, device=p).psnr)
        for p in ("cpu", "cuda")
    ]
    assert abs(levels[0] - levels[1]) < 0.01
    update = sent(model, [0, 1, 1, 3])
    read = [rgap.labels.estimate(model, update, device=p).labels for p in ("cpu", "cuda")]
    assert read[0] is not None and read[1] is not None and read[0].tolist() == read[1].tolist()


def test_the_second_device_is_the_one_that_was_asked_for() -> None:
    """A device that the machine lacks is named by every function before it begins."""
    missing = f"cuda:{torch.cuda.device_count()}"  # one more than there are
    model = conv(nn.Tanh())
    for call in (
        lambda: rgap.invert(model, sent(model, [1]), device=missing),
        lambda: match(model, sent(model, [1]), device=missing),
        lambda: rgap.analysis.audit(model, (2, 8, 8), (1,), device=missing),
        lambda: rgap.analysis.identifiability(model, (2, 8, 8), device=missing),
        lambda: rgap.analysis.noise(model, (2, 8, 8), sigma=1e-3, device=missing),
        lambda: rgap.analysis.noise_trials(model, (2, 8, 8), sigma=1e-3, device=missing),
        lambda: rgap.analysis.harden(model, (2, 8, 8), device=missing),
        lambda: rgap.analysis.generic_ranks(model, (2, 8, 8), device=missing),
        lambda: rgap.analysis.leakage_indices(model, (2, 8, 8), device=missing),
        lambda: rgap.analysis.largest_identifiable_batch(model, (2, 8, 8), device=missing),
    ):
        with pytest.raises(ValueError, match="device: expected one that computes"):
            call()
