"""Pools that forget where data are, and values beside them that do not need these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgap.completion.windows import confused_of_graph
from rgap.jacobian.frontier import Frontier
from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate


class Beside(nn.Module):
    """A stream that ends in a pool, and a branch of it that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, 1, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        return torch.cat([self.branch(a).relu().flatten(1), self.pool(a).flatten(1)], 1)


def test_a_pool_matters_only_where_nothing_beside_it_is_enough() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Beside().double().eval(), torch.rand(2, 1, 4, 4).double()
    flow = flow_of(model, (1, 4, 4))
    assert isinstance(flow, Flow), flow
    names = [node.name for node in flow.nodes]
    values = {0: x}
    for place, node in enumerate(flow.nodes[1:], 1):
        values[place] = node.forward([values[source] for source in node.sources])
    rectified, pooled = names.index("relu"), names.index("pool")
    known = {p: Estimate(v, torch.zeros(1, *v.shape).double()) for p, v in values.items()}
    function = Frontier(flow, [rectified, pooled], known)
    on = min(int((row > 0).sum()) for row in values[rectified])
    assert confused_of_graph(function, on) == ""
    assert "forgets" in confused_of_graph(function, on + 1)
    assert "forgets" in confused_of_graph(Frontier(flow, [pooled], known), 1)
