"""Networks with a step of any kind at any place, and what a recovery of theirs must never say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap

Step = Callable[[int], nn.Module]  # from the number of entries
PLACES = ("input", "first", "second", "head")
CROSS, BINARY, SQUARED = "cross_entropy", "binary_cross_entropy_with_logits", "mse_loss"
LOSSES = {
    "index": rgap.Loss(),
    "sum": rgap.Loss(reduction="sum"),
    "soft": rgap.Loss(targets="probability"),
    "squared": rgap.Loss(SQUARED),
    "binary": rgap.Loss(BINARY, targets="probability"),
}


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Buffered(nn.Module):
    """A product with a buffer, or a sum with it."""

    def __init__(self, value: Tensor, add: bool = False) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value if self.add else x * self.value


def _norm(n: int) -> nn.Module:
    layer = nn.BatchNorm1d(n, affine=False).eval()
    draw = torch.Generator().manual_seed(n)
    layer.running_mean.copy_(torch.randn(n, generator=draw))
    layer.running_var.copy_(0.2 + torch.rand(n, generator=draw))
    return layer


def _layer_norm(n: int) -> nn.Module:
    return nn.LayerNorm(n, elementwise_affine=False)


def _call(function: Callable[[Tensor], Tensor]) -> Step:
    return lambda n: Call(function)


def _mask(n: int, off: float) -> Tensor:
    return torch.where(torch.arange(n) == n - 1, off, 0.0)


STEPS: dict[str, Step] = {
    "none": lambda n: nn.Identity(),
    "temperature": _call(lambda z: z / 0.07),
    "half": _call(lambda z: z * 0.5),
    "batch norm": _norm,
    "negation": _call(lambda z: -z),
    "shift": _call(lambda z: z + 0.3),
    "reversed shift": _call(lambda z: 1.0 - z),
    "buffer": lambda n: Buffered(torch.linspace(0.5, 1.5, n)),
    "buffer with zero": lambda n: Buffered((torch.arange(n) > 0).float()),
    "mask of zeros": lambda n: Buffered(torch.zeros(n), add=True),
    "mask of one entry": lambda n: Buffered(_mask(n, -1e4), add=True),
    "flip": _call(lambda z: z.flip(1)),
    "roll": _call(lambda z: z.roll(1, 1)),
    "permutation": _call(
        lambda z: z[:, torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(1))]
    ),
    "slice": _call(lambda z: z[:, :-1]),
    "every second": _call(lambda z: z[:, ::2]),
    "pad": _call(lambda z: F.pad(z, (1, 0))),
    "average pool": _call(lambda z: F.avg_pool1d(z[:, None], 2)[:, 0]),
    "max pool": _call(lambda z: F.max_pool1d(z[:, None], 2)[:, 0]),
    "softmax": lambda n: nn.Softmax(1),
    "log softmax": lambda n: nn.LogSoftmax(1),
    "sigmoid": lambda n: nn.Sigmoid(),
    "twice sigmoid": _call(lambda z: 2 * torch.sigmoid(z)),
    "tanh": lambda n: nn.Tanh(),
    "softplus": lambda n: nn.Softplus(),
    "leaky relu": lambda n: nn.LeakyReLU(0.2),
    "relu": lambda n: nn.ReLU(),
    "elu": lambda n: nn.ELU(),
    "gelu": lambda n: nn.GELU(),
    "silu": lambda n: nn.SiLU(),
    "hardtanh": lambda n: nn.Hardtanh(),
    "clamp": _call(lambda z: z.clamp(-0.3, 0.3)),
    "abs": _call(torch.abs),
    "square": _call(torch.square),
    "exp": _call(lambda z: (0.5 * z).exp()),
    "layer norm": _layer_norm,
    "unit norm": _call(lambda z: F.normalize(z, dim=1)),
    "centred": _call(lambda z: z - z.mean(1, keepdim=True)),
    "less its largest": _call(lambda z: z - z.amax(1, keepdim=True)),
    "cumulative sum": _call(lambda z: z.cumsum(1)),
    "with itself": _call(lambda z: torch.cat([z, z], 1)),
    "doubled": _call(lambda z: z + z),
    "sorted": _call(lambda z: z.sort(1).values),
    "dropout": lambda n: nn.Dropout(0.5),
    "reshape": _call(lambda z: z.reshape(len(z), 1, -1).flatten(1)),
    "squeeze": _call(lambda z: z[:, :, None].squeeze(2)),
    "clone": _call(lambda z: z.clone()),
    "float64": _call(lambda z: z.double()),
    "where": _call(lambda z: torch.where(z > 0, z, 0.1 * z)),
}


@dataclass(frozen=True)
class Case:
    """A step at a place of a small network, and a batch of it."""

    step: str
    place: str
    batch: int
    loss: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.step}, {self.place}, B={self.batch}, {self.loss}"


def cases(seed: int = 0) -> Iterator[Case]:
    """All of them."""
    for step in STEPS:
        for place in PLACES:
            for batch in (1, 2, 3):
                for loss in LOSSES:
                    yield Case(step, place, batch, loss, seed)


def network(case: Case) -> nn.Module:
    """12 → 14 → 13 → 5 with tanh and LeakyReLU, and the step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed + 1)
        make = STEPS[case.step]
        widths = {"input": 12, "first": 14, "second": 13, "head": 5}

        def at(place: str) -> tuple[list[nn.Module], int]:
            if place != case.place:
                return [], widths[place]
            step = make(widths[place])
            return [step], step(torch.rand(2, widths[place])).shape[1]

        begin, n = at("input")
        middle, m = at("first")
        upper, k = at("second")
        end, _ = at("head")
        layers = [*begin, nn.Linear(n, 14), *middle, nn.Tanh(), nn.Linear(m, 13), *upper,
                  nn.LeakyReLU(0.3), nn.Linear(k, 5), *end]  # fmt: skip
        return nn.Sequential(*layers).double().eval()


