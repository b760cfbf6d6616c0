"""The rows of a network in closed form, in the order in which it calls its layers and steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rgap.analysis.calls.layers import POOLS, Call, sizes_of
from rgap.analysis.calls.recorder import record, refusal, structural_twin, uncounted
from rgap.analysis.calls.steps import Narrow, narrow_steps
from rgap.analysis.calls.uses import Recording
from rgap.analysis.closed_forms.kinds import layer_form
from rgap.analysis.closed_forms.layer import SymbolicLayer, made
from rgap.analysis.closed_forms.own_gradient import alone

__all__ = ["in_order", "recorded_notes", "structure_of"]

LIGHT = 1 << 24  # parameters up to which two samples in double precision are run


def structure_of(model: nn.Module, shape: tuple[int, ...]) -> tuple[Recording, dict[int, str]]:
    """The forward with nothing switched off, and the names of its weights by ``id``.

    Weights and inputs are random and the loss is a random combination of the outputs, so that a
    cotangent is zero only where nothing reads it.

    Raises:
        ValueError: the shape does not fit.
    """
    light = sum(p.numel() for p in model.parameters()) <= LIGHT
    twin = structural_twin(model, dtype=torch.float64 if light else torch.float32)
    names = {id(p): name for name, p in twin.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    kind = torch.float64 if light else torch.float32

    def combined(outputs: Tensor) -> Tensor:
        return (outputs * torch.randn(outputs.shape, generator=generator).to(outputs)).sum()

    def recorded(batch: int) -> Recording:
        x = torch.randn(batch, *shape, generator=generator).to(kind)
        return record(twin, x, combined, substitute="smooth")

    try:
        recording = recorded(1)
        for use, again in zip(recording.uses, recorded(1).uses if light else (), strict=False):
            use.cotangents = torch.where(use.cotangents == 0, again.cotangents, use.cotangents)
    except Exception:  # somebody else's forward may raise anything; squeeze() drops a batch of one
        try:
            recording = recorded(2)
        except ValueError:
            raise
        except Exception as error:
            raise refusal(model, shape, error) from error
    if not any(use.covered for use in recording.uses):
        raise ValueError(
            f"expected a model with fully connected or convolutional layers, got "
            f"{type(model).__name__} with none: there is nothing to count"
        )
    return recording, names


def in_order(
    recording: Recording, counted: dict[int, SymbolicLayer], batch: Any, effort: float
) -> tuple[SymbolicLayer, ...]:
    """The table of a network: its layers, and the steps that discard values, in forward order."""
    narrow = narrow_steps(recording)
    into = {one.use: one for one in narrow if one.use is not None}
    numbers = {id(use): n for n, use in enumerate(recording.uses)}
    places: list[tuple[int, SymbolicLayer]] = []
    pools: set[str] = set()
    at = 0
    for event in recording.events:
        if event.use is not None:
            number = numbers[id(event.use)]
            if number not in counted:
                continue
            row, at = counted[number], event.use.node
            if event.use.shown:
                row = replace(row, shown=event.use.shown, exact=False, gradient_exact=False,
                              weight_exact=False)  # fmt: skip
            head = row.kind == "head"
            by_gradient, by_shifts = alone(event.use, head)
            row = replace(row, by_gradient=by_gradient, by_shifts=by_shifts)
            if number in into:
                ahead = recording.nodes[event.use.read[0]].entries + into[number].lost
                row = replace(row, step=into[number].step, ahead=ahead)
            places.append((at, row))
        elif isinstance(event.module, (*POOLS, _BatchNorm)):
            call = Call(event.name, event.module, event.in_shape, event.out_shape)
            kind, sizes, _ = sizes_of(call, head=False)
            sizes["batch"] = batch * event.folded
            row = layer_form(kind, sizes, name=event.name, effort=effort)
            places.append((at, row))
            pools.add(event.name)
    for one in narrow:
        if one.use is None or one.step not in pools:
            places.append((one.node - 1, _step(one, batch)))
    return tuple(row for _, row in sorted(places, key=lambda pair: pair[0]))


def recorded_notes(model: nn.Module, recording: Recording) -> tuple[str, ...]:
    """What the rows leave out, one sentence each."""
    notes = []
    left = uncounted(model, recording)
    if left:
        notes.append(f"Not counted: {', '.join(left)}.")
    ops = {node.op for node in recording.nodes}
    if any(op.startswith("relu") for op in ops):
        notes.append("Units are taken as on; every ReLU that is off takes a weight row away.")
    if any("max_pool" in op for op in ops):
        notes.append("The places of the winners of max-pools are taken as known.")
    if any(one.chooses and "pool" not in one.op for one in narrow_steps(recording)):
        notes.append("The places of maxima are taken as known.")
    if recording.chooses:
        notes.append(
            f"What {', '.join(recording.chooses)} reads depends on the data; all of it is taken "
            "as read."
        )
    return tuple(notes)


def _step(one: Narrow, batch: Any) -> SymbolicLayer:
    """A function that discards; of kind "step" where it leads into no single layer."""
    kind = "step" if one.use is None else "max" if one.chooses else "mean"
    if one.use is not None and one.op in ("__getitem__", "select", "narrow", "index_select"):
        kind = "selection"
    known = sympy.sympify(batch) * one.after
    counts = (batch * one.before, 0, known, known)
    reason = f"{one.after} values go on for {one.before}"
    flags = (True, one.independent, one.independent)
    return made(one.step, kind, batch, counts, 1, reason, exact=flags)
