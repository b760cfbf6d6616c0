"""One entry that was raised is named, or nothing is: it is no step, no sample, no other weights."""

from __future__ import annotations

from dataclasses import replace

import mistakes_table
import pytest
import torch
from genuine_updates import drawn
from torch import nn

import rgap
from rgap import Update
from rgap.diagnosis import Kind


def raised(update: Update, name: str, entry: int, factor: float) -> Update:
    changed = update.gradients[name].clone().flatten()
    changed[entry] += factor * changed.abs().max()
    sent = {**update.gradients, name: changed.reshape(update.gradients[name].shape)}
    return replace(update, gradients=sent)


@pytest.mark.parametrize("factor", [10.0, 1.0, 0.01])
@pytest.mark.parametrize("part", range(2))
def test_a_raised_entry_is_no_step_and_no_sample(part: int, factor: float) -> None:
    named = 0
    for seed in range(part, 12, 2):
        model, update = drawn(seed)
        generator = torch.Generator().manual_seed(seed)
        for name, sent in update.gradients.items():
            if not bool(sent.any()):
                continue
            entry = int(torch.randint(sent.numel(), (1,), generator=generator))
            best = rgap.check(model, raised(update, name, entry, factor)).best
            if best is None or best.kind is Kind.NAMES:
                continue
            assert best.kind in (Kind.ENTRY, Kind.UNDECIDED), (seed, name, best.sentence)
            if best.kind is Kind.UNDECIDED:  # where too few rows or channels say which
                assert factor < 1.0 or Kind.ENTRY in best.rivals, (seed, name, best.sentence)
            else:
                assert f"'{name}'" in best.evidence, (seed, name, best.sentence)
                named += 1
    assert named or factor < 1.0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["1.weight", "1.bias", "3.weight", "3.bias"])
def test_the_entry_and_what_was_added_are_told(batch: int, name: str) -> None:
    torch.manual_seed(batch)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    x, y = torch.rand(batch, 30, dtype=torch.float64), torch.arange(batch)
    update = rgap.capture(model, x, y)
    sent = update.gradients[name]
    found = rgap.check(model, raised(update, name, 7, 2.0)).best
    assert found is not None and found.kind is Kind.ENTRY
    place = list(divmod(7, sent.shape[1])) if sent.ndim > 1 else [7]
    assert f"at {place} of '{name}'" in found.evidence
    assert found.value == pytest.approx(2.0 * float(sent.abs().max()), rel=1e-6)


def test_one_more_sample_or_step_is_no_entry() -> None:
    for mistake in ("steps", "steps apart", "batch 2"):
        for trial in mistakes_table.trials(1, (mistake,)):
            if trial.network in ("mlp", "cnn relu"):
                kinds = {finding.kind for finding in trial.outcome()[2].findings}
                assert Kind.ENTRY not in kinds, trial
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    for batch in (2, 3, 4):
        update = rgap.capture(model, torch.rand(batch, 30), torch.arange(batch))
        found = rgap.check(model, update, batch_size=batch - 1).best
        assert found is not None and found.kind is Kind.BATCH_SIZE, found
