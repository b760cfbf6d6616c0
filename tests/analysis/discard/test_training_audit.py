"""The audit along training: one table per checkpoint on the same probe."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import pytest
import torch
from cases import small_mlp
from torch import Tensor, nn

from rgap.analysis import TrainingAudit, audit, audit_training

SHAPE = (2, 4, 4)


def states(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """As drawn; trained a little; with half of the units of fc1 dead."""
    net = copy.deepcopy(model)
    found = {"start": copy.deepcopy(net.state_dict())}
    steps = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        steps.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(16) % 5).backward()
        steps.step()
    found["trained"] = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net.fc1.weight[8:] = 0
    found["dead"] = net.state_dict()
    return found


@pytest.fixture(scope="module")
def found() -> TrainingAudit:
    model = small_mlp("tanh")
    return audit_training(model, SHAPE, states(model), (1, 2))


def test_every_checkpoint_has_the_audit_of_its_weights(found: TrainingAudit) -> None:
    model = small_mlp("tanh")
    for name, state, table in zip(found.names, states(model).values(), found.audits, strict=True):
        model.load_state_dict(state)
        assert table == audit(model, SHAPE, (1, 2)), name
    assert found.names == ("start", "trained", "dead")


def test_what_training_does_is_seen_layer_by_layer(found: TrainingAudit) -> None:
    series = found.series("fc1", 2)
    assert [row.weight_rank for row in series] == [32, 32, 16]
    conditions = [row.condition for row in series]
    assert len(set(conditions)) > 1
    words = found.explain()
    assert "over 3 checkpoints" in words and "'fc1' at B = 2: discard" in words


def test_the_table_in_frames_html_and_json(found: TrainingAudit) -> None:
    frame = found.to_frame()
    assert list(frame["checkpoint"].unique()) == ["start", "trained", "dead"]
    assert len(frame) == 3 * len(found.audits[0].rows)
    assert "<th>trained</th>" in found._repr_html_()
    document = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert [one["name"] for one in document["checkpoints"]] == ["start", "trained", "dead"]


def test_checkpoints_are_read_one_at_a_time_and_the_model_is_left_alone() -> None:
    model = small_mlp("tanh")
    before = [p.clone() for p in model.parameters()]

    def stream() -> Iterator[dict[str, Tensor]]:
        yield from states(model).values()

    found = audit_training(model, SHAPE, stream(), (1,), method="sketch")
    assert found.names == ("0", "1", "2")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_what_is_refused() -> None:
    model = small_mlp("tanh")
    with pytest.raises(ValueError, match="expected checkpoints, got none; write"):
        audit_training(model, SHAPE, [], (1,))
    with pytest.raises(ValueError, match="'formula', which does not look at weights"):
        audit_training(model, SHAPE, [model.state_dict()], (1,), method="formula")
    other = small_mlp("tanh", widths=(9, 7)).state_dict()
    with pytest.raises(ValueError, match="checkpoint 0 does not fit the Sequential"):
        audit_training(model, SHAPE, [other], (1,))
