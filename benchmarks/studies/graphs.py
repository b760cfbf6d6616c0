"""How far down a network its gradient gives every value away, by gradient constraints alone.

    python -m benchmarks.studies.graphs
    python -m benchmarks.studies.graphs --batches 8 --labels equal --dtypes float32
    python -m benchmarks.studies.graphs --pictures --batches 1 2 4
    python -m benchmarks.studies.graphs --network vgg16 vgg16_bn --pictures --batches 1 2 --count 5
    python -m benchmarks.studies.graphs --network resnet34 densenet121 --batches 1 --list
    python -m benchmarks.studies.graphs --found --batches 16 32 --labels random equal

Networks of :mod:`benchmarks.common.everyday`, weights as PyTorch draws them or after ``--trained``
steps, running statistics of photographs, eval mode; the photographs that come with the package.
Given: the cotangent at the output, as the client computed it.  A row: the lowest value that is
solved, how many are, their largest error over the largest entry of the value, over that in standard
errors of the worst entry, and seconds of processor time.  With ``--found`` the cotangent is not
given but read off the highest convolution, which needs no head that tells the samples apart.

With ``--pictures`` nothing is given but the update: ``rgap.invert`` is to find the batch.  A row
then: its status, the lowest PSNR of a picture, the largest error over the bound, wall and processor
seconds.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from itertools import product

import torch
from computed import computed
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.everyday import CLASSES, NETWORKS, STATISTICS, photographs, side
from benchmarks.common.judging import match
from benchmarks.common.networks import seeded
from benchmarks.common.pictures import drawn_labels
from rgap.network.trace import trace
from rgap.precision import Estimate, Precision
from rgap.recursion.graph import descend_graph
from rgap.recursion.outputs import cotangents_at_output

MEMBERS = 12
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class _Seen(fx.Interpreter):
    """Every value as the client computed it, in the order of the graph."""

    values: list[Tensor]

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node.op != "output":
            self.values.append(value.detach().double().clone())
        return value


@dataclass(frozen=True)
class Case:
    """A batch of photographs for a network; the seed says which."""

    network: str
    model: nn.Module
    batch: int
    labels: str
    dtype: torch.dtype
    seed: int

    @property
    def inputs(self) -> Tensor:
        """The photographs."""
        return photographs(self.batch, side(self.network), self.seed).to(self.dtype)

    @property
    def targets(self) -> Tensor:
        """Their labels."""
        return drawn_labels(self.labels, self.batch, CLASSES, self.seed)

    @property
    def words(self) -> str:
        """The first columns of a row."""
        name = f"{self.network:<13}"
        return f"{name} {self.batch:>2}  {self.labels:<9} {str(self.dtype)[6:]:<8}"


def row(case: Case, found: bool, listed: bool) -> str:
    """What one batch gives."""
    model, x = case.model, case.inputs
    seen = _Seen(fx.GraphModule(model, trace(model)))
    seen.values = []
    with torch.no_grad():
        seen.run(x)
    flow, gradients, top = computed(model, x, case.targets)
    precision, began = Precision(dtype=case.dtype, samples=MEMBERS), time.process_time()
    known, order = Estimate(top, precision.rounding(top)), torch.arange(len(x))
    if found:
        made = cotangents_at_output(flow, gradients, precision)
        if isinstance(made, str) or len(made.value) != len(x):
            return f"{case.words} {made if isinstance(made, str) else len(made.value)}"
        apart = torch.cdist(made.value, known.value).numpy()
        known, order = made, torch.from_numpy(linear_sum_assignment(apart)[1])
    told = descend_graph(flow, gradients, known, precision)
    seconds, worst, beside = time.process_time() - began, 0.0, 0.0
    if not told.values:
        return f"{case.words} nothing: {told.ends[max(told.ends)]}"
    for place, value in told.values.items():
        gap = float((value.value - seen.values[place][order]).abs().max())
        worst = max(worst, gap / float(seen.values[place].abs().max()))
        beside = max(beside, gap / float(value.std.max()))
    lowest = flow.nodes[min(told.values)]
    line = (
        f"{case.words} {lowest.name:<9} {lowest.shape!s:<14} "
        f"{len(told.values):>3}  {worst:8.1e}  {beside:5.1f}  {seconds:6.1f}"
    )
    if listed:
        nodes = [flow.nodes[place] for place in sorted(told.values, reverse=True)]
        line += "".join(f"\n    {node.name} {node.shape}" for node in nodes)
    return line


def picture_row(case: Case, limit: float) -> str:
    """What ``rgap.invert`` makes of the update alone."""
    x, given = case.inputs, case.targets
    update = rgap.capture(case.model, x, given)
    began, busy = time.perf_counter(), time.process_time()
    recovery = rgap.invert(case.model, update, time_limit=limit)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    told = ""
    why = "" if recovery.status is rgap.Status.EXACT else recovery.reason
    if recovery.inputs is not None and recovery.error_bound is not None:
        found = match(recovery.inputs, recovery.labels, x, given)
        told = f"{found.psnr:6.1f}  {found.worst / recovery.error_bound:7.3f}"
        told += "" if found.labels_right else "  LABELS WRONG"
    return f"{case.words} {recovery.status.name:<15} {told:<16} {seconds:6.1f} {busy:6.1f}  {why}"


def trained(model: nn.Module, pixels: int, steps: int, seed: int) -> nn.Module:
    """The model after steps of SGD on photographs with drawn labels, in eval mode."""
    if not steps:
        return model
    x = photographs(STATISTICS, pixels).float()
    labels = drawn_labels("random", STATISTICS, CLASSES, seed)
    optimiser = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    model.train()
    for step in range(steps):
        some = slice(8 * (step % 4), 8 * (step % 4) + 8)
        optimiser.zero_grad()
        F.cross_entropy(model(x[some]), labels[some]).backward()
        optimiser.step()
    return model.eval()


def main() -> int:
    """Print a row for every network, batch size, kind of labels, precision and seed."""
    parser = Arguments(__doc__, batches=[1], labels=["equal"], dtypes=["float64"])
    parser.several("--network", tuple(NETWORKS), "whose gradients are read", ["resnet18"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8], help="sizes")
    parser.several("--labels", ("distinct", "equal", "random"), "in a batch", ["distinct", "equal"])
    parser.dtypes("float64", "float32")
    parser.add_argument("--seed", type=int, default=0, help="of weights and photographs")
    parser.add_argument("--count", type=int, default=1, help="seeds from that one on")
    parser.add_argument("--trained", type=int, default=0, help="steps of SGD before")
    parser.add_argument("--found", action="store_true", help="the cotangent, not given")
    parser.add_argument("--list", action="store_true", help="all values that are solved")
    parser.add_argument("--pictures", action="store_true", help="what rgap.invert finds")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of rgap.invert")
    options = parser.parse_args()
    if options.pictures:
        print("network        B  labels    dtype    status           psnr  of bound       s  cpu s")
    else:
        print("network        B  labels    dtype    lowest    shape       solved   error", end="  ")
        print("errors  cpu s")
    rows = product(options.network, options.dtypes, options.batches, options.labels)
    for network, dtype, batch, labels in rows:
        for seed in range(options.seed, options.seed + options.count):
            model = trained(seeded(NETWORKS[network], seed), side(network), options.trained, seed)
            kind = DTYPES[dtype]
            case = Case(network, model.to(kind), batch, labels, kind, seed)
            told = picture_row(case, options.limit) if options.pictures else ""
            print(told or row(case, options.found, options.list), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
