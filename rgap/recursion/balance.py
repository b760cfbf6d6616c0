"""Whether the gradients of two neighbouring layers can be those of one cotangent.

A value alone at the end of a walk is as good as the one gradient that it follows from: that
gradient times 1.001 gives the value times 1.001, with the same error.  But what a layer makes,
``z_f`` of channel f, and the cotangent k there are the factors of two gradients at once:

- below, of the layer: ``Σ_p k_p z_p = ⟨W_f, G_f⟩ + b_f ∂b_f`` of its own weights and gradients;
- above a batch norm in eval mode, ``y = γ (z − μ)/σ + β`` with ``σ = √(v + ε)`` and cotangent
  ``h``, ``k = γ h/σ``: ``Σ k z = γ Σ h (z − μ)/σ + (γ μ/σ) Σ h = γ ∂γ + (γ μ/σ) ∂β``;
- through a positively homogeneous step, ``φ'(y) y = φ(y)``, and an average or a maximum of a
  channel, the sum stays what it is; a layer that reads ``u_c`` has it as ``⟨W_·c, G_·c⟩``, and
  several layers that read it have it together.

Values that are known say how far rounding and noise of the gradients let two such sums differ.

Source: the conservation law of Du, Hu, Lee, "Algorithmic regularization in learning deep
homogeneous models" (NeurIPS 2018), there along a gradient flow, here of a single gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rgap.limits import SAFETY
from rgap.network.activations import Activation
from rgap.network.affine import Affine
from rgap.network.flow import Flow
from rgap.network.pooling import LinearMap, MaxPool
from rgap.network.reshape import Reshape
from rgap.network.scaling import BatchNorm
from rgap.precision import Estimate, Precision

__all__ = ["Unbalanced", "disagreement_of_gradients"]

LARGE = 2**18  # entries of a fully connected layer of which five copies in float64 are not made
ROUNDED = 4.0  # operations on a scale γ/σ, each rounded, which all terms of a channel share


@dataclass(frozen=True)
class Unbalanced:
    """A layer whose gradient is not that of the cotangent of those above it.

    Attributes:
        layer: its name.
        share: by how many standard errors.
        reason: the equation and the numbers.
    """

    layer: str
    share: float
    reason: str


@dataclass(frozen=True)
class _Sum:
    """``Σ_p k_p z_p`` of every channel as gradients have it.

    Attributes:
        value: [C].
        variance: of its rounding and noise, [C].
        words: the formula and the layers.
    """

    value: Tensor
    variance: Tensor
    words: str


def disagreement_of_gradients(
    flow: Flow,
    known: Mapping[int, Estimate],
    cotangents: Mapping[int, Estimate],
    gradients: Mapping[str, Tensor],
    precision: Precision,
) -> Unbalanced | None:
    """The layer whose gradient misses that of the cotangents above it most, if errors do not say.

    Args:
        flow: the network.
        known: values [B, *shape] by place.
        cotangents: ∂L/∂value by place, as far as they are known.
        gradients: by parameter name, float64.
        precision: of the update.
    """
    sums = _Sums(flow, cotangents, gradients, precision)
    found = list[Unbalanced]()
    for place, value in known.items():
        for user in flow.users(place):
            below = sums.of_layer(user, value.value)
            if below is None:
                continue
            above = sums.above(user, flow.nodes[user].forward([value.value]))
            if above is None:
                continue
            gap = (below.value - above.value).abs()
            variance = below.variance + above.variance + sums.rounded(user, value.value)
            share = gap / variance.sqrt().clamp_min(1e-300)
            worst = int(share.argmax())
            size = max(float(below.value[worst].abs()), float(above.value[worst].abs()), 1e-300)
            reason = (
                f"{below.words} and {above.words} are one number, and in channel {worst} differ by "
                f"{float(gap[worst]) / size:.1e} of it, {float(share[worst]):.1e} standard errors: "
                "the gradient of one of them was changed, or is of other weights or statistics"
            )
            found.append(Unbalanced(flow.nodes[user].name, float(share[worst]), reason))
    worst_of_all = max(found, key=lambda one: one.share, default=None)
    return None if worst_of_all is None or worst_of_all.share <= SAFETY else worst_of_all


class _Sums:
    """The sums of one update."""

    def __init__(
        self,
        flow: Flow,
        cotangents: Mapping[int, Estimate],
        gradients: Mapping[str, Tensor],
        precision: Precision,
    ) -> None:
        self.flow, self.cotangents = flow, cotangents
        self.gradients, self.precision = gradients, precision

    def sent(self, *names: str | None) -> bool:
        """True if gradients of these, of those that exist, were sent."""
        return all(self.precision.sent(n) and n in self.gradients for n in names if n is not None)

    def of_layer(self, place: int, u: Tensor) -> _Sum | None:
        """``⟨W_f, G_f⟩ + b_f ∂b_f`` of a layer that reads u."""
        node, k = self.flow.nodes[place], self.cotangents.get(place)
        affine = node.link
        if not isinstance(affine, Affine) or node.shared or k is None:
            return None
        if _large(affine) or not self.sent(affine.weight_name, affine.bias_name):
            return None
        value = (affine.weight * affine.sent(self.gradients)).flatten(1).sum(1)
        variance = self.spread(affine, u, k.value).flatten(1).sum(1)
        words = f"⟨W, ∂W⟩ of '{affine.name}'"
        if affine.bias is not None and affine.bias_name is not None:
            terms = k.value.square().transpose(0, 1).flatten(1).sum(1)
            value = value + affine.bias * self.gradients[affine.bias_name]
            std = self.precision.update_std(affine.bias_name, terms)
            variance = variance + (affine.bias * std).square()
            words = f"⟨W, ∂W⟩ + b ∂b of '{affine.name}'"
        return _Sum(value, variance, words)

    def spread(self, affine: Affine, u: Tensor, k: Tensor) -> Tensor:
        """Variances of the terms of ``⟨W, G⟩``, in the shape of W."""
        squares = affine.weight_gradient(self.precision.squares(u), k.square())
        total = affine.sent(self.gradients)
        std = self.precision.update_std(affine.weight_name, squares, total)
        return (affine.weight * std).square()

    def rounded(self, place: int, u: Tensor) -> Tensor:
        """Variance by the rounding of what the layer makes, and of the cotangent that it gets."""
        affine, k = self.flow.nodes[place].link, self.cotangents[place].value
        assert isinstance(affine, Affine)
        z, unit = affine.forward(u), self.precision.unit
        squares = affine.linear_of_squares(self.precision.squares(u)) + z.square()
        made = self.precision.sum_std(squares, affine.weight[0].numel())
        own = made.square() * k.square()
        terms = (k * z).transpose(0, 1).flatten(1)
        return own.transpose(0, 1).flatten(1).sum(1) + (unit * unit) * terms.square().sum(1)

    def above(self, place: int, z: Tensor) -> _Sum | None:
        """The sum of a value as the gradients above it have it, or None where none has.

        Args:
            place: of the value.
            z: the value, [B, *shape].
        """
        users = self.flow.users(place)
        links = [self.flow.nodes[user].link for user in users]
        if users and all(isinstance(link, Affine) for link in links):
            return self.of_readers(users, z)
        if len(users) != 1:
            return None
        [user], [link] = users, links
        if isinstance(link, BatchNorm):
            return self.of_norm(user, link, z)
        kept = isinstance(link, Reshape) or _keeps_channels(link, z)
        if not kept or (isinstance(link, Activation) and not link.homogeneous):
            return None
        found = self.above(user, self.flow.nodes[user].forward([z]))
        if found is None or len(found.value) % z.shape[1]:
            return None
        value, variance = (t.reshape(z.shape[1], -1).sum(1) for t in (found.value, found.variance))
        return _Sum(value, variance, found.words)

    def of_norm(self, place: int, norm: BatchNorm, z: Tensor) -> _Sum | None:
        """``γ ∂γ + (γ μ/σ) ∂β`` of a batch norm that reads z."""
        gamma, beta, k = norm.weight_name, norm.bias_name, self.cotangents.get(place)
        if gamma is None or beta is None or k is None or self.flow.nodes[place].shared:
            return None
        if not self.sent(gamma, beta):
            return None
        slope, centre = norm.scale.flatten(), norm.mean.flatten()
        weight = slope * norm.deviation.flatten()
        parts = weight * self.gradients[gamma], slope * centre * self.gradients[beta]
        squares = k.value.square()
        # A client subtracts μ from z before it multiplies: both round.
        terms = squares * (z.square() + norm.mean.square()) / norm.deviation.square()
        spread, shift = (t.transpose(0, 1).flatten(1).sum(1) for t in (terms, squares))
        own = (weight * self.precision.update_std(gamma, spread, self.gradients[gamma])).square()
        other = slope * centre * self.precision.update_std(beta, shift, self.gradients[beta])
        common = ROUNDED * self.precision.unit * (parts[0].abs() + parts[1].abs())
        variance = own + other.square() + common.square()
        return _Sum(parts[0] + parts[1], variance, f"γ ∂γ + γ μ/σ ∂β of '{norm.name}'")

    def of_readers(self, users: list[int], u: Tensor) -> _Sum | None:
        """``Σ_j ⟨W_j·c, G_j·c⟩`` of all layers that read u."""
        value, variance = u.new_zeros(u.shape[1]), u.new_zeros(u.shape[1])
        for user in users:
            node, k = self.flow.nodes[user], self.cotangents.get(user)
            affine = node.link
            if not isinstance(affine, Affine) or node.shared or k is None:
                return None
            grouped = affine.geometry is not None and affine.geometry.groups != 1
            if grouped or _large(affine) or not self.sent(affine.weight_name):
                return None
            terms = affine.weight * affine.sent(self.gradients)
            value = value + terms.transpose(0, 1).flatten(1).sum(1)
            spread = self.spread(affine, u, k.value)
            variance = variance + spread.transpose(0, 1).flatten(1).sum(1)
            # What the client makes of k on the way down rounds, and that is what it goes on with.
            squares = affine.adjoint_of_squares(k.value.square())
            made = self.precision.sum_std(squares, affine.weight[:, 0].numel()) * u
            variance = variance + made.square().transpose(0, 1).flatten(1).sum(1)
        names = " and ".join(f"'{self.flow.nodes[user].name}'" for user in users)
        return _Sum(value, variance, f"⟨W, ∂W⟩ of {names}")


def _large(affine: Affine) -> bool:
    return affine.geometry is None and affine.weight.numel() > LARGE


def _keeps_channels(link: object, z: Tensor) -> bool:
    """True for steps of each channel alone that keep ``Σ k z``."""
    if isinstance(link, Activation):
        return True
    pooled = isinstance(link, MaxPool) or (isinstance(link, LinearMap) and "avg" in link.kind)
    return pooled and z.ndim > 2
