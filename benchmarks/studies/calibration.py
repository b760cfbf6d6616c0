"""Is the confidence of `rgap.labels.estimate` (method ``best``) what it says?

    python -m benchmarks.studies.calibration               630 batches, about five minutes
    python -m benchmarks.studies.calibration --set fitted  the networks that constants were set on

Multilayer perceptrons, a LeNet and a small CNN, as drawn and after 60 steps of Adam, with 2, 3 and
10 classes and one logit, batches of 2 to 40 samples with balanced, uniform and skewed labels.  The
pictures are windows of the photographs that come with the package; ``vec`` networks read 20
numbers.
Constants were set on other activations, seeds and photographs than those that are reported.

An answer counts as right if every count is.  Its confidence is the lowest of any class.  The tables
are the share of right answers by confidence, and by kind of network beside the plain identity with
the mean softmax of dummy data and iLRG.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.networks import BINARY, adam
from benchmarks.common.pictures import sampled_labels, windows
from rgap.labels import METHODS, HeadGradient, LabelEstimate, head_gradient
from rgap.labels.integers import nearest_counts

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
BATCHES = {1: (2, 4, 8, 16), 2: (2, 4, 8, 16), 3: (2, 6, 12), 10: (4, 8, 20, 40)}  # by logits
DRAWS = ("balanced", "uniform", "skewed")
SETS = {
    "fitted": (50_000, range(16), ("vec-relu", "mlp-relu")),
    "reported": (
        1_000_000,
        range(16, 32),
        ("mlp-relu", "mlp-sigmoid", "mlp2-relu", "mlp2-tanh", "vec-tanh", "lenet-sigmoid",
         "cnn-tanh"),
    ),
}  # fmt: skip
"""First seed, photographs, networks."""
STEPS, TOGETHER = 60, 32  # of Adam, samples each
EDGES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)
SURE = 0.95


class Case(NamedTuple):
    """One client."""

    kind: str
    trained: bool
    logits: int
    batch: int
    draw: str
    head: HeadGradient
    counts: Tensor


def network(kind: str, logits: int, seed: int) -> nn.Module:
    """The network of a kind such as ``mlp-relu``."""
    torch.manual_seed(seed)
    form, name = kind.split("-")
    act, lin, conv = ACTIVATIONS[name], nn.Linear, nn.Conv2d
    if form == "mlp":
        return nn.Sequential(nn.Flatten(), lin(192, 64), act(), lin(64, logits))
    if form == "mlp2":
        return nn.Sequential(nn.Flatten(), lin(192, 64), act(), lin(64, 32), act(), lin(32, logits))
    if form == "vec":
        return nn.Sequential(lin(20, 32), act(), lin(32, logits))
    if form == "lenet":
        return rgap.models.lenet(logits, activation=name, seed=seed)
    return nn.Sequential(
        conv(3, 16, 3, 2, 1), act(), conv(16, 32, 3, 2, 1), act(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), lin(128, logits),
    )  # fmt: skip


def data(
    form: str, batch: int, generator: torch.Generator, pool: Sequence[int],
    labels: Tensor | None, classes: int,
) -> Tensor:  # fmt: skip
    """Inputs [B, ...] in float32; with ``labels`` such as can be learned."""
    if form == "vec":
        inputs = torch.rand(batch, 20, generator=generator)
        if labels is None:
            return inputs
        centres = torch.rand(classes, 20, generator=torch.Generator().manual_seed(5))
        return 0.5 * inputs + 0.5 * centres[labels]
    pools = [pool] * batch
    if labels is not None:
        pools = [[p for p in pool if p % classes == label] for label in labels.tolist()]
    size = 32 if form in ("lenet", "cnn") else 8
    return F.avg_pool2d(windows(pools, generator), 32 // size)


def one(
    kind: str, logits: int, batch: int, draw: str, seed: int, pool: Sequence[int], trained: bool
) -> Case:
    """One client and the truth."""
    generator = torch.Generator().manual_seed(seed)
    form, classes = kind.split("-", maxsplit=1)[0], max(logits, 2)
    model = network(kind, logits, seed)
    if trained:
        drawn = (torch.randint(classes, (TOGETHER,), generator=generator) for _ in range(STEPS))
        batches = ((data(form, TOGETHER, generator, pool, y, classes), y) for y in drawn)
        adam(model, batches, 1e-3 if form == "lenet" else 3e-3)
    model.eval()
    labels = sampled_labels(draw, classes, batch, generator)
    inputs = data(form, batch, generator, pool, labels if trained else None, classes)
    name = "cross_entropy" if logits > 1 else BINARY
    update = rgap.capture(model, inputs, labels if logits > 1 else labels.float(), name)
    counts = torch.bincount(labels, minlength=classes)
    return Case(kind, trained, logits, batch, draw, head_gradient(model, update), counts)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The clients of a set that the command line asks for; each has the seed of its place."""
    seed, pool, kinds = SETS[options.set]
    for kind, logits in product(kinds, BATCHES):
        for batch, draw, trained in product(BATCHES[logits], DRAWS, (False, True)):
            for _ in range(options.seeds):
                seed += 1
                if logits in options.logits and kind in (options.networks or kinds):
                    yield one(kind, logits, batch, draw, seed, pool, trained)


