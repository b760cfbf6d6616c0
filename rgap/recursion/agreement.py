"""Whether values that different layers' gradients determine belong to one run of the network.

Each value follows from the gradients of the layers that read it, so that one of them that was
changed gives another value, with the error of an unchanged one.  But lower values make the higher
ones: forward from what is known, what comes out has to be what is known there, and what a rectifier
gives is not below 0.  Where a branch is missing on the way up the second alone is asked.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rgap.jacobian.frontier import rounded
from rgap.limits import REFUTED, SAFETY
from rgap.network.flow import Flow
from rgap.precision import Estimate, smoothed
from rgap.recursion.steps_above import nonnegative

__all__ = ["disagreement_of_values"]

MEMBERS = 4  # of an ensemble that are sent forward


def disagreement_of_values(flow: Flow, known: Mapping[int, Estimate], unit: float) -> str:
    """Which known value is not what lower ones make of it, or "".

    Args:
        flow: the network.
        known: values [B, *shape] by place, with their errors.
        unit: unit roundoff of the client's arithmetic.
    """
    runs = dict[int, list[Tensor]]()  # the value, and it with each error
    for place, node in enumerate(flow.nodes[: max(known, default=0) + 1]):
        own, made = known.get(place), list[Tensor]()
        if node.sources and all(source in runs for source in node.sources):
            below = zip(*(runs[source] for source in node.sources), strict=True)
            made = [node.forward(list(values)) for values in below]
        if own is None:
            if made:
                runs[place] = made
            continue
        if made and (apart := _apart(made, own, rounded(flow, place, own.value, unit))):
            return f"the value of '{node.name}' that gradients give {apart}"
        least = float((own.value / smoothed(own).clamp_min(1e-300)).min())
        if least < -REFUTED and nonnegative(flow, place):
            return (
                f"the value of '{node.name}' that gradients give is {float(own.value.min()):.2g} "
                f"in an entry, {-least:.1e} standard errors below the 0 that it may be at least"
            )
        runs[place] = [own.value, *(own.value + e for e in own.error[:MEMBERS])]
    return ""


def _apart(made: list[Tensor], own: Estimate, rounding: float) -> str:
    """By how much a value is off that which lower ones make, in words, or "".

    Args:
        made: that one, and with each member of the errors.
        own: the value.
        rounding: standard error of an entry that a client, and we, compute.
    """
    size = max(float(own.value.norm()), 1e-300)
    gap = float((made[0] - own.value).norm())
    spread = max(float((member - made[0]).norm()) for member in made[1:])
    spread += max(float(error.norm()) for error in own.error[:MEMBERS])
    allowed = SAFETY * (spread + rounding * own.value.numel() ** 0.5)
    if gap <= allowed:
        return ""
    return (
        f"is not what the values below it make: they differ by {gap / size:.1e} of its size, where "
        f"{allowed / size:.1e} is explained"
    )
