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


@pytest.mark.cases(2)
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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [2, 4])
def test_several_entries_are_told_together(count: int, batch: int) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(30, 20), nn.Sigmoid(), nn.Linear(20, 16), nn.Sigmoid(),
            nn.Linear(16, 10),
        ).double()  # fmt: skip
        x, y = torch.rand(batch, 30, dtype=torch.float64), torch.arange(batch)
        update, name = rgap.capture(model, x, y), ("1.weight", "3.weight")[seed % 2]
        rows, columns = torch.randperm(16)[:count].tolist(), torch.randperm(20)[:count].tolist()
        changed = update.gradients[name].clone()
        for row, column in zip(rows, columns, strict=True):
            changed[row, column] += 0.3 * changed.abs().max()
        sent = replace(update, gradients={**update.gradients, name: changed})
        found = rgap.check(model, sent).best
        assert found is not None and found.kind is Kind.ENTRY and not found.rivals, found
        for row, column in zip(rows, columns, strict=True):
            assert f"at [{row}, {column}] of '{name}'" in found.evidence


def test_entries_of_one_row_are_among_what_more_rank_may_be() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    update = rgap.capture(model, torch.rand(3, 30, dtype=torch.float64), torch.arange(3))
    changed = update.gradients["0.weight"].clone()
    changed[5, [3, 17]] += changed.abs().max()
    found = rgap.check(
        model, replace(update, gradients={**update.gradients, "0.weight": changed})
    ).best
    assert found is not None and Kind.ENTRY in (found.kind, *found.rivals), found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_bias_of_a_black_picture_is_not_blamed(dtype: torch.dtype) -> None:
    """Its features are 0, so that the column of the bias is in the row space as well."""
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 16), nn.Sigmoid(), nn.Linear(16, 5)).to(dtype)
        x = torch.rand(2, 6, dtype=dtype)
        x[0] = 0.0
        update = rgap.capture(model, x, torch.tensor([1, 3]))
        changed = update.gradients["0.weight"].clone()
        changed[11, 1] += 0.02
        found = rgap.check(
            model, replace(update, gradients={**update.gradients, "0.weight": changed})
        ).best
        assert found is not None and found.kind is Kind.ENTRY, found
        assert "at [11, 1] of '0.weight'" in found.evidence and 0.019 < found.value < 0.021


@pytest.mark.parametrize("name", ["0.bias", "1.weight", "1.bias"])
def test_one_channel_of_a_norm_is_no_other_weights(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=name == "0.bias"), nn.BatchNorm2d(8), nn.Tanh(),
        nn.Flatten(), nn.Linear(288, 10),
    ).double().eval()  # fmt: skip
    model[1].running_mean.normal_()  # type: ignore[union-attr, operator]
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    found = rgap.check(model, raised(rgap.capture(model, x, torch.arange(3)), name, 5, 0.3)).best
    assert found is not None and found.kind is Kind.ENTRY, found
    assert "channel 5" in found.evidence and f"'{name}'" in found.evidence


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


@pytest.mark.parametrize("seed", [101115, 101196, 0, 1])
def test_two_entries_of_one_filter_end_in_a_finding(seed: int) -> None:
    """Of one sample: the value that mends the first entry is met exactly, the second is left."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 8, 3, 1, 1),
        nn.BatchNorm2d(8), nn.Sigmoid(), nn.Flatten(), nn.Linear(72, 3),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.3)
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.4, 2)  # type: ignore[union-attr]
    model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1, 6, 6, generator=generator).double()
    update = rgap.capture(model, x, torch.randint(0, 3, (1,), generator=generator))
    changed = update.gradients["3.weight"].clone()
    changed.view(8, -1)[2, [15, 53]] *= -1
    sent = replace(update, gradients={**update.gradients, "3.weight": changed})
    found = rgap.check(model, sent).best
    assert found is not None and {Kind.ENTRY, Kind.WEIGHTS} & {found.kind, *found.rivals}
