"""Which equations separate the samples of a batch, and why.

A pair of fully connected layers in a row separates any batch up to about their width.  Without one
the loss has to: at a softmax head up to C − 1 samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

import torch

from rgap.jacobian.batch_loss import loss_scale
from rgap.jacobian.layer import differentiable
from rgap.limits import ROUNDED
from rgap.network.chain import Chain, Stage
from rgap.network.reshape import Op
from rgap.separation.batch import Batch, Separated, Unseparated
from rgap.separation.mixture import Mixture
from rgap.separation.pair import Between, between, lines, separate_pair, steps_between
from rgap.separation.softmax.separate import separate_head, unfit

Watcher = Callable[[str], None]


def separate(batch: Batch, watch: Watcher | None = None) -> Separated | Unseparated:
    """Tell the samples of a batch apart, at the lowest stage where equations do."""
    chain = batch.chain
    if not batch.loss.equations:
        return Unseparated(
            f"no equations of the loss {batch.loss.name} with these options tell how much each "
            "sample of a batch weighs; a batch of one needs none"
        )
    head = chain.stages[-1]
    if head.affine.geometry is not None:
        return Unseparated(
            f"the last layer '{head.name}' is a {head.affine.kind}; separating a batch needs "
            "fully connected ones"
        )
    names = filter(None, (head.affine.weight_name, head.affine.bias_name))
    if not all(batch.precision.sent(name) for name in names):
        return Unseparated(
            f"the gradient of the last layer '{head.name}' was not sent (frozen on the client): "
            "nothing names the samples; ask the client to train that layer too"
        )
    top = batch.mixture(head.index)
    for stage in chain.stages:
        if batch.size is None or stage.affine.geometry is not None:
            continue
        rank = batch.mixture(stage.index).triplets.rank
        if rank.rank > batch.size and rank.clear and _beyond(batch, stage):
            return Unseparated(
                f"the gradient of '{stage.name}' has rank {rank.rank} (σ_{rank.rank}/σ_1 "
                f"{rank.smallest / rank.largest:.1e}): more than the stated batch_size="
                f"{batch.size} allows",
                consistent=False,
            )
    whys: list[str] = []
    for index in range(len(chain.stages) - 1):
        steps = steps_between(chain, index)
        if isinstance(steps, str):
            continue
        if bent := _bent(chain, index):
            whys.append(bent)
            continue
        lower, upper = batch.mixture(index), batch.mixture(index + 1)
        why = unfit_pair(lower, upper, steps)
        if why is None:
            pair = Between.of(lower, upper, steps, batch.precision)
            return _after(separate_pair(batch, pair, top, watch), whys)
        whys.append(why)
    alone = "; ".join(whys) or "no two fully connected layers in a row"
    why_not = unfit(batch, top)
    if why_not is not None:
        return Unseparated(f"{alone}; {why_not.reason}", why_not.consistent)
    return _after(separate_head(batch, top, watch), whys)


def undetermined(batch: Batch, separated: Separated) -> str:
    """Which samples of a pair of layers lie on lines of solutions, any point of which is as good.

    "" where each has equations that determine it, and for samples of a head.
    """
    index, samples = separated.stage.index, separated.mixture
    steps = "" if separated.stage is batch.chain.stages[-1] else steps_between(batch.chain, index)
    if isinstance(steps, str):
        return ""
    pair = Between.of(samples, batch.mixture(index + 1), steps, batch.precision)
    roots = separated.features.value.flatten(1) @ samples.right
    return lines(pair, roots) or between(pair, roots)


def _bent(chain: Chain, index: int) -> str:
    """Which step above a stage has derivatives that no polish here takes, or ""."""
    steps = [*chain.stages[index].tail]
    for stage in chain.stages[index + 1 :]:
        steps += [*stage.lead, *stage.tail]
    for op in steps:
        if not differentiable(op):
            name = chain.stages[index].name
            return f"how '{op.name}' ({op.kind}) above '{name}' bends is not among the equations"
    return ""


def _beyond(batch: Batch, stage: Stage) -> bool:
    """True if what a gradient holds beyond the rank of the batch is more than errors can add.

    By Eckart and Young no error E of a matrix of rank B leaves more than ‖E‖ beyond its rank.
    Each sample rounds by its own size, which may be far above that of a sum that nearly cancels.
    """
    held, precision, name = batch.mixture(stage.index), batch.precision, stage.affine.weight_name
    rest = torch.cat([held.values[batch.size :], held.triplets.beneath]).norm()
    own = ROUNDED * precision.unit * float(held.gradient.norm()) * _cancelled(batch)
    return float(rest) > own + precision.noise_length(name, held.gradient)


def _cancelled(batch: Batch) -> float:
    """Times that the samples of a batch may be longer than their sum, ``B max‖κ‖ / ‖Σκ‖``.

    There is no such bound where targets may be any numbers, and Σκ is not known without a bias.
    """
    head, loss = batch.chain.stages[-1].affine, batch.loss
    if batch.size is None or batch.size == 1:
        return 1.0
    bias = None if head.bias_name is None else batch.gradients[head.bias_name]
    if bias is None:
        return inf
    longest = loss.longest(torch.zeros_like(bias)[None])
    longest *= loss_scale(loss, batch.size, len(bias))
    return max(1.0, batch.size * longest / max(float(bias.norm()), 1e-300))


def _after(answer: Separated | Unseparated, whys: list[str]) -> Separated | Unseparated:
    """The answer with what kept lower layers from giving it."""
    return replace(answer, passed="; ".join(whys)) if isinstance(answer, Separated) else answer


def unfit_pair(lower: Mixture, upper: Mixture, steps: Sequence[Op]) -> str | None:
    """Why a pair of layers with ``steps`` between does not separate the batch, None if it does."""
    name, above = lower.stage.name, upper.stage.name
    width = upper.gradient.shape[1]
    if lower.bias_gradient is None:
        return f"'{name}' has no bias: nothing fixes the scale of a sample of its row space"
    if lower.rank == 0 or not bool((lower.bias_gradient != 0).any()):
        drowned = bool((lower.gradient != 0).any()) and lower.rank == 0
        return f"the gradient of '{name}' is {'all noise, as stated' if drowned else 'zero'}"
    if not bool((lower.weights != 0).any()):
        return f"the bias gradient of '{name}' has no part in the range of its weight's"
    if lower.rank != upper.rank:
        lost = "one of them lost samples"
        if lower.rank < upper.rank:
            lost += f", or some are linearly dependent at the input of '{name}'"
        return (
            f"the gradients of '{name}' and '{above}' have different ranks, {lower.rank} and "
            f"{upper.rank}: {lost}"
        )
    if lower.rank - 1 > width - lower.rank:
        return (
            f"'{above}' with {width} inputs gives {width - lower.rank} equations a sample for "
            f"{lower.rank - 1} unknowns"
        )
    if lower.rank > 1 and all(op.affine for op in steps):
        return f"nothing bends between '{name}' and '{above}': mixtures of samples pass as samples"
    return None


def mixed(batch: Batch) -> bool:
    """True if the gradient of some fully connected layer has a rank above one."""
    stages = [s for s in batch.chain.stages if s.affine.geometry is None]
    return any(batch.mixture(stage.index).rank > 1 for stage in stages)
