"""What every result about one network at one batch says of itself, in numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, kw_only=True)
class Finding:
    """A result about the update of one network at one batch.

    Attributes:
        model: name of the network's class.
        input_shape: of one sample.
        batch_size: B.
        method: the route that was taken.
        unknowns: B·n.
        equations: entries of the update that were looked at.
        loss: name of the client's loss.
        notes: what the reader should know.
        seconds: wall time.
    """

    model: str
    input_shape: tuple[int, ...]
    batch_size: int
    method: str
    unknowns: int
    equations: int
    loss: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Plain numbers, for JSON; None where a number is not finite."""
        return {
            "model": self.model,
            "loss": self.loss,
            "input_shape": list(self.input_shape),
            "batch_size": self.batch_size,
            "method": self.method,
            "unknowns": self.unknowns,
            "equations": self.equations,
            **self._numbers(),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def _numbers(self) -> dict[str, Any]:
        """What this kind of result adds to the summary."""
        return {}


def aligned(rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    r"""Lines of a table in plain text, the first row its heading.

    Args:
        rows: cells in words.
        left: leading columns of names; the others are numbers.

    >>> print("\n".join(aligned([("layer", "nullity"), ("conv1", "0")], 1)))
    layer  nullity
    -----  -------
    conv1        0
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def data_frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """One line for each row, its keys as columns; like ``pandas.DataFrame``.

    Raises:
        ImportError: pandas is not installed; it is the extra ``frames``.

    >>> data_frame([{"layer": "conv1", "nullity": 0}]).shape
    (1, 2)
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ImportError(
            "expected pandas for a data frame, got no such module; write "
            "pip install 'rgap[frames]', or take the numbers from summary()"
        ) from error
    return pandas.DataFrame(list(rows))
