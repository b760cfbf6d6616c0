"""Several local steps, or a larger batch, declared as one gradient.

The average ``1/T Σ_t ∇L(θ_t)``, ``θ_{t+1} = θ_t − η ∇L(θ_t)``, of T steps on one sample still has
rank one at a layer that reads the data, ``Σ_t k_t xᵀ``, so that x is exact there; above it the
features move with the weights and the rank grows to T.  Two trials follow.

- Where the data are read off (B = 1), the training is repeated with T = 2, 3 … steps and the rate
  that fits best: one number for thousands of equations.
- Where only the head can be read, its rank is more than the batch allows: a larger batch would
  explain that as well, and is tried.

Steps on *other* samples each, ``1/T Σ_t ∇L(θ_t; X_t)``, have the rank of one step on all of them.
In a batch of one it is too large; in a larger one the samples of the first step satisfy all
equations and those of the later ones miss them by O(η).  They are excluded where every sample is
found and its cotangent fits (:mod:`rgap.diagnosis.scale`), or where none is
(:mod:`rgap.diagnosis.weights`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from rgap.diagnosis.evidence import Call, Evidence
from rgap.diagnosis.finding import MENDING, Finding, Kind
from rgap.diagnosis.noise import Floor
from rgap.diagnosis.samples import batch
from rgap.head.bias_attack import bias_attack, rank_one_residual
from rgap.remedy import trained
from rgap.update.local_training import LocalTraining, average
from rgap.update.losses import Loss
from rgap.update.targets import CLASSES

MOST = 6  # local steps that are tried
LARGEST = 2_000_000  # parameters of a network that is trained again
BETTER = 20.0  # times as well that several steps must fit
HOPE = 0.5  # of what one gradient leaves, that two steps must come below
CLOSER = 0.3  # of what fewer steps leave, that more must come below
FITS = 1e-2  # relative residual that they may leave
FIRST = 1e-4  # relative residual of rank one at the data, at most
KNOWN = 1e3  # roundings that one gradient may leave
SUBSTITUTIONS = 6  # of a real-valued target
OPTIONS = 10  # classes that are tried
SPECK = 1e-9  # of the largest singular value: what a difference of weights rounds lies below
FAINT = 0.05  # of the largest singular value: steps leave less beneath the batch, samples more


@dataclass(frozen=True)
class Training:
    """A client's training that explains an update.

    Attributes:
        steps: T.
        rate: η.
        scale: of the update over the average of the steps: T where it is their sum.
        residual: relative.
        single: relative residual of one gradient.
    """

    steps: int
    rate: float
    scale: float
    residual: float
    single: float

    @property
    def clear(self) -> bool:
        """True if the steps explain the update, and one gradient does not."""
        return self.residual <= FITS and self.residual * BETTER <= self.single


def data(evidence: Evidence) -> tuple[Call, Tensor] | None:
    """The input of a batch of one, read off the fully connected layer that reads it."""
    if not evidence.dense or (evidence.update.input_shape is None and evidence.outputs is None):
        return None
    call, weight, bias = evidence.dense[0]
    first = next(iter(evidence.calls))
    if not (call.first and evidence.feeds(first.given, call.given) and evidence.batch == 1):
        return None
    if bias is None or not bool((bias != 0).any()):
        return None
    x = bias_attack(weight, bias)
    if rank_one_residual(weight, x, bias) > FIRST:
        return None
    return call, x.reshape(1, *first.given.shape[1:])


def repeated(evidence: Evidence, x: Tensor) -> Training | None:
    """The training whose update comes nearest, if it comes nearer than one gradient."""
    loss, outputs = evidence.update.loss, evidence.outputs
    if outputs is None or outputs.ndim != 2 or not loss.known:
        return None
    if evidence.labels is None and (loss.targets == "probability" or loss.own):
        return None  # any target, or nobody knows which
    if sum(g.numel() for g in evidence.gradients.values()) > LARGEST:
        return None
    client = Client.of(evidence, x)
    best: Training | None = None
    for target in _targets(evidence, loss, outputs.shape[1]):
        evidence.tested.add(Kind.STEPS)
        single = client.misfit(target, None, 1)[0]
        if single < KNOWN * evidence.unit:
            return None  # one gradient explains the update
        if best is not None and single > 1.5 * best.single:
            continue
        for steps in range(2, MOST + 1):
            if evidence.late:
                return None
            training = _fitted(client, target, steps, single)
            if steps == 2 and training.residual > HOPE * single:
                break  # to first order in the rate all numbers of steps are alike
            if best is None or training.residual < CLOSER * best.residual:
                best = training
    return best


@dataclass(frozen=True)
class Client:
    """A client with known data that trains again.

    Attributes:
        model: float64.
        loss: the client's.
        data: x, [1, *input_shape].
        sent: the update, flattened.
        names: of its tensors, in order.
        head: place in ``sent`` of the head's ∂b, from which a real-valued target is read.
    """

    model: nn.Module
    loss: Loss
    data: Tensor
    sent: Tensor
    names: tuple[str, ...]
    head: slice | None

    @classmethod
    def of(cls, evidence: Evidence, x: Tensor) -> Client:
        """The client of an update."""
        model = copy.deepcopy(evidence.model).double().requires_grad_(False)
        gradients, head = evidence.gradients, evidence.head
        ends = pairwise(accumulate((g.numel() for g in gradients.values()), initial=0))
        places = {name: slice(*end) for name, end in zip(gradients, ends, strict=True)}
        bias = None if head is None or evidence.folded else places.get(head[0].bias_name)
        sent = torch.cat([g.flatten() for g in gradients.values()])
        return cls(model, evidence.update.loss, x, sent, tuple(gradients), bias)

    def update(self, target: Tensor, local: LocalTraining | None, steps: int) -> Tensor:
        """The average of ``steps`` gradients, flattened."""

        def gradient(current: dict[str, Tensor], _: slice) -> dict[str, Tensor]:
            leaves = {n: p.detach().requires_grad_() for n, p in current.items()}
            with torch.enable_grad():
                outputs = torch.func.functional_call(self.model, leaves, (self.data,))
                value = self.loss(outputs, target)
                slopes = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
            return dict(zip(leaves, slopes, strict=True))

        parameters = {n: p.detach() for n, p in self.model.named_parameters() if n in self.names}
        total = average(gradient, parameters, local, steps, 1)
        return torch.cat([total[n].flatten() for n in self.names])

    def misfit(self, target: Tensor, rate: float | None, steps: int) -> tuple[float, float]:
        """``‖u − a g‖/‖u‖`` at the best factor a, and a.

        A real-valued target is one more unknown, C numbers that enter ∂b of the head almost
        linearly, ``2/C (z − t)``: a few substitutions find them, and a stays 1.
        """
        local = None if rate is None else LocalTraining(rate)
        made = self.update(target, local, steps)
        if self.loss.targets != "value" or self.head is None:
            return _residual(self.sent, made)
        factor = 2.0 if self.loss.reduction == "sum" else 2.0 / target.numel()
        for _ in range(SUBSTITUTIONS):
            gap = (made - self.sent)[self.head]
            target = target + gap.reshape(target.shape) / factor
            made = self.update(target, local, steps)
            if not bool(made.isfinite().all()):
                return 1.0, 0.0
        return float((self.sent - made).norm() / self.sent.norm()), 1.0


def _targets(evidence: Evidence, loss: Loss, outputs: int) -> list[Tensor]:
    """Targets of the sample, the likeliest first: the class whose entry of ∂b is odd."""
    head, place = evidence.head, evidence.gradients[next(iter(evidence.gradients))].device
    bias = None if head is None else head[2]
    if bias is not None and bias.numel() != outputs:
        bias = None  # a slice or a pad stands behind it: its rows are no classes
    if evidence.labels is not None:
        return [evidence.labels.to(place)]
    if loss.targets == "value":
        return [torch.zeros(1, outputs, dtype=torch.float64, device=place)]
    if loss.name not in CLASSES:  # one 0/1 target an output
        if outputs == 1:
            return [torch.tensor([c], device=place) for c in range(2)]
        return [] if bias is None else [(bias < 0).double()[None]]
    if bias is None:
        return [torch.tensor([c], device=place) for c in range(min(outputs, OPTIONS))]
    order = bias.argsort()
    likely = dict.fromkeys((int(order[0]), int(order[-1])))
    return [torch.tensor([c], device=place) for c in likely]


def _residual(sent: Tensor, made: Tensor) -> tuple[float, float]:
    """‖u − a g‖/‖u‖ at the best factor a, and a."""
    energy = float(made.square().sum())
    if energy == 0.0 or not bool(made.isfinite().all()):
        return 1.0, 0.0
    scale = float(sent @ made) / energy
    return float((sent - scale * made).norm() / sent.norm()), scale


def _fitted(client: Client, target: Tensor, steps: int, single: float) -> Training:
    """The rate by a grid of its logarithm, then by Brent's method."""

    def misfit(exponent: float) -> float:
        return client.misfit(target, 10.0**exponent, steps)[0]

    grid = [0.5 * k for k in range(-10, 3)]
    values = [misfit(place) for place in grid]
    k = min(max(values.index(min(values)), 1), len(grid) - 2)
    best = minimize_scalar(
        misfit, bounds=(grid[k - 1], grid[k + 1]), method="bounded", options={"xatol": 1e-7}
    )
    rate = 10.0 ** float(best.x)
    residual, scale = client.misfit(target, rate, steps)
    return Training(steps, rate, scale, residual, single)


