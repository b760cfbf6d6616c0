"""How far a long call is, for a terminal or for whoever asks: what, how many, how fast, how long.

Every public function that may take long has ``progress=``:

- ``False``: nothing is shown.
- ``True``: one line on standard error, if that is a terminal, after two seconds; gone at the end.
- a function: it is called with a :class:`Report` at every count.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds below which nothing is shown on a terminal

__all__ = ["Progress", "Report", "Shown", "Watch", "silent"]


@dataclass(frozen=True)
class Report:
    """How far a call is.

    Attributes:
        what: is being done: a layer, a batch size, an iteration of a method.
        number: of it, from 1, or None where nothing is counted.
        total: of them, or None where it is not known beforehand.
        seconds: since the call began.
        rate: finished a second, or None before the first is.
        left: seconds that the rest will take at this rate, at most until a time limit, or None.
        inner: of the call within, or None.
        how: it goes, as in "best 2e-3".
    """

    what: str
    number: int | None = None
    total: int | None = None
    seconds: float = 0.0
    rate: float | None = None
    left: float | None = None
    inner: Report | None = None
    how: str = ""

    @property
    def words(self) -> str:
        """The line that a terminal shows.

        >>> Report("conv2", 2, 5, 12.0, 0.25, 16.0).words
        'conv2: 2 of 5, 4.0 s each, 16 s left'
        >>> Report("step", 40, None, 10.0, 4.0, 50.0, Report("conv1"), "best 2e-3").words
        'step: 40, best 2e-3, 4.0 a second, 50 s left; conv1'
        """
        parts = []
        if self.number is not None:
            parts.append(f"{self.number}" + (f" of {self.total}" if self.total else ""))
        if self.how:
            parts.append(self.how)
        if self.rate:
            slow = self.rate < 1.0
            parts.append(f"{1 / self.rate:.1f} s each" if slow else f"{self.rate:.1f} a second")
        if self.left is not None:
            parts.append(f"{_clock(self.left)} left")
        text = f"{self.what}: {', '.join(parts)}" if parts else self.what
        return text if self.inner is None else f"{text}; {self.inner.words}"


Shown = bool | Callable[[Report], object]


class Watch(Protocol):
    """What a loop far below tells: the ``stage`` of a :class:`Progress`."""

    def __call__(self, what: str, number: int | None = None, total: int | None = None) -> None:
        """What is being done, the number of it, and how many there are."""


def silent(what: str, number: int | None = None, total: int | None = None) -> None:
    """Tell nobody."""


class Progress:
    """Tells how far a call is; a context manager, nested calls get :attr:`within`.

    Args:
        shown: as the module says.
        deadline: of ``clock``, at which the call ends whatever is left; None for none.
        clock: seconds, monotonic.

    >>> told = []
    >>> with Progress(told.append) as show:
    ...     for number, layer in enumerate(["fc", "conv"], 1):
    ...         show.stage(layer, number, 2)
    >>> [(report.what, report.number, report.total) for report in told]
    [('fc', 1, 2), ('conv', 2, 2)]
    """

    def __init__(
        self,
        shown: Shown,
        deadline: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not isinstance(shown, bool) and not callable(shown):
            raise TypeError(
                f"progress: expected True, False or a function that is told, got {shown!r}; write "
                "progress=True for a line on a terminal, or progress=print"
            )
        self._clock, self._deadline = clock, deadline
        self._began = clock()
        self._counted: tuple[str | None, int, float] | None = None  # first number of a series
        self._tell = None if isinstance(shown, bool) else shown
        self._line = _Line(self._began, clock) if shown is True else None
        self.last: Report | None = None

    def __enter__(self) -> Self:
        if self._line is not None:
            self._line.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._line is not None:
            self._line.stop()

    def stage(
        self,
        what: str,
        number: int | None = None,
        total: int | None = None,
        series: str = "",
        how: str = "",
    ) -> None:
        """Say what is being done now.

        Args:
            what: a layer, a batch size, …
            number: of it in its series, from 1.
            total: of the series, where it is known.
            series: name of the series; another name begins the measurement of the rate anew.
            how: it goes, in words.
        """
        log.debug("%s", what)
        now = self._clock()
        rate = left = None
        if number is not None:
            held = self._counted
            if held is None or held[0] != series or number < held[1]:
                held = self._counted = (series, number, now)
            done, spent = number - held[1], now - held[2]
            rate = done / spent if done > 0 and spent > 0 else None
            if rate is not None and total is not None:
                left = (total - number + 1) / rate
        if self._deadline is not None:
            rest = max(self._deadline - now, 0.0)
            left = rest if left is None else min(left, rest)
        self._show(Report(what, number, total, now - self._began, rate, left, how=how))

    @property
    def listened(self) -> bool:
        """True if anybody is told."""
        return self._tell is not None or self._line is not None

    @property
    def within(self) -> Shown:
        """What a call within this one takes as its ``progress``; its reports are shown inside."""
        return self._nested if self.listened else False

    def _nested(self, inner: Report) -> None:
        outer = self.last or Report("", seconds=self._clock() - self._began)
        self._show(replace(outer, inner=inner) if outer.what else inner, keep=True)

    def _show(self, report: Report, keep: bool = False) -> None:
        if not keep:
            self.last = report
        if self._line is not None:
            self._line.report = report
        if self._tell is not None:
            self._tell(report)


class _Line:
    """One line of a terminal, drawn by rich; begins after :data:`PATIENCE` seconds."""

    def __init__(self, began: float, clock: Callable[[], float]) -> None:
        self.report: Report | None = None
        self._began, self._clock = began, clock
        self._status: Any = None
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        """Wait for the first seconds to pass; nothing at all where there is no terminal."""
        from rich.console import Console

        console = Console(stderr=True)
        if not console.is_terminal:
            return
        self._status = console.status(self)
        self._timer = threading.Timer(PATIENCE, self._status.start)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Take the line away."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if self._status is not None:
            self._status.stop()

    def __rich__(self) -> str:
        """The report as it is now, with the time that has passed."""
        words = "beginning" if self.report is None else self.report.words
        return f"{words} [dim]({_clock(self._clock() - self._began)})[/dim]"


def _clock(seconds: float) -> str:
    """Seconds as a reader takes them in.

    >>> _clock(12.3), _clock(75), _clock(7260)
    ('12 s', '1:15 min', '2:01 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
