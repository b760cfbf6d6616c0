"""All samples of a mixture polished together on every gradient from their layer up.

In the row space of G the unknowns are the R² entries of Q.  Each sample touches a gradient only
through its own ``dk uᵀ + k duᵀ``, so that JᵀΣ⁻¹J is made of inner products between samples and is
formed and factored as a whole.  This uses what the separation leaves aside: every gradient at once,
each entry weighed by its error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from rgap.jacobian.batch_loss import BatchLoss
from rgap.jacobian.dense import Dense
from rgap.jacobian.layer import ParameterRows, pooled
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.weights import Fit, row_weights, update_noise
from rgap.network.chain import Chain
from rgap.separation.batch import Batch
from rgap.separation.mixture import Mixture
from rgap.solvers.positive import backsolve, cholesky_in_place, extremes, resolved

log = logging.getLogger(__name__)

LARGEST = 48  # samples up to which the normal matrix is formed: R⁴ entries
UNKNOWNS = 4096  # up to which it is formed with the cotangents at the head
FACTORS, CHORDS = 4, 4  # factorisations, and steps with each
DENSE = 2**19  # entries of J up to which a head alone is solved by QR
UNRESOLVED = 2**22  # the same where the normal matrix does not resolve a direction
SETTLED = 0.98  # decrease of the objective that ends the steps


@dataclass(frozen=True)
class Joint:
    """Q after the last step.

    Attributes:
        roots: Q, [R, R].
        errors: ensemble, [S, R, R]; None where rounding empties a direction.
        misfit: largest weighted rms residual of a parameter.
        worst: standard error of the direction that is fixed least.
        head: the loss, with the targets that the cotangents say where these were unknowns.
        free: the cotangents at the head were unknowns.
        kappa: their errors, [S, R, C].
    """

    roots: Tensor
    errors: Tensor | None
    misfit: float
    worst: float
    head: BatchLoss
    free: bool = False
    kappa: Tensor | None = None


def polish_jointly(
    batch: Batch,
    samples: Mixture,
    roots: Tensor,
    head: BatchLoss,
    across: Tensor,
    largest: int = LARGEST,
    dense: int = DENSE,
) -> Joint | None:
    """Gauss–Newton on Q; None where a layer above is not fully connected, or J is too large.

    Args:
        batch: the update.
        samples: the mixture.
        roots: Q, [R, R].
        head: targets and multiplicities.
        across: errors of the samples across the row space, [S, R, n]; noise for Q.
        largest: number of samples up to which it is worth its cost.
        dense: entries of J up to which a head alone is solved by QR.
    """
    chain, index = batch.chain, samples.stage.index
    if samples.rank > largest or any(s.affine.geometry for s in chain.stages[index:]):
        return None
    small = _reduced(chain, samples)
    sent = {n: batch.gradients[n] for n in _names(small)}
    first = small.stages[0].affine
    sent[first.weight_name] = samples.stage.affine.sent(batch.gradients) @ samples.right
    precision = batch.precision.projected(first.weight_name, samples.right)
    free = _frees(small, samples, head)
    point = Linearisation(small, roots, head)
    if free:
        point = point.moved(roots, point.kappa)
    dz = samples.stage.affine.linear(_flat(across, samples)).reshape(*across.shape[:2], -1)
    leak = point.jvp(None, dz_first=dz)
    kappa = head.known(point.outputs, precision)
    leaking = {n: pooled(rows.square()) for n, rows in leak.items()}
    at = Fit(point, sent, row_weights(point, kappa, precision, [leaking]), free)
    log.debug("joint polish of %d samples starts at misfit %.2g", samples.rank, at.misfit)
    solver: Dense | _Formed | None = None
    for _ in range(FACTORS):
        solver = _solver(at, dense)
        if solver is None:
            return None
        begin = at.objective
        for _ in range(CHORDS):
            before = at.objective
            if isinstance(solver, Dense):
                at = solver.stepped(at)[0]
            else:
                at = at.shortened(*solver.solve(at.left))[0]
            if at.objective > SETTLED * before:
                break
        if at.objective > SETTLED * begin:
            break
    assert solver is not None
    worst, point = solver.worst(), at.point
    log.debug("joint polish ends at misfit %.2g, worst direction %.2g", at.misfit, worst)
    if free:
        head = head.explained(point.outputs, point.kappa)
    if worst == float("inf"):
        return Joint(point.x, None, at.misfit, worst, head, free)
    drawn = replace(precision, seed=precision.seed + 1)
    noise = update_noise(point, kappa, drawn)
    errors, dkappa = solver.solve({n: noise[n] + leak[n] for n in noise})
    # It is off its own optimum by the step that is left: where no step settled that is long.
    length = errors.square().sum(2).mean(0).sqrt().clamp_min(1e-300)
    excess = (solver.solve(at.left)[0][0].norm(dim=1) / length).clamp_min(1.0)
    errors, worst = excess[:, None] * errors, worst * float(excess.max())
    dkappa = None if dkappa is None else excess[:, None] * dkappa
    return Joint(point.x, errors, at.misfit, worst, head, free, dkappa)


def _frees(small: Chain, samples: Mixture, head: BatchLoss) -> bool:
    """True if the cotangents at the head are unknowns beside Q.

    Targets that may be any real numbers leave them free; a head alone says nothing without them.
    """
    many = samples.rank * (samples.rank + prod(small.output_shape))
    return head.continuous and len(small.stages) > 1 and many <= UNKNOWNS


class _Formed:
    """JᵀΣ⁻¹J formed and factored.

    Where κ is free its entries come first, so that the last block of the factor is that of the
    Schur complement: what fixes x once κ is eliminated.
    """

    def __init__(
        self, point: Linearisation, weights: ParameterRows, lower: Tensor, free: bool
    ) -> None:
        self.point, self.weights, self.lower, self.free = point, weights, lower, free

    def solve(self, rows: ParameterRows) -> tuple[Tensor, Tensor | None]:
        """(JᵀΣ⁻¹J)⁻¹ JᵀΣ⁻¹ r, [S, R, n], and the part of κ [S, R, C] where that is free."""
        on_x, on_k = self.point.pulls({n: rows[n] * self.weights[n].square() for n in rows})
        if not self.free:
            return backsolve(self.lower, on_x.flatten(1).T).T.reshape(on_x.shape), None
        rhs = torch.cat([on_k.flatten(1), on_x.flatten(1)], 1)
        out = backsolve(self.lower, rhs.T).T
        size = on_k[0].numel()
        return out[:, size:].reshape(on_x.shape), out[:, :size].reshape(on_k.shape)

    def worst(self) -> float:
        """Standard error of the direction of x that is fixed least."""
        first = self.point.kappa.numel() if self.free else 0
        lower = self.lower[first:, first:]
        smallest = extremes(
            lambda v: lower @ (lower.T @ v), lambda v: backsolve(lower, v), len(lower), lower
        )[1]
        return smallest**-0.5 if smallest > 0 else float("inf")


def _solver(at: Fit, dense: int) -> Dense | _Formed | None:
    """JᵀΣ⁻¹J factored, or J itself where forming it loses what fixes a direction.

    None where J is too large for that: nothing says how well the direction is known.
    """
    point, weights, free = at.point, at.weights, at.free
    entries = Dense.entries(point, free)
    if len(point.nodes) == 1 and entries <= dense:
        return Dense(point, weights)
    matrix = normal_matrix(point, weights, free)
    lower = cholesky_in_place(matrix.clone())
    if lower is not None and resolved(matrix, lower):
        return _Formed(point, weights, lower, free)
    return Dense(point, weights, free) if entries <= max(dense, UNRESOLVED) else None


def normal_matrix(point: Linearisation, weights: ParameterRows, free: bool = False) -> Tensor:
    """JᵀΣ⁻¹J over the entries of x [R, n], for a chain of fully connected stages; [R·n, R·n].

    With k_b^r, u_b^r the directions that entry r of sample b causes, each stage adds
    ``⟨dk_b^r u_b + k_b du_b^r, dk_a^s u_a + k_a du_a^s⟩`` and the bias ``⟨dk_b^r, dk_a^s⟩``.

    Args:
        point: the update linearised, at a κ that is held.
        weights: 1/σ by parameter name.
        free: the entries of κ [R, C] are unknowns too, before those of x: [R·(C + n), R·(C + n)].
    """
    count, size = point.x.shape
    eye = torch.eye(size, dtype=point.x.dtype, device=point.x.device)
    on_x, on_k, extra = eye, None, 0
    if free:
        extra = point.kappa[0].numel()
        on_x = torch.cat([eye.new_zeros(extra, size), eye])
        on_k = torch.eye(extra + size, extra, dtype=eye.dtype, device=eye.device)
        size += extra
        on_k = on_k[:, None].expand(size, count, extra).reshape(size, *point.kappa.shape)
    tangents = point.tangents(on_x[:, None, :].expand(size, count, on_x.shape[1]), on_k)
    matrix = point.x.new_zeros(count, size, count, size)
    for node, (du, dk) in zip(point.nodes, tangents, strict=True):
        affine = node.stage.affine
        w = weights[affine.weight_name].flatten().square()
        k, u = node.k.flatten(1), node.u.flatten(1)
        du, dk = du.flatten(2), dk.flatten(2)  # [r, b, n], [r, b, m]
        kk, uu = (k * w) @ k.T, u @ u.T
        kd = torch.einsum("bm,sam->bas", k * w, dk)
        ud = torch.einsum("bn,san->bas", u, du)
        own = weights[affine.bias_name].flatten().square() if affine.bias_name else None
        flat_dk, flat_du = dk.transpose(0, 1), du.transpose(0, 1)  # [b, r, ...]
        for b in range(count):
            block, rest = matrix[b, :, b:], slice(b, None)  # [r, a, s], the blocks a >= b
            others = flat_dk[rest].flatten(0, 1).T
            block += (flat_dk[b] * w @ others).view_as(block) * uu[b, rest][:, None]
            block += kd[rest, b].T[:, :, None] * ud[b, rest][None]
            block += ud[rest, b].T[:, :, None] * kd[b, rest][None]
            along = flat_du[b] @ flat_du[rest].flatten(0, 1).T
            block += along.view_as(block) * kk[b, rest][:, None]
            if own is not None:
                block += (flat_dk[b] * own @ others).view_as(block)
    upper = matrix.reshape(count * size, count * size).triu_()
    whole = upper + upper.triu(1).T
    if not free:
        return whole
    entries = torch.arange(count * size, device=whole.device).reshape(count, size)
    order = torch.cat([entries[:, :extra].flatten(), entries[:, extra:].flatten()])
    return whole[order][:, order]


def _reduced(chain: Chain, samples: Mixture) -> Chain:
    """The stages from the mixture's up, as functions of q: the first weight is W V."""
    bottom = samples.stage
    affine = replace(
        bottom.affine, weight=bottom.affine.weight @ samples.right, in_shape=(samples.rank,)
    )
    stages = [replace(bottom, index=0, lead=(), affine=affine)]
    for stage in chain.stages[bottom.index + 1 :]:
        stages.append(replace(stage, index=stage.index - bottom.index))
    return replace(chain, stages=tuple(stages), barrier=None, input_shape=(samples.rank,))


def _names(chain: Chain) -> list[str]:
    both = [(stage.affine.weight_name, stage.affine.bias_name) for stage in chain.stages]
    return [name for names in both for name in names if name is not None]


def _flat(across: Tensor, samples: Mixture) -> Tensor:
    return across.reshape(-1, *samples.stage.affine.in_shape)
