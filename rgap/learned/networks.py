"""Networks from a hashed gradient to the pictures of its batch, and to its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "counter", "decoder", "first_layer", "under", "with_size"]

WIDTH = 64  # channels of the convolutions
SMALLEST = 4  # side of the grid that they begin with, at least
COUNTING = 128  # hidden units of the network that guesses the batch size


def decoder(kind: str, inputs: int, hidden: int, shape: Sequence[int]) -> nn.Sequential:
    """A network from ``[N, inputs]`` to values in (0, 1), ``[N, *shape]``.

    ``mlp``: three fully connected layers with ReLU and a sigmoid, as published.  ``convolutional``:
    the last is replaced by a coarse grid that is doubled and convolved up to the size of a picture.

    Source: Wu, Chen, Guo and Weinberger (2023); the convolutions are ours.

    Args:
        kind: of :data:`KINDS`.
        inputs: of a row.
        hidden: units of each hidden layer.
        shape: [B, *picture].

    Raises:
        ValueError: convolutions for data that are no pictures.

    >>> decoder("convolutional", 32, 16, (2, 3, 9, 8))(torch.zeros(5, 32)).shape
    torch.Size([5, 2, 3, 9, 8])
    """
    return KINDS[kind](inputs, hidden, tuple(shape))


def _mlp(inputs: int, hidden: int, shape: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, prod(shape)), nn.Sigmoid(), nn.Unflatten(1, shape),
    )  # fmt: skip


def _convolutional(inputs: int, hidden: int, shape: tuple[int, ...]) -> nn.Sequential:
    if len(shape) != 4:
        raise ValueError(
            f"network: 'convolutional' makes pictures [channels, height, width], got samples of "
            f"{list(shape[1:])}; write network='mlp'"
        )
    batch, channels, *side = shape
    sizes = [tuple(side)]
    while min(sizes[0]) > SMALLEST:
        sizes.insert(0, tuple(-(-length // 2) for length in sizes[0]))
    layers: list[nn.Module] = [
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH * prod(sizes[0])), nn.ReLU(),
        nn.Unflatten(1, (WIDTH, *sizes[0])),
    ]  # fmt: skip
    for size in sizes[1:]:
        layers += [nn.Upsample(size), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()]
    last = nn.Conv2d(WIDTH, batch * channels, 3, padding=1)
    return nn.Sequential(*layers, last, nn.Sigmoid(), nn.Unflatten(1, (batch, channels)))


KINDS = {"mlp": _mlp, "convolutional": _convolutional}
"""Networks by name."""


def first_layer(network: nn.Sequential) -> nn.Linear:
    """The layer that reads the hashed gradient, whatever the kind."""
    layer = network[0]
    assert isinstance(layer, nn.Linear)
    return layer


def counter(inputs: int, sizes: int) -> nn.Sequential:
    """A network from ``[N, inputs]`` to a logit for every batch size that was trained for."""
    return nn.Sequential(nn.Linear(inputs, COUNTING), nn.ReLU(), nn.Linear(COUNTING, sizes))


def with_size(rows: Tensor, place: int, sizes: int) -> Tensor:
    """Rows with the batch size beside them, one-hot, where there is more than one, [N, m + S]."""
    if sizes == 1:
        return rows
    beside = torch.zeros(len(rows), sizes).to(rows)
    beside[:, place] = 1.0
    return torch.cat([rows, beside], 1)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one network among those of several, by their names in it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
