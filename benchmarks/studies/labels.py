"""How well each method reads the labels of a batch from its gradient.

    python -m benchmarks.studies.labels --seeds 60 --output labels.jsonl    half an hour on one core
    python -m benchmarks.studies.labels                                    10 seeds, five minutes
    python -m benchmarks.studies.labels --classes 10 --methods ilrg best   a part of it

Pictures are random 32×32 windows, half of them mirrored, of the 64×64 photographs that come with
the package; labels are drawn at random, uniformly or with a few frequent classes, and have nothing
to do with the pictures.  Only the trained network (60 steps of Adam) learned labels, the place of
the photograph modulo 10, and its batches keep to them.  Every case has its own weights, pictures
and labels; the client computes in float32.  Each cell is the mean multiset overlap (labels found
over B) and the share of cases in which every count is right.  A method that only says which classes
occur is given one label for each.  ``exact`` is given the true inputs of the last layer.
"""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append
from benchmarks.common.networks import adam
from benchmarks.common.pictures import sampled_labels, windows
from rgap.labels import METHODS, HeadGradient, head_features, head_gradient

# Activation and weights; uniform(−0.5, 0.5), as DLG and iDLG draw them, spreads the logits.
NETWORKS = {
    "ReLU": ("relu", "default"),
    "sigmoid": ("sigmoid", "default"),
    "sigmoid, uniform": ("sigmoid", "uniform"),
    "ReLU, trained": ("relu", "trained"),
}
CLASSES = (10, 100)
BATCHES = (8, 32, 128)
DRAWS = ("uniform", "skewed")
PHOTOGRAPHS = len(rgap.photos.names())
LEARNED, STEPS = 10, 60  # classes and steps of the trained network
SURE = 0.95
Case = dict[str, object]


def main() -> int:
    """Run what the command line asks for; 1 if `exact` is not, or `best` is behind `ilrg`."""
    parser = Arguments(
        __doc__, networks=["ReLU"], classes=[10], batches=[8], draws=["uniform"], seeds=2
    )
    parser.add_argument("--seeds", type=int, default=10, help="cases a cell")
    parser.several("--networks", NETWORKS, "LeNet")
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES, help="how many")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="batch sizes")
    parser.several("--draws", DRAWS, "of labels")
    parser.several("--methods", METHODS, "of reading them")
    parser.output()
    options = parser.parse_args()
    cases: list[Case] = []
    print("| network | C | labels | B | " + " | ".join(options.methods) + " |")
    print("|---|---|---|---|" + "---|" * len(options.methods), flush=True)
    for network in options.networks:
        for classes in options.classes if network != "ReLU, trained" else (LEARNED,):
            for draw in options.draws:
                for batch in options.batches:
                    row = [
                        case
                        for seed in range(options.seeds)
                        for case in one(network, classes, draw, batch, seed, options.methods)
                    ]
                    cells = (cell(row, name) for name in options.methods)
                    print(f"| {network} | {classes} | {draw} | {batch} | {' | '.join(cells)} |")
                    sys.stdout.flush()
                    cases += row
                    append(options.output, row)
    return verdict(cases)


def one(
    network: str, classes: int, draw: str, batch: int, seed: int, methods: list[str]
) -> list[Case]:
    """One client: its pictures, its labels, and what every method reads."""
    activation, weights = NETWORKS[network]
    generator = torch.Generator().manual_seed(seed)
    labels = sampled_labels(draw, classes, batch, generator)
    if weights == "trained":
        model, inputs = trained(seed), windows(own_places(labels), generator)
    else:
        model = rgap.models.lenet(classes, activation=activation, seed=seed, weights=weights)
        inputs = windows([range(PHOTOGRAPHS)] * batch, generator)
    update = rgap.capture(model, inputs, labels)
    head = head_gradient(model, update)
    truth = torch.bincount(labels, minlength=classes)
    cases = []
    for name in methods:
        given = head if name != "exact" else known(head, head_features(model, update, inputs))
        start = time.perf_counter()
        estimate = METHODS[name](given)
        seconds = time.perf_counter() - start
        counts = estimate.counts
        if counts is None and estimate.present is not None:
            counts = estimate.present.long()
        shared = 0 if counts is None else int(torch.minimum(counts, truth).sum())
        cases.append(
            {
                "network": network,
                "classes": classes,
                "labels": draw,
                "batch": batch,
                "seed": seed,
                "method": name,
                "overlap": shared / batch,
                "exact": estimate.decided and shared == batch,
                "answered": counts is not None,
                "decided": estimate.decided,
                "least_confidence": estimate.least,
                "seconds": seconds,
            }
        )
    return cases


def known(head: HeadGradient, features: Tensor | None) -> HeadGradient:
    """The gradient with the batch's true features."""
    assert features is not None
    return replace(head, features=features)


def own_places(labels: Tensor) -> list[range]:
    """Photographs whose place modulo 10 is the label."""
    return [range(label, PHOTOGRAPHS, LEARNED) for label in labels.tolist()]


@functools.cache
def trained(seed: int) -> nn.Module:
    """A ReLU LeNet after a few steps of Adam on windows with their photograph's label."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    model = rgap.models.lenet(LEARNED, activation="relu", seed=seed)
    drawn = (torch.randint(LEARNED, (64,), generator=generator) for _ in range(STEPS))
    return adam(model, ((windows(own_places(y), generator), y) for y in drawn), 1e-3)


def cell(row: list[Case], method: str) -> str:
    """Overlap and share of exact answers, – where there is none."""
    mine = [case for case in row if case["method"] == method]
    if not any(case["answered"] for case in mine):
        return "–"
    return f"{share(mine, 'overlap'):.3f} {100 * share(mine, 'exact'):.0f}%"


def share(cases: list[Case], key: str) -> float:
    """Mean of a number over cases."""
    return sum(float(case[key]) for case in cases) / len(cases)  # type: ignore[arg-type]


def verdict(cases: list[Case]) -> int:
    """Say where a claim failed, and how honest the confidence of `best` is."""
    failed = 0
    mine = {
        name: [case for case in cases if case["method"] == name]
        for name in ("best", "exact", "ilrg")
    }
    wrong = [case for case in mine["exact"] if not case["exact"]]
    if wrong:
        failed = 1
        print(f"\nexact: {len(wrong)} of {len(mine['exact'])} are not")
    rows = dict.fromkeys(
        (c["network"], c["classes"], c["labels"], c["batch"]) for c in mine["best"]
    )
    for row in rows if mine["ilrg"] else ():
        at = {
            name: [
                c
                for c in mine[name]
                if (c["network"], c["classes"], c["labels"], c["batch"]) == row
            ]
            for name in ("best", "ilrg")
        }
        for key in ("overlap", "exact"):
            if share(at["best"], key) < share(at["ilrg"], key) - 1e-12:
                failed = 1
                print(f"\nbest is behind ilrg in {key}: {row}")
    sure = [c for c in mine["best"] if float(c["least_confidence"]) >= SURE]  # type: ignore[arg-type]
    if sure:
        right = sum(bool(c["exact"]) for c in sure)
        print(
            f"\nbest: every class at least {SURE:.0%} sure in {len(sure)} of {len(mine['best'])} "
            f"cases, all counts right in {right} of these"
        )
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
