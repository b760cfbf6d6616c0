"""What the client would send for an answer, and how far from that an update may be.

The real model, the declared loss and the targets of the answer are used here, not the cotangent
that was observed: nothing is certified that does not give the update again, tensor by tensor, up to
what its precision, its noise and the errors of the answer explain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.inversion.problem import Problem
from rgap.jacobian.batch_loss import loss_scale
from rgap.limits import REPLAYS, ROUNDED, SAFETY
from rgap.machine import memory
from rgap.update.capture import capture
from rgap.update.losses import Loss

__all__ = ["Replay", "replay", "replayed", "sent_for"]

LOW = torch.float32  # the arithmetic whose rounding is measured
MEMBERS = 2  # of its ensemble that are replayed
COPIES = 32.0  # bytes a number, float64: the model, two updates, and what autograd holds


@dataclass(frozen=True)
class Replay:
    """An update beside that of an answer.

    Attributes:
        residual: relative difference of the whole.
        parts: relative difference by parameter name.
        allowed: the same as precision, noise and the answer's errors explain it.
        free: True if targets may be any numbers, so that some make an update as small as any.
    """

    residual: float
    parts: dict[str, float]
    allowed: dict[str, float]
    free: bool = False

    @property
    def worst(self) -> str:
        """The parameter that misses by most of what it may."""
        return max(self.parts, key=lambda n: self.parts[n] / max(self.allowed[n], 1e-300))

    @property
    def fits(self) -> bool:
        """True if every tensor is reproduced within what it may be off by."""
        return all(part <= self.allowed[name] for name, part in self.parts.items())

    @property
    def deaf(self) -> bool:
        """True where one rounding is as large as every tensor, so that any answer would do.

        A label cannot make an update small: of a sample that the network is sure of it is.
        """
        return self.free and all(allowed >= ROUNDED for allowed in self.allowed.values())


def sent_for(
    problem: Problem,
    inputs: Tensor,
    labels: Tensor,
    scale: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The update of a batch, in float64 whatever it was computed in.

    Args:
        problem: the model and the declared loss.
        inputs: [B, *input_shape].
        labels: as the loss takes them.
        scale: factor on the update, or one a sample [B].
        dtype: of the client's arithmetic; a forward that casts to one of its own has its way.
    """
    if isinstance(scale, Tensor):
        return _weighed(problem, inputs, labels, scale, dtype)

    loss = problem.declared
    if loss.targets == "probability" or (loss.targets == "index" and labels.is_floating_point()):
        # As they were read: noise may have moved them out of [0, 1], or off 0 and 1.
        loss = Loss(loss.name, function=problem.declared)

    def sent(precision: torch.dtype) -> Mapping[str, Tensor]:
        return capture(
            problem.model, inputs, labels, loss, value_range=None, dtype=precision
        ).gradients

    try:
        again = sent(dtype)
    except ValueError:  # a forward that casts to a precision of its own
        again = sent(problem.update.dtype)
    return {n: scale * again[n].to(g) for n, g in problem.gradients.items()}


