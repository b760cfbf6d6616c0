"""The largest batch that a network's update still determines, found by bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from operator import index

import torch
from torch import nn

from rgap.analysis.joint_rank.identifiability import identifiability
from rgap.machine.allowance import Timed
from rgap.network.agreement import refuse_unready
from rgap.progress import Shown
from rgap.update.losses import Loss

NOT_GROWING = (
    "The nullity does not grow with the batch everywhere: a rank was decided inside the spectrum; "
    "look at the gaps in tried."
)


@dataclass(frozen=True)
class LargestBatch:
    """Result of :func:`largest_identifiable_batch`.

    Attributes:
        batch_size: largest B with full column rank and a clear gap; 0 if even one sample is not
            determined.
        counting_bound: ⌊equations / unknowns of one sample⌋: no B above it can be.
        tried: (B, joint nullity, gap) of every batch size that was looked at, ascending.
        limited: True where the search stopped at ``largest``, not at a failure.
        notes: what the reader should know.
    """

    batch_size: int
    counting_bound: int
    tried: tuple[tuple[int, int, float], ...]
    limited: bool
    notes: tuple[str, ...] = ()

    def explain(self) -> str:
        """The answer in words."""
        lines = [
            f"The largest batch with a full-rank update is B = {self.batch_size}"
            + (", the largest that was allowed." if self.limited else "."),
            f"Counting equations alone would allow B = {self.counting_bound}.",
        ]
        failed = [(b, n) for b, n, _ in self.tried if n]
        if failed:
            lines.append(f"At B = {failed[0][0]}, {failed[0][1]} directions are missing.")
        return "\n".join([*lines, *self.notes])


def largest_identifiable_batch(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    loss: str | Loss | nn.Module = "cross_entropy",
    largest: int = 64,
    method: str = "auto",
    memory_budget: float | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    progress: Shown = False,
    device: torch.device | str | None = None,
) -> LargestBatch:
    """Largest B at which the update has full column rank at a random batch.

    In eval mode the update of a batch is the mean of its samples' updates, so its Jacobian is
    [J_1 … J_B]/B, one block of columns per sample: full column rank at B implies it at every
    smaller batch of the same samples.  That makes bisection right; the nullities of the batches
    tried are checked to grow with B all the same, because ranks are decided numerically.

    Args:
        model: in eval mode; left as it was.
        input_shape: of one sample.
        loss: of the client.
        largest: no batch above it is looked at.
        method: as for `identifiability`.
        memory_budget: as for `identifiability`.
        time_limit: seconds for all batches together, kept within a tenth; None for none.
        seed: of the batch; smaller batches are its first samples.
        progress: True for a line on a terminal, or a function that is told; see
            :mod:`rgap.progress`.
        device: where to compute; default the CPU.

    Raises:
        ValueError: ``largest`` below 1, or what `identifiability` raises.

    >>> import rgap
    >>> net = rgap.models.mlp((8,), 3, input_shape=(1, 4, 4), seed=0)
    >>> largest_identifiable_batch(net, (1, 4, 4), largest=4).counting_bound
    10
    """
    try:
        limit = index(largest)
    except TypeError:
        limit = 0
    if limit < 1:
        raise ValueError(f"expected largest, a whole number >= 1, got {largest!r}; write 64")
    refuse_unready(model)  # with statistics of the batch, one sample more changes all columns
    shape = tuple(index(n) for n in input_shape)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bound = trained // max(1, prod(shape))
    top = min(limit, bound)
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(max(1, top), *shape, generator=generator).double()
    tried: dict[int, tuple[int, float]] = {}

    def full(batch: int) -> bool:
        shown.stage(f"B = {batch}", len(tried) + 1)
        answer = identifiability(
            model, pictures[:batch], loss=loss, method=method, sequential=False, null_space=False,
            memory_budget=memory_budget, seed=seed, device=device, progress=shown.within,
            time_limit=shown.left,
        )  # fmt: skip
        tried[batch] = (answer.joint_nullity, answer.gap)
        return answer.identifiable

    with Timed(progress, time_limit) as shown:
        good = _last(full, top)
        if top == 0:
            full(1)  # for the nullity, and for the errors of a model that no batch fits
    rows = tuple((b, *tried[b]) for b in sorted(tried))
    grows = all(first[1] <= second[1] for first, second in pairwise(rows))
    return LargestBatch(
        good, bound, rows, good == limit and bound > limit, () if grows else (NOT_GROWING,)
    )


def _last(holds: Callable[[int], bool], top: int) -> int:
    """Largest n in 1 … top at which ``holds``, by doubling and halving; 0 if it never does.

    Right where what holds at n holds below it.
    """
    good, step = 0, 1
    while good < top and holds(min(step, top)):
        good, step = min(step, top), 2 * step
    bad = min(step, top) if good < top else top + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good
