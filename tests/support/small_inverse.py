"""A small model and smooth pictures for it, for inverses that are learned in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from rgap.learned import Schedule

SHAPE = (1, 6, 6)
QUICK = Schedule(steps=400, updates=64, rate=2e-3, every=50)


def client(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 4)
        ).eval()  # fmt: skip


def smooth(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures that four corners and a middle decide, and labels."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=draw)
    labels = torch.randint(4, (count,), generator=draw)
    return interpolate(coarse, SHAPE[1:], mode="bilinear", align_corners=True), labels