def drawn(case: Case, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a case."""
    draw = torch.Generator().manual_seed(case.seed + 7 * case.batch)
    x = torch.rand(case.batch, 12, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        classes = model(x).shape[1]
    if case.loss in ("index", "sum"):
        return x, torch.randint(classes, (case.batch,), generator=draw)
    y = torch.rand(case.batch, classes, generator=draw, dtype=torch.float64)
    return x, y.softmax(1) if case.loss == "soft" else y


def wrong(case: Case) -> tuple[str, str]:
    """Status of the recovery of a case, and what is wrong with it, or ""."""
    model = network(case)
    x, y = drawn(case, model)
    try:
        update = rgap.capture(model, x, y, LOSSES[case.loss])
    except (ValueError, TypeError):
        return "refused to capture", ""
    try:
        found = rgap.invert(model, update)
    except (ValueError, TypeError) as error:
        return "refused", "" if _ours(error) else f"{type(error).__name__}: {error}"
    except Exception as error:  # what the sweep is for
        return "traceback", f"{type(error).__name__}: {error}"
    if found.status is rgap.Status.INCONSISTENT:
        return found.status.name, f"the update is genuine: {found.reason}"
    return found.status.name, fault(found, x, y)


def fault(found: rgap.Recovery, x: Tensor, y: Tensor) -> str:
    """What a recovery certifies and should not, or ""."""
    exact = found.status is rgap.Status.EXACT
    if exact != (found.certified == {"inputs", "targets"}):
        return f"certified {sorted(found.certified)} under {found.status.name}"
    if exact and not found.residual < 1e-9:
        return f"EXACT with a residual of {found.residual:.1e}"
    if "inputs" in found.certified:
        assert found.inputs is not None
        gaps = (found.inputs.flatten(1)[:, None] - x.flatten(1)[None]).abs().amax(2)
        rows = gaps.argmin(1)
        if len(rows.unique()) != len(x) or not float(gaps.amin(1).max()) <= found.error_bound:
            return f"inputs off by {float(gaps.amin(1).max()):.1e}, bound {found.error_bound:.1e}"
        if "targets" in found.certified:
            truth, labels = y[rows], found.labels
            same = truth.shape == labels.shape and torch.allclose(
                truth.double(), labels.double(), atol=1e-6
            )
            if not same:
                return f"targets {labels.tolist()} in place of {truth.tolist()}"
    if found.determined is not None and len(x) == 1:
        gap = (found.partial - x)[found.determined].abs().max()
        if not float(gap) <= found.error_bound:
            return f"determined entries off by {float(gap):.1e}"
    return ""


def _ours(error: Exception) -> bool:
    """True if the sentence is the library's, not torch's."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_code.co_filename
    return any(f"/{part}/" in name for part in ("rgap", "analysis", "solvers"))
