"""Which entry won each window of a max-pool: the gradient of the layer below it says so.

Below a pool with known output û and cotangent κ there, the input u of the next lower layer meets

    pool(φ(W u + b)) = û,      ∂⟨κ, pool(φ(W u + b))⟩/∂W = G,

many more equations than unknowns while a batch is small.  One layer and one pool are annealed alone
(:mod:`rgap.jacobian.smoothing`), so what lies above and below them plays no part.  The winners at
the solution make the pool linear: values and cotangents at their places, nothing elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn

from rgap.completion.annealing import Position, anneal
from rgap.completion.complete import grey
from rgap.constraints.known_input import Where
from rgap.jacobian.module_update import KnownFeatures, ModuleUpdate
from rgap.jacobian.smoothing import rounded
from rgap.network.affine import Affine
from rgap.network.chain import Chain
from rgap.network.reshape import Op
from rgap.precision import UNKNOWN, Estimate
from rgap.solvers.gauss_newton import Schedule, Step
from rgap.solvers.priors import Squares, TotalVariation

PASSES = (8, 40, 100)  # levels of the first try and of those after it
FOUND = 1e-6  # misfit up to which the winners are taken as found; the equations of the stage decide
PRODUCTS = 100  # conjugate-gradient iterations a step
LAST = "pooled"


@dataclass(frozen=True)
class PoolSearch:
    """What a search for winners ended with.

    Attributes:
        input: of the affine map below the pool, [B, *in_shape]; near it where nothing was found.
        passed: values and cotangents at the pool's input, nothing known of the entries that did
            not win; None where the equations are not met.
    """

    input: Tensor
    passed: tuple[Estimate, Estimate] | None


class _Layer(nn.Module):
    """An affine map whose parameters are leaves."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self._affine = affine
        self.weight = nn.Parameter(affine.weight)
        self.bias = None if affine.bias is None else nn.Parameter(affine.bias)

    def forward(self, u: Tensor) -> Tensor:
        """W u + b."""
        return replace(self._affine, weight=self.weight, bias=self.bias).forward(u)


class _Step(nn.Module):
    """A step of a chain as a module."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self._op = op

    def forward(self, x: Tensor) -> Tensor:
        """The step."""
        return self._op.forward(x)


def find_winners(
    model: nn.Module,
    chain: Chain,
    gradients: Mapping[str, Tensor],
    index: int,
    pool: Op,
    output: Estimate,
    cotangent: Estimate,
    seconds: float,
    seed: int = 0,
    surplus: float = 0.0,
    watch: Callable[[Step], None] = lambda step: None,
) -> PoolSearch | None:
    """Search the winners of a pool by the equations of the stage below it.

    Args:
        model: the network, whose modules the kinks are.
        chain: its stages.
        gradients: the update, float64.
        index: of the stage with the pool in its lead.
        pool: of that lead.
        output: û, [B, *pool.out_shape].
        cotangent: κ there.
        seconds: to spend.
        seed: of the start.
        surplus: equations that it takes to begin, in multiples of the unknowns.
        watch: told of every step.

    Returns:
        How it ended; None where it was not begun: other steps than max-pools, a pool of the data,
        or of the layer at the data, which a completion searches with its prior.
    """
    deadline = time.perf_counter() + seconds
    if index < 2:
        return None
    below, above = chain.stages[index - 1], chain.stages[index]
    sent = {
        f"affine.{part}": gradients[name]
        for part, name in (("weight", below.affine.weight_name), ("bias", below.affine.bias_name))
        if name is not None and name in gradients
    }
    steps = [*below.tail, *above.lead[: above.lead.index(pool) + 1]]
    modules = dict(model.named_modules())
    if pool.name not in modules or not rounded(modules[pool.name]):
        return None
    network = nn.Sequential()
    network.add_module("affine", _Layer(below.affine))
    for number, op in enumerate(steps):
        held = modules.get(op.name)
        network.add_module(f"step{number}", held if held and rounded(held) else _Step(op))
    network.add_module(LAST, nn.Identity())
    shape = (len(output.value), *below.affine.in_shape)
    if sent["affine.weight"].shape != below.affine.weight.shape:
        return None
    known = Where(output.value, output.known)
    source = KnownFeatures(LAST, tuple(output.value.shape), known, cotangent.value)
    equations = ModuleUpdate(network, sent, source, shape)
    start = grey(shape[0], shape[1:], None, seed).to(output.value)
    if equations.equations < surplus * start.numel():
        return None
    size = float(output.value[output.known].abs().mean()) if known.equations else 1.0
    u, met = _solve(
        equations, 2.0 * size * start, size, _positive(chain, index - 1), deadline, watch
    )
    if not met:
        return PoolSearch(u, None)
    x = below.affine.forward(u)
    for op in steps[:-1]:
        x = op.forward(x)
    return PoolSearch(u, _placed(pool, x, output, cotangent))


def _positive(chain: Chain, index: int) -> bool:
    """True if no entry of the input of a stage's affine map is negative: a ReLU is before it."""
    before = chain.stages[index - 1].tail if index else ()
    return any(getattr(op, "one_sided", False) for op in (*before, *chain.stages[index].lead))


def _solve(
    equations: ModuleUpdate,
    start: Tensor,
    size: float,
    positive: bool,
    deadline: float,
    watch: Callable[[Step], None],
) -> tuple[Tensor, bool]:
    """Anneal ever more slowly until the equations are met: the nearest input, and if it does."""
    picture = start.ndim > 2
    prior = TotalVariation(1.0 / size) if picture else Squares(1.0 / size**2, size)

    def project(u: Tensor) -> Tensor:
        return u.clamp_min(0.0) if positive else u

    def told(step: Step, _: Tensor) -> None:
        watch(step)

    equations.balance(start)
    best, lowest = start, inf
    for levels in PASSES:
        found = anneal(
            equations, Position(start), prior, Schedule(products=PRODUCTS), levels, deadline,
            project=project, watch=told,
        )  # fmt: skip
        if found.misfit < lowest:
            best, lowest = found.value, found.misfit
        if lowest <= FOUND or time.perf_counter() > deadline:
            break
    return best, lowest <= FOUND


def _placed(
    pool: Op, x: Tensor, output: Estimate, cotangent: Estimate
) -> tuple[Estimate, Estimate]:
    """Values and cotangents at the entries of x that the pool picks."""
    # Windows that overlap may share a winner: what they know of it is one and the same value.
    count = pool.pull(x, output.known.to(x))
    won = count > 0
    share = torch.where(won, 1.0 / count.clamp_min(1.0), 0.0)

    def back(values: Tensor) -> Tensor:
        return share * pool.pull(x, values)

    known = output.known.to(x)
    error = torch.stack([back(known * e) for e in output.error])
    value = Estimate(
        back(known * output.value), torch.where(won, error, torch.full_like(error, UNKNOWN))
    )
    spread = torch.stack([pool.pull(x, e) for e in cotangent.error])
    return value, Estimate(pool.pull(x, cotangent.value), spread)