def plain(head: HeadGradient) -> LabelEstimate:
    """The identity with the mean softmax of dummy data, rounded."""
    assert head.probes is not None
    p = head.probabilities(head.probes).mean(0)
    estimates = (head.batch_size * p - head.sums) / head.sharpness
    return LabelEstimate.rounded(estimates, nearest_counts(estimates, head.batch_size), "plain", ())


READERS: dict[str, Callable[[HeadGradient], LabelEstimate]] = {
    "best": METHODS["best"], "plain identity": plain, "ilrg": METHODS["ilrg"],
}  # fmt: skip
Row = list[tuple[float, bool]]


def share(row: Row) -> str:
    """Right ones among the answers, in per cent."""
    return f"{100 * sum(right for _, right in row) / len(row):.0f}%" if row else "–"


def main() -> int:
    """Run what the command line asks for; 1 if fewer than 95% of the sure answers are right."""
    parser = Arguments(__doc__, networks=["vec-tanh"], logits=[2], seeds=1)
    parser.add_argument("--seeds", type=int, default=1, help="batches a cell")
    parser.add_argument("--set", default="reported", choices=SETS, help="of clients")
    parser.add_argument("--networks", nargs="+", metavar="KIND", help="of the set, these only")
    parser.several("--logits", BATCHES, "number of outputs")
    options = parser.parse_args()
    kinds: dict[tuple[str, bool], dict[str, Row]] = defaultdict(lambda: defaultdict(list))
    draws: dict[str, Row] = defaultdict(list)
    for case in cases(options):
        for name, read in READERS.items():
            estimate = read(case.head)
            right = estimate.counts is not None and torch.equal(estimate.counts, case.counts)
            kinds[case.kind, case.trained][name].append((estimate.least, right))
            if name == "best":
                draws[case.draw].append((estimate.least, right))
    print("| network | batches | " + " | ".join(READERS) + " | ≥ 95% sure | of these right |")
    print("|---|---|" + "---|" * (len(READERS) + 2))
    for (kind, trained), row in kinds.items():
        sure = [pair for pair in row["best"] if pair[0] >= SURE]
        cells = " | ".join(share(row[name]) for name in READERS)
        label = f"{kind}{', trained' if trained else ''}"
        print(f"| {label} | {len(row['best'])} | {cells} | {len(sure)} | {share(sure)} |")
    everything = [pair for row in draws.values() for pair in row]
    print("\n| confidence | answers | right |\n|---|---|---|")
    for low, high in pairwise(EDGES):
        mine = [pair for pair in everything if low <= pair[0] < high]
        print(f"| {low:g} to {min(high, 1.0):g} | {len(mine)} | {share(mine)} |")
    sure = [pair for pair in everything if pair[0] >= SURE]
    print(f"\n{len(sure)} of {len(everything)} at least {SURE:.0%} sure, {share(sure)} right")
    for draw, row in draws.items():
        mine = [pair for pair in row if pair[0] >= SURE]
        print(f"{draw}: {share(row)} right, {len(mine)} sure, {share(mine)} of these right")
    return int(sum(right for _, right in sure) < SURE * len(sure))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
