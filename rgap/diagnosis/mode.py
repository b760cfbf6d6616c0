"""Batch norm in train mode: an exact identity of the affine map before it holds in one mode only.

Let s be the input of a batch norm, ``y = γ (s − μ)/σ + β``, and s = W∗x + b the output of the layer
before, read by nothing else.  In eval mode μ and σ are constants, so for every channel f

    ``∂b_f = γ_f/σ_f ∂β_f``  and  ``⟨W_f, G_f⟩ = γ_f ∂γ_f + (μ_f − b_f) γ_f/σ_f ∂β_f``.

In train mode μ and σ² = v + ε are those of the batch: the loss does not change when s is shifted,
and hardly when W_f is scaled,

    ``∂b_f = 0``  and  ``⟨W_f, G_f⟩ = ε/(v_f + ε) γ_f ∂γ_f``,

v_f the variance over the batch, which is not known: from a share of the running one on, all are
taken to be possible.  All are linear in the update, hold for any batch and do not see a factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rgap.diagnosis.axes import by_filter
from rgap.diagnosis.evidence import Call, Evidence
from rgap.diagnosis.finding import MENDING, Finding, Kind

SAFETY = 100.0
LEAST = 1e-3  # variance of a batch, over the running one, in train mode
APART = 30.0  # times as much as the one mode must miss, for the other to be meant


@dataclass(frozen=True)
class Pair:
    """Both sides of the identity of one affine map before a batch norm.

    Attributes:
        name: of the affine map.
        norm: of the batch norm.
        sent: ∂b, or ⟨W_f, G_f⟩ where there is no bias, [F].
        evaluated: what eval mode makes of it, [F].
        trained: the end of what train mode makes of it, from 0 on, [F].
        still: the same if the batch has no variance at all, [F].
        size: of the terms of the sum, [F].
        rounding: standard error of the terms.
        of: tensors whose gradients these are.
    """

    name: str
    norm: str
    sent: Tensor
    evaluated: Tensor
    trained: Tensor
    still: Tensor
    size: float
    rounding: float
    of: tuple[str, ...]

    @property
    def eval_misfit(self) -> float:
        """Relative distance from eval mode."""
        return float((self.sent - self.evaluated).norm()) / self.size

    @property
    def train_misfit(self) -> float:
        """Relative distance from train mode."""
        return self._beyond(self.trained)

    @property
    def any_train_misfit(self) -> float:
        """The same, whatever the variance of the batch."""
        return self._beyond(self.still)

    def _beyond(self, end: Tensor) -> float:
        """Relative distance from what lies between 0 and an end."""
        nearest = torch.minimum(torch.maximum(self.sent, end.clamp_max(0)), end.clamp_min(0))
        return float((self.sent - nearest).norm()) / self.size


def pairs(evidence: Evidence) -> list[Pair]:
    """Every affine map whose output goes into a batch norm."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    affine = [c for c in evidence.calls if isinstance(c.module, kinds)]
    norms = [c for c in evidence.calls if isinstance(c.module, nn.modules.batchnorm._BatchNorm)]
    known = []
    for norm in norms:
        if not norm.module.affine or norm.module.running_mean is None:
            continue
        before = [c for c in affine if evidence.feeds(c.made, norm.given)]
        if not norm.alone or not all(c.read_once for c in before):
            continue  # a branch that goes past the norm sends to the map as well
        names = [c.weight_name for c in (*before, norm)] + [norm.bias_name]
        if len(before) == 1 and all(n in evidence.gradients for n in names):
            pair = _pair(evidence, before[0], norm)
            if pair is not None:
                known.append(pair)
    return known


