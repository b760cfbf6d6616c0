"""Steps of L-BFGS that are cut: by the time, or by a function that is no number."""

from __future__ import annotations

import time
from math import nan

import torch
from torch import Tensor

from rgap.solvers.lbfgs import lowered

F64 = torch.float64


def rosenbrock(x: Tensor) -> Tensor:
    return (1.0 - x[0]).square() + 100.0 * (x[1] - x[0].square()).square()


def test_a_way_that_is_cut_ends_at_its_lowest_point() -> None:
    begin = torch.tensor([-1.2, 1.0], dtype=F64)
    assert torch.equal(lowered(begin, 10, rosenbrock, time.perf_counter() - 1.0), begin)
    for calls in range(1, 40):
        seen: list[float] = []

        def counted(x: Tensor, calls: int = calls, seen: list[float] = seen) -> Tensor:
            value = rosenbrock(x)
            seen.append(float(value.detach()))
            return value if len(seen) <= calls else nan * value

        end = lowered(begin, 100, counted)
        assert float(rosenbrock(end)) == min(seen[:calls])
    assert float(rosenbrock(lowered(begin, 100, rosenbrock))) < 1e-12


def test_a_slope_that_is_no_number_is_not_followed() -> None:
    begin = torch.tensor([2.0], dtype=torch.float32)
    assert lowered(begin, 10, lambda x: (x * 1e38).square().sum()).tolist() == [2.0]  # infinite
    assert lowered(begin, 10, lambda x: (x - 2.0).abs().sqrt().sum()).tolist() == [2.0]
