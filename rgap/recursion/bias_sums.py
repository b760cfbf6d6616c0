"""Which units near zero are on, by the gradient of the bias below their rectifier.

A rectifier lets the cotangent κ of a unit through where it is on, and the bias of a layer or batch
norm right below it collects what comes through:

    ∂L/∂b_f = Σ_{b, p} m_bfp κ_bfp,    m = 1 where the unit is on, else 0.

All κ are known from above.  Of the units whose value is within its error of 0 one subset alone
makes this sum, each of them as large as any other: that a value is small says nothing of its κ.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from rgap.limits import OFF, SAFETY, SUMMED, SURELY_ON
from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.network.scaling import BatchNorm
from rgap.precision import Estimate, Precision
from rgap.recursion.patterns import shares_of

__all__ = ["bias_below", "opened", "told_by_bias"]

MOST = 8  # units of a channel that are asked for: 2^8 sums, of which a wrong one hardly agrees


def opened(
    flow: Flow,
    place: int,
    known: Estimate,
    k: Estimate,
    gradients: Mapping[str, Tensor],
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """Which units of a rectifier are on, and which of these may be off; both like its output.

    Args:
        flow: the network.
        place: of the rectifier.
        known: its output.
        k: the cotangent there.
        gradients: by parameter name.
        precision: of the update.

    Returns:
        1 and 0; and as bool.
    """
    share, off = shares_of(known)
    on = (share > OFF * off).to(known.value)
    unsure = (on > 0) & (share < SURELY_ON * off)
    told = told_by_bias(flow, place, k, (share, off), gradients, precision)
    if told is not None:
        channels = told[1].reshape(1, -1, *[1] * (on.ndim - 2))
        on, unsure = torch.where(channels, told[0], on), unsure & ~channels
    return on, unsure


def bias_below(flow: Flow, place: int) -> tuple[str, float] | None:
    """The bias whose gradient is ± the sum of the cotangent at the input of a step, or None.

    Args:
        flow: the network.
        place: of the step, which reads one value.

    Returns:
        The parameter's name, and the sign.
    """
    nodes = flow.nodes
    open_ = [(source, place, 1.0) for source in nodes[place].sources]
    while open_:
        at, user, sign = open_.pop()
        node = nodes[at]
        twice = nodes[user].sources.count(at) > 1  # y + y
        if twice or node.shared or node.joined or flow.users(at) != [user]:
            continue
        if isinstance(node.link, Affine | BatchNorm):
            if node.link.bias_name is not None:
                return node.link.bias_name, sign
        elif node.link is None:
            signs = node.signs or (1.0,) * len(node.sources)
            pairs = zip(node.sources, signs, strict=True)
            open_ += [(source, at, sign * own) for source, own in pairs]
    return None


def told_by_bias(
    flow: Flow,
    place: int,
    k: Estimate,
    shares: tuple[Tensor, float],
    gradients: Mapping[str, Tensor],
    precision: Precision,
) -> tuple[Tensor, Tensor] | None:
    """Which units of a rectifier are on, and of which channels a bias says it.

    Args:
        flow: the network.
        place: of the rectifier.
        k: the cotangent at its output, [B, F, ...].
        shares: what it gives in standard errors, and of those that are off at most.
        gradients: by parameter name.
        precision: of the update.

    Returns:
        1 where a unit is on, else 0, [B, F, ...]; and the channels where one subset of units alone
        makes the sum, as bool [F].  None where no bias below collects the cotangent, or so few
        channels agree that its gradient is another.
    """
    found = bias_below(flow, place)
    if found is None or not precision.sent(found[0]) or found[0] not in gradients:
        return None
    (name, sign), (share, off) = found, shares
    sent = sign * gradients[name]
    if sent.ndim != 1 or len(sent) != k.value.shape[1]:
        return None
    kappa, share_of = (t.transpose(0, 1).flatten(1) for t in (k.value, share))
    sure = share_of >= SURELY_ON * off
    near = share_of.masked_fill(sure | (kappa == 0), -torch.inf)
    count = min(MOST, near.shape[1])
    likely, units = near.topk(count, 1)
    own = kappa.gather(1, units)
    patterns = torch.tensor(list(product((0.0, 1.0), repeat=count))).to(kappa)
    through = sure.to(kappa)
    left = sent - (through * kappa).sum(1)
    spread = (k.error.transpose(1, 2).flatten(2) * through).sum(2).square().mean(0)
    rounded = precision.update_std(name, (through * kappa).square().sum(1), sent)
    met = SAFETY * (spread + rounded.square()).sqrt()[:, None]
    # Patterns of the units most likely on; where none agrees, one unit of all that are near 0.
    agree = (left[:, None] - own @ patterns.T).abs() <= met
    agree &= (patterns[None] * (likely == -torch.inf)[:, None].to(kappa)).sum(2) == 0
    alone = ((left[:, None] - kappa).abs() <= met) & (near > -torch.inf)
    several, single = agree.sum(1) == 1, ~agree.any(1) & (alone.sum(1) == 1)
    pattern = patterns[agree.int().argmax(1)]
    for f in (several & (pattern > 0).any(1)).nonzero().flatten().tolist():
        others = near[f] > -torch.inf
        others[units[f]] = False
        exchanged = own[f][pattern[f] > 0][:, None] - kappa[f][others]
        several[f] = not bool((exchanged.abs() <= met[f]).any())  # below an average all κ are equal
    on = through.scatter_add(1, units, pattern)
    on = torch.where(several[:, None], on, through + alone.to(kappa) * single[:, None])
    told = several | single
    if float(told.double().mean()) < SUMMED:
        return None
    shape = k.value.transpose(0, 1).shape
    return on.reshape(shape).transpose(0, 1), told