def _weighed(
    problem: Problem, inputs: Tensor, labels: Tensor, scale: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Each sample by itself, with its factor and its share in the mean of the batch."""
    shares = _shares(problem.declared, labels, problem.chain.output_shape)
    total: dict[str, Tensor] = {}
    for row, factor in enumerate((scale * shares.to(scale)).tolist()):
        one = sent_for(problem, inputs[row : row + 1], labels[row : row + 1], factor, dtype)
        total = {n: total[n] + g if total else g for n, g in one.items()}
    return total


def _shares(loss: Loss, labels: Tensor, output_shape: Sequence[int]) -> Tensor:
    """What a sample's own gradient counts for in that of the batch, [B]: 1/B of a plain mean."""
    ones = torch.ones(len(labels), dtype=torch.float64, device=labels.device)
    if loss.own:
        return ones * loss_scale(loss, len(labels), 1) / loss_scale(loss, 1, 1)
    dense = loss.dense(labels, ones.new_zeros(len(labels), *output_shape))
    each = [loss.divisor(dense[i : i + 1], ones[:1]) for i in range(len(labels))]
    return ones.new_tensor(each) / loss.divisor(dense, ones)


def replay(
    problem: Problem,
    inputs: Tensor,
    labels: Tensor,
    scale: float | Tensor = 1.0,
    error: Tensor | None = None,
    spread: float | Tensor = 0.0,
) -> Replay:
    """The update beside that of an answer.

    The rounding of the client is measured: the same update is computed in float32, and what that
    is off by is scaled to the client's unit roundoff.

    Args:
        problem: the update.
        inputs: of the answer, [B, *input_shape].
        labels: of the answer.
        scale: factor on the update, or one a sample.
        error: ensemble of the errors of ``inputs``, [S, B, *input_shape].
        spread: standard error of ``scale``, like it.
    """
    parameters = sum(p.numel() for p in problem.model.parameters())
    memory.require(
        f"the update of an answer, {parameters:,} numbers in float64 beside a model of as many",
        COPIES * parameters,
        problem.room,
    )
    exact = sent_for(problem, inputs, labels, scale)
    rounded = _distances(exact, sent_for(problem, inputs, labels, scale, LOW))
    carried = dict.fromkeys(exact, 0.0)
    members = [] if error is None else list(error)
    for e in members[:MEMBERS]:
        moved = _distances(exact, sent_for(problem, inputs + e, labels, scale + spread))
        carried = {name: max(carried[name], moved[name]) for name in exact}
    residual, parts = _compared(problem, exact)
    free = problem.update.loss.targets != "index"
    made = Replay(residual, parts, _allowed(problem, rounded, carried), free)
    coarse = problem.precision.unit >= torch.finfo(LOW).eps / 2
    for number in range(MEMBERS, REPLAYS if members else 0):
        if made.fits:
            break
        # Units at a kink are on in one arithmetic and off in another: one draw may have had none.
        e = members[number % len(members)] + problem.precision.rounding(inputs)[number]
        own = LOW if coarse else torch.float64
        again = _distances(exact, sent_for(problem, inputs + e, labels, scale + spread, own))
        carried = {name: max(carried[name], again[name]) for name in exact}
        made = replace(made, allowed=_allowed(problem, rounded, carried))
    return made


def _allowed(
    problem: Problem, rounded: Mapping[str, float], carried: Mapping[str, float]
) -> dict[str, float]:
    """Relative differences that precision, noise and the errors of an answer explain."""
    unit, allowed = problem.precision.unit, {}
    ratio = unit / (torch.finfo(LOW).eps / 2)
    for name, sent in problem.sent.items():
        own = float(sent.norm())
        rounding = ratio * rounded[name] + unit * own
        rounding += problem.precision.floor * sent.numel() ** 0.5
        noise = float(problem.precision.noise_std(name, sent).square().sum()) ** 0.5
        may = ROUNDED * rounding + SAFETY * (noise + carried[name])
        allowed[name] = may / own if own > 0 else may
    return allowed


def _distances(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((other[name] - g).norm()) for name, g in one.items()}


def replayed(
    problem: Problem, inputs: Tensor, labels: Tensor, scale: float | Tensor = 1.0
) -> tuple[float, dict[str, float]]:
    """Relative difference between the update and the gradient of a batch, in all and by name.

    Arguments as of :func:`sent_for`.
    """
    return _compared(problem, sent_for(problem, inputs, labels, scale))


def _compared(problem: Problem, again: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    parts, total, size = {}, 0.0, 0.0
    for name, sent in problem.sent.items():
        gap, own = float((again[name] - sent).norm()), float(sent.norm())
        parts[name] = gap / own if own > 0 else gap
        total, size = total + gap**2, size + own**2
    return (total / size) ** 0.5 if size > 0 else total**0.5, parts
