"""Networks as directed graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap.network.flow import Flow, flow_of
from rgap.network.trace import joined_on_meta


class Branches(nn.Module):
    """Two branches of one value, joined by a function."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], out: int = 6) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.join, self.head = join, nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.join(self.left(x).relu(), self.right(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("join", "out"),
    [
        (operator.add, 6),
        (torch.add, 6),
        (operator.sub, 6),
        (lambda a, b: a.sub(b), 6),
        (lambda a, b: torch.cat([a, b, a], 1), 18),
        (lambda a, b: torch.cat((b, a), dim=1), 12),
    ],
)
def test_sums_and_joins_are_what_the_model_computes(
    join: Callable[[Tensor, Tensor], Tensor], out: int
) -> None:
    torch.manual_seed(0)
    model = Branches(join, out).double().eval()
    flow = flow_of(model, (2, 5, 4))
    assert isinstance(flow, Flow), flow
    x = torch.rand(3, 2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(flow.forward(x), model(x))
    names = [flow.nodes[place].name for place in flow.cuts()]
    assert names[1:3] == ["first", "norm"] and "left" not in names and names[-1] == "head"


@pytest.mark.parametrize("join", [operator.add, lambda a, b: torch.cat([a, b], 1)])
def test_cotangents_spread_over_branches_as_autograd_has_them(
    join: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model = Branches(join, 6 if join is operator.add else 12).double().eval()
    flow = flow_of(model, (2, 5, 4))
    assert isinstance(flow, Flow)
    at = next(i for i, node in enumerate(flow.nodes) if len(node.sources) > 1)
    node = flow.nodes[at]
    parts = [
        torch.rand(2, *flow.nodes[s].shape, dtype=torch.float64, requires_grad=True)
        for s in node.sources
    ]
    k = torch.rand(2, *node.shape, dtype=torch.float64)
    own = torch.autograd.grad(node.forward(parts), parts, k)
    spread = node.spread(k, [flow.nodes[s].shape[0] for s in node.sources])
    for one, other in zip(own, spread, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("join", "why"),
    [
        (operator.mul, "multiplies two branches"),
        (lambda a, b: a + b.mean((2, 3), keepdim=True), "different shapes"),
        (lambda a, b: torch.add(a, b, alpha=2), "adds two branches"),
        (lambda a, b: torch.cat([a, b], 2), "concatenates branches"),
    ],
)
def test_what_is_no_sum_is_named(join: Callable[[Tensor, Tensor], Tensor], why: str) -> None:
    assert why in str(flow_of(Branches(join).eval(), (2, 5, 4)))


def test_a_layer_that_is_called_twice_says_so() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.one(self.one(x).relu()) + x)

    flow = flow_of(Twice(), (4,))
    assert isinstance(flow, Flow)
    assert sum("more than once" in node.shared for node in flow.nodes) == 2


def test_a_hook_that_changes_the_output_is_no_flow_of_the_model() -> None:
    model = Branches(operator.add).eval()
    model.right.register_forward_hook(lambda module, args, out: 2 * out)
    assert "a hook" in str(flow_of(model, (2, 5, 4)))


@pytest.mark.parametrize("join", [operator.add, operator.iadd, operator.mul, torch.sub])
def test_meta_tensors_are_joined_as_pytorch_joins_them(
    join: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Without PyTorch's own sum of them, which takes seconds the first time."""
    wide, short = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 1, 4, dtype=torch.float64)
    inplace = join is operator.iadd
    meta = joined_on_meta(wide.to("meta"), short.to("meta"), inplace)
    real = join(wide.clone(), short)
    assert meta.is_meta and meta.shape == real.shape and meta.dtype == real.dtype
    with pytest.raises(RuntimeError, match="size"):
        joined_on_meta(short.to("meta"), torch.ones(2, 2, 4, 4, device="meta"), inplace)
