"""Time and memory of audits: LeNet's joint rank, and large networks layer by layer.

    python -m benchmarks.timing.audit                          every row
    python -m benchmarks.timing.audit --rows resnet18 vgg16    some of them

``layers``: LeNet layer by layer, B = 1, 2, 4, 8; ``lenet``: its joint ranks by structure, the same
B; ``dense``: B = 2 by the singular values of the Jacobian; ``strided``: two strided convolutions,
unread borders; ``resnet18``: on 3×32×32, ``vgg16``: on 3×224×224, layer by layer.
Every row runs in a process of its own, on the threads that OMP_NUM_THREADS allows.  ``cpu`` is the
processor time of all threads, ``wall`` what a clock shows, ``peak`` the largest resident memory.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.measuring import Stopwatch, peak
from benchmarks.common.networks import seeded, vgg16
from rgap.analysis import audit, identifiability
from rgap.analysis.joint_rank.blocks import jacobian_blocks
from rgap.jacobian.update_map import UpdateMap
from rgap.solvers.rank import numerical_rank, resolve_rcond
from rgap.update.losses import Loss


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.around = nn.Sequential()
        if stride > 1 or channels != filters:
            way = nn.Conv2d(channels, filters, 1, stride, bias=False)
            self.around = nn.Sequential(way, nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        """Sum of both ways."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.around(x))


def strided(classes: int = 10) -> nn.Module:
    """Two convolutions that leave the last rows and columns of their inputs unread."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32 * 6 * 6, classes),
    )


def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 with the stem for ImageNet (He et al. 2016)."""
    parts: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for filters, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        parts += [Block(channels, filters, stride), Block(filters, filters, 1)]
        channels = filters
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def joint(batch: int, null_space: bool) -> dict[str, Any]:
    """LeNet's joint rank at photographs, layer by layer without the Jacobian."""
    finding = identifiability(
        rgap.models.lenet(seed=0),
        rgap.photos.load(batch),
        method="structured",
        sequential=False,
        null_space=null_space,
    )
    return {"rank": finding.joint_rank, "unknowns": finding.unknowns, "gap": finding.gap}


def dense(batch: int) -> dict[str, Any]:
    """The same by LAPACK's singular values of the whole Jacobian, every layer of norm one."""
    pictures = rgap.photos.load(batch).double()
    labels = torch.arange(batch)
    with Stopwatch() as forming:
        update = UpdateMap(rgap.models.lenet(seed=0), pictures, labels, Loss.of("cross_entropy"))
        jacobian = torch.cat([rows / rows.norm() for rows in jacobian_blocks(update, False)])
    values = torch.linalg.svdvals(jacobian)
    rank = numerical_rank(values, update.unknowns, resolve_rcond(None, tuple(jacobian.shape)))
    return {
        "rank": rank.rank,
        "unknowns": update.unknowns,
        "gap": rank.gap,
        "forming_cpu_s": round(forming.cpu, 2),
    }


def table(make: Callable[[], nn.Module], shape: tuple[int, ...], batches: tuple[int, ...],
          method: str) -> dict[str, Any]:  # fmt: skip
    """The per-layer table of a network."""
    audited = audit(seeded(make), shape, batches, method=method)
    for row in audited.rows:
        bound = "" if row.exact else "<="
        print(
            f"    {row.layer:<14} B={row.batch_size} unknowns {row.unknowns:>9,}  gradient "
            f"{row.gradient_rank:>9,}  weight {row.weight_rank:>9,}  joint {bound}"
            f"{row.joint_rank:,}  {row.route}",
            flush=True,
        )
    return {"rows": len(audited.rows)}


ROWS: dict[str, list[tuple[str, Callable[[], dict[str, Any]]]]] = {
    "lenet": [
        *(
            (f"LeNet, joint rank by structure, B = {b}", lambda b=b: joint(b, False))
            for b in (1, 2, 4, 8)
        ),
        ("LeNet, joint rank and null directions, B = 2", lambda: joint(2, True)),
    ],
    "dense": [("LeNet, singular values of the Jacobian, B = 2", lambda: dense(2))],
    "layers": [
        (
            "LeNet, layer by layer, measured, B = 1, 2, 4, 8",
            lambda: table(lambda: rgap.models.lenet(seed=0), (3, 32, 32), (1, 2, 4, 8), "exact"),
        )
    ],
    "strided": [
        (
            "Two strided convolutions at 3x32x32, measured, B = 1, 2, 4, 8",
            lambda: table(strided, (3, 32, 32), (1, 2, 4, 8), "exact"),
        )
    ],
    "resnet18": [
        (
            f"ResNet-18 at 3x32x32, {method}, B = 1",
            lambda method=method: table(resnet18, (3, 32, 32), (1,), method),
        )
        for method in ("formula", "sketch", "exact")
    ],
    "vgg16": [
        (
            f"VGG-16 at 3x224x224, {method}, B = 1",
            lambda method=method: table(vgg16, (3, 224, 224), (1,), method),
        )
        for method in ("formula", "sketch")
    ],
}


def measured(name: str, at: int) -> None:
    """Run one row in this process and print what it took."""
    label, work = ROWS[name][at]
    print(label, flush=True)
    with Stopwatch() as watch:
        told = work()
    told |= {"cpu_s": round(watch.cpu, 2), "wall_s": round(watch.wall, 2)}
    told |= {"threads": torch.get_num_threads(), "peak_gb": round(peak() / 1e9, 2)}
    print("    " + json.dumps(told), flush=True)


def main() -> int:
    """Run the rows named, each in a process of its own."""
    parser = Arguments(__doc__, rows=["strided"])
    parser.rows(ROWS)
    context = multiprocessing.get_context("spawn")
    for name in parser.parse_args().rows:
        for at in range(len(ROWS[name])):
            process = context.Process(target=measured, args=(name, at))
            process.start()
            process.join()
            if process.exitcode:
                return int(process.exitcode or 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
