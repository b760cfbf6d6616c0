"""A time limit that a long call keeps: checked at every count, and before work that takes long.

A loop asks between its passes.  One factorisation of a large matrix can take longer than all that
is left, and nothing interrupts it: what it will take is told from its size before it begins.
Within :meth:`Timed.every_operation` every operation of torch asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import ceil, floor, inf, log10, prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
TRIAL = 320  # size of the factorisation that others are told from
SHORT = 0.02  # seconds of a trial, about what that one takes
LEAST_ASKED = float(TRIAL**3)  # work below which there is time for it in any case
# Shares of the work of the singular values and vectors, measured at 320 … 1280 rows.
CHOLESKY = 1 / 25  # of a normal matrix and its factor
PLAIN = 1 / 12  # of a product of the same sizes, or of its QR by such products
SYMMETRIC = 1 / 2  # of the eigenvalues and vectors of a symmetric matrix
REFLECTED = 1 / 5  # of a QR by reflections

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

    @contextmanager
    def every_operation(self) -> Iterator[None]:
        """Within it every operation of torch asks for the time that it takes before it begins.

        What runs there must let OutOfTime through: no ``except ValueError`` around it.

        >>> with Timed(False, 1e-3) as show, show.every_operation():
        ...     torch.zeros(3000, 3000) @ torch.zeros(3000, 3000)
        Traceback (most recent call last):
        ...
        rgap.machine.allowance.OutOfTime: time_limit: ...
        """
        if self.limit == inf:
            yield
            return
        pace(self._device)  # measured outside, or its own factorisation would ask
        with _Asking(self._ask):
            yield

    def _ask(self, work: float) -> None:
        self.ahead(work)
        if self._clock() > self.end:
            place = self.last.what if self.last is not None else "the next step"
            raise OutOfTime(
                f"time_limit: the {self.limit:g} s are over at '{place}'; {self._advice(0.0)}"
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


class _Asking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Asks before every operation of torch."""

    def __init__(self, ask: Ahead) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ask = ask

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        count = WORK.get(func.overloadpacket.__name__)
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        self._ask(count(*tensors) if count is not None else 0.0)
        if func is torch.ops.aten._efficientzerotensor.default:
            # Zeros without memory, as forward mode makes them, crash inside a mode.
            func = torch.ops.aten.zeros.default
        return func(*args, **(kwargs or {}))


def _product(*factors: torch.Tensor) -> float:
    """Of a sum and a product of matrices, or of the product alone: the last two factors count."""
    left, right = factors[-2:]
    return PLAIN * left.numel() * right.shape[-1]


def _convolution(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> float:
    return PLAIN * (x.numel() // max(1, x.shape[1])) * weight.numel()


def _convolution_backward(k: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    return 2.0 * _convolution(x, weight)


def _of_each(share: float) -> Callable[..., float]:
    """Of every matrix of a batch, the first argument."""

    def work(matrix: torch.Tensor, *others: torch.Tensor) -> float:
        *outer, rows, columns = matrix.shape
        return prod(outer) * factorisation(rows, columns, share)

    return work


def _solved(matrix: torch.Tensor, *others: torch.Tensor) -> float:
    """A matrix factored, and its solutions."""
    return _of_each(PLAIN)(matrix) + sum(_product(matrix, one) for one in others if one.ndim > 1)


WORK: Mapping[str, Callable[..., float]] = {
    "mm": _product,
    "bmm": _product,
    "addmm": _product,
    "baddbmm": _product,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_linalg_svd": _of_each(1.0),
    "_linalg_eigh": _of_each(SYMMETRIC),
    "linalg_qr": _of_each(REFLECTED),
    "linalg_cholesky_ex": _of_each(CHOLESKY),
    "linalg_lu_factor_ex": _of_each(PLAIN),
    "linalg_inv_ex": _of_each(PLAIN),
    "_linalg_solve_ex": _solved,
    "linalg_lu_solve": _solved,
    "linalg_solve_triangular": _solved,
}
"""Work of the operations that can take long; every other takes a pass over its tensors."""


@cache
def pace(device: str) -> float:
    """Seconds of one unit of work here, from the largest trial that is short."""
    generator = torch.Generator().manual_seed(0)
    for size in (TRIAL // 4, TRIAL):
        matrix = torch.randn(size, size, generator=generator, dtype=torch.float64).to(device)
        began = time.perf_counter()
        torch.linalg.svd(matrix).S.sum().item()
        seconds = time.perf_counter() - began
        if seconds > SHORT:  # a machine that others use as well: more would only take long
            break
    return seconds / size**3