def read(evidence: Evidence, layers: list[Floor]) -> list[Finding]:
    """Steps by repeating them; else a rank that the batch does not allow."""
    if evidence.batch is None:
        return []
    given = data(evidence)
    best = None if given is None else repeated(evidence, given[1])
    if best is not None and best.clear:
        return [_trained_finding(best)]
    findings = _by_rank(evidence, layers)
    if best is not None and not findings:
        evidence.tested.discard(Kind.STEPS)  # nearer than one gradient, but not near
    return findings


def _trained_finding(fit: Training) -> Finding:
    said = (
        f"{fit.steps} steps at rate {fit.rate:.4g} from the data of the lowest layer give the "
        f"update up to {fit.residual:.1e}, one gradient up to {fit.single:.1e}"
    )
    factor = None
    if abs(fit.scale / fit.steps - 1) < 1e-2:
        said += "; they are summed, not averaged"
        factor = fit.steps
    line = str(trained(fit.steps, f"{fit.rate:.4g}", factor))
    strength = fit.single / max(fit.residual, 1e-16)
    return Finding(Kind.STEPS, float(fit.steps), said, line, strength)


def _by_rank(evidence: Evidence, layers: list[Floor]) -> list[Finding]:
    """A layer whose rank is more than the batch allows.

    Where it reads the data, T steps see no more samples than one; above, both are possible.
    """
    size = evidence.batch or 1
    if not layers:
        return []
    lowest, calls = layers[0], {c.name: c for c in evidence.calls}
    reads = calls[lowest.name].first
    if max(f.rank for f in layers) >= size:  # below, more samples or steps had room
        whole = size == 1 and bool(layers[reads:])  # steps on parts of a batch keep its rank
        evidence.tested.update((Kind.BATCH_SIZE, *((Kind.STEPS,) if whole else ())))
    high = [f for f in layers if f.rank > size and f.next > SPECK]
    over = [f for f in high if not f.flat]
    if not over:
        return []
    if any(f.flat and f.level > 20 * f.rounding for f in layers):
        worst = max(high, key=lambda f: f.rank)
        said = (
            f"the gradient of '{worst.name}' has rank {worst.rank}, a batch of {size} at most "
            f"{size}; the spectrum beneath is that of noise in some layers, and not in all"
        )
        kinds = (Kind.OPTIMISER, Kind.NOISE, Kind.STEPS, Kind.BATCH_SIZE)
        return [Finding.among(kinds, float(worst.rank), said, worst.level / worst.rounding)]
    worst = max(over, key=lambda f: f.rank)
    said = f"the gradient of '{worst.name}' has rank {worst.rank}, a batch of {size} at most {size}"
    strength = max(worst.level / worst.rounding, 1.0)
    count = lowest.rank if reads else worst.rank
    line = f"dataclasses.replace(update, batch_size={count})"
    larger = Finding(Kind.BATCH_SIZE, float(count), said, line, strength)
    told = None if reads and lowest not in over else batch(replace(evidence, batch=count))
    told = told if told is not None and told.clear else None
    if reads and lowest in over:
        said += f"; '{lowest.name}' reads the data, of which steps on one batch see no more"
        rivals = () if told else (Kind.STEPS, Kind.OPTIMISER)
        return [replace(larger, evidence=said, rivals=rivals)]
    if told is not None:
        return [replace(larger, evidence=f"{said}; {told.route}")]
    if reads:
        said += f"; '{lowest.name}' below has no more: the same data, other weights"
    least = max(2, -(-worst.rank // size))
    said += f"; {least} steps at least"
    several = Finding(Kind.STEPS, float(least), said, str(MENDING[Kind.STEPS]), strength)
    if reads:
        return [several]
    if worst.next > FAINT:
        return [replace(larger, rivals=(Kind.STEPS, Kind.OPTIMISER))]
    return [replace(several, rivals=(Kind.BATCH_SIZE, Kind.OPTIMISER))]
