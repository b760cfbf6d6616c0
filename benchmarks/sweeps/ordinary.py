"""Ordinary networks: how a recovery ends, and whether what is certified is right.

    python -m benchmarks.sweeps.ordinary
    python -m benchmarks.sweeps.ordinary --output runs.jsonl
    python -m benchmarks.sweeps.ordinary --against runs.jsonl     what ends otherwise than it did

Two fully connected hidden layers, two convolutions, a linear classifier and a small network with
two classes, each with four activations, untrained and trained, float32 and float64, B = 1, 2, 3:
288 updates.  Prints how often each status came by network and batch size, and the largest error
of an EXACT beside its bound.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from batched import expanded
from torch import nn
from torch.nn import functional as F

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append, read
from benchmarks.common.judging import match

ACTIVATIONS = (nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU)
SHAPE = (3, 4, 4)
STEPS = 30  # of training, on random pictures with random labels
KEY = ("network", "seed", "trained", "dtype", "batch")


def networks(seed: int) -> dict[str, nn.Sequential]:
    """The four networks of a seed, which chooses the activation as well."""
    torch.manual_seed(seed)
    act = ACTIVATIONS[seed % len(ACTIVATIONS)]
    return {
        "mlp": nn.Sequential(
            nn.Flatten(), nn.Linear(48, 64), act(), nn.Linear(64, 32), act(), nn.Linear(32, 10)
        ),
        "cnn": nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1), act(), nn.Conv2d(16, 16, 3, 2, 1), act(), nn.Flatten(),
            nn.Linear(64, 10),
        ),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(48, 10)),
        "small": nn.Sequential(nn.Flatten(), nn.Linear(48, 8), act(), nn.Linear(8, 2)),
    }  # fmt: skip


def train(model: nn.Sequential) -> None:
    """A little training, so that the weights are no longer as they were drawn."""
    x, y = torch.rand(64, *SHAPE), torch.randint(0, model[-1].out_features, (64,))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(STEPS):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()


@dataclass(frozen=True)
class Run:
    """How one recovery ended.

    Attributes:
        error: largest error of an entry, with the samples in the order that fits best; of an EXACT.
        bound: that its certificate states.
        labels: True if they are those of the batch; of an EXACT.
    """

    network: str
    seed: int
    trained: bool
    dtype: str
    batch: int
    status: str
    error: float | None
    bound: float | None
    labels: bool | None

    @property
    def fault(self) -> str:
        """What is wrong, or ""."""
        if self.status == "INCONSISTENT":
            return "a genuine update is called inconsistent"
        if self.status != "EXACT":
            return ""
        assert self.error is not None
        if not self.error <= (self.bound or 0.0):
            return f"error {self.error:.1e} above the bound {self.bound}"
        return "" if self.labels else "wrong labels"


def runs(seeds: int) -> Iterator[Run]:
    """Every network of these seeds, with every batch size."""
    for seed, trained in product(range(seeds), (False, True)):
        for name, model in networks(seed).items():
            if trained:
                train(model)
            for dtype, batch in product((torch.float32, torch.float64), (1, 2, 3)):
                given = model.to(dtype).eval()
                torch.manual_seed(seed * 7 + batch)
                x = torch.rand(batch, *SHAPE, dtype=dtype)
                y = torch.randint(0, model[-1].out_features, (batch,))
                recovery = rgap.invert(given, rgap.capture(given, x, y))
                right = error = None
                if recovery.exact:
                    beside = match(*expanded(recovery), x, y)
                    error, right = beside.worst, beside.once and beside.labels_right
                width = str(dtype).removeprefix("torch.")
                yield Run(
                    name, seed, trained, width, batch, recovery.status.name, error,
                    recovery.error_bound, right,
                )  # fmt: skip


def main() -> int:
    """Run the sweep; 1 if an EXACT is wrong or a genuine update inconsistent."""
    parser = Arguments(__doc__, seeds=1)
    parser.add_argument("--seeds", type=int, default=6, help="48 updates each")
    parser.add_argument("--against", type=Path, help="runs of an earlier call (its --output)")
    parser.output()
    options = parser.parse_args()
    done, faults = list(runs(options.seeds)), 0
    append(options.output, (vars(run) for run in done))
    counts: dict[tuple[str, int], Counter[str]] = {}
    for run in done:
        counts.setdefault((run.network, run.batch), Counter())[run.status] += 1
        if run.fault:
            faults += 1
            print(f"{run}: {run.fault}")
    for (network, batch), statuses in counts.items():
        print(
            f"{network:7s} B = {batch}:", ", ".join(f"{s} {n}" for s, n in statuses.most_common())
        )
    exact = [run for run in done if run.error is not None]
    if exact:
        worst = max(exact, key=lambda run: (run.error or 0.0) / (run.bound or 1e-300))
        print(f"EXACT: {len(exact)} of {len(done)}, the nearest to its bound {worst}")
    if options.against is not None:
        earlier = {tuple(run[k] for k in KEY): run["status"] for run in read([options.against])}
        for run in done:
            was = earlier.get(tuple(getattr(run, k) for k in KEY))
            if was not in (None, run.status):
                print(f"{was} before: {run}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