def _pair(evidence: Evidence, affine: Call, norm: Call) -> Pair | None:
    gradients, module = evidence.gradients, norm.module
    layer = evidence.model.get_submodule(norm.name)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None and variance is not None
    gamma = layer.weight.detach().double()
    slope = gamma / (variance.double() + layer.eps).sqrt()
    shift, spread = gradients[f"{norm.name}.bias"], gradients[f"{norm.name}.weight"]
    noise = max(
        evidence.added(f"{n}.{p}") for n in (affine.name, norm.name) for p in ("weight", "bias")
    )
    bias = evidence.update.gradients.get(affine.bias_name)  # in train mode its rounding is left
    if bias is not None and bool(bias.any()):
        bias = bias.to(shift)
        evaluated = slope * shift
        size = float(evaluated.norm())
        if size == 0.0:
            return None
        # Positions add up, and may cancel.
        rounding = 16 * evidence.unit * float(affine.made[0, 0].numel()) ** 0.5
        added = noise * (len(bias) + float(slope.square().sum())) ** 0.5
        both = f"{affine.name}.bias", f"{norm.name}.bias"
        zero = torch.zeros_like(bias)
        rounding += added / size
        return Pair(affine.name, norm.name, bias, evaluated, zero, zero, size, rounding, both)
    weight = evidence.model.get_parameter(f"{affine.name}.weight").detach().double()
    own = evidence.model.get_submodule(affine.name).bias
    if own is not None:  # one that was not sent
        mean = mean - own.detach()  # type: ignore[operator]
    g = gradients[f"{affine.name}.weight"]
    terms = by_filter(affine.module, weight * g)
    parts = gamma * spread, mean.double() * slope * shift  # they may cancel
    evaluated = parts[0] + parts[1]
    size = float(terms.norm())
    if size == 0.0:
        return None
    count = terms.shape[1]
    added = noise * float(weight.norm() + gamma.norm() + (mean.double() * slope).norm())
    rounding = 4 * evidence.unit * (count**0.5 + float(parts[0].norm() + parts[1].norm()) / size)
    of = f"{affine.name}.weight", f"{norm.name}.weight", f"{norm.name}.bias"
    trained = layer.eps / (LEAST * variance.double() + layer.eps) * parts[0]
    rounding += added / size
    sent = terms.sum(1)
    return Pair(affine.name, norm.name, sent, evaluated, trained, parts[0], size, rounding, of)


def read(evidence: Evidence) -> list[Finding]:
    """Train mode where it explains the identities that eval mode contradicts."""
    tried = pairs(evidence)
    if tried:
        evidence.tested.update((Kind.MODE, Kind.WEIGHTS))
    return _trained(tried)


def _trained(tried: list[Pair]) -> list[Finding]:
    """Train mode of some that were taken to be in eval mode."""
    wrong = [p for p in tried if p.eval_misfit > tolerance(p)]
    train = [p for p in wrong if p.train_misfit * APART < p.eval_misfit or _zero(p)]
    if train and len(train) == len(wrong):
        worst = max(train, key=lambda p: p.eval_misfit / max(p.train_misfit, 1e-300))
        what = "⟨W, G⟩" if worst.train_misfit < 1 and worst.rounding else "∂b"
        said = (
            f"{len(train)} of {len(tried)} affine maps before a batch norm, '{worst.name}' first: "
            f"{what} is {worst.train_misfit:.1e} of its terms, 0 in train mode; eval mode misses "
            f"by {worst.eval_misfit:.1e}"
        )
        line = str(MENDING[Kind.MODE])
        strength = worst.eval_misfit / max(worst.train_misfit, worst.rounding, 1e-300)
        return [Finding(Kind.MODE, worst.train_misfit, said, line, strength)]
    return []


def as_declared(model: nn.Module, evidence: Evidence, findings: list[Finding]) -> list[Finding]:
    """The findings of trials in eval mode, for a model that was given in train mode.

    Train mode is then as declared, and eval mode a mistake.  Where no affine map before a batch
    norm tells the mode, the identities between layers say nothing: they are those of eval mode.

    Args:
        model: as it was given.
        evidence: of the trials.
        findings: of them.
    """
    modes = {n: m.training for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not any(modes.values()):
        return findings
    rest = [f for f in findings if f.kind is not Kind.MODE]
    tried = pairs(evidence)
    frozen = _trained([p for p in tried if not modes[p.norm]])
    if len(rest) < len(findings):
        return [*rest, *frozen]
    tried = [p for p in tried if modes[p.norm]]
    clear = [p for p in tried if p.any_train_misfit > max(APART * p.rounding, 1e-6)]
    evaluated = [p for p in clear if p.eval_misfit <= tolerance(p)]
    if evaluated:
        worst = max(evaluated, key=lambda p: p.train_misfit / max(p.rounding, 1e-300))
        said = (
            f"the model is in train mode, but '{worst.name}' before a batch norm satisfies eval "
            f"mode to {worst.eval_misfit:.1e} and misses train mode by {worst.train_misfit:.1e}"
        )
        strength = worst.train_misfit / max(worst.eval_misfit, worst.rounding, 1e-300)
        mending = "model.eval() before what reads the update, as the client had it"
        return [*rest, Finding(Kind.MODE, worst.eval_misfit, said, mending, strength)]
    told = (Kind.WEIGHTS, Kind.UNDECIDED)
    evidence.tested.difference_update((Kind.MODE, *told))
    evidence.unrun.append("the identities between layers: a batch norm in train mode mixes samples")
    return [f for f in rest if f.kind not in told]


def _zero(pair: Pair) -> bool:
    return pair.train_misfit < SAFETY * pair.rounding


def tolerance(pair: Pair) -> float:
    """Of its identities, relative."""
    return max(SAFETY * pair.rounding, 1e-6)
