"""One sample at the head, or at a lower layer: its features, and its cotangent from gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import svdvals

from rgap.arithmetic.doubles import row_blocks
from rgap.head.bias_attack import rank_one_residual
from rgap.head.features import features_from_bias, rank_one_tolerance
from rgap.inversion.problem import Problem
from rgap.jacobian.eliminated import Eliminated
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.weights import Fit, row_weights, update_noise
from rgap.limits import SAFETY, TRUSTED
from rgap.network.chain import Chain, Stage
from rgap.precision import UNKNOWN, Estimate, Precision, carried
from rgap.recursion.reached import Descent

__all__ = [
    "from_bias",
    "head_cotangent",
    "head_features",
    "head_gradients",
    "risen",
    "rounded_features",
    "top_features",
]


def from_bias(problem: Problem, stage: Stage) -> tuple[Estimate, Estimate, str]:
    """The input and the cotangent of a fully connected layer, ``x = Gᵀk/‖k‖²`` and ``k = ∂b``.

    Args:
        problem: the update.
        stage: the layer, whose bias gradient was sent and is not 0.

    Returns:
        x [1, *in_shape], k [1, m], and by how much G is not of rank one, in words, or "".
    """
    affine, precision = stage.affine, problem.precision
    weight, bias = head_gradients(stage, problem, problem.gradients.original)  # block by block
    assert bias is not None
    bias = bias.to(affine.weight)
    x, k = features_from_bias(affine, weight, bias, precision)
    misfit = rank_one_residual(weight, x.value[0], k.value[0])
    tolerance = rank_one_tolerance(affine, weight, bias, x, precision)
    if misfit > tolerance:
        return x, k, f"residual {misfit:.1e}, where rounding and noise explain {tolerance:.1e}"
    return x, k, ""


def head_cotangent(problem: Problem, descent: Descent) -> Estimate:
    """Cotangent k at the head [1, m]: known from the descent, or read off the head's own gradient.

    ``k = ∂b`` where a bias gradient was sent, else ``k = G x / ‖x‖²`` with x the input of the head,
    or where that is 0 the k that explains most of the gradients below.

    Args:
        problem: of one sample.
        descent: that reached the data, or whose data were completed.
    """
    last = len(problem.chain.stages) - 1
    if last in descent.cotangents:
        return descent.cotangents[last]
    stage = problem.chain.stages[-1]
    weight, bias = head_gradients(stage, problem)
    name = stage.affine.bias_name
    if bias is not None and name is not None:
        noise = problem.precision.normal(problem.precision.noise_std(name, bias))
        return Estimate(bias[None], noise[:, None])
    x = head_features(problem.chain, descent)
    if float(x.value.norm()) <= SAFETY * float(x.error.square().sum((1, 2)).mean().sqrt()):
        if not problem.chain.complete:
            k = x.value.new_zeros(1, *problem.chain.output_shape)
            return Estimate(k, k.new_full((len(x.error), *k.shape), UNKNOWN**0.5))
        return _from_below(problem, descent.require_data())
    scale = x.value[0].square().sum()
    k = weight @ x.value[0] / scale
    name, precision = stage.affine.weight_name, problem.precision
    variance = torch.cat(
        [
            ((g.abs() * precision.unit).square() + precision.noise_std(name, g, rows).square())
            @ x.value[0].square()
            for rows, g in row_blocks(weight, k)
        ]
    )
    error = precision.normal(variance.sqrt()) / scale  # rows of G are independent
    return Estimate(k[None], error[:, None])


def _from_below(problem: Problem, data: Estimate) -> Estimate:
    """The cotangent at the head that explains most of the whole update at the data, [1, m].

    All errors are unknown where the update does not tell its entries apart.
    """
    chain, precision = problem.chain, problem.precision
    kappa = data.value.new_zeros(1, *chain.output_shape)
    still = Estimate(kappa, kappa.new_zeros(len(data.error), *kappa.shape))
    point = Linearisation(chain, data.value, kappa)
    for _ in range(2):  # the rounding of the update is known with its κ
        weights = row_weights(point, still, precision)
        eliminated = Eliminated.of(point, weights)
        sizes = kappa.new_zeros(1) if eliminated is None else svdvals(eliminated.lower)
        if eliminated is None or not float(sizes[-1]) * TRUSTED > float(sizes[0]):
            return Estimate(kappa, still.error + UNKNOWN**0.5)
        kappa = kappa + eliminated.explained(Fit(point, problem.gradients, weights).left)[0][0]
        point = point.moved(data.value, kappa)
    assert eliminated is not None
    noise, moved = update_noise(point, still, precision), point.jvp(data.error)
    return Estimate(kappa, eliminated.explained({n: noise[n] + moved[n] for n in noise})[0])


def head_features(chain: Chain, descent: Descent) -> Estimate:
    """Input u of the last affine map: of the data, or above a barrier of what the descent knows.

    The stages above a barrier take in no data, only the features from which the descent began.

    Args:
        chain: the network.
        descent: that reached the data, or whose data were completed.
    """
    if chain.complete:
        return top_features(chain, descent.require_data())
    start = max(descent.features)
    return top_features(chain, descent.features[start], start)


def top_features(chain: Chain, known: Estimate, start: int | None = None) -> Estimate:
    """Input u of the last affine map, with the ensemble carried up.

    Args:
        chain: the network; complete where data are given.
        known: data x [B, *input_shape], or the input of the affine map of stage ``start``.
        start: that stage; None for data.
    """

    def rise(x: Tensor) -> Tensor:
        for op in chain.stages[0].lead if start is None else ():
            x = op.forward(x)
        begun = start or 0
        for stage, above in zip(chain.stages[begun:], chain.stages[begun + 1 :], strict=False):
            x = stage.affine.forward(x)
            for op in (*stage.tail, *above.lead):
                x = op.forward(x)
        return x

    return carried(rise, known)


def rounded_features(chain: Chain, known: Estimate, start: int, precision: Precision) -> Estimate:
    """The same with what every layer on the way up rounds: the input that the client computed.

    Args:
        chain: the network.
        known: the input of the affine map of stage ``start``.
        start: that stage.
        precision: of the client.
    """
    for stage, above in zip(chain.stages[start:], chain.stages[start + 1 :], strict=False):
        known = risen(stage, above, known, precision)
    return known


def risen(stage: Stage, above: Stage, u: Estimate, precision: Precision) -> Estimate:
    """The input of the next stage's affine map that one stage makes of its own, with its errors.

    Args:
        stage: of which u is the affine map's input.
        above: the next one.
        u: [B, *in_shape].
        precision: of the update.
    """
    squares = stage.affine.linear_of_squares(u.value.square())
    linear = torch.stack([stage.affine.linear(error) for error in u.error])
    z = Estimate(stage.affine.forward(u.value), linear)
    known = _rounded(z, precision.sum_std(squares), precision)
    for op in (*stage.tail, *above.lead):
        made = carried(op.forward, known)
        size = made.value.abs()
        if size.shape == known.value.shape:  # x − tanh x rounds as x does
            size = torch.maximum(size, known.value.abs() * (size != 0))
        known = _rounded(made, size * precision.unit + precision.floor, precision)
    return known


def _rounded(made: Estimate, std: Tensor, precision: Precision) -> Estimate:
    return replace(made, error=made.error + precision.normal(std, len(made.error)))


def head_gradients(
    stage: Stage, problem: Problem, gradients: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """∂L/∂W and ∂L/∂b of a stage; None for a bias that it does not have, or that was not sent.

    Args:
        stage: the layer.
        problem: the update.
        gradients: where they are taken from; by default in float64.
    """
    gradients = problem.gradients if gradients is None else gradients
    name = stage.affine.bias_name
    sent = name is not None and problem.precision.sent(name)
    return stage.affine.sent(gradients), gradients[name] if name and sent else None
