"""CPU time of ``invert`` on three grouped, strided, dilated convolutions, B = 1.

    OMP_NUM_THREADS=1 python -m benchmarks.timing.grouped

Inputs of 4096 and 8192 unknowns; the gradient of every channel has full rank.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.measuring import Stopwatch
from benchmarks.common.networks import seeded

SIDE = 16


def network(channels: int) -> nn.Module:
    """Three layers with groups, a stride of 2 and dilations 3, 2, 1."""
    wide = 8 * channels
    layers = [
        nn.Conv2d(channels, wide, 3, 2, 3, dilation=3, groups=2),
        nn.Tanh(),
        nn.Conv2d(wide, wide, 3, 1, 2, dilation=2, groups=4),
        nn.Tanh(),
        nn.Conv2d(wide, wide, 3, 1, 1, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(wide * ((SIDE + 1) // 2) ** 2, 10),
    ]
    return nn.Sequential(*layers)


def main() -> int:
    """Invert both and print what it took."""
    parser = Arguments(__doc__, channels=[2])
    parser.add_argument("--channels", nargs="+", type=int, default=(16, 32), help="of the input")
    for channels in parser.parse_args().channels:
        model = seeded(lambda channels=channels: network(channels).double())
        x = torch.rand(1, channels, SIDE, SIDE, dtype=torch.float64)
        update = rgap.capture(model, x, torch.tensor([3]))
        with Stopwatch() as watch:
            recovery = rgap.invert(model, update)
        error = float("nan")
        if recovery.inputs is not None:
            error = float((recovery.inputs - x).abs().max())
        print(
            f"{x.numel()} unknowns: {recovery.status.name}, error {error:.1e}, "
            f"{watch.cpu:.2f} CPU s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
