"""Tables of results as data frames; pandas is imported only when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["data_frame"]


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
