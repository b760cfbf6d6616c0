"""Samples that no search found: from what the others leave of the update, or as candidates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from residual import pictured
from torch import Tensor, nn

import rgap
from rgap import Status
from rgap.completion.value_search import Search
from rgap.completion.value_settling import Row, Settling
from rgap.inversion import branches

F64 = torch.float64
LABELS = [3, 4, 4]


def network(dtype: torch.dtype) -> nn.Module:
    return pictured(dtype, 8, (16, 64), seed=1)


def blind(row: int, least: int) -> Callable[..., Tensor | str]:
    """A search that does not find one sample of a batch of so many, or of more."""
    whole = Search.run

    def run(self: Search, number: int, goal: float, starts: int = 3) -> Tensor | str:
        made = whole(self, number, goal, starts)
        if number == row and len(self.explained) >= least:
            self.missed.add(row)
            return "not found"
        return made

    return run


def beside(row: int) -> Callable[..., Row | str]:
    """Gauss–Newton that ends beside the data of one sample."""
    whole = Settling.settled

    def settled(self: Settling, number: int, x: Tensor) -> Row | str:
        return "beside the data" if number == row else whole(self, number, x)

    return settled


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("row", [0, 2])
def test_a_sample_that_is_not_found_follows_from_what_the_others_leave(
    dtype: torch.dtype, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network(dtype), rgap.photos.load(3, 8, start=4, dtype=dtype)
    monkeypatch.setattr(Search, "run", blind(row, 3))
    asked = list[int]()
    whole = branches.without_found

    def watched(*args: object) -> object:
        asked.append(row)
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(branches, "without_found", watched)
    recovery = rgap.invert(model, rgap.capture(model, x, torch.tensor(LABELS)))
    assert recovery.status is Status.EXACT, recovery.reason
    assert asked
    assert recovery.inputs is not None and recovery.error_bound is not None
    assert recovery.labels is not None and recovery.labels.tolist() == LABELS
    apart = (recovery.inputs[:, None] - x.double()).abs().flatten(2).amax(2)
    assert float(apart.amin(1).max()) <= recovery.error_bound < 1e-4


@pytest.mark.parametrize("complete", [False, True])
def test_the_nearest_data_are_a_candidate_and_where_one_is_asked_for_a_completion(
    complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network(F64), rgap.photos.load(3, 8, start=4, dtype=F64)
    monkeypatch.setattr(Settling, "settled", beside(1))
    update = rgap.capture(model, x, torch.tensor(LABELS))
    recovery = rgap.invert(model, update, complete=complete, time_limit=60.0)
    assert recovery.status is (Status.COMPLETED if complete else Status.UNDERDETERMINED)
    assert not recovery.certified and "the nearest data" in recovery.reason
    near, labels = recovery.nearest, recovery.nearest_labels
    assert near is not None and labels is not None and labels.tolist() == LABELS
    assert float((near[0] - x[0]).abs().max()) < 1e-3
    residual = recovery.residual if complete else recovery.candidates[0].residual
    assert residual is not None and residual < 1e-3
    if not complete:
        assert recovery.inputs is None and len(recovery.candidates) == 1


def test_data_that_send_another_update_are_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(F64), rgap.photos.load(3, 8, start=4, dtype=F64)
    monkeypatch.setattr(Settling, "settled", beside(1))
    monkeypatch.setattr(branches, "without_found", lambda *args: None)
    update = rgap.capture(model, x, torch.tensor(LABELS))
    near = rgap.invert(model, update)
    assert near.inputs is None and near.candidates
    answers = Search.nearest.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Search, "nearest", property(lambda self: {n: 1.0 - v for n, v in answers(self).items()})
    )
    far = rgap.invert(model, update)
    assert far.inputs is None and not far.candidates and far.nearest is None
