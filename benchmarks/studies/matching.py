"""Searches beside equations, in PSNR of the worst picture of a batch.

    python -m benchmarks.studies.matching                every row, photographs 8 and later
    python -m benchmarks.studies.matching --rows blog --figure docs/pictures/matching.png
    python -m benchmarks.studies.matching --rows residual ablation --seconds 60
    python -m benchmarks.studies.matching --rows terms terms32 smooth32 --cases 6
    python -m benchmarks.studies.matching --rows tuning  the weights below, photographs 0 to 7

``blog``: what a reader of introductions to gradient inversion sees, and what is behind it. (a) a
four-layer MLP, one picture, squared distance; (b) LeNet, one picture, squared distance and cosine;
(c) LeNet, two pictures, cosine, no prior; (d) the same with total variation at four weights; beside
each the closed form, and the completion where it ends.  ``residual``: two residual networks with
SiLU, one picture and two, Gauss-Newton and signed Adam with total variation for the same time.
``ablation``: LeNet, two pictures, the same time: signed Adam; Gauss-Newton on gradients alone; with
what the closed forms found.  ``terms``: GradInversion with all its terms and with each of them off,
two pictures of 8 by 8, two seeds, 150 iterations; the batch norms keep the statistics of the
photographs 0 to 7.  ``terms32``: the same with pictures of 32 by 32, a network of strides, four
seeds, float32 updates and 600 iterations; ``smooth32``: with ten thousand times the
published weight of the total variation.  They end with means, and with the means of what each term
adds to a batch (paired differences), ± the standard error over the batches.

Labels are known to every method.  A search gets ``--seconds``; the iterations of signed Adam are
set so that its schedule ends with them.  The weights of the total variation in ``residual`` and
``ablation`` are the best of ``tuning``.  Exit status 1 if an EXACT is off by more than its bound or
a COMPLETED does not reproduce its update to 1%.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.equal_time import WEIGHTS, signed_adam, timed
from benchmarks.common.json_lines import append
from benchmarks.common.judging import match, misstated
from benchmarks.common.networks import seeded
from benchmarks.common.pictures import FIRST, photographs
from benchmarks.figures.batches import draw_matching
from rgap.matching.presets import PRESETS, Preset

SHOWN = (1e-4, 1e-3, 1e-2, 1e-1)  # weights of the total variation in (d)
BEST = {"lenet": 1e-3, "flat": 1e-8, "pooled": 1e-3}  # by --rows tuning, photographs 0 to 7
LABELS = (3, 5)
PLAIN = signed_adam(name="cosine")
WHOLE = "all"
TERMS = ("group", "statistics", "noise", "variation", "size")
QUICK = {
    "terms": replace(PRESETS["gradinversion"], iterations=150, restarts=2),
    "terms32": replace(PRESETS["gradinversion"], iterations=600, restarts=4),
}
# The best of 1e-4, 1e-2, 0.1 and 1 on the photographs 0 to 3.
QUICK["smooth32"] = replace(QUICK["terms32"], variation=1.0)
SQUARES = replace(PLAIN, name="squares", distance="squares")


@dataclass(frozen=True)
class Case:
    """One batch through one method.

    Attributes:
        row: of the table.
        network: of :func:`network`.
        places: of the photographs.
        method: a preset, ``"gauss_newton"``, or ``"closed form"`` and ``"completion"``.
    """

    row: str
    network: str
    places: tuple[int, ...]
    method: str | Preset


class Block(nn.Module):
    """``φ(skip(x) + conv(φ(conv(x))))``, no batch norm."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1)
        self.skip = nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        z = nn.functional.silu(self.first(x))
        return nn.functional.silu(self.skip(x) + self.second(z))


def network(name: str, seed: int) -> nn.Module:
    """A network for pictures of 32 by 32 and ten classes."""
    if name == "mlp":
        return rgap.models.mlp((512, 512, 512), activation="relu", seed=seed)
    if name == "lenet":
        return rgap.models.lenet(seed=seed, weights="uniform")
    if name in ("normed", "strided"):
        return normed(seed, 8 if name == "normed" else 32)
    if name == "pooled":
        return rgap.models.resnet(activation="silu", seed=seed)
    return seeded(flat, seed)


def flat() -> nn.Module:
    """Two residual blocks without batch norm."""
    parts = (nn.Conv2d(3, 16, 3, 1, 1), nn.SiLU(), Block(16, 16, 1), Block(16, 32, 2))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(32 * 256, 10))


def normed(seed: int, side: int) -> nn.Module:
    """A small network with batch norms that have seen photographs, for pictures of 8 or 32."""
    width, stride = (8, 1) if side == 8 else (16, 2)

    def build() -> nn.Module:
        parts: list[nn.Module] = []
        for inner in (3, width):
            parts += [nn.Conv2d(inner, width, 3, stride, 1), nn.BatchNorm2d(width, momentum=None)]
            parts.append(nn.SiLU())
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(64 * width, 10))

    model = seeded(build, seed)
    with torch.no_grad():
        model.train()(rgap.photos.load(FIRST, side).float())
    return model.eval()


def without(preset: Preset, terms: Sequence[str]) -> Iterator[Preset]:
    """The preset with all its terms, and with each of some off."""
    yield replace(preset, name=WHOLE)
    for term in terms:
        yield replace(preset, name=f"no {term}", **{term: 0.0})


