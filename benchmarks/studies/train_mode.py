"""Batch norm in train mode: what a search for the batch reaches, beside eval mode.

    python -m benchmarks.studies.train_mode
    python -m benchmarks.studies.train_mode --batches 2

Two convolutions of 12 channels with a norm each and sigmoids, running statistics of drawn pictures,
photographs of 8×8 of different labels, float64; Gauss–Newton, at most 60 iterations.  A row: the
PSNR of the worst picture in both modes, and in train mode the share of the squared error that is a
common factor of all pictures, which the norm's ε alone fixes.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F
from train_mode import mixing_conv

import rgap
from benchmarks.common.arguments import Arguments

ITERATIONS = 60


def error(train: bool, x: Tensor, labels: Tensor) -> Tensor:
    """Of the batch that is found, in the order of the truth."""
    network = mixing_conv().train(train)
    update = rgap.capture(network, x, labels, dtype=torch.float64)
    found = rgap.match(network, update, labels=labels, iterations=ITERATIONS)
    assert found.inputs is not None
    return found.inputs - x.double()


def decibels(gap: Tensor) -> float:
    """PSNR of the worst picture."""
    return float(-10 * gap.square().flatten(1).mean(1).max().log10())


def main() -> int:
    """Print a row for every batch size."""
    parser = Arguments(__doc__, batches=[2])
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 3, 4], help="sizes")
    options = parser.parse_args()
    print("  B   eval mode  train mode  common factor")
    for count in options.batches:
        x, labels = F.avg_pool2d(rgap.photos.load(count).float(), 4), torch.arange(count)
        fixed, mixed = (error(train, x, labels) for train in (False, True))
        along = float((mixed * x).sum().square() / (mixed.square().sum() * x.square().sum()))
        print(
            f"{count:>3} {decibels(fixed):8.0f} dB {decibels(mixed):8.0f} dB {along:13.0%}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
