"""All samples together: known values, and what the layers next below them send."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import rgap
from rgap.completion.joint_search import JointSearch
from rgap.completion.value_search import Search
from rgap.jacobian.frontier import Frontier, frontier
from rgap.machine.clock import ENDLESS, Clock
from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate
from rgap.recursion.graph import GraphDescent

F64 = torch.float64


def pooled() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 24, 3, 1, 1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(384, 5),
    ).double()  # fmt: skip


def known(flow: Flow, x: Tensor, name: str) -> GraphDescent:
    """The true value of one node."""
    value, told = x, GraphDescent()
    for place, node in enumerate(flow.nodes[1:], 1):
        value = node.forward([value])
        if node.name == name:
            told.values[place] = Estimate(value, torch.full((2, *value.shape), 1e-14, dtype=F64))
    return told


def case() -> tuple[Frontier, JointSearch, Tensor, Tensor]:
    """Values below a pool, the search, the data, and the gradient of the layer below the pool."""
    model = pooled()
    x = rgap.photos.load(3, 8, start=2, dtype=F64)
    loss = nn.functional.cross_entropy(model(x), torch.tensor([1, 1, 4]))
    names = [name for name, _ in model.named_parameters()]
    sent = torch.autograd.grad(loss, list(model.parameters()))
    gradients = dict(zip(names, sent, strict=True))
    flow = flow_of(model, (3, 8, 8))
    assert isinstance(flow, Flow)
    told = known(flow, x, "4")
    [place] = told.values
    value = model[:5](x).detach().requires_grad_()
    above = nn.functional.cross_entropy(model[5:](value), torch.tensor([1, 1, 4]))
    (k,) = torch.autograd.grad(above, value)
    told.cotangents[place] = Estimate(k, torch.zeros(2, *k.shape, dtype=F64))
    near = Frontier(flow, frontier(flow, told.values), told.values).to(torch.float32)
    joint = JointSearch.of(near, told, gradients, ENDLESS)
    assert joint is not None
    assert [flow.nodes[p].name for p in joint.gradients] == ["2"]
    return near, joint, x, gradients["2.weight"]


def test_samples_send_what_the_layer_next_below_the_values_sent() -> None:
    near, joint, x, gradient = case()
    every = torch.ones(3, dtype=torch.bool)
    data = x.float().requires_grad_()
    [own] = joint.sent(near.values(data), every)
    torch.testing.assert_close(own.double(), gradient, rtol=1e-4, atol=1e-6)
    assert float(joint.misfit(data, every, [gradient.float()], {}).detach()) < 1e-10
    other = torch.zeros(3, 3, 8, 8).requires_grad_()
    assert float(joint.misfit(other, every, [gradient.float()], {}).detach()) > 1e-3


def test_a_sample_that_is_known_stays_and_leaves_the_rest_of_the_gradient_to_others() -> None:
    torch.manual_seed(0)
    near, joint, x, gradient = case()
    some = torch.tensor([False, True, True])
    first = x[:1].float().requires_grad_()
    [its] = joint.sent(near.values(first), ~some)
    left = [gradient.float() - its.detach()]
    others = x[1:].float().requires_grad_()
    assert float(joint.misfit(others, some, left, {}).detach()) < 1e-9
    begun = torch.cat([x[:1], x[1:] + 0.02 * torch.randn_like(x[1:])]).float()
    ended, _ = joint.descended(begun, [True, False, False], 3)
    assert torch.equal(ended[0], begun[0])
    missed = [
        float(joint.misfit(batch[1:].requires_grad_(), some, left, {}).detach())
        for batch in (begun.clone(), ended.clone())
    ]
    assert missed[1] < 0.2 * missed[0]


def test_least_absolute_errors_come_nearer_to_the_values() -> None:
    near, _, x, _ = case()
    late = Clock(time.perf_counter() + 60)
    search = Search(near, lambda number: x, lambda words: None, "", late)
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(x[:1].shape, generator=generator)
    begun = x[:1].float() + noise
    search.answers[0] = begun
    search.absolute(0, 3e-5)
    assert search.misfit(0, search.answers[0], None) < 0.05 * search.misfit(0, begun, None)


def test_no_search_where_no_cotangent_is_known() -> None:
    model = pooled()
    flow = flow_of(model, (3, 8, 8))
    assert isinstance(flow, Flow)
    told = known(flow, rgap.photos.load(1, 8, dtype=F64), "4")
    near = Frontier(flow, list(told.values), told.values)
    assert JointSearch.of(near, told, {"2.weight": torch.ones(24, 8, 3, 3)}, ENDLESS) is None
