"""A time limit that a long call keeps: checked at every count, and before work that takes long.

A loop asks between its passes.  One factorisation of a large matrix can take longer than all that
is left, and nothing interrupts it: what it will take is told from its size before it begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil, floor, inf, log10

import torch

from rgap.progress import Progress, Report, Shown

__all__ = [
    "CHOLESKY",
    "LEAST_ASKED",
    "OVER",
    "PLAIN",
    "SYMMETRIC",
    "Ahead",
    "OutOfTime",
    "Timed",
    "Until",
    "factorisation",
    "freely",
    "seconds_of",
    "sufficient",
]

OVER = 0.1  # of a limit, by which it may be exceeded
LEAST = 1e-3  # seconds
EXACTLY = 1e-9  # of a digit, which rounding up leaves as it is
TRIAL = 320  # size of the factorisation that others are told from: about 0.1 s
LEAST_ASKED = float(TRIAL**3)  # work below which there is time for it in any case
CHOLESKY = 1 / 60  # work of a normal matrix and its factor, over that of the singular values
PLAIN = 1 / 12  # work of a QR or a product of the same sizes, over that of the singular values
SYMMETRIC = 1 / 3  # that of the eigenvalues and vectors of a symmetric matrix

Ahead = Callable[[float], None]
"""Asks whether there is time for work of so many units, see :func:`factorisation`."""


class OutOfTime(ValueError):  # noqa: N818  (the name says what happened, as OutOfMemory does)
    """The time limit came before the answer."""


def freely(work: float) -> None:
    """There is time for everything."""


def factorisation(rows: float, columns: float, share: float = 1.0) -> float:
    """Work of the singular values and vectors of a matrix, or the share of it that another has.

    >>> factorisation(200, 100)
    2000000.0
    """
    return float(max(rows, columns) * min(rows, columns) ** 2) * share


def seconds_of(limit: float | None) -> float:
    """A limit in seconds, infinite where none is given.

    Raises:
        TypeError: no number.
        ValueError: not above 0.

    >>> seconds_of(None), seconds_of(60)
    (inf, 60.0)
    """
    if limit is None:
        return inf
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(f"time_limit: expected seconds, got {limit!r}; write time_limit=60.0")
    if not limit > 0:
        raise ValueError(f"time_limit: expected seconds above 0, got {limit!r}; write 60.0")
    return float(limit)


class Timed(Progress):
    """Progress of a call that ends at its limit.

    Args:
        shown: as for :class:`rgap.progress.Progress`.
        limit: seconds; None or infinite for none.
        device: where the factorisations run.

    >>> with Timed(False, 1e-9) as show:
    ...     show.stage("conv1", 1, 2)
    Traceback (most recent call last):
    ...
    rgap.machine.allowance.OutOfTime: time_limit: the 1e-09 s are over at 'conv1' (1 of 2); ...
    """

    def __init__(
        self, shown: Shown, limit: float | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.limit, self._device = seconds_of(limit), str(device)
        clock = time.perf_counter
        self.end = clock() + self.limit
        super().__init__(shown, None if self.limit == inf else self.end, clock)
        self._before = ("", 0, 0.0)  # what the last count was of, and when

    @property
    def left(self) -> float:
        """Seconds until the limit; never 0, which is no limit that a call within could take."""
        return max(self.end - self._clock(), LEAST)

    def _show(self, report: Report, keep: bool = False) -> None:
        """Show a stage, or raise OutOfTime: the limit is over, or one more pass would exceed it."""
        super()._show(report, keep)
        if keep or self.limit == inf:
            return
        what, number, total = report.what, report.number, report.total
        now, (last, count, when) = self._clock(), self._before
        alike = last == what and number is not None and number > count
        self._before = (what, number or 0, now)
        if now > self.end or (alike and now + (now - when) > self.end + OVER * self.limit):
            place = (
                f"'{what}'"
                if number is None
                else f"'{what}' ({number}" + (f" of {total})" if total else ")")
            )
            rest = 0.0
            if alike and total and number is not None:  # a pass may be of several
                rest = (now - when) / (number - count) * (total - number + 1)
            raise OutOfTime(
                f"time_limit: the {self.limit:g} s are over at {place}; {self._advice(rest)}"
            )

    def ahead(self, work: float) -> None:
        """Ask for time.

        Args:
            work: as :func:`factorisation` counts it.

        Raises:
            OutOfTime: it would end after the limit.
        """
        if self.limit == inf or work < LEAST_ASKED:
            return
        need = work * pace(self._device)
        if need > self.left + OVER * self.limit:
            place = self.last.what if self.last is not None else "the next step"
            raise OutOfTime(
                f"time_limit: '{place}' takes about {need:.2g} s, and {self.left:.2g} s of "
                f"{self.limit:g} s are left; {self._advice(need)}"
            )

    def _advice(self, need: float) -> str:
        used = self._clock() - (self.end - self.limit)
        enough = sufficient(self.limit, used + need)
        return f"write time_limit={enough:g}, a smaller batch or a smaller input_shape"


@dataclass(frozen=True)
class Until:
    """Asks for time, as :meth:`Timed.ahead`, until a share of a limit is over.

    Attributes:
        began: of ``time.perf_counter``.
        limit: seconds of the whole call.
        share: of it that the work may take.
        device: where it runs.

    >>> Until(time.perf_counter(), 60.0)(1.0)
    >>> Until(time.perf_counter() - 31.0, 60.0, 0.5)(LEAST_ASKED)
    Traceback (most recent call last):
    ...
    rgap.machine.allowance.OutOfTime: it takes about ... s, and 0 s of 30 s are left; write ...
    """

    began: float
    limit: float
    share: float = 1.0
    device: str = "cpu"

    def __call__(self, work: float) -> None:
        """Ask.

        Args:
            work: as :func:`factorisation` counts it.

        Raises:
            OutOfTime: it would end after the share.
        """
        if work < LEAST_ASKED:
            return
        need, used = work * pace(self.device), time.perf_counter() - self.began
        room = self.share * self.limit
        if used + need > room:
            enough = sufficient(self.limit, (used + need) / self.share)
            raise OutOfTime(
                f"it takes about {need:.2g} s, and {max(room - used, 0.0):.2g} s of {room:g} s are "
                f"left; write time_limit={enough:g}"
            )


def sufficient(limit: float, need: float) -> float:
    """A limit to advise in the place of one that was too short: two digits, rounded up.

    Args:
        limit: seconds that were too few; four times as many are advised at least.
        need: seconds that are needed; twice as many at least.

    >>> sufficient(5.0, 36.2), sufficient(10.0, 12.0)
    (73.0, 40.0)
    """
    enough = max(4.0 * limit, 2.0 * need, LEAST)
    size = 10.0 ** (floor(log10(enough)) - 1)
    return ceil(enough / size - EXACTLY) * size


@cache
def pace(device: str) -> float:
    """Seconds of one unit of work here."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(TRIAL, TRIAL, generator=generator, dtype=torch.float64).to(device)
    began = time.perf_counter()
    torch.linalg.svd(matrix).S.sum().item()
    return (time.perf_counter() - began) / TRIAL**3
