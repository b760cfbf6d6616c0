"""Data at the weighted least squares of known values, their errors, and whether any are open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from rgap.jacobian.frontier import Frontier, Tangent
from rgap.limits import BACK, FITS, PROBES, SAFETY
from rgap.machine.clock import ENDLESS, LONGER, Clock
from rgap.precision import Estimate
from rgap.solvers.conjugate import cgls, times

__all__ = ["MEMBERS", "Row", "Settled", "Settling", "gathered"]

LAST = 8  # steps of Gauss–Newton
FIRST, CLOSING = 1e-2, 3e-4  # accuracy of the first, among other kinks, and of one within errors
MEMBERS = 4  # errors that are carried to the data
PRODUCTS, ACCURACY = 400, 3e-5  # of conjugate gradients
FINEST = 1e-6  # accuracy at which float32 ends them
SIGNS, BOX = 4, 3  # draws of a mean length of columns, and entries of it along an axis
ENOUGH, LEAST = 32, 1e-2  # numbers in such a mean; the least mean, as a share of all

LATE = f"the time was up as the data were settled; {LONGER}"
_MEANS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)

Row = tuple[Estimate, float]  # a sample, and its misfit in standard errors
Settled = tuple[Estimate, Tensor]  # data, and the misfit of every sample


def gathered(ends: Mapping[int, Row | str], samples: int) -> Settled | str:
    """All samples, or why one is missing.

    Args:
        ends: by the number of a sample, the sample or why it is not found; none that was not tried.
        samples: B.
    """
    lost = {row: end for row, end in ends.items() if isinstance(end, str)}
    if lost or len(ends) < samples:
        row = min(lost)
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        untried = f", {samples - len(ends)} not tried" if len(ends) < samples else ""
        return f"sample {row}{more}{untried}: {lost[row]}"
    rows = [end for _, end in sorted(ends.items()) if not isinstance(end, str)]
    value = torch.cat([row.value for row, _ in rows])
    error = torch.cat([row.error for row, _ in rows], 1)
    return Estimate(value, error), value.new_tensor([misfit for _, misfit in rows])


class Settling:
    """Gauss–Newton in units of the errors, and the errors of where it ends.

    Products with the Jacobian are of float32, what is left of the equations of float64: iterative
    refinement.

    Args:
        function: the known values.
        clock: when it ends, if a limit was given.
    """

    def __init__(self, function: Frontier, clock: Clock = ENDLESS) -> None:
        self.function, self.rough = function, function.to(torch.float32)
        self.clock = clock
        self.balances = dict[int, Tensor]()

    def settled(self, row: int, x: Tensor) -> Row | str:
        """One sample, from data near it."""
        full, sigma = self.function, self.function.sigma(row)
        generator = torch.Generator().manual_seed(row)
        errors = _stacked(
            [
                full.known[place].error[:MEMBERS, row]
                + full.own(place) * torch.randn((MEMBERS, *s.shape), generator=generator).to(s)
                for place, s in zip(full.edge, sigma, strict=True)
            ],
            sigma,
        )
        x, misfit = self.nearest(row, x)
        if not misfit <= FITS:
            if self.clock.over:
                return LATE
            return (
                f"the nearest data that were found miss the known values by {misfit:.1e} standard "
                "errors: the search ended beside the client's data, or the weights or the running "
                "statistics below these values are others than the client's"
            )
        drawn = torch.randn((PROBES, *x.shape[1:]), generator=generator).to(x)
        tangent = Tangent(self.rough, sigma, x.float())
        moved, lost = self.back(row, tangent, drawn, errors)
        # What is read by units within their error of a kink alone is open on its other side.
        beside = torch.cat([x + SAFETY * moved, x - SAFETY * moved])
        either = Tangent(self.rough, sigma, x.float(), beside.float())
        if not either.alike(tangent):
            _, lost = self.back(row, either, drawn)
        if not lost <= BACK:
            if self.clock.over:
                return LATE
            return (
                "the known values leave directions of the data open: of a random one "
                f"{lost:.1e} is lost"
            )
        return Estimate(x, moved[:, None]), misfit

    def back(
        self, row: int, tangent: Tangent, drawn: Tensor, errors: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """What errors do to the data, and the largest share of random data that does not come back.

        Whatever the iteration at which conjugate gradients are stopped, with D as balance and n
        taken to 0 by the map, random data are lost as a whole along ``D n``.  That they are back in
        all directions is also why the errors are by then what they end at.

        Args:
            row: of the sample.
            tangent: the map at its data.
            drawn: random data, [S, *in_shape].
            errors: of the known values, in standard errors, [R, m].
        """
        images = tangent.push(drawn.float()).to(drawn) / tangent.unit
        rhs = images if errors is None else torch.cat([errors, images])

        def lost(found: Tensor) -> float:
            gap = (found[-len(drawn) :] - drawn).flatten(1).norm(dim=1)
            return float((gap / drawn.flatten(1).norm(dim=1)).max())

        def enough(found: Tensor) -> bool:
            return self.clock.over or lost(found) <= BACK

        found = _solved(tangent, rhs, FINEST, self.balance(row, tangent), enough)
        return found[: len(found) - len(drawn)], lost(found)

    def balance(self, row: int, tangent: Tangent) -> Tensor | None:
        """Squares of the lengths of the Jacobian's columns near a sample, [1, *in_shape].

        They tell what is seen through many units from what is not, a border or a dark corner, and
        halve the iterations.  ``(Jᵀs)²`` of random signs s has them for its mean, here over
        neighbours and channels too; None where these are too few for a mean.
        """
        channels, *size = self.function.flow.in_shape
        few = SIGNS * channels * BOX ** len(size) < ENOUGH
        if few or not 1 <= len(size) <= len(_MEANS) or min(size) < BOX:
            return None
        if row not in self.balances:
            generator = torch.Generator().manual_seed(row)
            shape = (SIGNS, sum(s.numel() for s in tangent.sigma))
            signs = 2.0 * torch.randint(0, 2, shape, generator=generator).to(tangent.sigma[0]) - 1.0
            squares = tangent.pull(signs).square().mean((0, 1))[None, None]
            mean = _MEANS[len(size) - 1](squares, BOX, 1, BOX // 2, count_include_pad=False)
            least = LEAST * float(mean.mean())
            self.balances[row] = mean.clamp_min(least).expand(1, channels, *size)
        return self.balances[row]

    def nearest(self, row: int, x: Tensor) -> tuple[Tensor, float]:
        """Where Gauss–Newton ends for one sample, and its misfit in standard errors.

        Args:
            row: of the sample.
            x: data to begin at, [1, *in_shape].
        """
        full, sigma = self.function, self.function.sigma(row)
        target = _stacked([full.known[place].value[row][None] for place in full.edge], sigma)
        misfit, step, met = inf, torch.zeros_like(x), False
        for number in range(LAST + 1):
            gap = target - _stacked(full(x + step), sigma)
            now = float(gap.square().mean().sqrt())
            if not now < misfit:
                break
            fell = now / misfit if number else 1.0
            x, misfit = x + step, now
            if met or number == LAST or self.clock.over:
                break
            # Within one standard error an entry, data may still be off by many of their own: a
            # misfit of 1 is that of the errors in all entries, theirs that in as many as unknowns.
            met = number > 0 and misfit <= 1.0
            # As long as kinks are crossed, what is left of the equations is theirs.
            accuracy = CLOSING if met else min(max(fell**2, ACCURACY), FIRST)
            tangent = Tangent(self.rough, sigma, x.float())
            balance = self.balance(row, tangent)
            step = _solved(tangent, gap, accuracy, balance, lambda _: self.clock.over)
        return x, misfit


def _stacked(values: Sequence[Tensor], sigma: Sequence[Tensor]) -> Tensor:
    """Values of the frontier in units of their errors, [S, m]."""
    return torch.cat([(v / s).flatten(1) for v, s in zip(values, sigma, strict=True)], 1)


def _solved(
    tangent: Tangent,
    rhs: Tensor,
    accuracy: float,
    balance: Tensor | None,
    enough: Callable[[Tensor], bool],
) -> Tensor:
    """Least-squares solutions of ``J v = r`` for right-hand sides [S, m], float64."""
    size = rhs.norm(dim=1).clamp_min(1e-300)

    def scaled(x: Tensor) -> Tensor:
        return times(size * tangent.unit, x.double())

    unit = (rhs / size[:, None]).float()
    pair = tangent.push, tangent.pull
    found = cgls(*pair, unit, PRODUCTS, accuracy, balance, lambda x: enough(scaled(x)))
    return scaled(found.x)
