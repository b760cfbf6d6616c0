"""The defender's question: the smallest change after which part of the data is no longer there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod
from operator import index
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rgap.analysis.hardening.resize import UnfitError, called_layers, with_channels, with_stride
from rgap.analysis.hardening.table import Change, Hardening
from rgap.analysis.joint_rank.identifiability import identifiability
from rgap.analysis.noise_bound.cramer_rao import noise
from rgap.analysis.noise_bound.defences import DEFENCES, Defence
from rgap.analysis.noise_bound.report import NoiseReport
from rgap.machine.allowance import OutOfTime, Timed
from rgap.machine.memory import OutOfMemory
from rgap.network.agreement import refuse_unready
from rgap.progress import Shown
from rgap.update.losses import Loss

__all__ = ["harden"]

HAIR = 1e-9  # share by which σ goes above the boundary: the error has to exceed the range
CHANGES = ("batch size", "channels", "stride", "noise")


def harden(
    model: nn.Module,
    input_shape: Sequence[int],
    fraction: float = 0.1,
    batch_size: int = 1,
    *,
    changes: Sequence[str] = CHANGES,
    defence: str | Sequence[str] = (),
    loss: str | Loss | nn.Module = "cross_entropy",
    largest_batch: int = 32,
    largest_stride: int = 4,
    value_range: tuple[float, float] = (0.0, 1.0),
    memory_budget: float | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Shown = False,
) -> Hardening:
    """Find the smallest changes that make a fraction of the data unidentifiable.

    Batch size, channels and stride are judged by the joint nullity of `identifiability` at a
    random batch: directions of the data that change nothing in the update, to first order.  Noise
    and defences are judged by the Cramér–Rao bound: a direction counts once its standard deviation
    exceeds the width of ``value_range``, so that a guess from the range alone is as good.

    Fewer channels and larger batches leave fewer equations per unknown, so both are found by
    bisection; strides are tried one after the other.  Layers whose sizes follow from the change
    are fitted to it, and weights that no longer fit are drawn anew.

    Args:
        model: in eval mode; left as it was.
        input_shape: of one sample.
        fraction: in (0, 1], of the unknowns.
        batch_size: B as it is.
        changes: which of "batch size", "channels", "stride" and "noise" to look for.
        defence: names of defences ("prune", "quantise", "sign", or what a distribution offers) to
            look for the weakest level of.
        loss: of the client.
        largest_batch: no batch above it is looked at.
        largest_stride: no stride above it is looked at.
        value_range: of the data.
        memory_budget: bytes to take on top of the model; by default half of what is free.
        time_limit: seconds, kept within a tenth; None for none.  What was found before is returned,
            and what was not looked at is named.
        seed: of the batch and of weights that are drawn anew.
        device: where to compute; default the CPU.
        progress: True for a line on a terminal, or a function; see :mod:`rgap.progress`.

    Returns:
        The :class:`Hardening`.

    Raises:
        ValueError: a fraction outside (0, 1], an unknown kind of change or defence, a defence
            without levels, a limit below 1, or what `identifiability` raises.

    >>> import rgap
    >>> net = rgap.models.mlp((12,), 3, "tanh", input_shape=(1, 4, 4), seed=0)
    >>> found = harden(net, (1, 4, 4), 0.1, changes=("batch size", "noise"))
    >>> [(change.kind, change.missing, change.unknowns) for change in found.changes]
    [('batch size', 26, 256), ('noise', 4, 16)]
    >>> pruned = harden(net, (1, 4, 4), 0.1, changes=(), defence="prune").of("prune")
    >>> pruned.after, pruned.missing
    (0.1, 2)
    """
    start = time.perf_counter()
    refuse_unready(model)  # what is changed is counted for samples by themselves
    limits = {"batch size": index(largest_batch), "stride": index(largest_stride)}
    _refuse(fraction, changes, limits, index(batch_size))
    names = (defence,) if isinstance(defence, str) else tuple(defence)
    levels = {name: _levels(name) for name in names}
    shape = tuple(index(n) for n in input_shape)
    show = Timed(progress, time_limit, device or "cpu")
    search = _Search(
        model, shape, index(batch_size), fraction, Loss.of(loss), value_range, memory_budget, seed,
        device, show, levels,
    )  # fmt: skip
    with show:
        now = search.run(changes, limits)
    return search.table(now, time.perf_counter() - start)


def _refuse(
    fraction: float, changes: Sequence[str], limits: Mapping[str, int], batch_size: int
) -> None:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"expected fraction in (0, 1], got {fraction}; write fraction=0.1")
    unknown = [kind for kind in changes if kind not in CHANGES]
    if unknown or isinstance(changes, str):
        raise ValueError(
            f"expected changes among {list(CHANGES)}, got {changes!r}; write "
            "changes=('batch size', 'noise')"
        )
    if min(limits.values()) < 1:
        raise ValueError(
            f"expected largest_batch and largest_stride >= 1, got {limits['batch size']} and "
            f"{limits['stride']}; write largest_batch=32"
        )
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}; write batch_size=1")


@dataclass
class _Search:
    """The system as it is, and what was found of it."""

    model: nn.Module
    shape: tuple[int, ...]
    batch: int
    fraction: float
    loss: Loss
    value_range: tuple[float, float]
    room: float | None
    seed: int
    device: torch.device | str | None
    show: Timed
    levels: Mapping[str, Sequence[Defence]]
    smallest: list[Change] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    tried: int = 0

    @property
    def unknowns(self) -> int:
        return self.batch * prod(self.shape)

    @property
    def wanted(self) -> float:
        return self.fraction * self.unknowns

    def run(self, changes: Sequence[str], limits: Mapping[str, int]) -> int:
        """Look for every change that is asked for; the joint nullity as the system is."""
        now = self.missing(self.model, self.batch)
        for what, look in self.looks(changes, limits):
            if now >= self.wanted:
                break
            try:
                self.show.stage(what)
                look()
            except (OutOfMemory, OutOfTime) as reason:
                self.failed.append(f"{what}: not found out ({reason}).")
        return now

    def table(self, now: int, seconds: float) -> Hardening:
        """What was found: the changes by kind, the smallest of a kind first."""
        kinds = (*CHANGES, *self.levels)
        return Hardening(
            type(self.model).__name__,
            self.shape,
            self.batch,
            self.fraction,
            now,
            self.unknowns,
            tuple(sorted(self.smallest, key=lambda c: (kinds.index(c.kind), _relative(c)))),
            tuple(self.failed),
            seconds,
        )

    def looks(
        self, changes: Sequence[str], limits: Mapping[str, int]
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """What to look for, by its name."""
        layers = called_layers(self.model, self.shape)
        if "batch size" in changes:
            yield "batch size", partial(self.larger_batch, limits["batch size"])
        if "channels" in changes:
            for name, module in layers[:-1]:
                yield f"channels of '{name}'", partial(self.fewer_channels, name, module)
        if "stride" in changes:
            for name, module in layers:
                if isinstance(module, _ConvNd):
                    look = partial(self.larger_stride, name, module, limits["stride"])
                    yield f"stride of '{name}'", look
        if "noise" in changes:
            yield "noise", self.more_noise
        for name, levels in self.levels.items():
            yield name, partial(self.stronger, name, levels)

    def missing(self, network: nn.Module, batch: int) -> int:
        """Joint nullity at a random batch."""
        self.tried += 1
        self.show.stage("changed network", self.tried)
        return identifiability(
            network,
            self.shape,
            batch,
            loss=self.loss,
            sequential=False,
            null_space=False,
            memory_budget=self.room,
            time_limit=self.show.left,
            seed=self.seed,
            device=self.device,
            progress=self.show.within,
        ).joint_nullity

    def larger_batch(self, largest: int) -> None:
        """Smallest batch that is large enough."""
        size = prod(self.shape)
        best = _first(
            lambda b: self.missing(self.model, b),
            lambda b: self.fraction * b * size,
            self.batch,
            largest,
        )
        if best is None:
            self.failed.append(f"batch size: none up to {largest} is enough.")
            return
        batch, left = best
        share = left / (batch * size)
        self.smallest.append(Change("batch size", "", self.batch, batch, left, batch * size, share))

    def fewer_channels(self, name: str, module: nn.Module) -> None:
        """Fewest channels taken away from one hidden layer."""
        out: Any = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        step = int(getattr(module, "groups", 1))
        groups = int(out) // step

        def fewer(taken: int) -> int:
            count = (groups - taken) * step
            network = with_channels(self.model, name, count, self.shape, self.seed)
            return self.missing(network, self.batch)

        try:
            best = _first(fewer, lambda _: self.wanted, 0, groups - 1)
        except UnfitError as reason:
            self.failed.append(f"channels of '{name}': the network does not run ({reason}).")
            return
        if best is None:
            self.failed.append(f"channels of '{name}': even {step} is not few enough.")
        else:
            self._note("channels", name, int(out), (groups - best[0]) * step, best[1])

    def larger_stride(self, name: str, module: _ConvNd, largest: int) -> None:
        """Note the smallest larger stride of a convolution that leaves enough open, if any does."""
        before = max(module.stride)
        for stride in range(before + 1, largest + 1):
            try:
                network = with_stride(self.model, name, stride, self.shape, self.seed)
            except UnfitError as reason:
                self.failed.append(f"stride of '{name}': {stride} does not run ({reason}).")
                return
            left = self.missing(network, self.batch)
            if left >= self.wanted:
                self._note("stride", name, before, stride, left)
                return
        self.failed.append(f"stride of '{name}': none up to {largest} is enough.")

    def more_noise(self) -> None:
        """Smallest σ at which enough directions have an error beyond the range of the data."""
        report = self._bound(1.0, None)
        if report.decision is None:
            self.failed.append("noise: too many unknowns to see the directions one by one.")
            return
        kept = report.spectrum[: report.decision.rank].sort().values
        more = max(0, ceil(self.wanted) - report.decision.nullity)
        sigma = report.width * float(kept[more - 1]) * (1 + HAIR) if more else 0.0
        left = report.decision.nullity + int((sigma > report.width * kept).sum())
        self._note("noise", "", 0.0, sigma, left)

    def stronger(self, name: str, levels: Sequence[Defence]) -> None:
        """Weakest level of a defence at which enough directions are beyond the range."""
        for level in levels:
            self.tried += 1
            self.show.stage(str(level), self.tried)
            report = self._bound(0.0, level)
            if report.nullity is None or report.lost is None:
                self.failed.append(f"{name}: too many unknowns to see the directions one by one.")
                return
            left = report.nullity + report.lost
            if left >= self.wanted:
                self._note(name, "", level.idle, level.strength, left)
                return
        self.failed.append(f"{name}: even {levels[-1]} is not enough.")

    def _bound(self, sigma: float, defence: Defence | None) -> NoiseReport:
        """The Cramér–Rao bound at a random batch."""
        return noise(
            self.model,
            self.shape,
            self.batch,
            sigma=sigma,
            defence=defence,
            loss=self.loss,
            value_range=self.value_range,
            memory_budget=self.room,
            time_limit=self.show.left,
            seed=self.seed,
            device=self.device,
            progress=self.show.within,
        )

    def _note(self, kind: str, layer: str, before: float, after: float, left: int) -> None:
        share = left / self.unknowns
        self.smallest.append(Change(kind, layer, before, after, left, self.unknowns, share))


def _levels(name: str) -> Sequence[Defence]:
    """The levels of a defence from weak to strong; there is at least one."""
    if name not in DEFENCES:
        able = [other for other, kind in DEFENCES.working().items() if kind.levels()]
        raise ValueError(
            f"defence: expected one of {', '.join(map(repr, able))}, which have levels, got "
            f"{name!r}; write defence={able[0]!r}"
        )
    levels = DEFENCES[name].levels()
    if not levels:
        raise ValueError(
            f"defence: expected one with levels from weak to strong, got {name!r}, which has none; "
            "write defence='prune', or rgap.analysis.noise(model, shape, defence=...) for one level"
        )
    return levels


def _relative(change: Change) -> float:
    if change.before == 0:
        return 0.0
    ratio = change.after / change.before
    return max(ratio, 1.0 / ratio)


def _first(
    value: Callable[[int], int], wanted: Callable[[int], float], low: int, high: int
) -> tuple[int, int] | None:
    """Smallest n in (low, high] with value(n) ≥ wanted(n), and its value, by doubling and halving.

    Right where what holds at n holds above it.
    """
    step, top = max(1, low), low
    reached: tuple[int, int] | None = None
    while top < high:
        low, top = top, min(top + step, high)
        step *= 2
        here = value(top)
        if here >= wanted(top):
            reached = (top, here)
            break
    while reached is not None and reached[0] - low > 1:
        middle = (low + reached[0]) // 2
        here = value(middle)
        if here >= wanted(middle):
            reached = (middle, here)
        else:
            low = middle
    return reached
