"""What a learned inverse is trained on and judged by: clients, pictures, errors."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.pictures import FIRST, digits, windows
from rgap.learned import Inverse
from rgap.learned.assignment import assigned_error
from rgap.learned.fitting import batches
from rgap.precision import Precision
from rgap.separation.mixture import relative_rounding
from rgap.solvers.rank import numerical_rank

CLIENTS = {
    "mlp": lambda shape: rgap.models.mlp((256,), 10, "relu", input_shape=shape, seed=0),
    "lenet": lambda shape: rgap.models.lenet(10, input_shape=shape, seed=0, weights="uniform"),
}
CUT = 5000  # windows that are cut of the photographs
TESTED = 500  # pictures that no training sees


@dataclass(frozen=True)
class Pictures:
    """Pictures to learn from and others, with labels.

    Attributes:
        learned, labels: to train with.
        unseen, unseen_labels: to judge by.
    """

    learned: Tensor
    labels: Tensor
    unseen: Tensor
    unseen_labels: Tensor

    @property
    def mean_error(self) -> float:
        """Mean squared error of the mean picture."""
        return float((self.unseen - self.learned.mean(0)).square().mean())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one."""
        return tuple(self.learned.shape[1:])


def pictures(kind: str, count: int) -> Pictures:
    """Pictures by name, or those of a folder; the last tenth is not learned from, at most 500.

    Args:
        kind: ``digits``; ``photographs``: windows of those that ship with the library, unseen are
            those of numbers 0 to 7; else a folder, whose labels are random.
        count: at most.
    """
    if kind == "digits":
        x, y = (part[:count] for part in digits())
    elif kind == "photographs":
        draw = torch.Generator().manual_seed(0)
        number, count = len(rgap.photos.names()), min(count, CUT)
        unseen = split(count)
        seen, kept = list(range(FIRST, number)), list(range(FIRST))
        x = windows([seen] * (count - unseen) + [kept] * unseen, draw)
        y = torch.randint(10, (count,), generator=draw)
    else:
        x = rgap.photos.folder(Path(kind), 32)[:count]
        y = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(0))
    kept = len(x) - split(len(x))
    x = x.float()
    return Pictures(x[:kept], y[:kept], x[kept:], y[kept:])


def split(count: int) -> int:
    """How many of so many pictures are not learned from."""
    return min(TESTED, max(1, count // 10))


class Judged(NamedTuple):
    """How near an inverse came to batches that it did not see."""

    error: float  # mean squared
    counted: float  # share of batches whose size is guessed
    ranked: float  # share whose size is the rank of the last layer's gradient
    seconds: float  # an inversion, without the capture


def judged(
    inverse: Inverse, model: nn.Module, data: Pictures, size: int, number: int = 100, **options: str
) -> Judged:
    """Errors on so many batches of unseen pictures, through ``capture`` and ``pictures``."""
    index = batches(len(data.unseen), size, number, torch.Generator().manual_seed(7))
    made, seconds, right, told = [], 0.0, 0, 0
    first = rgap.capture(model, data.unseen[index[0]], data.unseen_labels[index[0]])
    inverse.pictures(model, first, **options)  # what a first call imports is not timed
    for places in index:
        update = rgap.capture(model, data.unseen[places], data.unseen_labels[places])
        began = time.perf_counter()
        made.append(inverse.pictures(model, update, **options))
        seconds += time.perf_counter() - began
        odds = inverse.sizes(model, update, **options)
        right += max(odds, key=odds.__getitem__) == size
        told += rank(update) == size
    error = assigned_error(torch.stack(made), data.unseen[index])
    number = len(index)
    return Judged(float(error.mean()), right / number, told / number, seconds / number)


def rank(update: rgap.Update) -> int:
    """Rank of the gradient of the last fully connected layer, as far as rounding leaves it."""
    last = [g for g in update.gradients.values() if g.ndim == 2][-1]
    rounding = relative_rounding((last.shape[0], last.shape[1]), Precision(update.dtype))
    return numerical_rank(torch.linalg.svdvals(last.double()), last.shape[1], rounding).rank


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that training and study share."""
    parser.add_argument("--pictures", default="digits", help="digits, photographs, or a folder")
    parser.add_argument("--count", type=int, default=5000, help="of pictures, at most")
    parser.add_argument("--hash-size", type=int, default=4096, help="m; 0: the whole gradient")
    parser.add_argument("--hidden", type=int, default=1000, help="units of a hidden layer")
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--updates", type=int, default=64, help="gradients a step")
    parser.add_argument("--seconds", type=float, default=600.0, help="of a training, at most")
    parser.add_argument("--steps", type=int, default=40_000, help="of a training, at most")
