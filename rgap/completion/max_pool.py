"""Which entry won each window of a max-pool: the gradient of the layer below it says so.

Below a pool with known output û and cotangent κ there, the input u of the next lower layer meets

    pool(φ(W u + b)) = û,      ∂⟨κ, pool(φ(W u + b))⟩/∂W = G,

many more equations than unknowns while a batch is small.  One layer and one pool are annealed alone
(:mod:`rgap.jacobian.smoothing`), so what lies above and below them plays no part.  The winners at
the solution make the pool linear: values and cotangents at their places, nothing elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn

from rgap.completion.annealing import Plan, Position, anneal
from rgap.completion.complete import grey
from rgap.constraints.known_input import Where
from rgap.jacobian.module_update import KnownFeatures, ModuleUpdate
from rgap.jacobian.smoothing import rounded
from rgap.network.affine import Affine
from rgap.network.chain import Chain
from rgap.network.reshape import Op
from rgap.precision import UNKNOWN, Estimate
from rgap.solvers.gauss_newton import Schedule
from rgap.solvers.priors import Squares, TotalVariation

PASSES = (8, 40, 100)  # levels of the first try and of those after it
FOUND = 1e-6  # misfit up to which the winners are taken as found; the equations of the stage decide
PRODUCTS = 100  # conjugate-gradient iterations a step
LAST = "pooled"


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


@dataclass(frozen=True)
class PooledStage:
    """A max-pool of which what comes out is known, and the layer below it.

    Attributes:
        chain: the stages of the network.
        index: of the stage with the pool in its lead.
        pool: of that lead.
        output: û, [B, *pool.out_shape].
        cotangent: κ there.
    """

    chain: Chain
    index: int
    pool: Op
    output: Estimate
    cotangent: Estimate

    def equations(self, model: nn.Module, gradients: Mapping[str, Tensor]) -> ModuleUpdate | None:
        """The update of the layer below alone, as a function of the input of its affine map.

        None where there is no layer between it and the data, its weight was frozen on the client,
        or the pool is no max-pool.

        Args:
            model: the network, whose modules the kinks are.
            gradients: the update, float64.
        """
        if self.index < 2:
            return None
        below = self.chain.stages[self.index - 1]
        names = (("weight", below.affine.weight_name), ("bias", below.affine.bias_name))
        sent = {f"affine.{part}": gradients[n] for part, n in names if n and n in gradients}
        weight, modules = sent.get("affine.weight"), dict(model.named_modules())
        if weight is None or weight.shape != below.affine.weight.shape:
            return None
        if self.pool.name not in modules or not rounded(modules[self.pool.name]):
            return None
        network = nn.Sequential()
        network.add_module("affine", _Layer(below.affine))
        for number, op in enumerate(self.steps):
            own = modules.get(op.name)
            network.add_module(f"step{number}", own if own and rounded(own) else _Step(op))
        network.add_module(LAST, nn.Identity())
        value = self.output.value
        known = Where(value, self.output.known)
        source = KnownFeatures(LAST, tuple(value.shape), known, self.cotangent.value)
        return ModuleUpdate(network, sent, source, (len(value), *below.affine.in_shape))

    @property
    def steps(self) -> list[Op]:
        """From the affine map of the layer below through the pool."""
        lead = self.chain.stages[self.index].lead
        return [*self.chain.stages[self.index - 1].tail, *lead[: lead.index(self.pool) + 1]]

    def placed(self, u: Tensor) -> tuple[Estimate, Estimate]:
        """Values and cotangents at the entries that the pool picks where the layer takes in u."""
        x = self.chain.stages[self.index - 1].affine.forward(u)
        for op in self.steps[:-1]:
            x = op.forward(x)
        pool, output = self.pool, self.output
        # Windows that overlap may share a winner: what they know of it is one and the same value.
        known = output.known.to(x)
        count = pool.pull(x, known)
        won = count > 0
        share = torch.where(won, 1.0 / count.clamp_min(1.0), 0.0)

        def back(values: Tensor) -> Tensor:
            return share * pool.pull(x, values)

        error = torch.stack([back(known * e) for e in output.error])
        error = torch.where(won, error, torch.full_like(error, UNKNOWN))
        spread = torch.stack([pool.pull(x, e) for e in self.cotangent.error])
        pulled = Estimate(pool.pull(x, self.cotangent.value), spread)
        return Estimate(back(known * output.value), error), pulled


def find_winners(
    model: nn.Module,
    stage: PooledStage,
    gradients: Mapping[str, Tensor],
    seconds: float,
    *,
    seed: int = 0,
    surplus: float = 0.0,
) -> tuple[Estimate, Estimate] | None:
    """Search the winners of a pool by the equations of the stage below it.

    Args:
        model: the network, whose modules the kinks are.
        stage: with the pool in its lead.
        gradients: the update, float64.
        seconds: to spend.
        seed: of the start.
        surplus: equations that it takes to begin, in multiples of the unknowns.

    Returns:
        Values and cotangents at the pool's input, nothing known of the entries that did not win;
        None where the equations are not met, or the search was not begun: other steps than
        max-pools, a layer below that was frozen, a pool of the data, or of the layer at the data,
        which a completion searches with its prior.
    """
    deadline = time.perf_counter() + seconds
    equations = stage.equations(model, gradients)
    if equations is None:
        return None
    output, shape = stage.output, stage.chain.stages[stage.index - 1].affine.in_shape
    start = grey(len(output.value), shape, None, seed).to(output.value)
    if equations.equations < surplus * start.numel():
        return None
    some = bool(output.known.any())
    size = (float(output.value[output.known].abs().mean()) if some else 0.0) or 1.0
    positive = _positive(stage.chain, stage.index - 1)
    u, met = _solve(equations, 2.0 * size * start, size, positive, deadline)
    return stage.placed(u) if met else None


def _positive(chain: Chain, index: int) -> bool:
    """True if no entry of the input of a stage's affine map is negative: a ReLU is before it."""
    before = chain.stages[index - 1].tail if index else ()
    return any(getattr(op, "one_sided", False) for op in (*before, *chain.stages[index].lead))


def _solve(
    equations: ModuleUpdate, start: Tensor, size: float, positive: bool, deadline: float
) -> tuple[Tensor, bool]:
    """Anneal ever more slowly until the equations are met: the nearest input, and if it does."""
    picture = start.ndim > 2
    prior = TotalVariation(1.0 / size) if picture else Squares(1.0 / size**2, size)

    def project(u: Tensor) -> Tensor:
        return u.clamp_min(0.0) if positive else u

    equations.balance(start)
    best, lowest = start, inf
    for levels in PASSES:
        plan = Plan(prior, Schedule(products=PRODUCTS), levels, deadline, 1.0, project)
        minimum = anneal(equations, Position(start), plan)
        if minimum.misfit < lowest:
            best, lowest = minimum.value, minimum.misfit
        if lowest <= FOUND or time.perf_counter() > deadline:
            break
    return best, lowest <= FOUND
