"""A batch size that nobody states: what it leaves open of an answer.

Only what no other batch sends is certified.  How far apart may pictures be that are shown as one?

Samples x ± e with one label send, at a fully connected layer with input u and cotangent k,

    ½ Σ k(x ± e) u(x ± e)ᵀ = k̄ ūᵀ + (∂k e)(∂u e)ᵀ,

so beside the mixture of the batch that was found, ``K X``, stands a term of second order.  Between
the projections onto what is orthogonal to all k and all u of that batch nothing of first order is
left, no shift of a sample and no other weight:

    ‖(I − P_K) ∂k e‖ ‖(I − P_X) ∂u e‖ ≤ ‖(I − P_K) G (I − P_X)‖ + noise.

The right side is measured on the update, the left side on the model; the layer that sees most
decides.  Directions that no layer sees cannot be bounded by any update, so the directions are
drawn: noise, brightness, contrast and single entries, and the least visible of them, with a
margin, stands for the rest.  Where no layer sees them, as behind one logit of a piecewise linear
network, the distance is infinite.

Of a stated batch size the distance is bounded, to second order.  Copies r that are in truth at
x_r + δ_i send ``Σ_r A_r M_r B_rᵀ`` between the projections, with ``M_r = Σ_i δ_i δ_iᵀ``, and A_r
and B_r the projected ∂k and ∂u.  With A and B of all r side by side,

    max_i ‖δ_i‖² ≤ ‖M‖ ≤ ‖(I − P_K) G (I − P_X)‖ / (σ_min(A) σ_min(B)).
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, sqrt

import torch
from torch import Tensor, nn

from rgap.arithmetic.doubles import row_blocks
from rgap.inversion.batch_rows import BatchRows
from rgap.inversion.problem import Problem
from rgap.limits import ALIKE, LEANING, MERGED, ROUNDING_SHARE, USEFUL
from rgap.network.running import called
from rgap.network.watching import LayerCall, watched
from rgap.recovery import Candidate, Recovery, Status

__all__ = ["counted", "hidden", "merged"]

DRAWS = 8  # directions of each of four kinds
STEP = 1e-5  # of the largest entry: of a central difference
TOGETHER = 1 << 21  # entries of the data of one pass


def counted(problem: Problem, recovery: Recovery) -> Recovery:
    """The recovery without inputs that are certified only if the batch is one sample.

    Where the network is affine on the data, or has one logit, several samples send a gradient of
    rank one as well: without targets nothing says that there is one.

    Args:
        problem: with or without a stated batch size.
        recovery: its answer for the smallest batch.
    """
    if problem.stated is not None:
        return recovery
    if recovery.status is Status.INCONSISTENT:
        return _unrefuted(recovery)
    if not recovery.certified:
        return recovery
    if "targets" in recovery.certified and recovery.inputs is not None:
        return _uncounted(problem, recovery)
    return recovery.uncertified(
        labels=problem.labels,
        determined=None,
        partial=None,
        reason="the batch size is not stated, and several samples can send a gradient of rank one "
        f"too; for one sample write batch_size=1; then: {recovery.reason}",
    )


def _uncounted(problem: Problem, recovery: Recovery) -> Recovery:
    """A certified recovery of unknown batch size, with what may be merged in its bound.

    ``EXACT`` then says of every picture of the batch that it lies within ``error_bound`` of one
    that is returned and has its target.

    Args:
        problem: without a stated batch size.
        recovery: with inputs and targets certified.
    """
    inputs, labels, bound = recovery.inputs, recovery.labels, recovery.error_bound
    assert inputs is not None and labels is not None and bound is not None
    if problem.update.loss.targets != "index":
        return _open(
            problem,
            recovery,
            f"the batch size is not stated, and copies of a picture with different targets send "
            f"the same as one with their mean, which {problem.update.loss.name} admits too",
        )
    scale = 1.0 if recovery.scale is None else recovery.scale
    if not _whole(problem, len(inputs), scale):
        return _open(
            problem,
            recovery,
            "the batch size is not stated, and samples that the network is sure of send next to "
            "nothing: only under a mean, and at its own scale, would they be missed",
        )
    try:
        apart = hidden(problem, inputs, labels, scale)
    except (ValueError, TypeError, RuntimeError):  # a forward that takes this batch only
        apart = inf
    if bound + apart <= USEFUL * problem.width:
        return replace(
            recovery,
            error_bound=bound + apart,
            reason=f"the batch size is not stated: no picture of the batch is further than "
            f"{bound + apart:.1e} from one of these, {apart:.1e} of it because several may be "
            f"shown as one; if it has {len(inputs)}: {recovery.reason}",
        )
    far = "any distance" if apart == inf else f"up to {apart:.1g}"
    return _open(
        problem,
        recovery,
        f"the batch size is not stated, and several pictures with one target, {far} from each "
        "other, send the update of the one between them",
    )


def _whole(problem: Problem, rows: int, scale: float | Tensor) -> bool:
    """True if the update is a mean over as many samples as were found.

    A mean over n + 1 samples of which one sends nothing is n/(n + 1) times that over the others:
    its scale tells.  That of a sum does not.
    """
    factors = scale.tolist() if isinstance(scale, Tensor) else [scale]
    near = all(abs(factor - 1.0) < 0.5 / (rows + 1) for factor in factors)
    return problem.declared.reduction == "mean" and near


def _open(problem: Problem, recovery: Recovery, why: str) -> Recovery:
    """The recovery of a batch of unknown size as a candidate, which nothing certifies."""
    assert recovery.inputs is not None
    listed = Candidate(
        recovery.inputs, recovery.labels, recovery.residual or 0.0, recovery.multiplicities
    )
    return recovery.uncertified(
        labels=problem.labels,
        status=Status.UNDERDETERMINED,
        targets_error_bound=None,
        multiplicities=None,
        scale=None,
        candidates=(listed,),
        reason=f"{why}; state batch_size (for one sample batch_size=1) to have it certified; "
        f"then: {recovery.reason}",
    )


def _unrefuted(recovery: Recovery) -> Recovery:
    """A contradiction of the smallest batch, which refutes no larger one: not ``INCONSISTENT``."""
    return recovery.uncertified(
        status=Status.UNDERDETERMINED,
        reason="the batch size is not stated, and the smallest batch does not send this update; a "
        "larger one may: state batch_size (for one sample batch_size=1) to have it tested; "
        f"then: {recovery.reason}",
    )


def hidden(problem: Problem, inputs: Tensor, labels: Tensor, scale: float | Tensor = 1.0) -> float:
    """Largest difference in any entry that pictures shown as one may have from it.

    Args:
        problem: the update and its model.
        inputs: what was found, [R, *input_shape], float64.
        labels: their targets.
        scale: factor on the update, or one a sample.
    """
    step = _step(problem, inputs)
    base = _layers(problem, [inputs], labels)[0]
    seen = {name: _Seen(problem, name, u, k, scale) for name, (u, k) in base.items()}
    seen = {name: layer for name, layer in seen.items() if layer.noise < inf}
    if not seen:
        return inf
    moves = _directions(inputs, problem.precision.seed)
    pairs = [inputs + sign * step * move for move in moves for sign in (1, -1)]
    least = torch.full((len(inputs),), inf, dtype=torch.float64, device=inputs.device)
    together = 2 * max(1, TOGETHER // (2 * inputs.numel()))
    for first in range(0, len(pairs), together):
        made = _layers(problem, pairs[first : first + together], labels)
        for up, down in zip(made[::2], made[1::2], strict=True):
            visible = [layer.visible(up[name], down[name], step) for name, layer in seen.items()]
            least = least.minimum(torch.stack(visible).amax(0))
    smallest = float(least.min()) / LEANING
    return (MERGED / smallest) ** 0.5 if smallest > 0 else inf


def merged(
    problem: Problem,
    rows: BatchRows,
    inputs: Tensor,
    scale: float | Tensor,
    known: Tensor,
) -> float:
    """Bound on any entry's difference of the copies of a picture from it, of a stated batch size.

    Args:
        problem: the update and its model.
        rows: of the batch, some with copies.
        inputs: the pictures, [R, *input_shape], float64.
        scale: factor on the update.
        known: entries that it is asked for, [R, *input_shape].

    Returns:
        The bound; infinite where no layer sees all directions.
    """
    batch, labels = rows.expanded(inputs)
    first = (rows.copies.cumsum(0) - rows.copies).to(batch.device)
    several = rows.copies > 1
    asked = known[rows.picture[several]].flatten(1).any(0)
    if isinstance(scale, Tensor):
        return inf
    base = _layers(problem, [batch], labels)[0]
    seen = {n: _Seen(problem, n, u[first], k[first], scale) for n, (u, k) in base.items()}
    wanted = int(several.sum()) * int(asked.sum())
    room = {n: min(base[n][0].shape[1], base[n][1].shape[1]) - len(first) for n in seen}
    seen = {n: layer for n, layer in seen.items() if layer.noise < inf and room[n] >= wanted}
    if not seen:
        return inf
    step = _step(problem, inputs)
    units = torch.eye(len(asked), dtype=batch.dtype, device=batch.device)
    columns: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in seen}
    together = max(1, TOGETHER // (2 * batch.numel()))
    for some in torch.split(units, together):
        moves = step * some.reshape(-1, *inputs.shape[1:])
        pairs = [batch + sign * move for move in moves for sign in (1, -1)]
        made = _layers(problem, pairs, labels)
        for up, down in zip(made[::2], made[1::2], strict=True):
            for name, layer in seen.items():
                (u, k), (v, l_) = up[name], down[name]
                across, along = layer.second((u[first], k[first]), (v[first], l_[first]), step)
                columns[name].append((across[several], along[several]))
    bounds = []
    for name, layer in seen.items():
        least = 1.0
        for slopes, whole in zip(zip(*columns[name], strict=True), base[name][::-1], strict=True):
            table = torch.stack(slopes, -1)  # [pictures, m, entries]
            least *= _least(table, asked, ALIKE / step * float(whole[first].norm()))
        bounds.append(sqrt(layer.noise / least) if least > 0 else inf)
    return min(bounds)


def _least(table: Tensor, asked: Tensor, floor: float) -> float:
    """σ_min of the columns that are asked for beside what the others, as they like, add to them.

    Args:
        table: derivatives of every picture, [pictures, m, entries].
        asked: [entries].
        floor: rounding of one of its columns.
    """
    own, others = (table[..., mask].transpose(0, 1).flatten(1) for mask in (asked, ~asked))
    others = others[:, others.any(0)]
    if len(own) < own.shape[1] + others.shape[1]:
        return 0.0
    basis = torch.linalg.qr(others)[0]
    own = own - basis @ (basis.T @ own)
    return max(0.0, float(torch.linalg.svdvals(own)[-1]) - floor * sqrt(own.shape[1]))


def _step(problem: Problem, inputs: Tensor) -> float:
    """Of a difference, which pictures of no size of their own have as well."""
    return STEP * max(float(inputs.abs().max()), min(float(problem.width), 1.0))


class _Seen:
    """What one fully connected layer shows of samples that are not one."""

    def __init__(
        self, problem: Problem, name: str, u: Tensor, k: Tensor, scale: float | Tensor
    ) -> None:
        factor = scale.to(k)[:, None] if isinstance(scale, Tensor) else scale
        self.factor, self.floor = factor, (factor * k).norm(dim=1)
        self.left, self.right = torch.linalg.qr(k.T)[0], torch.linalg.qr(u.T)[0]
        self.noise = inf
        if k.shape[1] <= len(k) or u.shape[1] <= len(u):
            return  # the batch fills the layer: nothing is orthogonal to it
        gradient, precision = problem.gradients.original[name], problem.precision
        met, whole = 0.0, 0.0
        image = u.new_zeros(self.left.shape[1], u.shape[1])
        for rows, block in row_blocks(gradient, u):
            image += self.left[rows].T @ block
        for rows, block in row_blocks(gradient, u):
            rest = block - self.left[rows] @ image
            met += float((rest - rest @ self.right @ self.right.T).square().sum())
            whole += float(block.square().sum())
        added = precision.noise_norm(name, gradient) if precision.noisy else 0.0
        rounding = ROUNDING_SHARE * precision.unit * whole**0.5
        floor = precision.floor * gradient.numel() ** 0.5
        if whole > 0:
            self.noise = met**0.5 + added + rounding + floor

    def visible(
        self, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor], step: float
    ) -> Tensor:
        """Second-order term of each sample over the noise, per square of its largest entry, [R]."""
        across, along = self.second(up, down, step)
        size = across.norm(dim=1)
        # What a difference of k in float64 leaves of one that is none.
        size = torch.where(size > ALIKE / step * self.floor, size, 0.0)
        shown: Tensor = size * along.norm(dim=1) / self.noise
        return shown

    def second(
        self, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor], step: float
    ) -> tuple[Tensor, Tensor]:
        """∂k and ∂u of each sample beside all k and all u, from a central difference."""
        du, dk = (up[0] - down[0]) / (2 * step), self.factor * (up[1] - down[1]) / (2 * step)
        across, along = dk - dk @ self.left @ self.left.T, du - du @ self.right @ self.right.T
        return across, along


def _directions(inputs: Tensor, seed: int) -> list[Tensor]:
    """Differences of the largest entry 1: noise, brightness, contrast, single entries."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(DRAWS):
        plain = torch.randn(inputs.shape, generator=generator, dtype=torch.float64).to(inputs)
        even = torch.rand(inputs.shape, generator=generator, dtype=torch.float64).to(inputs)
        place = torch.randint(inputs[0].numel(), (len(inputs), 1), generator=generator)
        single = torch.zeros_like(inputs).flatten(1).scatter_(1, place.to(inputs.device), 1.0)
        middle = inputs - inputs.flatten(1).mean(1).reshape(-1, *([1] * (inputs.ndim - 1)))
        drawn += [plain, even, middle + 0.1 * middle.abs().amax() * plain,
                  single.reshape(inputs.shape)]  # fmt: skip
    shape = (-1, *([1] * (inputs.ndim - 1)))
    return [d / d.abs().flatten(1).amax(1).clamp_min(1e-300).reshape(shape) for d in drawn]


