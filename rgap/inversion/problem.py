"""An update and its model, checked and in float64: what everything below the surface works on."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.arithmetic.doubles import Doubles
from rgap.completion.complete import PriorSchedule
from rgap.head.behind import behind
from rgap.head.ending import folded
from rgap.machine import memory
from rgap.machine.allowance import Ahead, freely
from rgap.machine.clock import Clock
from rgap.network.chain import Chain, parse, unparsed
from rgap.network.probing import UnreadyError
from rgap.precision import Estimate, Precision
from rgap.progress import Watch, silent
from rgap.recursion.descend import descend
from rgap.recursion.reached import Descent, Reached
from rgap.recursion.stage import BUDGET
from rgap.recursion.steps import Unpool
from rgap.remedy import trained
from rgap.update.losses import Loss
from rgap.update.preflight import ClientView
from rgap.update.targets import CLASSES
from rgap.update.update import Update, view

log = logging.getLogger(__name__)

FEWEST = 4  # members of an ensemble: the spread is then known to a third
COPIES = 3  # of an ensemble that are held at a time: before, after, and what is added
BEYOND = 1.0  # slack of a range that nobody stated for this recovery: data are often normalised


@dataclass(frozen=True)
class Problem:
    """An update and its model, checked and in float64, ready to be solved."""

    client: ClientView
    update: Update  # under the loss as the last affine map sees it
    chain: Chain
    gradients: Doubles
    precision: Precision
    batch: int  # rows of what is recovered: different pictures
    value_range: tuple[float, float] | None
    slack: float  # widths of the range by which a candidate may leave it
    budget: float  # bytes for the matrices of one layer; without room for them: no matrices
    room: float  # bytes for everything together
    unready: str = ""  # why the model, in train mode, is no function of the data
    filling: PriorSchedule | None = None  # None: stop where the equations end
    deadline: float = inf  # of time.perf_counter, after which a search begins no further step
    ahead: Ahead = freely  # asked for time before equations are solved and ranks counted
    notes: tuple[str, ...] = ()  # what was read off the update before anything was solved

    @property
    def model(self) -> nn.Module:
        """As the client had it."""
        return self.client.model

    @property
    def left(self) -> float:
        """Seconds of a limit that was given, at least 0; infinite where none was."""
        return max(self.deadline - time.perf_counter(), 0.0) if self.clock.limited else inf

    @property
    def clock(self) -> Clock:
        """When searches end."""
        return Clock(self.deadline, self.ahead is not freely)

    @property
    def stated(self) -> int | None:
        """Batch size, where the update or the caller says it."""
        return self.client.batch

    @property
    def labels(self) -> Tensor | None:
        """Targets, where the update or the caller says them."""
        return self.client.labels

    @property
    def declared(self) -> Loss:
        """Of the model's own outputs, as the client minimised it."""
        return self.client.update.loss

    def descend(
        self,
        index: int,
        features: Estimate,
        cotangent: Estimate,
        watch: Watch = silent,
        unpool: Unpool | None = None,
    ) -> Descent:
        """The recursion from a stage whose affine input and cotangent are known down to the data.

        Args:
            index: of the stage.
            features: u, [B, *affine.in_shape].
            cotangent: k, [B, *affine.out_shape].
            watch: told the name of each stage.
            unpool: as for :func:`rgap.recursion.descend.descend`.
        """
        start = Reached(index, cotangent, features, None)
        return descend(
            self.chain,
            self.gradients,
            start,
            self.precision,
            watch,
            self.budget,
            unpool,
            self.ahead,
        )

    @property
    def width(self) -> float:
        """Of the value range; 1 where there is none."""
        low, high = self.value_range or (0.0, 1.0)
        return high - low

    def excess(self, values: Tensor, bound: float) -> float:
        """How far data leave their range beyond what their error explains, in its widths.

        Args:
            values: of the data, any shape.
            bound: largest error of any of them.
        """
        if self.value_range is None:
            return 0.0
        low, high = self.value_range
        over = float(torch.maximum(values - high, low - values).max()) - bound
        return max(over, 0.0) / (high - low)

    @property
    def sent(self) -> Doubles:
        """The gradients without those of layers that the client had frozen."""
        return self.gradients.only(n for n in self.gradients if self.precision.sent(n))


def prepare(
    client: ClientView,
    value_range: tuple[float, float] | None = None,
    seed: int = 0,
    budget: float | None = None,
) -> Problem:
    """Bring a client's model and update to float64.

    Args:
        client: both, checked.
        value_range: of the data, if the caller states one.
        seed: of the sampled errors.
        budget: bytes; by default a share of what the machine has free.

    Raises:
        ValueError: several local steps, labels out of range, a range that is none, no room.
    """
    update, place = client.update, client.place
    bounds = update.value_range if value_range is None else validation.bounds(value_range)
    if update.local_steps > 1:
        raise ValueError(
            f"expected one gradient, got an average over {update.local_steps} local steps: the "
            "weights moved between them and the equations of one step do not hold; ask the client "
            f"for one step, or write {trained(update.local_steps, 'rate')}"
        )
    room = memory.budget_of(budget, place)
    memory.require_copies(client.model, 1 if place.type == "cpu" else 2, room)
    unready = ""
    try:
        chain = parse(client.model, client.input_shape, mixing=True)
    except UnreadyError as error:  # what stands below it may be read all the same
        unready = str(error)
        chain = unparsed(client.model, client.input_shape, error.state)
    if place.type != "cpu":
        chain = chain.to(place)
    chain, loss = behind(*folded(chain, update.loss, client.batch))
    update = view(update, loss=loss)
    _check_labels(client.labels, update, chain)
    samples = ensemble(chain, client.batch or 1, room)
    return Problem(
        client,
        update,
        chain,
        Doubles(update.gradients, place, room / 8),
        client.precision(seed, samples),
        client.batch or 1,
        bounds,
        slack=BEYOND if value_range is None else 0.0,
        budget=room if budget is not None else min(room, BUDGET),
        room=room,
        unready=unready,
        notes=(client.rounded,) if client.rounded else (),
    )


def ensemble(chain: Chain, batch: int, room: float) -> int:
    """Members of the error ensemble that fit: fewer where the values of a layer are many.

    Args:
        chain: the network.
        batch: samples.
        room: bytes.

    Raises:
        OutOfMemory: not even the fewest do.
    """
    if not chain.stages:
        return Precision.samples
    widest = max(chain.steps, key=lambda step: prod(step.in_shape) + prod(step.out_shape))
    one = 8.0 * COPIES * batch * (prod(widest.in_shape) + prod(widest.out_shape))
    memory.require(
        f"carrying errors through '{widest.name}' with {batch * prod(widest.in_shape):,} inputs",
        FEWEST * one,
        room,
    )
    return min(Precision.samples, max(FEWEST, int(max(room, memory.LEAST) / one)))


def _check_labels(labels: Tensor | None, update: Update, chain: Chain) -> None:
    """Stated class indices lie in the range of the model's outputs."""
    loss = update.loss
    if labels is None or loss.targets != "index" or labels.is_floating_point() or loss.own:
        return
    outputs = chain.output_shape[0] if chain.output_shape else 0
    classes = max(outputs, 2) if loss.name in CLASSES else 2
    low, high = int(labels.min()), int(labels.max())
    if outputs and (low < 0 or high >= classes):
        got = f"{low}" if low == high else f"values from {low} to {high}"
        raise ValueError(
            f"labels: expected class indices from 0 to {classes - 1}, got {got}; write "
            "labels=None to have them found"
        )
