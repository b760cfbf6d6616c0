"""Below a call that ends a chain because branches meet: what wide layers give away all the same."""

from __future__ import annotations

from rgap.inversion.problem import Problem
from rgap.inversion.top import head_cotangent
from rgap.network.affine import Affine
from rgap.network.flow import Flow, flow_of
from rgap.precision import Estimate
from rgap.progress import Progress
from rgap.recursion.graph import descend_graph
from rgap.recursion.reached import Descent

__all__ = ["features_of_branches"]


def features_of_branches(problem: Problem, descent: Descent, show: Progress) -> dict[str, Estimate]:
    """Inputs of layers that their own gradients determine, from the lowest layer up.

    Empty where the network is a chain, or no graph of calls that the walk knows.

    Args:
        problem: of one sample.
        descent: that began at the head and ended at a barrier, or before it.
        show: told which value is solved.
    """
    last = problem.chain.stages[-1]
    bias = last.affine.bias_name
    read = len(problem.chain.stages) - 1 in descent.cotangents or problem.precision.sent(bias)
    if problem.chain.complete or not read:
        return {}
    flow = flow_of(problem.model, problem.chain.input_shape)
    if isinstance(flow, str):
        return {}
    heads = [place for place, node in enumerate(flow.nodes) if _is(node.link, last.affine.name)]
    if len(heads) != 1:
        return {}
    known = head_cotangent(problem, descent)
    if not bool(known.known.all()):
        return {}
    cut = Flow(flow.nodes[: heads[0] + 1], flow.name)

    def watch(name: str) -> None:
        show.stage(f"what '{name}' gives")

    gradients = problem.gradients
    told = descend_graph(cut, gradients, known, problem.precision, watch, problem.room)
    features = {}
    for place, value in sorted(told.values.items()):
        for user in cut.users(place):
            link = cut.nodes[user].link
            if isinstance(link, Affine):
                features[link.name] = Estimate(
                    value.value.reshape(-1, *link.in_shape),
                    value.error.reshape(len(value.error), -1, *link.in_shape),
                )
    return features


def _is(link: object, name: str) -> bool:
    return isinstance(link, Affine) and link.name == name