def _layers(
    problem: Problem, batches: list[Tensor], labels: Tensor
) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Input [R, n] and cotangent [R, m] of every fully connected layer, for each of the batches.

    By the name of its weight.  Layers that are called more than once, or position by position,
    are left out.
    """
    model, tensors, place = problem.model, {}, batches[0].device
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        real = tensor.is_floating_point()
        tensors[name] = tensor.detach().to(place, torch.float64 if real else tensor.dtype)
    rows, size = torch.cat(batches), len(batches[0])
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(call: LayerCall) -> None:
        calls.setdefault(call.name, []).append((call.given, call.made.requires_grad_()))

    weights = {f"{name}.weight".lstrip("."): m for name, m in model.named_modules()}
    layers = {n: m for n, m in weights.items() if isinstance(m, nn.Linear) and n in problem.sent}
    with torch.enable_grad(), watched(layers, leave=keep):
        outputs = called(model, rows.detach().requires_grad_(), tensors)
        loss = torch.stack(
            [problem.declared(own, labels.to(place)) for own in outputs.split(size)]
        ).sum()
    once = {
        name: kept[0]
        for name, kept in calls.items()
        if len(kept) == 1 and kept[0][0].ndim == 2 and len(kept[0][0]) == len(rows)
    }
    if not once:
        return [{} for _ in batches]
    grads = torch.autograd.grad(loss, [made for _, made in once.values()], materialize_grads=True)
    split = {
        name: list(zip(torch.split(given.detach(), size), torch.split(grad, size), strict=True))
        for (name, (given, _)), grad in zip(once.items(), grads, strict=True)
    }
    return [{name: own[i] for name, own in split.items()} for i in range(len(batches))]
