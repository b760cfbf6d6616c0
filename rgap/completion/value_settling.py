"""Data at the weighted least squares of known values, their errors, and whether any are open."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from rgap.jacobian.frontier import Frontier, Tangent
from rgap.limits import BACK, FITS, PROBES, SAFETY
from rgap.precision import Estimate
from rgap.progress import Watch
from rgap.solvers.conjugate import cgls, times

__all__ = ["MEMBERS", "Settled", "Settling"]

LAST = 8  # steps of Gauss–Newton
FIRST = 1e-2  # accuracy of the first, which ends among the same kinks
MEMBERS = 4  # errors that are carried to the data
PRODUCTS, ACCURACY = 400, 3e-5  # of conjugate gradients

Settled = tuple[Estimate, Tensor]  # data, and the misfit of every sample in standard errors


class Settling:
    """Gauss–Newton in units of the errors, and the errors of where it ends.

    Products with the Jacobian are of float32, what is left of the equations of float64: iterative
    refinement.

    Args:
        function: the known values.
        watch: told which sample is settled.
        below: what is, in words.
    """

    def __init__(self, function: Frontier, watch: Watch, below: str) -> None:
        self.function, self.rough = function, function.to(torch.float32)
        self.watch, self.below = watch, below

    def __call__(self, found: Tensor) -> Settled | str:
        """The data with their errors, and the misfit of every sample; or of which there are none.

        Args:
            found: data near them, [B, *in_shape], float64.
        """
        rows, misfits = list[Estimate](), list[float]()
        for row in range(len(found)):
            self.watch(f"{self.below}, sample {row + 1} of {len(found)}")
            settled = self.settled(row, found[row : row + 1])
            if isinstance(settled, str):
                return f"sample {row}: {settled}"
            rows.append(settled[0])
            misfits.append(settled[1])
        value = torch.cat([row.value for row in rows])
        data = Estimate(value, torch.cat([row.error for row in rows], 1))
        return data, value.new_tensor(misfits)

    def settled(self, row: int, x: Tensor) -> tuple[Estimate, float] | str:
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
            return (
                f"the data nearest to the known values miss them by {misfit:.1e} standard errors: "
                "the weights or the running statistics below them are others than the client's"
            )
        drawn = torch.randn((PROBES, *x.shape[1:]), generator=generator).to(x)
        moved = _solved(Tangent(self.rough, sigma, x.float()), errors, ACCURACY)
        # What is read by units within their error of a kink alone is open on its other side.
        beside = torch.cat([x + SAFETY * moved, x - SAFETY * moved])
        tangent = Tangent(self.rough, sigma, x.float(), beside.float())
        images = tangent.push(drawn.float()).to(x) / tangent.unit
        back = _solved(tangent, images, ACCURACY)
        lost = (back - drawn).flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
        if not bool((lost <= BACK).all()):
            return (
                "the known values leave directions of the data open: of a random one "
                f"{float(lost.max()):.1e} is lost"
            )
        return Estimate(x, moved[:, None]), misfit

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
            x, misfit = x + step, now
            if met or number == LAST:
                break
            # Within one standard error an entry, data may still be off by many of their own: a
            # misfit of 1 is that of the errors in all entries, theirs that in as many as unknowns.
            met = number > 0 and misfit <= 1.0
            tangent = Tangent(self.rough, sigma, x.float())
            step = _solved(tangent, gap, ACCURACY if number else FIRST)
        return x, misfit


def _stacked(values: Sequence[Tensor], sigma: Sequence[Tensor]) -> Tensor:
    """Values of the frontier in units of their errors, [S, m]."""
    return torch.cat([(v / s).flatten(1) for v, s in zip(values, sigma, strict=True)], 1)


def _solved(tangent: Tangent, rhs: Tensor, accuracy: float) -> Tensor:
    """Least-squares solutions of ``J v = r`` for right-hand sides [S, m], float64."""
    size = rhs.norm(dim=1).clamp_min(1e-300)
    unit = (rhs / size[:, None]).float()
    found = cgls(tangent.push, tangent.pull, unit, PRODUCTS, accuracy)
    return times(size * tangent.unit, found.x.double())
