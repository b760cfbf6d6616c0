"""CPU time of ``invert`` on three grouped, strided, dilated convolutions, B = 1.

    OMP_NUM_THREADS=1 python -m benchmarks.timing.grouped

Inputs of 4096 and 8192 unknowns; the gradient of every channel has full rank.
"""

from __future__ import annotations

import time

import torch
from torch import nn

import rgap

SIDE = 16


def network(channels: int) -> nn.Module:
    """Three layers with groups, a stride of 2 and dilations 3, 2, 1."""
    torch.manual_seed(0)
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
    return nn.Sequential(*layers).double().eval()


def main() -> None:
    """Invert both and print what it took."""
    for channels in (16, 32):
        model = network(channels)
        x = torch.rand(1, channels, SIDE, SIDE, dtype=torch.float64)
        update = rgap.capture(model, x, torch.tensor([3]))
        start = time.process_time()
        found = rgap.invert(model, update)
        seconds = time.process_time() - start
        error = float("nan")
        if found.inputs is not None:
            error = float((found.inputs - x).abs().max())
        print(
            f"{x.numel()} unknowns: {found.status.name}, error {error:.1e}, {seconds:.2f} CPU s",
            flush=True,
        )


if __name__ == "__main__":
    main()
