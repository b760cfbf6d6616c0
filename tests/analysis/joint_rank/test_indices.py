"""The published indices: against their definitions, and where they and the rank disagree."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import rgap
from benchmarks.common.networks import BINARY
from benchmarks.studies.indices import narrow, softmax
from rgap.analysis.joint_rank.indices import leakage_indices


def test_the_counts_follow_their_definitions() -> None:
    model = narrow(4)
    found = leakage_indices(model, (3, 12, 12), 2, loss=BINARY, joint=False)
    first, second, third, head = found.rows
    # 12×12 → 7×7 → 4×4 → 4×4 → one logit, two samples
    assert (first.unknowns, first.gradient, first.outputs) == (864, 576, 1176)
    assert (first.virtual, second.virtual) == (0, 1176 - 864)
    assert second.deficit == 2 * 588 - 12 * 4 * 9 - 2 * 64 - 312
    assert third.virtual == 312  # its input is smaller than the one below: no surplus
    assert head.virtual == 312 + (2 * 384 - 2 * 64)
    assert found.rank_analysis == max(row.deficit for row in found.rows)
    assert found.joint_rank is None
    assert found.misleading == ()


def test_copa_weighs_the_deficits_of_convolutions_by_place() -> None:
    found = leakage_indices(narrow(4), (3, 12, 12), 1, loss=BINARY, joint=False)
    lost = [row.nullity for row in found.rows]
    assert lost[1] == 192
    assert found.copa == pytest.approx(-(lost[0] + lost[1] * 2 / 3 + lost[2] / 3))
    whole = 432 + 588 * 2 / 3 + 64 / 3
    assert found.copa_share == pytest.approx(found.copa / whole)


def test_the_ranks_are_those_of_the_audit() -> None:
    model = rgap.models.lenet(channels=4, input_shape=(3, 16, 16), seed=0)
    found = leakage_indices(model, (3, 16, 16), joint=False)
    table = rgap.analysis.audit(model, (3, 16, 16), (1,))
    assert [row.nullity for row in found.rows] == [row.nullity for row in table.rows]


def test_relative_sizes_stay_where_plain_ones_grow_with_the_channels() -> None:
    def wide(times: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(  # as many copies of one layer side by side
                nn.Conv2d(2 * times, times, 1, groups=times, bias=False), nn.Tanh(),
                nn.Flatten(), nn.Linear(16 * times, 3),
            ).eval()  # fmt: skip

    small, large = (
        leakage_indices(wide(times), (2 * times, 4, 4), joint=False) for times in (1, 3)
    )
    assert large.copa == 3 * small.copa < 0
    assert large.copa_share == pytest.approx(small.copa_share)
    assert large.rank_analysis == 3 * small.rank_analysis > 0
    assert large.rank_analysis_share == pytest.approx(small.rank_analysis_share)


def test_counted_as_recoverable_and_it_is_not() -> None:
    """A softmax head at B = C: the gradient has as many entries as unknowns, but rank C − 1."""
    found = leakage_indices(softmax(), (1, 4, 4), 4)
    assert found.rank_analysis < 0
    assert found.copa == 0
    assert found.nullity == 13
    assert len(found.misleading) == 2
    enough = leakage_indices(softmax(), (1, 4, 4), 3)
    assert enough.nullity == 0
    assert enough.misleading == ()


def test_counted_as_lost_and_it_is_not() -> None:
    """The narrow layer lacks equations; the layer below has them."""
    found = leakage_indices(narrow(3), (3, 12, 12), 1, loss=BINARY)
    assert found.rank_analysis == 60
    assert found.copa < 0
    assert found.nullity == 0
    assert "not recoverable (+60)" in found.explain()
    assert "c(M) says a deficit" in found.explain()


def test_summaries_are_plain() -> None:
    told = json.loads(json.dumps(leakage_indices(softmax(), (1, 4, 4), 4).summary()))
    assert told["rank_analysis"] == -16
    assert told["copa_share"] == 0.0
    assert told["rows"][0]["unknowns"] == 64


def test_bad_input() -> None:
    with torch.random.fork_rng(devices=[]):
        twice = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        twice.append(twice[0])
    with pytest.raises(ValueError, match="called once, got '0' twice"):
        leakage_indices(twice.eval(), (6,))
    with pytest.raises(ValueError, match="batch sizes"):
        leakage_indices(softmax(), (1, 4, 4), 0)
    with pytest.raises(ValueError, match="train mode"):
        leakage_indices(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 4)), (1, 4, 4))
