"""Units in doubt that no other filter settles: of all patterns the one that agrees."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import Tensor, nn

from rgap.network.affine import Affine
from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate, Precision
from rgap.recursion.patterns import agreeing, likely
from rgap.recursion.readers import Contradicted, Reader, from_gradients

ROWS, POSITIONS = 13 * 9, 4 * 25  # with one filter less there are too few equations


class Case:
    """A convolution whose cotangent has units in doubt; every filter is needed."""

    def __init__(self, seed: int, on: tuple[bool, ...], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1)).double()
        flow = flow_of(net, (3, 5, 5))
        assert isinstance(flow, Flow)
        link = flow.nodes[1].link
        assert isinstance(link, Affine)
        self.affine, self.on = link, on
        self.x = torch.rand(4, 3, 5, 5, generator=generator).double()
        k = torch.randn(4, 12, 5, 5, generator=generator).double()
        k[torch.rand(k.shape, generator=generator) < 0.4] = 0.0
        self.unsure = torch.zeros(k.shape, dtype=torch.bool)
        for filter_, _ in enumerate(on):
            row = int(k[:, filter_].flatten(1).abs().amax(1).argmax())
            place = int(k[row, filter_].flatten().abs().argmax())
            self.unsure[row, filter_, place // 5, place % 5] = True
        self.k = k.clone()
        sent = k.clone()
        sent[self.unsure] *= torch.tensor(on).double()
        self.gradient = link.weight_gradient(self.x, sent).to(dtype).double()
        self.precision = Precision(dtype=dtype, samples=6)

    def solved(self, readers: object) -> Estimate | Contradicted | str:
        """The input from all gradients."""
        sent = {self.affine.weight_name: self.gradient}
        return from_gradients(readers, sent, self.precision, inf)  # type: ignore[arg-type]

    @property
    def reader(self) -> Reader:
        """With its doubts."""
        known = Estimate(self.k, self.k.new_zeros(6, *self.k.shape))
        return Reader(self.affine, known, self.unsure)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("on", [(True,), (False,), (True, False), (False, True, True)])
def test_the_pattern_that_agrees_is_that_of_the_client(
    on: tuple[bool, ...], dtype: torch.dtype
) -> None:
    case = Case(1, on, dtype)
    assert isinstance(case.solved([case.reader]), str), "every filter is needed"
    shares: Tensor = torch.full_like(case.k, 1e9)
    shares[case.unsure] = torch.linspace(4.0, 6.0, len(on)).double()
    told = agreeing([case.reader], [7], {7: (shares, 1.0)}, case.solved)
    filters = case.unsure.nonzero()[:, 1]
    assert told[7].tolist() == [float(on[int(f)]) for f in filters]


def test_no_pattern_is_told_where_none_agrees_or_too_many_are_asked_for() -> None:
    case = Case(1, (True,), torch.float64)
    shares = torch.full_like(case.k, 5.0)
    case.gradient[5] *= 1.01  # of a filter without doubts
    assert agreeing([case.reader], [7], {7: (shares, 1.0)}, case.solved) == {}
    assert agreeing([case.reader], [-1], {7: (shares, 1.0)}, case.solved) == {}
    case.unsure[:, :2] = True
    assert agreeing([case.reader], [7], {7: (shares, 1.0)}, case.solved) == {}


def test_nothing_is_told_where_equations_are_too_few_to_contradict_a_pattern() -> None:
    """As many rows as unknowns: every pattern has a solution, and each is as good as another."""
    case = Case(1, (True,), torch.float64)
    known = Estimate(case.x, case.x.new_zeros(6, *case.x.shape))
    shares = torch.full_like(case.k, 5.0)
    assert agreeing([case.reader], [7], {7: (shares, 1.0)}, lambda _: known) == {}


def test_patterns_come_in_order_of_their_likelihood() -> None:
    shares = torch.tensor([1.0, 100.0, 4.0])
    patterns = [tuple(p.tolist()) for p in likely(shares, 1.0)]
    assert patterns[0][:2] == (False, True) and len(set(patterns)) == 8
    assert patterns[-1][:2] == (True, False)
