"""Down a directed graph by gradient constraints alone: what wide networks give away.

A value is solved once every cotangent above it is known: the gradients of all layers that read it
are linear equations for it, ``K u = G``, and in wide layers K has full column rank.  Nothing is
inverted; activation, sum, normalisation and pooling only pass cotangents down.  The mask of a
rectifier is the sign of what it gives, where that was solved; above the highest solved value it is
read off the convolution below (:mod:`rgap.separation.shifts`).

Source: gradient constraints alone down a chain of one sample are R-CONV (Eltaras et al. 2024).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf

import torch
from torch import Tensor

from rgap.halt import Halt
from rgap.jacobian.layer import each
from rgap.limits import OFF, SURELY_ON
from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.network.pooling import MaxPool
from rgap.precision import Estimate, Precision
from rgap.recursion.bias_sums import opened
from rgap.recursion.one_sample import cotangent_below
from rgap.recursion.patterns import agreeing, shares_of
from rgap.recursion.pointwise import mask_of_one_tap, one_tap
from rgap.recursion.readers import Contradicted, Reader, from_gradients
from rgap.recursion.steps import down, through
from rgap.recursion.steps_above import StepsAbove, known_at, mask_of, nonnegative, steps_above
from rgap.recursion.unsettled import are_on
from rgap.recursion.winners import Above, Missed, bytes_of, winners_of

__all__ = ["GraphDescent", "Walk", "descend_graph"]


@dataclass
class GraphDescent:
    """What is known of the values of a network.

    Attributes:
        values: by place, those that gradients determine, [B, *shape].
        cotangents: by place, ∂L/∂value.
        masks: by place of a rectifier, what it lets through, as 0 and 1.
        below: by place of another step, ∂L/∂input where its convolution told it.
        shifts: places of convolutions whose gradients told the positions apart.
        ends: by place, why nothing is known of it or below it.
        near: by place, what a search that missed the value ended at.
        unit: unit roundoff of the client's arithmetic.
    """

    values: dict[int, Estimate] = field(default_factory=dict)
    cotangents: dict[int, Estimate] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    below: dict[int, Estimate] = field(default_factory=dict)
    shifts: list[int] = field(default_factory=list)
    ends: dict[int, str] = field(default_factory=dict)
    near: dict[int, Tensor] = field(default_factory=dict)
    unit: float = 0.0

    def of(self, rows: Sequence[int]) -> GraphDescent:
        """What is known of some samples of the batch: values, and what steps let through."""
        return GraphDescent(
            {place: value.of(rows) for place, value in self.values.items()},
            masks={place: mask[list(rows)] for place, mask in self.masks.items()},
            below={place: k.of(rows) for place, k in self.below.items()},
            unit=self.unit,
        )


def descend_graph(
    flow: Flow,
    gradients: Mapping[str, Tensor],
    top: Estimate,
    precision: Precision,
    watch: Callable[[str], None] | None = None,
    room: float = inf,
    begun: GraphDescent | None = None,
    deadline: float = inf,
) -> GraphDescent:
    """From the cotangent at the output down to the lowest values that gradients determine.

    Args:
        flow: the network.
        gradients: by parameter name, float64.
        top: ∂L/∂output [B, *output_shape] with its ensemble.
        precision: of the update.
        watch: told the name of each value that is solved.
        room: bytes for the equations of one value.
        begun: what is known beforehand.
        deadline: of ``time.perf_counter``, after which no search for winners of a pool goes on.
    """
    walk = Walk(flow, gradients, precision, watch or (lambda name: None), room, deadline)
    if begun is not None:
        walk.state = replace(begun, unit=precision.unit)
    while walk.down(top):
        pass
    return walk.state


class Walk:
    """One walk: its passes, and what it has found."""

    def __init__(
        self,
        flow: Flow,
        gradients: Mapping[str, Tensor],
        precision: Precision,
        watch: Callable[[str], None],
        room: float,
        deadline: float = inf,
    ) -> None:
        self.flow, self.gradients, self.precision = flow, gradients, precision
        self.room, self.deadline = room, deadline
        self.watch, self.state = watch, GraphDescent(unit=precision.unit)
        # Cotangents known up to the masks of rectifiers and max-pools: which, the highest first.
        self.behind: dict[int, tuple[int, ...]] = {}
        self.unsure: dict[int, Tensor] = {}  # units of a rectifier whose sign is open
        self.doubted: dict[int, int] = {}  # cotangents in which such units are taken to be on
        self.suspect: dict[int, int] = {}  # those that mix such entries with others
        self.opened: dict[int, int] = {}  # cotangents that one rectifier lets through, and which
        self.mended = set[int]()  # rectifiers of which filters were settled for a contradiction

    def down(self, top: Estimate) -> bool:
        """One pass; True if a mask was settled below its rectifier, so that the next goes on."""
        nodes, state = self.flow.nodes, self.state
        state.cotangents, state.ends = {len(nodes) - 1: top}, {}
        self.behind, self.doubted, self.suspect, self.opened = {}, {}, {}, {}
        for place in reversed(range(len(nodes))):
            node = nodes[place]
            if place not in state.ends:
                if place in self.behind and isinstance(node.link, Affine):
                    why = self.unmask(place, node.link)
                    if why is None:
                        return True
                    state.ends[place] = why
                elif place not in self.behind and self.solve(place):
                    return True
            if place in self.suspect:
                of = nodes[self.suspect[place]].name
                state.ends.setdefault(place, f"units of '{of}' are on or off within their error")
            passed = None if place in state.ends or not place else self.passed(place)
            for number, source in enumerate(node.sources):
                if passed is None:
                    state.ends.setdefault(source, f"the cotangent at '{node.name}' is not known")
                else:
                    self.push(source, passed[number], place)
        return False

    def push(self, source: int, k: Estimate, user: int) -> None:
        """Add what a user sends to the cotangent of what it reads."""
        known, state = self.state.cotangents.get(source), self.state
        through_layer = isinstance(self.flow.nodes[user].link, Affine)
        own = user if user in state.masks else self.opened.get(user)
        self.opened.pop(source, None)
        if known is None and own is not None and not through_layer:
            self.opened[source] = own
        rectifier = user if user in self.unsure else self.doubted.get(user)
        if rectifier is not None and known is None and not through_layer:
            self.doubted[source] = rectifier
        elif rectifier is not None or source in self.doubted:
            self.suspect[source] = self.doubted.pop(source, rectifier or 0)
        masks = self.behind.get(user, ()) + ((user,) if self.unopened(user) else ())
        if known is not None and (masks or source in self.behind):
            named = self.flow.nodes[(masks or self.behind[source])[-1]].name
            state.ends[source] = f"what '{named}' lets through is not known"
        elif known is None:
            state.cotangents[source] = k
            if masks:
                self.behind[source] = masks
        else:
            state.cotangents[source] = Estimate(known.value + k.value, known.error + k.error)

    def unopened(self, place: int) -> bool:
        """True at a rectifier, or a pool, of which what it lets through is not known."""
        link, state = self.flow.nodes[place].link, self.state
        if isinstance(link, MaxPool):
            return place not in state.masks
        rectifier = isinstance(link, Activation) and link.one_sided
        opened = place in state.masks or self.known(place) is not None
        return (rectifier and not opened) or self.bent(place)

    def bent(self, place: int) -> bool:
        """True at another step whose slopes no value tells, and of one sample may not have to."""
        link, state = self.flow.nodes[place].link, self.state
        if not isinstance(link, Activation) or link.affine or link.one_sided:
            return False
        alone = place in state.cotangents and len(state.cotangents[place].value) == 1
        told = place in state.below or (self.known(place) is not None and link.barrier is None)
        return alone and not told

    def passed(self, place: int) -> list[Estimate] | None:
        """The cotangents at the sources of a node; None, with the reason noted, where it ends."""
        node, state, k = self.flow.nodes[place], self.state, self.state.cotangents[place]
        link = node.link
        if link is None:
            sizes = [self.flow.nodes[source].shape[0] for source in node.sources]
            parts = zip(node.spread(k.value, sizes), node.spread(k.error, sizes), strict=True)
            return [Estimate(value, error) for value, error in parts]
        if isinstance(link, Affine):
            return [down(link, k, self.precision)]
        if isinstance(link, MaxPool) and link.disjoint:
            told = place in state.masks
            open_ = state.masks[place] if told else link.spread(self.alive(place))
            return [Estimate(link.spread(k.value) * open_, each(link.spread, k.error) * open_)]
        if link.affine and link.barrier is None:
            sent = link.adjoint(k.value)
            return [Estimate(sent, each(link.adjoint, k.error) + self.precision.rounding(sent))]
        if place in state.below:
            return [state.below[place]]
        if self.bent(place):
            return [k]  # of which the convolution below may tell what is left
        if not isinstance(link, Activation) or link.barrier is not None:
            state.ends[place] = link.barrier or f"'{node.name}' ({link.kind}) is not inverted"
            return None
        value = self.known(place)
        if link.one_sided and value is not None and place not in state.masks:
            self.open(place, value, k)
        if place in state.masks:
            open_ = state.masks[place]
            return [Estimate(k.value * open_, k.error * open_)]
        if value is not None:
            taken = through((link,), value, k, self.precision)
            assert not isinstance(taken, Halt)
            z, below = taken
            if bool(z.known.all()):
                state.values.setdefault(node.sources[0], z)
            return [below]
        if link.one_sided:
            return [k]  # behind a mask that the convolution below may tell
        state.ends[place] = f"the output of '{node.name}' is not determined"
        return None

    def known(self, place: int) -> Estimate | None:
        """The value, as it is or as something that only copies it has it, if that is known."""
        return known_at(self.flow, self.state.values, place)

    def alive(self, place: int) -> Tensor:
        """0 where a pool above a rectifier gives 0, so that all of its window is off; else 1."""
        known, [source] = self.known(place), self.flow.nodes[place].sources
        if known is None or not nonnegative(self.flow, source):
            return torch.ones_like(self.state.cotangents[place].value)
        share, off = shares_of(known)
        return (share > OFF * off).to(known.value)

    def open(self, place: int, known: Estimate, k: Estimate) -> None:
        """The mask of a rectifier from what it gives; units in doubt count as on until settled."""
        on, unsure = opened(self.flow, place, known, k, self.gradients, self.precision)
        self.state.masks[place] = on
        if bool(unsure.any()):
            self.unsure[place] = unsure

    def unmask(self, place: int, affine: Affine) -> str | None:
        """Read what steps above let through off the positions of a convolution, or say why not.

        Between them and it stand maps channel by channel: its cotangent is theirs or 0.
        """
        state, k = self.state, self.state.cotangents[place]
        if affine.geometry is None or affine.geometry.groups != 1:
            return f"'{affine.name}' is no convolution that tells what a rectifier lets through"
        if bent := [step for step in self.behind[place] if self.bent(step)]:
            [lowest, *_] = sorted(bent)
            below = cotangent_below(self.flow, place, lowest, self.gradients, self.precision)
            if isinstance(below, Estimate):
                state.below[lowest] = below
                state.shifts.append(place)
            return below if isinstance(below, str) else None
        gradient = affine.sent(self.gradients)
        noise = self.precision.rms(affine.weight_name, gradient)
        steps = steps_above(self.flow, place, self.behind[place], self.precision.unit)
        if one_tap(affine):
            own, room = self.precision, self.room
            told = mask_of_one_tap(self.flow, place, k, steps, self.gradients, own, room)
        else:
            told = mask_of(affine, gradient, k, steps, noise, self.room)
        if isinstance(told, str):
            won = self.won(place, affine, steps, noise)
            if isinstance(won, str):
                return f"{told}; {won}"
            told = won
        # A lower step lets through what the higher ones did not stop; of the rest nothing is asked.
        state.masks.update(dict.fromkeys(self.behind[place], told))
        state.shifts.append(place)
        return None

    def won(self, place: int, affine: Affine, steps: StepsAbove, noise: float) -> Tensor | str:
        """The winners of a pool whose output is known, by the gradient of the convolution below."""
        state = self.state
        pools = [p for p in self.behind[place] if self.flow.nodes[p].link is steps.pool]
        known = self.known(pools[0]) if pools else None
        if known is None:
            return "no pool's output is known there"
        if (need := bytes_of(affine, len(known.value))) > self.room:
            return f"its winners take {need / 1e9:.1f} GB, there is room for {self.room / 1e9:.1f}"
        self.watch(self.flow.nodes[place].name)
        on = self.alive(pools[0]) > 0
        above = Above(known.value, state.cotangents[pools[0]].value, on)
        k, gradient = state.cotangents[place], affine.sent(self.gradients)
        won = winners_of(affine, gradient, k, steps, above, noise, self.deadline)
        if not isinstance(won, Missed):
            return won
        state.near[self.flow.nodes[place].sources[0]] = won.near
        return won.reason

    def solve(self, place: int) -> bool:
        """The value, from the gradients of all layers that read it, if these determine it.

        Returns:
            True if units that were in doubt above are settled by it.
        """
        state, readers = self.state, list[Reader]()
        if place in state.values:
            return False
        users = [user for user in self.flow.users(place) if self.heard(user)]
        doubts = [self.doubted.get(user, -1) for user in users]
        for user, rectifier in zip(users, doubts, strict=True):
            affine, unsure = self.flow.nodes[user].link, self.unsure.get(rectifier)
            assert isinstance(affine, Affine)
            readers.append(Reader(affine, state.cotangents[user], unsure))
        if not readers:
            return False
        from_all = partial(
            from_gradients, gradients=self.gradients, precision=self.precision, room=self.room
        )
        found = from_all(readers)
        if isinstance(found, Contradicted):
            if self.reopened(users, found):
                return True
            if self.flow.nodes[place].link is not None:
                state.ends[place] = found.reason
            return False
        on = dict[int, Tensor]()
        if isinstance(found, Estimate):
            for rectifier, reader in zip(doubts, readers, strict=True):
                if reader.unsure is not None and rectifier not in on:
                    sent, k = reader.affine.sent(self.gradients), reader.k.value
                    on[rectifier] = are_on(reader.affine, k, reader.unsure, sent, found.value)
        elif time.perf_counter() < self.deadline:
            values = {r: known for r in self.unsure if (known := self.known(r)) is not None}
            shares = {r: shares_of(known) for r, known in values.items()}
            on = agreeing(readers, doubts, shares, from_all)
        for rectifier, units in on.items():
            state.masks[rectifier][self.unsure.pop(rectifier)] = units
        if on:
            return True
        if isinstance(found, Estimate):
            state.values[place] = found
            self.watch(self.flow.nodes[place].name)
        elif self.needed(place):
            state.ends[place] = found
        return False

    def needed(self, place: int) -> bool:
        """True where no cotangent goes below a value that is not known: a step with slopes."""
        link = self.flow.nodes[place].link
        step = isinstance(link, Activation) and not link.affine and not link.one_sided
        return step and not self.bent(place)

    def reopened(self, users: list[int], why: Contradicted) -> bool:
        """Put in doubt what a rectifier lets through in filters that contradict all others.

        A unit that is on by less than the error of its value is taken for off.  The gradient of its
        filter says so: with the input from the other filters it is linear in all of its cotangent.
        """
        state, opened = self.state, False
        for user, filters in zip(users, why.filters, strict=bool(why.filters)):
            rectifier = self.opened.get(user)
            if rectifier is None or rectifier in self.mended or not bool(filters.any()):
                continue
            affine, known = self.flow.nodes[user].link, self.known(rectifier)
            if known is None or not isinstance(affine, Affine):
                continue
            share, off = shares_of(known)
            near = (share < SURELY_ON * off) & filters.reshape(1, -1, *[1] * (share.ndim - 2))
            count = near.transpose(0, 1).flatten(1).sum(1).max()
            if 2 * int(count) > affine.weight[0].numel():  # equations of a filter
                continue
            state.masks[rectifier] = torch.where(near, 1.0, state.masks[rectifier])
            self.unsure[rectifier] = near
            self.mended.add(rectifier)
            opened = True
        return opened

    def heard(self, user: int) -> bool:
        """True for a layer whose gradient is its own and whose cotangent is known."""
        node, state = self.flow.nodes[user], self.state
        known = user in state.cotangents and user not in state.ends and user not in self.behind
        return (
            known
            and isinstance(node.link, Affine)
            and not node.shared
            and self.precision.sent(node.link.weight_name)
        )
