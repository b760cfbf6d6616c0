"""What a search comes back with: the batch whose update came nearest, and whether it meets it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, prod
from typing import ClassVar

import torch
from torch import Tensor

from rgap.completion.complete import blank_words, grey
from rgap.jacobian.module_update import ModuleUpdate
from rgap.matching.checkpoint import Checkpoint, Ended
from rgap.matching.problem import SearchProblem
from rgap.recovery import Candidate, Recovery, Status

__all__ = ["Matching", "Run", "answer_of"]

MET = 1e-3  # normalised residual up to which an answer reproduces the update
ROUNDED = 30.0  # the same in units of the update's rounding, where that is coarser
UNCERTIFIED = "matching certifies nothing: other batches may send the same update"
CHOSEN = "where they do, the answer was chosen among them by the start"


@dataclass(frozen=True, eq=False, repr=False)
class Matching(Recovery):
    """A recovery by search; ``COMPLETED`` where the update is met, never ``EXACT``.

    ``inputs`` is None where the nearest batch does not reproduce the update to a thousandth,
    parameter by parameter, to its rounding, or to its stated noise; that batch is
    :attr:`~rgap.Recovery.nearest` then, the only candidate.

    Attributes:
        method: name.
        prior: what chose, beside the start, among batches that send the same update; "" for
            nothing.
        ended: why it stopped.
        objective: the method's own, at the answer.
        misfit: ``Σ_j ‖G_j(x) − G_j‖²/‖G_j‖²`` there.
        iterations: made.
        checkpoint: to go on from, or None where nothing was begun.
    """

    method: str = ""
    prior: str = ""
    ended: Ended = Ended.DONE
    objective: float = inf
    misfit: float = inf
    iterations: int = 0
    checkpoint: Checkpoint | None = None

    searched: ClassVar[bool] = True

    def summary(self) -> dict[str, object]:
        """As plain numbers, for JSON."""
        own = {
            "method": self.method,
            "prior": self.prior,
            "ended": self.ended.name,
            "objective": self.objective if isfinite(self.objective) else None,
            "misfit": self.misfit if isfinite(self.misfit) else None,
            "iterations": self.iterations,
        }
        return {**super().summary(), **own}


@dataclass(frozen=True, eq=False)
class Run:
    """How a search went; attributes as of :class:`Matching`."""

    method: str
    prior: str
    ended: Ended
    objective: float
    iterations: int
    checkpoint: Checkpoint


def answer_of(
    problem: SearchProblem, run: Run, best: Tensor | None, targets: Tensor | None
) -> Matching:
    """The recovery, its status and why."""
    unknowns, numbers = prod(problem.shape), sum(g.numel() for g in problem.gradients.values())
    said = problem.notes
    if numbers < unknowns:
        said += (f"the update has {numbers} numbers for {unknowns} unknowns: most of the answer "
                 "is chosen by the start and the prior",)  # fmt: skip
    empty = Matching(
        inputs=None,
        labels=None if targets is None else targets.cpu(),
        status=Status.UNDERDETERMINED,
        layers=(),
        residual=None,
        predicted_error=None,
        error_bound=None,
        reason=f"{run.method} found no batch: {run.ended.value}",
        warnings=said,
        method=run.method,
        prior=run.prior,
        ended=run.ended,
        iterations=run.iterations,
        checkpoint=run.checkpoint,
    )
    if best is None or targets is None:
        return empty
    precision = problem.precision
    gradients = {n: g.double() for n, g in problem.gradients.items()}
    source = replace(problem.source, targets=targets)
    equations = ModuleUpdate(problem.model, gradients, source, problem.shape, precision=precision)
    gaps = equations.gaps(best)
    size = sum(size**2 for _, size in gaps.values())
    residual = (sum(gap**2 for gap, _ in gaps.values()) / size) ** 0.5
    # A tensor that was sent as zero has no norm to be measured by: it counts in the whole.
    normalised = sum((gap / size) ** 2 for gap, size in gaps.values() if size > 0)
    missed = sum((gap * equations.scales[n]) ** 2 for n, (gap, _) in gaps.items())
    misfit = max(normalised, residual**2)
    how = f"{run.iterations} iterations of {run.method}, {run.ended.value}"
    met = f"a normalised residual of {misfit**0.5:.1e}"
    answer = replace(empty, residual=residual, objective=run.objective, misfit=misfit)
    least = max(MET, ROUNDED * torch.finfo(problem.client.update.dtype).eps) ** 2
    blank = grey(problem.shape[0], problem.shape[1:], problem.bounds, 0).to(best)
    each, whole = equations.allowed(precision, blank)
    if max(missed, residual**2) <= max(least, each) and residual**2 <= max(least, whole):
        reason = f"the answer reproduces the update to {met} ({how}); {UNCERTIFIED}; "
        reason += CHOSEN + (f" and by {run.prior}" if run.prior else "")
        return replace(answer, inputs=best.cpu(), status=Status.COMPLETED, reason=reason)
    reason = f"the nearest batch, in candidates, does not reproduce the update: {met} ({how})"
    reason += blank_words(equations, precision, blank)
    nearest = Candidate(best.cpu(), answer.labels, residual)
    return replace(answer, labels=None, reason=reason, candidates=(nearest,))