def cases(rows: list[str], count: int) -> Iterator[Case]:
    """Everything that the rows ask for, ``count`` batches each."""

    def places(size: int, number: int, first: int = FIRST) -> tuple[int, ...]:
        return tuple((first + number * size + i) % 32 for i in range(size))

    for number in range(count):
        one, two = places(1, number), places(2, number)
        if "blog" in rows:
            yield from (Case("blog a", "mlp", one, m) for m in (SQUARES, "closed form"))
            yield from (Case("blog b", "lenet", one, m) for m in (SQUARES, PLAIN, "closed form"))
            yield Case("blog c", "lenet", two, PLAIN)
            yield from (Case("blog d", "lenet", two, signed_adam(w)) for w in SHOWN)
            yield from (Case("blog d", "lenet", two, m) for m in ("closed form", "completion"))
        if "residual" in rows:
            for name in ("flat", "pooled"):
                for where in (one, two):
                    for method in (signed_adam(BEST[name]), "gauss_newton"):
                        yield Case("residual", name, where, method)
        if "ablation" in rows:
            for method in (signed_adam(BEST["lenet"]), "gauss_newton", "completion"):
                yield Case("ablation", "lenet", two, method)
        for row, name in zip(QUICK, ("normed", "strided", "strided"), strict=True):
            if row in rows:
                terms = TERMS[:3] if row == "smooth32" else TERMS
                yield from (Case(row, name, two, preset) for preset in without(QUICK[row], terms))
        if "tuning" in rows:
            for name in BEST:
                for weight in WEIGHTS:
                    yield Case("tuning", name, places(1, number, 0), signed_adam(weight))


def one(case: Case, seconds: float) -> tuple[dict, Tensor, Tensor | None]:
    """One batch through one method: the numbers, the truth and what was found."""
    side = 8 if case.row == "terms" else 32
    x = photographs(case.places, side)
    targets = torch.tensor(LABELS[: len(x)])
    model = network(case.network, case.places[0])
    dtype = torch.float32 if case.network == "strided" else torch.float64
    update = rgap.capture(model, x.to(dtype), targets, dtype=dtype, share_labels=True)
    began = time.perf_counter()
    if case.method in ("closed form", "completion"):
        recovery = rgap.invert(
            model, update, complete=case.method == "completion", time_limit=seconds
        )
        steps = 0
    else:
        if isinstance(case.method, Preset) and case.row not in QUICK:
            recovery = timed(model, update, case.method, seconds)
        else:
            limit = inf if case.row in QUICK else 1.1 * seconds
            recovery = rgap.match(model, update, method=case.method, time_limit=limit)
        steps = recovery.iterations
    name = case.method.name if isinstance(case.method, Preset) else case.method
    run = {
        "row": case.row,
        "network": case.network,
        "photographs": list(case.places),
        "method": name,
        "status": recovery.status.name,
        "reason": recovery.reason,
        "residual": recovery.residual,
        "iterations": steps,
        "seconds": recovery.seconds if steps else time.perf_counter() - began,
        "missing": max((r.nullity or 0 for r in recovery.layers), default=None),
        "psnr": None,
        "fault": "",
    }
    near = recovery.nearest
    if near is None:
        return run, x, None
    beside = match(near, recovery.nearest_labels, x, targets)
    return {**run, "psnr": beside.psnr, "fault": misstated(recovery, beside)}, x, near


def differences(more: list[float], less: list[float]) -> list[float]:
    """Batch by batch."""
    return [a - b for a, b in zip(more, less, strict=True)]


def spread(numbers: list[float]) -> str:
    """Mean ± standard error of the mean."""
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else inf
    return f"{statistics.fmean(numbers):5.2f} ± {error:.2f}"


def main() -> int:
    """Run what the command line asks for."""
    parser = Arguments(__doc__, rows=["ablation"], seconds=1.0)
    rows = ["blog", "residual", "ablation", *QUICK, "tuning"]
    parser.rows(rows, default=rows[:-1])
    parser.add_argument("--cases", type=int, default=1, help="batches a row")
    parser.add_argument("--seconds", type=float, default=30.0, help="of every search")
    parser.output()
    parser.figure("pictures of the blog's rows")
    options = parser.parse_args()
    print(
        "row       network  photographs  method            status           PSNR residual steps s"
    )
    faults, shown, means = 0, [], dict[tuple[str, str], list[float]]()
    for case in cases(options.rows, options.cases):
        run, x, near = one(case, options.seconds)
        faults += bool(run["fault"])
        where = "–".join(str(p) for p in sorted({case.places[0], case.places[-1]}))
        psnr = "   –" if run["psnr"] is None else f"{run['psnr']:6.1f}"
        residual = "      –" if run["residual"] is None else f"{run['residual']:.1e}"
        missing = f", {run['missing']} equations missing" if run["missing"] else ""
        print(
            f"{run['row']:9} {run['network']:8} {where:12} {run['method']:17} {run['status']:15} "
            f"{psnr:>6} {residual} {run['iterations']:5} {run['seconds']:.0f}{missing} "
            f"{run['fault']}",
            flush=True,
        )
        append(options.output, [run])
        if case.row in QUICK:
            means.setdefault((case.row, run["method"]), []).append(run["psnr"])
        if case.row.startswith("blog"):
            shown.append((run, x, near))
    for (row, name), values in means.items():
        line = f"{row}, mean of {len(values)}: {name:13} {spread(values)} dB"
        whole = means[row, WHOLE]
        if name != WHOLE:
            line += f", the term adds {spread(differences(whole, values))}"
        elif row == "smooth32" and ("terms32", WHOLE) in means:
            line += f", the weight adds {spread(differences(whole, means['terms32', WHOLE]))}"
        print(line)
    if options.figure is not None and shown:
        draw_matching(shown, options.figure)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
