"""Data near those that give known values of a network: L-BFGS in float32, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

import torch
from torch import Tensor

from rgap.jacobian.frontier import Frontier
from rgap.limits import CLEAR
from rgap.machine.clock import LONGER, Clock
from rgap.network.activations import ReLU
from rgap.network.pooling import MaxPool
from rgap.progress import Watch
from rgap.solvers.lbfgs import lbfgs, stepped

__all__ = ["Search"]

ROUNDS, STEPS = 60, 20  # of L-BFGS, from every start
CLOSE, NEAR = 2e-6, 10.0  # relative misfit from which Gauss–Newton goes on; times that, if stuck
STALLED, GIVEN = 0.98, 8  # factor on the misfit of a round that ends a start, from which round
STARTS = 3
BLUNT, BLUNT_ROUNDS = (2.0, 10.0), 6  # sharpness of kinks at first, and rounds with each
WIDTHS, ABSOLUTE_ROUNDS = (3e-2, 1e-2, 1e-3), 10  # of least absolute errors
SETTLED = 0.95  # factor on the misfit of such a round that ends them: other kinks leave a rest


class Search:
    """L-BFGS in float32, sample by sample, on the known values.

    The network's kinks are rounded off at first: with them as they are the descent ends at other
    data.  What a rectifier is known to let through is asked of its input, which has a slope on both
    sides of 0.

    Args:
        function: the known values nearest to the data, float32.
        start: the batch to begin with, by the number of the trial.
        watch: told which sample is looked for.
        below: what is, in words.
        clock: when it ends.

    ``missed`` are the samples whose last run ended at data that do not give the known values,
    ``answers`` where it ended.
    """

    def __init__(
        self,
        function: Frontier,
        start: Callable[[int], Tensor],
        watch: Watch,
        below: str,
        clock: Clock,
    ) -> None:
        self.function, self.start = function, start
        self.watch, self.below, self.clock = watch, below, clock
        self.answers, self.missed = dict[int, Tensor](), set[int]()
        self.wanted = [function.known[place].value.float() for place in function.edge]
        self.squares = [self.square(place) for place in function.edge]
        known = zip(self.wanted, self.squares, strict=True)
        whole = sum((v.square().flatten(1).sum(1) / s for v, s in known), start=torch.zeros(()))
        self.scales = [(1.0 / (s * whole.clamp_min(1e-300))).float() for s in self.squares]
        sigmas = zip(*(function.sigma(row) for row in range(len(whole))), strict=True)
        on = zip(function.edge, sigmas, strict=True)
        self.explained = self.close().tolist()
        self.on = [function.known[place].value > CLEAR * torch.stack(s) for place, s in on]

    def square(self, place: int) -> Tensor:
        """Mean square error of a known value of every sample, [B]; none is better than CLOSE."""
        k = self.function.known[place]
        finest = CLOSE**2 * k.value.square().flatten(1).mean(1)
        square = k.error.square().mean(0).flatten(1).mean(1) + self.function.own(place) ** 2
        return torch.maximum(square, finest).clamp_min(1e-60)

    def close(self) -> Tensor:
        """Misfit of every sample that the errors explain: one unit an entry, [B]."""
        parts = zip(self.wanted, self.squares, self.scales, strict=True)
        return torch.stack([w * s * v[0].numel() for v, s, w in parts]).sum(0).float()

    def misfit(
        self, row: int, x: Tensor, sharp: Mapping[int, float] | None, width: float | None = None
    ) -> Tensor:
        """Of a sample; 1 where f(x) is 0.

        Args:
            row: of the sample.
            x: [1, *in_shape].
            sharp: by place of a step with a kink, how sharp it is; None for the network's own.
            width: over the rms of a known value, above which errors count by their size instead.
        """
        values, total = self.function.values(x, sharp), x.new_zeros(())
        known = zip(self.function.edge, self.wanted, self.scales, self.on, strict=True)
        for place, v, w, on in known:
            given = values[place]
            if sharp is None:
                given = torch.where(on[row], self.sloped(place, values), given)
            squares = (given - v[row]).square()
            if width is not None:
                unit = (width**2 * v[row].square().mean()).clamp_min(1e-30)
                squares = 2.0 * unit * (torch.sqrt(1.0 + squares / unit) - 1.0)
            total = total + w[row] * squares.sum()
        return total

    def sloped(self, place: int, values: Mapping[int, Tensor]) -> Tensor:
        """A known value where the rectifier on the way to it lets all through, with its slope."""
        nodes = self.function.flow.nodes
        link, below = nodes[place].link, nodes[place].sources[0]
        if isinstance(link, ReLU):
            return values[below]
        if isinstance(link, MaxPool) and isinstance(nodes[below].link, ReLU):
            return link.forward(values[nodes[below].sources[0]])
        return values[place]

    @property
    def nearest(self) -> dict[int, Tensor]:
        """Where the runs ended, by the number of the sample, [*in_shape], float64."""
        return {row: x[0].double() for row, x in self.answers.items()}

    @property
    def late(self) -> bool:
        """True if the time is up."""
        return self.clock.late

    def run(self, row: int, goal: float, starts: int = STARTS) -> Tensor | str:
        """A sample [1, *in_shape], float64, or how near the nearest one came.

        Goes on from where the last run for it ended.

        Args:
            row: of the sample.
            goal: relative misfit that will do; errors may allow more.
            starts: that are tried, with that one.
        """
        close = max(self.explained[row], goal**2)
        self.watch(f"{self.below}, sample {row + 1} of {len(self.explained)}")
        x, best = self.answers.get(row), inf
        for trial in range(starts):
            begin = None if trial else x
            if begin is None:
                begin = self.start(trial)[row : row + 1].to(self.wanted[0])
                for beta in BLUNT:
                    sharp = self.function.sharpness(begin, beta)
                    begin, _ = self.descended(row, begin, sharp, BLUNT_ROUNDS, 0.0)
            found, own = self.descended(row, begin, None, ROUNDS, close)
            if x is None or own < best:
                x, best = found, own
            if best <= NEAR**2 * close or self.late:
                break
        assert x is not None
        self.answers[row] = x
        self.missed.discard(row)
        if not best <= NEAR**2 * close:
            self.missed.add(row)
            met = f"{best**0.5:.1e} of their size, where {close**0.5:.1e} is explained"
            if self.late:
                return f"the time was up at data that give the known values to {met}; " + LONGER
            return f"the search found no data that give the known values nearer than {met}"
        return x.double()

    def absolute(self, row: int, goal: float) -> None:
        """Go on from where the last run ended by least absolute errors, ever more exactly so.

        Where few windows of a pool have another winner than the data's, what they miss draws the
        squares of all others; of absolute errors it is passed by, and the others say what they are.

        Args:
            row: of the sample.
            goal: relative misfit that will do.
        """
        x = self.answers[row]
        for width in WIDTHS:
            x, now = self.descended(row, x, None, ABSOLUTE_ROUNDS, goal**2, width)
            if now <= goal**2 or self.late:
                break
        self.answers[row] = x

    def descended(
        self,
        row: int,
        x: Tensor,
        sharp: Mapping[int, float] | None,
        rounds: int,
        close: float,
        width: float | None = None,
    ) -> tuple[Tensor, float]:
        """Where one start leads, and the misfit there.

        Args:
            row: of the sample.
            x: [1, *in_shape].
            sharp: by place of a step with a kink, how sharp it is; None for the network's own.
            rounds: of L-BFGS, at most.
            close: misfit that will do.
            width: below which errors count by their squares, above it by their size; None: all do.
        """
        x = x.clone().requires_grad_()
        optimiser = lbfgs(x, STEPS)

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = self.misfit(row, x, sharp, width)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        now = last = inf
        for number in range(rounds):
            stepped(optimiser, closure, self.clock.deadline)
            with torch.no_grad():
                now = float(self.misfit(row, x, sharp))
            given, stalled = (GIVEN, STALLED) if sharp is None else (1, SETTLED)
            stuck = width is None and number >= given and now**0.5 > stalled * last**0.5
            if now <= close or stuck or self.late:
                break
            last = now
        return x.detach(), now
