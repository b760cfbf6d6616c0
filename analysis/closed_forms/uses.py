"""Closed forms of the layers of a network as it really calls them.

What is read decides the equations: outputs without a cotangent give none
(:mod:`rgap.analysis.closed_forms.reached`), branches on one input and calls of one weight are
counted together (:mod:`rgap.analysis.generic_rank.together`), a frozen weight sends no gradient,
and a count is exact only where the network's own cotangents reach it
(:mod:`rgap.analysis.closed_forms.met`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from rgap.analysis.calls.steps import always_read, arbitrary, head_use
from rgap.analysis.calls.uses import Recording, Use
from rgap.analysis.closed_forms.batches import first_open, lines_of, turns
from rgap.analysis.closed_forms.kinds import layer_form
from rgap.analysis.closed_forms.layer import SymbolicLayer, made
from rgap.analysis.closed_forms.met import Met, curved
from rgap.analysis.closed_forms.reached import Reached, reached
from rgap.analysis.generic_rank.together import gather

__all__ = ["Counter"]

OFF = "units are taken as on, and here some are off or not reached"
OTHER = "for cotangents without a pattern; those of this network were not shown to be such"
PARTS = "the outputs that are read are no box; those of the smallest box around them are counted"
MIXED = "its weight is called again, on an input that other layers read too"
UNTOLD = "what is read depends on the data"


@dataclass(frozen=True)
class _Counted:
    use: Use
    number: int
    part: Reached
    mask: Tensor
    row: SymbolicLayer
    free: bool


class Counter:
    """Rows of the uses of weights of one network.

    Args:
        recording: of the network with nothing switched off.
        batch: B, a number or a symbol.
        met: the network at random weights.
        frozen: names of the weights that are not trained.
        loss: name of the client's loss.
        names: of the weights by ``id``.
        effort: multiplications that one step of a proof may take.
    """

    def __init__(
        self,
        recording: Recording,
        batch: Any,
        met: Met,
        frozen: frozenset[str],
        loss: str,
        names: dict[int, str],
        effort: float,
    ) -> None:
        self.recording, self.batch, self.met = recording, batch, met
        self.frozen, self.names, self.effort = frozen, names, effort
        self.head = head_use(recording) if loss == "cross_entropy" else None
        self.onto: set[int] = set()  # uses whose weights map onto all of their outputs

    def rows(self) -> dict[int, SymbolicLayer]:
        """By the number of the use."""
        covered = [n for n, use in enumerate(self.recording.uses) if use.covered]
        uses = [self.recording.uses[n] for n in covered]
        groups = gather(
            [(use.read[0], tuple(use.inputs.shape)) for use in uses],
            [(self.names[id(use.weight)], str(use.geometry), use.inputs.shape[1:]) for use in uses],
        )
        by_use: dict[int, SymbolicLayer] = {}
        mixed: list[int] = []
        for group in groups:
            numbers = [covered[i] for i in group.members]
            if group.kind == "branches":
                by_use |= self._branches(numbers)
            elif group.kind == "shared":
                row = self._alone(numbers, "shared").row
                for n in numbers:
                    name = self.recording.uses[n].name
                    by_use[n] = replace(row, name=name, beside=name)
            else:
                by_use[numbers[0]] = self._alone(numbers, group.kind).row
                mixed += numbers if group.kind == "mixed" else []
        return by_use | self._mixed({n: by_use[n] for n in mixed})

    def _alone(self, numbers: list[int], kind: str) -> _Counted:
        """One use, or the calls of one weight as samples of one use."""
        use = self.recording.uses[numbers[0]]
        part, mask = self._read(use)
        for n in numbers[1:]:
            _, other = self._read(self.recording.uses[n])
            if not torch.equal(mask, other):  # counted as if each read what any of them reads
                mask = mask | other
                part = replace(reached(use, mask), plain=False)
        unknowns = len(numbers) * use.unknowns(self.recording.batch)
        row = self._form(use, part, unknowns, len(numbers))
        frozen = self.names[id(use.weight)] in self.frozen
        free = len(numbers) == 1 and curved(self.recording, use)
        free = free and arbitrary(self.recording, use.read[0], self.onto)
        if bool(mask.all()) and row.weight_exact and self._onto(row, part):
            self.onto |= set(numbers)
        if frozen and part.sizes is not None:
            row = replace(row, gradient_rank=sympy.Integer(0), joint_rank=row.weight_rank,
                          gradient_exact=True, exact=row.weight_exact, left_open=None,
                          reason="the weight is frozen, and its gradient is not sent")  # fmt: skip
        masks = [mask] * len(numbers)
        row = self._honest(row, numbers, masks, part, free, kind)
        return _Counted(use, numbers[0], part, mask, self._critical(row, unknowns), free)

    def _read(self, use: Use) -> tuple[Reached, Tensor]:
        mask = use.read_outputs(self.recording.batch)
        if self.recording.chooses:
            mask = torch.ones_like(mask)
        return reached(use, mask), mask

    def _form(self, use: Use, part: Reached, unknowns: int, calls: int) -> SymbolicLayer:
        """Ranks of one use, from the outputs that the loss reads; the other unknowns stay open."""
        kind = "head" if use is self.head and calls == 1 else use.kind
        if part.sizes is None:
            zero, reason = sympy.Integer(0), "the loss does not read it"
            counts = (self.batch * unknowns, zero, zero, zero)
            return made(use.name, kind, self.batch, counts, 1, reason)
        if kind == "head" and not part.plain:
            kind = "linear"
        samples = self.batch * part.places * calls
        row = layer_form(kind, part.sizes | {"batch": samples}, name=use.name, effort=self.effort)
        whole = sympy.sympify(self.batch * unknowns)
        if row.unknowns != whole:
            row = replace(row, unknowns=whole, left_open=None)
        if not part.plain:
            row = _as_bound(row, PARTS)
        if self.recording.chooses:
            row = _as_bound(row, UNTOLD)
        return row

    def _honest(
        self,
        row: SymbolicLayer,
        numbers: Sequence[int],
        masks: Sequence[Tensor],
        part: Reached,
        free: bool,
        kind: str,
    ) -> SymbolicLayer:
        """``exact`` where the cotangents of this network reach the count; a bound elsewhere."""
        if part.sizes is None or not (row.exact or row.gradient_exact):
            return row
        if kind == "mixed":
            return _as_bound(row, MIXED)
        if row.kind == "head" and len(numbers) == 1:
            return row
        onto = row.weight_exact and self._onto(row, part)
        if not self._always(numbers):
            return _as_bound(row, OFF)
        if free and onto:
            return row
        if not free and not self.met.on(numbers, masks):
            return _as_bound(row, OFF)
        gradient = row.gradient_exact and all(
            self.met.gradient(numbers, b, _value(row.gradient_rank, self.batch, b), kind)
            for b in self._looked_at(row.gradient_rank)
        )
        alone = row.weight_exact and self._same(row.weight_rank, row.joint_rank)
        whole = self._same(row.gradient_rank, row.joint_rank)
        exact = row.exact and (alone or (gradient and (whole or row.kind == "linear")))
        if row.exact and not exact:
            exact = all(
                self.met.joint(numbers, b, _value(row.joint_rank, self.batch, b), kind)
                for b in self._looked_at(row.joint_rank)
            )
        if exact:
            return replace(row, gradient_exact=gradient)
        return replace(
            _as_bound(row, OTHER), weight_exact=row.weight_exact, gradient_exact=gradient
        )

    def _onto(self, row: SymbolicLayer, part: Reached) -> bool:
        return self._same(row.weight_rank, self.batch * part.outputs)

    def _always(self, numbers: Sequence[int]) -> bool:
        return all(always_read(self.recording, self.recording.uses[n].node) for n in numbers)

    def _same(self, one: Any, two: Any) -> bool:
        if not isinstance(self.batch, sympy.Symbol):
            return int(one) == int(two)
        lines = lines_of(one, self.batch)
        return lines is not None and lines == lines_of(two, self.batch)

    def _looked_at(self, count: Any) -> list[int]:
        """Batch sizes at which a concave count has to be met."""
        if not isinstance(self.batch, sympy.Symbol):
            return [int(self.batch)]
        lines = lines_of(count, self.batch)
        return [1] if lines is None else sorted({1, *turns(lines)})

    def _branches(self, numbers: list[int]) -> dict[int, SymbolicLayer]:
        """Each with its own two ranks, and all with the joint rank of all."""
        parts = [self._alone([n], "alone") for n in numbers]
        unknowns = parts[0].use.unknowns(self.recording.batch)
        whole = sympy.sympify(self.batch * unknowns)
        best = next(
            (p.row for p in parts if p.row.exact and self._same(p.row.joint_rank, whole)), None
        )
        joint, exact, reason = whole, True, "" if best is None else best.reason
        if best is None:
            total = sympy.Add(*(p.row.joint_rank for p in parts))
            joint, exact, reason = _least(whole, total, self.batch), False, OTHER
            stacked = self._stacked(parts, numbers)
            if stacked is not None:
                joint, exact, reason = stacked.joint_rank, stacked.exact, stacked.reason
            if not exact and all(p.mask.all() for p in parts) and self._always(numbers):
                masks = [p.mask for p in parts]
                at = [(b, _value(joint, self.batch, b)) for b in self._looked_at(joint)]
                exact = bool(self.met.on(numbers, masks)) and all(
                    self.met.joint(numbers, b, value, "branches") for b, value in at
                )
        names = [p.use.name for p in parts]
        by_use = {}
        for p in parts:
            beside = ", ".join(dict.fromkeys(n for n in names if n != p.use.name))
            row = replace(p.row, joint_rank=joint, exact=exact, left_open=None, beside=beside,
                          reason=f"together with {beside}, on one input; {reason}")  # fmt: skip
            by_use[p.number] = self._critical(row, unknowns)
        return by_use

    def _stacked(self, parts: Sequence[_Counted], numbers: list[int]) -> SymbolicLayer | None:
        """The count of layers of one geometry as one layer with the outputs of all of them."""
        first = parts[0].part.sizes
        key = "out_features" if parts[0].use.kind == "linear" else "out_channels"
        if (
            first is None
            or any(
                p.part.sizes is None
                or p.use.kind != parts[0].use.kind
                or not p.part.plain
                or p.part.places != parts[0].part.places
                or not torch.equal(_places(p.mask), _places(parts[0].mask))
                or p.part.sizes | {key: 0} != first | {key: 0}
                or self.names[id(p.use.weight)] in self.frozen
                or p.row.kind == "head"
                for p in parts
            )
            or first.get("groups", 1) != 1
        ):
            return None
        count = sum(p.part.sizes[key] for p in parts if p.part.sizes is not None)
        part = Reached(first | {key: count}, parts[0].part.places, True,
                       sum(p.part.outputs for p in parts))  # fmt: skip
        use = parts[0].use
        row = self._form(use, part, use.unknowns(self.recording.batch), 1)
        masks = [p.mask for p in parts]
        return self._honest(row, numbers, masks, part, all(p.free for p in parts), "branches")

    def _mixed(self, rows: dict[int, SymbolicLayer]) -> dict[int, SymbolicLayer]:
        by_use = {}
        for n, row in rows.items():
            use = self.recording.uses[n]
            beside = [m for m in rows if self.recording.uses[m].read == use.read]
            total = sympy.Add(*(rows[m].joint_rank for m in beside))
            unknowns = use.unknowns(self.recording.batch)
            joint = _least(sympy.sympify(self.batch * unknowns), total, self.batch)
            names = ", ".join(self.recording.uses[m].name for m in beside if m != n)
            by_use[n] = self._critical(
                replace(row, joint_rank=joint, left_open=None, beside=names), unknowns
            )
        return by_use

    def _critical(self, row: SymbolicLayer, unknowns: int) -> SymbolicLayer:
        """The smallest batch that leaves something open, of the count as it is now."""
        if not isinstance(self.batch, sympy.Symbol):
            if self._same(row.joint_rank, row.unknowns) or not row.exact:
                return row if row.exact else replace(row, critical_batch=None)
            return replace(row, critical_batch=sympy.Integer(1)) if self.batch == 1 else row
        lines = lines_of(row.joint_rank, self.batch)
        if lines is None:
            return replace(row, critical_batch=None)
        first = first_open(lambda b: b * unknowns - min(a + s * b for a, s in lines))
        open_ = first != sympy.oo or row.exact
        return replace(row, critical_batch=first if open_ else None)


def _as_bound(row: SymbolicLayer, why: str) -> SymbolicLayer:
    """The same counts as upper bounds."""
    critical = None if row.critical_batch == sympy.oo else row.critical_batch
    return replace(
        row, exact=False, gradient_exact=False, weight_exact=False, critical_batch=critical,
        reason=f"upper bound: {why}" if row.exact else row.reason,
    )  # fmt: skip


def _least(whole: Any, total: Any, batch: Any) -> Any:
    from rgap.analysis.closed_forms.batches import tidy

    return tidy(sympy.Min(whole, total), batch if isinstance(batch, sympy.Symbol) else None)


def _value(count: Any, batch: Any, b: int) -> int:
    return int(count.subs(batch, b)) if isinstance(batch, sympy.Symbol) else int(count)


def _places(mask: Tensor) -> Tensor:
    """Where anything of an output is read, whatever the channel or feature."""
    return mask.any(1)
