"""Samples of one label by the turns of their differences, all at once and without a Jacobian.

The softmax gives cotangents ``k(q) = p(q) − y``; the gradient gives those that are dual to the same
rows, ``US Q⁻¹/s``.  Both agree at the batch alone:

    E(Q) = p(Q) − Y − US Q⁻¹/s = 0.

In multiplicative steps ``Q ← exp(P) Q`` with P 1 = 0 its slope is ``J(p) Z Pᵀ + (US Q⁻¹/s) P``,
Z = M Qᵀ: a product costs as much as a few evaluations of the head.  Of one label the symmetric part
of P meets differences of cotangents, the antisymmetric one (a turn) only their curvature, products
z_a ∘ z_b of two samples.  Classes are weighed so that these products are of one size in all
directions, and conjugate gradients are preconditioned on each part by itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from rgap.separation.softmax.coupled import Coupled

CLASSES = 3  # classes for each sample that are weighed, at most: more add nothing to the search
CUT = 1e-12  # relative variance of a product of differences below which its direction is left out
STEPS = 250  # of the search from one start
PRODUCTS, RELATIVE = 40, 0.3  # of conjugate gradients a step, and the residual that ends them
LAST, LAST_PRODUCTS, LAST_RELATIVE = 10, 300, 1e-4  # the same near the batch
FRESH = 4  # steps for which a preconditioner serves
PROBED = 64  # random combinations of classes that its entries for turns are measured with
FIRST, EASIER, HARDER = 0.1, 0.3, 3.0  # damping, and what a good and a bad step do to it
GOOD, BAD = 0.75, 0.25  # decrease over the predicted one
LEAST, MOST = 1e-14, 1e6  # of the damping
STRETCHES, MOMENTA = (1.0, 1.5), (0.0, 0.7)  # of a step and of the one before that are tried
FOUND = 1e-8  # cost, over that of samples at random, below which only the last steps remain
ROUNDED = 0.03  # the same up to which an end that nothing improves may be one of a noisy update
HALF = 0.5  # decrease of the cost below which the last steps go on
FLOOR = 1e-12  # relative curvature of the symmetric part that counts as none


@dataclass(frozen=True)
class Turns:
    """``W E(T) = 0`` for rows q_b = q₀ + N t_b; T [R, R − 1].

    Attributes:
        problem: the head, its labels all equal.
        classes: those that are weighed, [r].
        weight: W, [r', r].
    """

    problem: Coupled
    classes: Tensor
    weight: Tensor

    @classmethod
    def of(cls, problem: Coupled, t: Tensor) -> Turns:
        """With W from the products of differences at T: ``(z zᵀ)² p pᵀ`` is their covariance.

        The mean of all cotangents, the same whatever the batch, is made small beside them.
        """
        count = len(problem.shift)
        place = problem.shift.device
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(count, generator=generator).to(place)
        # Its row is the sum of all others, with a mean a thousand times its differences.
        classes = order[order != problem.labels[0]][: CLASSES * problem.head.rank].sort().values
        bare = cls(problem, classes, torch.eye(len(classes), dtype=t.dtype, device=place))
        state = bare.at(t)
        p = state.p.mean(1)
        z = state.z - p @ state.z / p.sum()
        mean = bare.sent_mean
        moment = (z @ z.T / problem.head.rank).square() * p[:, None] * p
        # Apart, or beside a mean a million times its differences these would round away.
        basis = torch.linalg.qr(mean[:, None], mode="complete").Q
        along, beside = basis[:, :1].T / mean.norm(), basis[:, 1:]
        values, vectors = torch.linalg.eigh(beside.T @ moment @ beside)
        kept = values > CUT * values[-1]
        weight = (beside @ (vectors[:, kept] / values[kept].sqrt())).T
        return cls(problem, classes, torch.cat([along, weight]) / len(classes) ** 0.5)

    @property
    def rank(self) -> int:
        """R."""
        return self.problem.head.rank

    @cached_property
    def sent(self) -> tuple[Tensor, Tensor]:
        """``USw/s`` [r] and ``USN/s`` [r, R − 1] of the classes that are weighed."""
        head, problem = self.problem.head, self.problem
        rows = (head.left * head.values)[self.classes] / problem.scale
        return rows @ head.weights, rows @ problem.directions

    @property
    def sent_mean(self) -> Tensor:
        """The mean cotangent over s, [r]."""
        return self.sent[0] / self.rank

    def at(self, t: Tensor) -> State:
        """E and what its slope is made of, at T."""
        problem = self.problem
        logits = problem.along @ t.T + problem.middle[:, None]
        p = torch.softmax(logits, 0)
        z = logits - logits.mean(1, keepdim=True)
        mean = t.mean(0)
        square = torch.cat([torch.ones_like(t[:, :1]), t - mean], 1)
        back, info = torch.linalg.inv_ex(square)
        total, along = self.sent
        dual = total[:, None] / self.rank + (along - total[:, None] * mean) @ back[1:]
        few = p[self.classes]
        gap = few - problem.targets[0, self.classes][:, None] - dual
        gap = gap if int(info) == 0 else torch.full_like(gap, inf)
        return State(p, z, self.classes, self.weight, self.weight @ dual, gap)

    def cost(self, t: Tensor) -> float:
        """‖W E‖²; infinite where the rows are dependent."""
        cost = float(self.at(t).residual.square().sum())
        return cost if cost == cost else inf

    def moved(self, t: Tensor, step: Tensor) -> Tensor:
        """T of ``exp(P) Q`` up to P³, by Cayley's transform; ``Q w = 1`` stays."""
        eye = torch.eye(len(t), dtype=t.dtype, device=t.device)
        mean = t.mean(0)
        turned: Tensor = torch.linalg.solve(eye - step / 2, (eye + step / 2) @ (t - mean))
        return mean + turned


@dataclass(frozen=True)
class State:
    """E at one T, and its slope.

    Attributes:
        all_p: probabilities of all classes, [C, R].
        all_z: logits less their mean over samples, [C, R].
        classes: those that are weighed, [r].
        weight: W.
        dual: ``W US Q⁻¹/s``, [r', R].
        gap: E, [r, R].
    """

    all_p: Tensor
    all_z: Tensor
    classes: Tensor
    weight: Tensor
    dual: Tensor
    gap: Tensor

    @cached_property
    def p(self) -> Tensor:
        """Probabilities, [r, R]."""
        return self.all_p[self.classes]

    @cached_property
    def z(self) -> Tensor:
        """Logits less their mean over samples, [r, R]."""
        return self.all_z[self.classes]

    @cached_property
    def inner(self) -> Tensor:
        """``p_aᵀ z_b`` over all classes, [R, R]."""
        return self.all_p.T @ self.all_z

    @cached_property
    def residual(self) -> Tensor:
        """W E, [r', R]."""
        return self.weight @ self.gap

    def push(self, step: Tensor) -> Tensor:
        """W ∂E along P, [R, R] → [r', R]."""
        own = (self.inner * step).sum(1)
        out: Tensor = self.weight @ (self.p * (self.z @ step.T - own)) + self.dual @ step
        return out

    def pull(self, residual: Tensor) -> Tensor:
        """Its transpose, with P 1 = 0, [r', R] → [R, R]."""
        back = self.p * (self.weight.T @ residual)
        out = back.T @ self.z - back.sum(0)[:, None] * self.inner + self.dual.T @ residual
        return out - out.mean(1, keepdim=True)


@dataclass(frozen=True)
class Parts:
    """The normal equations on the parts of P by themselves.

    P is a common shift 1 uᵀ, a symmetric and an antisymmetric part.  To first order the symmetric
    part S meets ``2 H S``, H = W diag(p̄) Z, so that its normal matrix is that of a Lyapunov
    equation; the antisymmetric part is taken entry by entry.

    Attributes:
        values: of HᵀH, [R].
        vectors: the same, [R, R].
        lone: diagonal of the antisymmetric part, [R, R].
        shared: what a common shift meets besides.
    """

    values: Tensor
    vectors: Tensor
    lone: Tensor
    shared: Tensor

    @classmethod
    def of(cls, state: State) -> Parts:
        """At a state."""
        rank = state.z.shape[1]
        p = state.p.mean(1, keepdim=True)
        slope = state.weight @ (p * (state.z - state.inner.mean(0)))
        values, vectors = torch.linalg.eigh(slope.T @ slope)
        mean = state.dual.mean(1)
        pairs = state.p[:, :, None] * (state.z[:, None] - state.inner)
        own, dual = state.weight, state.dual - mean[:, None]
        if len(own) > PROBED:  # ‖Ω W g‖² ≈ ‖W g‖², near enough for a preconditioner
            generator = torch.Generator().manual_seed(1)
            draw = torch.randn(PROBED, len(own), generator=generator, dtype=torch.float64).to(p)
            draw = draw / PROBED**0.5
            own, dual = draw @ own, draw @ dual
        pairs = (own @ pairs.flatten(1)).reshape(-1, rank, rank) - dual[:, None]
        lone = pairs.square().sum(0)
        lone = (lone + lone.T) / 2
        tiny = FLOOR * float(lone.mean())
        return cls(values.clamp_min(0.0), vectors, lone + tiny, rank * mean.square().sum())

    def _map(self, matrix: Tensor, inverse: bool) -> Tensor:
        inner = matrix - matrix.mean(1, keepdim=True)
        shift = inner.mean(0, keepdim=True)
        inner = inner - shift
        half, turn = (inner + inner.T) / 2, (inner - inner.T) / 2
        sums = 2.0 * (self.values[:, None] + self.values) + FLOOR * self.values[-1]
        alone, along = self.lone, self.values + self.shared
        if inverse:
            sums, alone, along = 1.0 / sums, 1.0 / alone, 1.0 / along
        half = self.vectors @ ((self.vectors.T @ half @ self.vectors) * sums) @ self.vectors.T
        both = half + turn * alone
        both = both - both.mean(0, keepdim=True)
        out = both + ((shift @ self.vectors) * along) @ self.vectors.T
        return out - out.mean(1, keepdim=True)

    def times(self, step: Tensor) -> Tensor:
        """The damping's matrix."""
        return self._map(step, inverse=False)

    def solve(self, gradient: Tensor) -> Tensor:
        """Roughly its inverse."""
        return self._map(gradient, inverse=True)


def solve_turns(
    problem: Coupled, start: Tensor, deadline: float = inf, steps: int = STEPS
) -> Tensor | None:
    """T [R(R − 1)] from one start, to rounding, or None where the search ends elsewhere.

    Levenberg–Marquardt with conjugate gradients; a step may be stretched, and go on with a part of
    the one before, whichever costs least.  From samples at random the cost falls little for many
    steps while ever more of them come to their places, and then at once to nothing.

    Args:
        problem: the head; all of its labels equal.
        start: [R(R − 1)].
        deadline: of ``time.perf_counter``.
        steps: at most.
    """
    rank = problem.head.rank
    t = start.reshape(rank, rank - 1)
    equations = Turns.of(problem, t)
    cost = equations.cost(t)
    before = torch.zeros(rank, rank, dtype=t.dtype, device=t.device)
    damping, last = FIRST, 0
    parts: Parts | None = None
    for done in range(steps):
        if not cost < inf or time.perf_counter() > deadline:
            return None
        state = equations.at(t)
        if parts is None or done % FRESH == 0 or last:
            parts = Parts.of(state)
        near = cost < FOUND
        last += near
        step = _step(state, parts, 0.0 if near else damping, near)
        predicted = cost - float((state.residual + state.push(step)).square().sum())
        plain = trial_cost = inf
        trial, taken = t, step
        for stretch in (1.0,) if near else STRETCHES:
            for momentum in (0.0,) if near else MOMENTA:
                move = stretch * step + momentum * before
                place = equations.moved(t, move)
                fresh = equations.cost(place)
                plain = fresh if stretch == 1.0 and momentum == 0.0 else plain
                if fresh < trial_cost:
                    trial, trial_cost, taken = place, fresh, move
        gain = (cost - plain) / max(predicted, 1e-300)
        enough = trial_cost < HALF * cost
        if trial_cost < cost:
            t, cost, before = trial, trial_cost, taken
        else:
            before = torch.zeros_like(before)
        if near and (not enough or last >= LAST):
            return t.flatten()
        if gain > GOOD:
            damping = max(EASIER * damping, LEAST)
        elif not gain > BAD:
            damping *= HARDER
        if damping > MOST:
            return t.flatten() if cost < ROUNDED else None
    return None


def _step(state: State, parts: Parts, damping: float, last: bool) -> Tensor:
    """P of the damped Gauss–Newton step by preconditioned conjugate gradients."""
    most, relative = (LAST_PRODUCTS, LAST_RELATIVE) if last else (PRODUCTS, RELATIVE)
    left = -state.pull(state.residual)
    step = torch.zeros_like(left)
    ready = parts.solve(left)
    way, size = ready, float((left * ready).sum())
    enough = relative**2 * size
    for _ in range(most):
        if not size > enough:
            break
        ahead = state.pull(state.push(way))
        if damping > 0.0:
            ahead = ahead + damping * parts.times(way)
        share = size / max(float((way * ahead).sum()), 1e-300)
        step = step + share * way
        left = left - share * ahead
        ready = parts.solve(left)
        fresh = float((left * ready).sum())
        way, size = ready + fresh / size * way, fresh
    return step
