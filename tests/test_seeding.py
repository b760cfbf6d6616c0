"""A recovery as the start of other optimisers: order, units, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rgap.recovery import Candidate, Recovery, Status
from rgap.seeding import breaching_start, inversefed_start, start_of

X = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([4, 1, 3])
MEAN, STD = (0.4, 0.5), (0.2, 0.25)


def recovery(inputs: torch.Tensor | None, candidates: tuple[Candidate, ...] = ()) -> Recovery:
    labels = None if inputs is None else LABELS
    status = Status.UNDERDETERMINED if inputs is None else Status.EXACT
    return Recovery(inputs, labels, status, (), 0.0, None, None, "", candidates)


@pytest.mark.parametrize("held", [recovery(X), recovery(None, (Candidate(X, LABELS, 0.1),))])
def test_breaching_gets_normalised_rows_by_label(held: Recovery) -> None:
    found = breaching_start(held, mean=MEAN, std=STD)
    shape = (1, 2, 1, 1)
    expected = (X - torch.tensor(MEAN).reshape(shape)) / torch.tensor(STD).reshape(shape)
    assert torch.allclose(found, expected[[1, 2, 0]].float()) and found.dtype is torch.float32
    assert torch.equal(breaching_start(held), X[[1, 2, 0]].float()), "as the model sees them"


def test_inversefed_gets_rows_in_the_order_of_its_labels() -> None:
    images = inversefed_start(recovery(X), restarts=3)((2, 4, 4))
    assert images.shape == (3, 3, 2, 4, 4) and torch.equal(images[0], X.float())
    assert not torch.equal(images[1], images[2])
    with pytest.raises(ValueError, match="img_shape"):
        inversefed_start(recovery(X))((3, 4, 4))


def test_what_holds_no_batch_is_no_start() -> None:
    assert torch.equal(start_of(recovery(X)), X)
    with pytest.raises(ValueError, match="complete=True"):
        breaching_start(recovery(None))
    with pytest.raises(ValueError, match="expected both or none"):
        breaching_start(recovery(X), mean=MEAN)


def test_a_recovery_says_what_is_nearest() -> None:
    near = recovery(None, (Candidate(X, LABELS, 0.1),))
    assert near.nearest is X and near.nearest_labels is LABELS
    assert recovery(None).nearest is None and recovery(X).nearest is X


def test_a_row_that_occurs_twice_starts_two_rows() -> None:
    held = replace(recovery(X), multiplicities=torch.tensor([1, 2, 1]))
    assert torch.equal(start_of(held), X[[0, 1, 1, 2]])
    assert torch.equal(breaching_start(held), X[[1, 1, 2, 0]].float()), "labels 1, 1, 3, 4"
    near = Candidate(X, LABELS, 0.1, torch.tensor([2, 1, 1]))
    assert torch.equal(start_of(recovery(None, (near,))), X[[0, 0, 1, 2]])
