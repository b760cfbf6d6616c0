"""How far down a network its gradient gives every value away, by gradient constraints alone.

    python -m benchmarks.studies.graphs
    python -m benchmarks.studies.graphs --batches 8 --labels equal --dtypes float32
    python -m benchmarks.studies.graphs --pictures --batches 1 2 4
    python -m benchmarks.studies.graphs --network vgg16 vgg16_bn --pictures --batches 1 2 --count 5

A ResNet-18 or a VGG-16 in its CIFAR form (64 to 512 channels), weights as PyTorch draws them or
after ``--trained`` steps, running statistics of photographs, eval mode; the photographs that come
with the package.  Given: the
cotangent at the output, as the client computed it.  A row: the lowest value that is solved, how
many are, their largest error over the largest entry of the value, over that in standard errors of
the worst entry, and seconds of processor time.

With ``--pictures`` nothing is given but the update: ``rgap.invert`` is to find the batch.  A row
then: its status, the lowest PSNR of a picture, the largest error over the bound, and wall seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.judging import match
from benchmarks.common.networks import seeded
from benchmarks.common.pictures import drawn_labels
from rgap.network.flow import Flow, flow_of
from rgap.network.trace import trace
from rgap.precision import Estimate, Precision
from rgap.recursion.graph import descend_graph

CLASSES, STATISTICS = 10, 32  # photographs that the running statistics are of
MEMBERS = 12
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Block(nn.Module):
    """Two 3×3 convolutions and what leads past them."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Identity()
        if stride > 1:
            shorter = nn.Conv2d(into, out, 1, stride, bias=False)
            self.skip = nn.Sequential(shorter, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Of the map x."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.skip(x))


def resnet18() -> nn.Module:
    """For 32×32 pictures: no pool, no stride in the first convolution."""
    blocks, into = [], 64
    for group in range(4):
        for number in range(2):
            out = 64 << group
            blocks.append(Block(into, out, 2 if group and not number else 1))
            into = out
    first = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]
    return _with_statistics(nn.Sequential(*first, *blocks, *last))


def _with_statistics(model: nn.Module) -> nn.Module:
    """In eval mode, running statistics of photographs."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(rgap.photos.load(STATISTICS, 32, dtype=torch.float32))
    return model.eval()


VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg16(normed: bool) -> nn.Module:
    """For 32×32 pictures: thirteen convolutions, a max-pool where the table has 0, one layer."""
    layers, into = list[nn.Module](), 3
    for width in VGG16:
        if not width:
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(into, width, 3, 1, 1))
        layers += [nn.BatchNorm2d(width), nn.ReLU()] if normed else [nn.ReLU()]
        into = width
    return _with_statistics(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, CLASSES)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "vgg16": lambda: vgg16(False),
    "vgg16_bn": lambda: vgg16(True),
}


class _Seen(fx.Interpreter):
    """Every value as the client computed it, in the order of the graph."""

    values: list[Tensor]

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node.op != "output":
            self.values.append(value.detach().double().clone())
        return value


def row(model: nn.Module, batch: int, labels: str, dtype: torch.dtype, seed: int) -> str:
    """What one batch gives."""
    x = rgap.photos.load(batch, 32, start=seed).to(dtype)
    seen = _Seen(fx.GraphModule(model, trace(model)))
    seen.values = []
    with torch.no_grad():
        seen.run(x)
    out = model(x)
    loss = F.cross_entropy(out, drawn_labels(labels, batch, CLASSES, seed))
    (top,) = torch.autograd.grad(loss, out, retain_graph=True)
    sent = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    gradients = {name: g.double() for name, g in zip(names, sent, strict=True)}
    flow = flow_of(model.double(), (3, 32, 32))
    assert isinstance(flow, Flow), flow
    precision, began = Precision(dtype=dtype, samples=MEMBERS), time.process_time()
    known = Estimate(top.double(), precision.rounding(top.double()))
    told = descend_graph(flow, gradients, known, precision)
    seconds, worst, beside = time.process_time() - began, 0.0, 0.0
    for place, value in told.values.items():
        gap = float((value.value - seen.values[place]).abs().max())
        worst = max(worst, gap / float(seen.values[place].abs().max()))
        beside = max(beside, gap / float(value.std.max()))
    lowest = flow.nodes[min(told.values)]
    return (
        f"{batch:>2}  {labels:<9} {str(dtype)[6:]:<8} {lowest.name:<9} {lowest.shape!s:<14} "
        f"{len(told.values):>3}  {worst:8.1e}  {beside:5.1f}  {seconds:6.1f}"
    )


def picture_row(
    model: nn.Module, batch: int, labels: str, dtype: torch.dtype, seed: int, limit: float
) -> str:
    """What ``rgap.invert`` makes of the update alone."""
    x = rgap.photos.load(batch, 32, start=seed).to(dtype)
    given = drawn_labels(labels, batch, CLASSES, seed)
    update = rgap.capture(model, x, given)
    began = time.perf_counter()
    recovery = rgap.invert(model, update, time_limit=limit)
    seconds, told = time.perf_counter() - began, ""
    why = "" if recovery.status is rgap.Status.EXACT else recovery.reason
    if recovery.inputs is not None and recovery.error_bound is not None:
        found = match(recovery.inputs, recovery.labels, x, given)
        told = f"{found.psnr:6.1f}  {found.worst / recovery.error_bound:7.3f}"
        told += "" if found.labels_right else "  LABELS WRONG"
    return (
        f"{batch:>2}  {labels:<9} {str(dtype)[6:]:<8} {recovery.status.name:<15} {told:<16} "
        f"{seconds:6.1f}  {why}"
    )


def trained(model: nn.Module, steps: int, seed: int) -> nn.Module:
    """The model after steps of SGD on photographs with drawn labels, in eval mode."""
    x = rgap.photos.load(STATISTICS, 32, dtype=torch.float32)
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
    parser.add_argument("--pictures", action="store_true", help="what rgap.invert finds")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of rgap.invert")
    options = parser.parse_args()
    if options.pictures:
        print(" B  labels    dtype    status           psnr  of bound       s")
    else:
        print(" B  labels    dtype    lowest    shape       solved   error  errors  cpu s")
    rows = product(options.network, options.dtypes, options.batches, options.labels)
    for network, dtype, batch, labels in rows:
        for seed in range(options.seed, options.seed + options.count):
            model = trained(seeded(NETWORKS[network], seed), options.trained, seed)
            case = (model.to(DTYPES[dtype]), batch, labels, DTYPES[dtype], seed)
            print(picture_row(*case, options.limit) if options.pictures else row(*case), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
