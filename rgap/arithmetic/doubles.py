"""Tensors in float64 that are converted where they are used.

Everything here computes in float64, and an update comes in float32: converted at once, that of a
network with 138 million parameters takes 1.1 GB beside the 0.55 GB that it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["BLOCK", "Doubles", "blocks", "row_blocks"]

KEPT = 2.5e8  # bytes up to which all conversions are kept
# Entries of a block of rows: above 32 MB, from where an allocator gives back what is freed.
BLOCK = 5 * 2**20


class Doubles(Mapping[str, Tensor]):
    """A mapping of tensors by name that gives them in float64 on one device.

    Args:
        original: the tensors as they came.
        device: where they are wanted.
        room: bytes; where all of them take more than a share of it, none is kept.

    >>> doubles = Doubles({"weight": torch.ones(2)}, "cpu", 1e9)
    >>> doubles["weight"].dtype, doubles.original["weight"].dtype
    (torch.float64, torch.float32)
    """

    def __init__(
        self, original: Mapping[str, Tensor], device: torch.device | str, room: float = KEPT
    ) -> None:
        self.original = {name: tensor.detach() for name, tensor in original.items()}
        self.device = torch.device(device)
        total = 8.0 * sum(tensor.numel() for tensor in self.original.values())
        self._keep = total <= min(KEPT, room)
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._made:
            return self._made[name]
        made = self.original[name].to(self.device, torch.float64)
        if self._keep:
            self._made[name] = made
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.original)

    def __len__(self) -> int:
        return len(self.original)

    def __contains__(self, name: object) -> bool:
        return name in self.original  # Mapping's own would convert

    def only(self, names: Iterable[str]) -> Doubles:
        """The same tensors under some of the names; what is converted already is shared.

        >>> list(Doubles({"weight": torch.ones(2), "bias": torch.ones(1)}, "cpu").only(["bias"]))
        ['bias']
        """
        chosen = Doubles({name: self.original[name] for name in names}, self.device)
        chosen._keep, chosen._made = self._keep, self._made
        return chosen


def blocks(tensor: Tensor, entries: int = BLOCK) -> Iterator[Tensor]:
    """The entries of a tensor in their order, a block at a time, as they came.

    What looks at all values of an update converts and compares no more than a block at a time.

    >>> [len(block) for block in blocks(torch.ones(5, 2), 4)]
    [4, 4, 2]
    """
    flat = tensor.detach().reshape(-1)
    yield from (flat,) if len(flat) <= entries else torch.split(flat, entries)


def row_blocks(
    matrix: Tensor, like: Tensor, entries: int = BLOCK
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a matrix [m, n] in the dtype and on the device of ``like``.

    >>> [block.shape for _, block in row_blocks(torch.ones(5, 2), torch.ones(1).double(), 4)]
    [torch.Size([2, 2]), torch.Size([2, 2]), torch.Size([1, 2])]
    """
    step = max(entries // max(matrix.shape[1], 1), 1)
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        yield rows, matrix[rows].to(like)
